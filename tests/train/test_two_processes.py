"""Two real processes with two devices each: they read what one process of four devices reads, and go on for it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DEVICES = 4
SIZE = 1257  # examples of the training split of the digits
BATCH = 32
STEPS = 8

PROGRAM = """
import json, sys
import jax

address, index, count, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if count > 1:
    jax.distributed.initialize(address, count, index)
from tokenlab import cli, train
from tokenlab.core.config import load
from tokenlab.train import experiment

code = cli.main(["train", *sys.argv[5:]])
config = load("configs/quickstart.py")
config.batch_size = BATCH
stream = experiment.build(config).stream
with open(f"{rows}.{index}", "w") as file:
    json.dump([stream.indices(step).tolist() for step in range(SIZE // BATCH + 2)], file)
sys.exit(code)
""".replace("BATCH", str(BATCH)).replace("SIZE", str(SIZE))


def train(workdir: Path, processes: int) -> np.ndarray:
    """Train, or go on; returns the examples that each process read: [processes, steps, rows]."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most of the time would be compiling
    overrides = {"steps": STEPS, "batch_size": BATCH, "log_every": 1, "eval_every": 4, "checkpoint_every": 4}
    overrides |= {"model.size": "nano/2", "model.stack": "block + keep(0.5, by=cls) + block"}
    changes = [f"--config.{key}={value}" for key, value in overrides.items()]
    rows = workdir.with_suffix(".rows")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(index), str(processes), str(rows)]
            + ["--config=configs/quickstart.py", f"--workdir={workdir}", *changes],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output
    return np.array([json.loads(Path(f"{rows}.{index}").read_text()) for index in range(processes)])


def values(workdir: Path) -> tuple[list[tuple[int, str]], np.ndarray]:
    """Which records there are; their losses, accuracies and gradient norms."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "accuracy", "grad_norm")
    found = np.array([[record.get(name, 0.0) for name in names] for record in records])
    return [(record["step"], record["split"]) for record in records], found


def without_last_checkpoint(workdir: Path, to: Path) -> Path:
    """A copy of a run as if it had been killed between its last two checkpoints."""
    shutil.copytree(workdir, to)
    shutil.rmtree(to / "checkpoints" / str(STEPS))
    return to


@pytest.mark.slow
def test_two_processes_read_train_and_go_on_as_one(tmp_path: Path) -> None:
    """They go on for one process; that one goes on for several is in test_hosts.py."""
    one = train(tmp_path / "one", 1)[0]
    first, second = train(without_last_checkpoint(tmp_path / "one", tmp_path / "one_then_two"), 2)
    # The rows of the two, one after the other, are the global batch of one; an epoch of them is the whole split.
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), one)
    for step in range(SIZE // BATCH):  # the next batch holds the end of one epoch and the begin of another
        assert not set(first[step]) & set(second[step])
    assert set(one.ravel()[:SIZE].tolist()) == set(range(SIZE))

    steps, expected = values(tmp_path / "one")
    assert [step for step, split in steps if split == "train"] == list(range(1, STEPS + 1))
    found_steps, found = values(tmp_path / "one_then_two")
    assert found_steps == steps
    np.testing.assert_allclose(found, expected, rtol=1e-5)
