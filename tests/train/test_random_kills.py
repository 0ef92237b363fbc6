"""A run that is killed at twenty random points, told to stop, and damaged, loses nothing but the steps since its last
checkpoint; other faults.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenlab.train.checkpoint import load_params
from tokenlab.train.records import read_metrics, read_run

ROOT = Path(__file__).parents[2]
EVERY = 5
OVERRIDES: dict[str, Any] = {
    "steps": 240,
    "batch_size": 32,
    "log_every": EVERY,
    "eval_every": 2 * EVERY,
    "checkpoint_every": EVERY - 1,  # so that runs go on between two records
    "keep_checkpoints": 3,
    "eval.batch_size": 16,  # so that evaluation takes a while
    "model.size": "nano/2",
    "model.stack": "block + skip(keep=0.5, by=random)(block) + keep(0.5)",
    "model.drop_path": 0.1,
    "optimizer.ema": 0.99,
}
WORKERS = {"data.workers": 2, "data.prefetch": 2}
POINTS = 20
PATIENCE = 1500

pytestmark = pytest.mark.slow


def start(workdir: Path, said: Path, **more: Any) -> subprocess.Popen[bytes]:
    words = [
        sys.executable,
        "-m",
        "tokenlab.cli",
        "train",
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
    ]
    words += [f"--config.{key}={value}" for key, value in {**OVERRIDES, **more}.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    with said.open("wb") as file:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file)


def records(workdir: Path) -> list[dict[str, Any]]:
    """All but the times, which no two runs share."""
    return [{k: v for k, v in each.items() if not k.endswith("seconds")} for each in read_metrics(workdir)]


def last_step(said: Path) -> int:
    """Of the training records that a process has told of so far; 0 before the first."""
    found = re.findall(r"^step (\d+)/\d+  loss", said.read_text(), re.MULTILINE)
    return int(found[-1]) if found else 0


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def wait_for(process: subprocess.Popen[bytes], said: Path, what: Callable[[], Any]) -> Any:
    """The first true answer, looking every millisecond."""
    deadline = time.monotonic() + PATIENCE
    while not (found := what()):
        assert process.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.001)
    return found


def children(parent: int) -> list[int]:
    """The worker processes; Python's tracker of resources is none."""
    found = []
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        found += [int(number) for number in path.read_text().split()]
    return [each for each in found if b"resource_tracker" not in Path(f"/proc/{each}/cmdline").read_bytes()]


def kill(where: str, chance: random.Random, workdir: Path, said: Path) -> None:
    """Starts the run and kills a process of it."""
    process = start(workdir, said, **(WORKERS if where == "worker" else {}))
    first = wait_for(process, said, lambda: last_step(said))
    later = first + EVERY * chance.randint(0, 2)
    wait_for(process, said, lambda: last_step(said) >= later)
    victim = process.pid
    if where == "worker":
        victim = chance.choice(children(process.pid))
    elif where == "checkpoint":
        half = "*.orbax-checkpoint-tmp*"
        wait_for(process, said, lambda: list((workdir / "checkpoints").glob(half)))
        time.sleep(chance.random() * 0.03)
    elif where == "evaluation":  # it follows the record of its step
        wait_for(process, said, lambda: last_step(said) > later and last_step(said) % (2 * EVERY) == 0)
        time.sleep(chance.random() * 0.03)
    else:
        time.sleep(chance.random() * 0.2)
    os.kill(victim, signal.SIGKILL)
    status = process.wait(PATIENCE)
    if where == "worker":
        assert status == 2 and "a worker that makes batches ended" in said.read_text(), said.read_text()
    else:
        assert status == -signal.SIGKILL


