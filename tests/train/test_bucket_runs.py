"""Whole runs with their workdir in a bucket: killed, gone on with, by several processes, and read by all commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fake_gcs import CUT, FakeGcs, Request, serving
from tests.train.jobs import PATIENCE, ROOT, job

pytest.importorskip("google.cloud.storage", reason="needs google-cloud-storage (the extra gcs)")
pytestmark = pytest.mark.slow

ADDRESS = "gs://bucket/run"
STEPS = 12
CONFIG: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 32,
    "log_every": 1,
    "eval_every": 6,
    "checkpoint_every": 2,
    "keep_checkpoints": 2,
    "eval.batch_size": 64,
    "model.size": "nano/2",
    "model.stack": "block + keep(0.5) + block",
}


@pytest.fixture
def gcs() -> Iterator[FakeGcs]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The records of a run on a file system."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    words = command("train", workdir, CONFIG)
    subprocess.run(words, cwd=ROOT, env=environment(None), check=True, capture_output=True)
    return facts((workdir / "metrics.jsonl").read_bytes())


def environment(gcs: FakeGcs | None) -> dict[str, str]:
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return found | (variables(gcs) if gcs else {})


def variables(gcs: FakeGcs) -> dict[str, str]:
    return {"STORAGE_EMULATOR_HOST": gcs.url}


def command(name: str, workdir: object, config: dict[str, Any], *flags: str) -> list[str]:
    words = [sys.executable, "-m", "tokenlab.cli", name, f"--workdir={workdir}", *flags]
    words += ["--config=configs/quickstart.py"] if name == "train" else []
    return words + [f"--config.{key}={value}" for key, value in config.items()]


def run(gcs: FakeGcs, name: str, *flags: str, config: dict[str, Any] | None = None, status: int = 0) -> str:
    words = command(name, ADDRESS, CONFIG if config is None else config, *flags)
    done = subprocess.run(
        words, cwd=ROOT, env=environment(gcs), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def facts(content: bytes) -> list[tuple[Any, ...]]:
    """Records without their times."""
    records = [json.loads(line) for line in content.splitlines()]
    return [tuple((k, v) for k, v in each.items() if not k.endswith("seconds")) for each in records]


def records(gcs: FakeGcs) -> list[tuple[Any, ...]]:
    return facts(gcs.objects["run/metrics.jsonl"].data)


def steps(gcs: FakeGcs) -> list[int]:
    """Of whole checkpoints."""
    names = gcs.names("run/checkpoints/")
    return sorted(int(name.split("/")[2]) for name in names if name.endswith("/manifest.md5"))


def killer(running: list[subprocess.Popen[bytes]], step: int, part: str) -> Any:
    """A fault that kills the process when it writes a certain object of the checkpoint of a step, which is not kept."""

    def kill(request: Request) -> str | None:
        if request.method == "POST" and f"checkpoints/{step}/" in request.name and part in request.name:
            for process in running:
                process.kill()
                process.wait()
            return CUT
        return None

    return kill


def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(
    gcs: FakeGcs, alone: list[tuple[Any, ...]]
) -> None:
    for step, part in ((4, "/d/"), (6, "manifest.md5"), (8, "commit_success.txt")):
        running: list[subprocess.Popen[bytes]] = []
        gcs.faults = [killer(running, step, part)]
        words = command("train", ADDRESS, CONFIG)
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(gcs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        running.append(process)
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == -signal.SIGKILL, said.decode()
        assert steps(gcs)[-1] == step - 2
        assert gcs.names(f"run/checkpoints/{step}/")
    gcs.faults = []
    said = run(gcs, "train")
    assert "is gone without giving gs://bucket/run free" in said and "going on from step 6" in said
    assert records(gcs) == alone
    assert steps(gcs) == [10, 12] or len(steps(gcs)) == 3  # and the best, where that is another
    assert "run/.lock" not in gcs.objects
    folders = {int(name.split("/")[2]) for name in gcs.names("run/checkpoints/")}
    assert folders == set(steps(gcs))


def test_sigterm_saves_and_gives_the_workdir_free(gcs: FakeGcs, alone: list[tuple[Any, ...]]) -> None:
    process = subprocess.Popen(
        command("train", ADDRESS, CONFIG), cwd=ROOT, env=environment(gcs), stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 143
    process.stdout.close()
    assert "run/.lock" not in gcs.objects
    begun = time.monotonic()
    said = run(gcs, "train")
    assert f"going on from step {steps_in(said)}" in said and "in use" not in said
    assert time.monotonic() - begun < PATIENCE and records(gcs) == alone


def steps_in(said: str) -> int:
    return int(said.partition("going on from step ")[2].split()[0])


def test_two_processes_write_one_checkpoint_and_one_goes_on(
    gcs: FakeGcs, alone: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    config = {**CONFIG, "mesh.fsdp": 2, "keep_checkpoints": 99}
    with job(tmp_path / "run", config, 2, 1, variables=variables(gcs), at=ADDRESS) as running:
        assert running.wait() == [0, 0], running.told()
    assert any("ocdbt.process_1" in name for name in gcs.names("run/checkpoints/6/"))
    assert_close(records(gcs), alone)
    for name in gcs.names("run/checkpoints/"):
        if int(name.split("/")[2]) > 6:  # as if both had been killed before
            del gcs.objects[name]
    assert "going on from step 6" in run(gcs, "train", config=config)
    assert_close(records(gcs), alone)


def assert_close(found: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]]) -> None:
    losses = [[(dict(each)["step"], dict(each)["loss"]) for each in group] for group in (found, wanted)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_every_command_reads_it(gcs: FakeGcs, tmp_path: Path) -> None:
    run(gcs, "train")
    report = tmp_path / "found.json"
    run(gcs, "evaluate", f"--json={report}", "--checkpoint=best", config={})
    assert 0 < json.loads(report.read_text())["accuracy"] <= 1
    assert gcs.objects["run/report.png"].data.startswith(b"\x89PNG")
    more = {**CONFIG, "steps": 1, "init_from.path": ADDRESS}
    words = command("train", tmp_path / "tuned", more)
    done = subprocess.run(words, cwd=ROOT, env=environment(gcs), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    other = {**CONFIG, "seed": 7}
    assert "gs://bucket/run belongs to a run of another configuration: seed" in run(
        gcs, "train", config=other, status=2
    )
    gcs.faults = [lambda request: 403]
    said = run(gcs, "train", config=other, status=2)
    assert "gs://bucket/run/checkpoints: access is denied (denied by the test); give the account" in said


def test_a_bucket_that_turns_away_in_the_middle_ends_the_run_and_spares_its_checkpoints(gcs: FakeGcs) -> None:
    run(gcs, "train", config={**CONFIG, "steps": 4})
    gcs.faults = [lambda request: 403 if request.method == "POST" and "/8/" in request.name else None]
    said = run(gcs, "train", status=2)
    assert "cannot save step 8 in gs://bucket/run/checkpoints: " in said and "whole checkpoints: " in said
    assert steps(gcs)[-1] == 6 and "run/.lock" not in gcs.objects
    gcs.faults = []
    assert "going on from step 6" in run(gcs, "train")
