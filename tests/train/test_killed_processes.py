"""A real process that is told to stop: the same command goes on, and every quality field is the same bit for bit.

What is killed at any moment is in test_random_kills.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STACK = "block + skip(keep=0.5, by=random)(block) + block + keep(0.5, by=cls) + block"
OVERRIDES = {
    "steps": 120,
    "batch_size": 32,
    "log_every": 7,
    "eval_every": 40,
    "checkpoint_every": 25,
    "model.size": "nano/2",
    "model.stack": STACK,
    "model.drop_path": 0.1,
    "optimizer.ema": 0.99,
}


WORKERS = {"data.workers": 2, "data.prefetch": 2}


def command(workdir: Path, more: dict[str, int]) -> list[str]:
    changes = [f"--config.{key}={value}" for key, value in {**OVERRIDES, **more}.items()]
    return [
        sys.executable,
        "-m",
        "tokenlab.cli",
        "train",
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        *changes,
    ]


def start(workdir: Path, more: dict[str, int] | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.Popen(
        command(workdir, more or {}),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(process: subprocess.Popen[str], step: int) -> list[str]:
    """Lines up to the record of `step` or later."""
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        record = re.match(r"step (\d+)/", line)
        if record and int(record[1]) >= step:
            return lines
    raise AssertionError("ended before it was to be stopped:\n" + "\n".join(lines))


def finish(workdir: Path, more: dict[str, int] | None = None) -> str:
    process = start(workdir, more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def records(workdir: Path) -> list[dict]:
    """All but the times, which no two runs share."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(workdir)
    found = records(workdir)
    assert found[-1]["step"] == OVERRIDES["steps"]
    return found


@pytest.mark.slow
def test_sigterm_then_a_truncated_checkpoint(whole, tmp_path):
    """With workers, as a run without; neither process has anything to add at its end."""
    workdir = tmp_path / "run"
    process = start(workdir, WORKERS)
    until(process, 60)
    process.send_signal(signal.SIGTERM)
    stopped, _ = process.communicate(timeout=120)
    assert process.returncode == 143, stopped
    newest = max(
        (p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
    )
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    output = finish(workdir, WORKERS)
    assert f"checkpoint {newest.name}" in output.lower() or newest.name in output, output
    assert records(workdir) == whole
    aside = list(workdir.glob("metrics.aside-*.jsonl"))
    assert aside, "records past the restored step were not moved aside"
    for text in (stopped, output):
        assert "Traceback" not in text and "Warning" not in text and "leaked" not in text, text
