"""Jobs of several real processes on this machine, for tests: `tokenlab train`, connected by gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
PATIENCE = 1500
"""Seconds a job of a dozen small steps may take on a machine that is very busy with others."""


class Job:
    """Processes that train together, each with its output in a file."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], outputs: list[Path]):
        self.processes, self._outputs = processes, outputs

    def output(self, index: int) -> str:
        return self._outputs[index].read_text()

    def until(self, text: str) -> None:
        """Waits for a text in the output of process 0."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.output(0):
            assert self.processes[0].poll() is None and time.monotonic() < deadline, self.told()
            time.sleep(0.05)

    def kill(self, index: int, number: int = signal.SIGKILL) -> None:
        self.processes[index].send_signal(number)

    def wait(self, index: int | None = None, seconds: float = PATIENCE) -> list[int]:
        """Exit statuses, of all or of one."""
        chosen = self.processes if index is None else [self.processes[index]]
        try:
            return [process.wait(seconds) for process in chosen]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still at work after {seconds} s:\n{self.told()}") from None

    def told(self) -> str:
        return "\n".join(f"-- process {i}\n{self.output(i)}" for i in range(len(self._outputs)))


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@contextmanager
def job(
    workdir: Path,
    overrides: Mapping[str, Any],
    processes: int,
    devices: int,
    *flags: str,
    command: str = "train",
    first: Mapping[int, str] | None = None,
    variables: Mapping[str, str] | None = None,
    at: str | None = None,
) -> Iterator[Job]:
    """Starts a job of `processes` x `devices`; what is still at work at the end is killed.

    Args:
        overrides: of the configuration, or a mapping of them by process id.
        first: Python that a process runs before its command, by process id.
        variables: of the environment.
        at: address of the workdir, where `workdir` is only what outputs are named after.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # nearly all of the time would be compiling
        **(variables or {}),
    }
    address, running, outputs = free_address(), [], []
    for index in range(processes):
        found = overrides.get(index, overrides)
        program = ["-m", "tokenlab.cli"]
        if first and index in first:
            program = ["-c", f"{first[index]}\nimport sys\nfrom tokenlab.cli import main\nsys.exit(main())"]
        words = [sys.executable, *program, command, f"--workdir={at or workdir}", *flags]
        words += [f"--config.{key}={value}" for key, value in found.items()]
        if command == "train":
            words += ["--config=configs/quickstart.py"]
        if processes > 1:
            words += [f"--coordinator={address}", f"--process-id={index}", f"--num-processes={processes}"]
        outputs.append(workdir.with_name(f"{workdir.name}.{time.monotonic_ns()}.{index}"))
        with outputs[-1].open("wb") as file:
            running.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file))
    try:
        yield Job(running, outputs)
    finally:
        for process in running:
            process.kill()
            process.wait()


def train(workdir: Path, overrides: Mapping[str, Any], processes: int, devices: int, *flags: str) -> str:
    """A job that runs to its end; returns what process 0 said."""
    with job(workdir, overrides, processes, devices, *flags) as running:
        assert running.wait() == [0] * processes, running.told()
        return running.output(0)


def values(workdir: Path) -> tuple[list[tuple[int, str]], np.ndarray]:
    """Which records there are; their losses, accuracies and gradient norms."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "accuracy", "grad_norm")
    found = np.array([[record.get(name, 0.0) for name in names] for record in records])
    return [(record["step"], record["split"]) for record in records], found


def assert_same(workdir: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """The same records, to a tolerance."""
    steps, found = values(workdir)
    expected_steps, wanted = values(expected)
    assert steps == expected_steps
    np.testing.assert_allclose(found, wanted, rtol=tolerance)


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