@pytest.mark.first
def test_twenty_random_kills(tmp_path: Path) -> None:
    """None of them leaves a state that cannot be read, and the run ends as one that nobody disturbed.

    Nor does one that it is told of, and a checkpoint that is damaged afterwards. With workers, as a run without.
    """
    chance = random.Random(20)
    places = ["worker", "checkpoint", "evaluation", "main"] * (POINTS // 4)
    chance.shuffle(places)
    workdir = tmp_path / "run"
    newest = 0
    for number, where in enumerate(places):
        said = tmp_path / f"said.{number}"
        kill(where, chance, workdir, said)
        told = said.read_text()
        assert ("going on from step" in told) == (newest > 0), told
        assert f"going on from step {newest}" in told or not newest, told
        before, newest = newest, checkpoints(workdir)[-1]
        assert newest >= before and newest >= last_step(said) - 2 * EVERY, f"{number}: {where}"
        assert load_params(workdir)[1]["step"] == newest  # whole: its checksums were read
        read_run(workdir)
        whole_lines = (workdir / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()
        assert {json.loads(line)["split"] for line in whole_lines} <= {"train", "validation"}
    stopped, last, undisturbed = (tmp_path / f"said.{name}" for name in ("stopped", "last", "whole"))
    process = start(workdir, stopped, **WORKERS)
    wait_for(process, stopped, lambda: last_step(stopped))
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM, stopped.read_text()
    *_, whole, second, newest = checkpoints(workdir)
    assert newest >= last_step(stopped) > whole
    damaged = (second, newest)
    for step in damaged:
        files = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    aside = set(workdir.glob("metrics.aside-*.jsonl"))
    assert start(workdir, last, **WORKERS).wait(PATIENCE) == 0, last.read_text()
    told = last.read_text()
    assert all(f"checkpoint {step} is damaged" in told for step in damaged), told
    assert f"going on from step {whole}" in told, told
    for text in (stopped.read_text(), told):
        assert "Traceback" not in text and "Warning" not in text and "leaked" not in text, text
    assert set(workdir.glob("metrics.aside-*.jsonl")) - aside, (
        "records past the restored step were not moved aside"
    )
    assert start(tmp_path / "whole", undisturbed).wait(PATIENCE) == 0, undisturbed.read_text()
    assert records(workdir) == records(tmp_path / "whole")
    others = [path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdecimal()]
    assert sorted(others) == sorted(f"{step}.damaged-1" for step in damaged)


def one_line(words: list[str], kib: int | None = None) -> str:
    """What a command that fails says, with the exit status of a mistake: one line of ours.

    With `kib` a file that grows past so many KiB cannot be written, as on a full disk.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # nearly all of the time would be compiling
    }
    command = [sys.executable, "-m", "tokenlab.cli", *words]
    if kib is not None:
        command = ["bash", "-c", f'ulimit -f {kib}; exec "$@"', "_", *command]
    found = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert found.returncode == 2, found.stderr
    (line,) = found.stderr.splitlines()
    assert line.startswith("tokenlab: error: ")
    return line


SMALL = [
    "--config=configs/quickstart.py",
    "--config.steps=4",
    "--config.batch_size=8",
    "--config.model.size=nano/2",
]
SMALL += ["--config.compilation_cache=False"]
BLOCK = "--config.model.stack=block"


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_with_room(tmp_path: Path) -> None:
    words = ["train", *SMALL, BLOCK, f"--workdir={tmp_path / 'run'}"]
    line = one_line(words, kib=8)
    assert "cannot save step 4" in line and "free space" in line and "whole checkpoints: none" in line
    assert (
        subprocess.run(
            [sys.executable, "-m", "tokenlab.cli", *words], cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}
        ).returncode
        == 0
    )
    assert checkpoints(tmp_path / "run") == [4] and records(tmp_path / "run")[-1]["step"] == 4


def test_a_workdir_that_cannot_be_written_is_one_line() -> None:
    line = one_line(["train", *SMALL, BLOCK, "--workdir=/proc/tokenlab"])  # also root makes no folder there
    assert (
        "cannot use /proc/tokenlab as workdir" in line and "expected a folder that can be written to" in line
    )


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "tokenlab.cli", "train", *SMALL, BLOCK, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert made.returncode == 0
    line = one_line(["train", *SMALL, f"--workdir={tmp_path / 'run'}", "--config.model.stack=block*2"])
    assert "belongs to a run of another configuration: model.stack" in line
    # And where the configuration was changed with it: what is in the file decides.
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "run", other)
    config = other / "config.json"
    config.write_text(config.read_text().replace('"block"', '"block*2"'))
    line = one_line(["train", *SMALL, f"--workdir={other}", "--config.model.stack=block*2"])
    assert "checkpoint 4 in" in line and "is of another model: " in line and "expected float32" in line
    wide = ["train", *SMALL, BLOCK, f"--workdir={tmp_path / 'wide'}", "--config.mesh.fsdp=3"]
    assert "mesh" in one_line(wide)
