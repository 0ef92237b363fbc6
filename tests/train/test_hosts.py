"""Real processes, on data x fsdp x expert: they train as one, go on elsewhere, and wait for none that is gone."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.jobs import assert_same, checkpoints, job, train, values

STEPS = 20
CONFIG: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 32,
    "log_every": 1,
    "eval_every": 8,
    "checkpoint_every": 2,
    "keep_checkpoints": 99,
    "eval.batch_size": 64,
    "model.size": "nano/2",
    "model.stack": "block(ffn=soft_moe(experts=4, slots=2)) + keep(0.5)",
    "optimizer.learning_rate": 1e-3,
    "mesh.fsdp": 2,
    "mesh.expert": 2,
}
ALONE = {**CONFIG, "mesh.fsdp": 1, "mesh.expert": 1}
TIMEOUT = 6
"""Seconds of silence until a process counts as gone."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process of eight devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    train(workdir, CONFIG, 1, 8)
    found, _ = values(workdir)
    assert [step for step, split in found if split == "train"] == list(range(1, STEPS + 1))
    return workdir


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four processes of two devices."""
    workdir = tmp_path_factory.mktemp("four") / "run"
    train(workdir, CONFIG, 4, 2)
    return workdir


def cut(workdir: Path, to: Path, step: int) -> Path:
    """A copy of a run as if it had been killed before its next checkpoint after `step`."""
    shutil.copytree(workdir, to)
    for later in checkpoints(to):
        if later > step:
            shutil.rmtree(to / "checkpoints" / str(later))
    return to


def test_four_processes_train_as_one(one: Path, four: Path) -> None:
    assert_same(four, one)


@pytest.mark.parametrize(("processes", "devices", "config"), [(1, 8, CONFIG), (2, 2, CONFIG), (1, 1, ALONE)])
def test_what_four_processes_saved_goes_on_elsewhere(
    four: Path, tmp_path: Path, processes: int, devices: int, config: dict[str, Any]
) -> None:
    said = train(cut(four, tmp_path / "run", 4), config, processes, devices)
    assert "going on from step 4" in said
    assert_same(tmp_path / "run", four)


def test_evaluation_by_two_processes_is_that_of_one(four: Path, tmp_path: Path) -> None:
    found = {}
    for processes, devices in ((1, 4), (2, 2)):
        report = tmp_path / f"{processes}.json"
        flags = (f"--json={report}", "--no-pictures", "--split=test")
        with job(four, {}, processes, devices, *flags, command="evaluate") as running:
            assert running.wait() == [0] * processes, running.told()
        found[processes] = json.loads(report.read_text())
    for name in ("loss", "accuracy", "examples", "ece"):
        assert found[2][name] == pytest.approx(found[1][name], rel=1e-5), name


def test_two_processes_that_are_killed_frozen_and_preempted_train_as_one_left_alone(
    one: Path, tmp_path: Path
) -> None:
    """They go on from what one process wrote."""
    newest = 2
    workdir = cut(one, tmp_path / "run", newest)
    for victim, number in (
        (1, signal.SIGKILL),
        (0, signal.SIGKILL),
        (1, signal.SIGSTOP),
        (1, signal.SIGTERM),
    ):
        with job(workdir, CONFIG, 2, 4, f"--host-timeout={TIMEOUT}") as running:
            running.until(f"step {newest + 3}/")
            running.kill(victim, number)
            begun = time.monotonic()
            if number == signal.SIGTERM:
                assert running.wait() == [143, 143], running.told()
                assert "is saved; the same command goes on from there" in running.output(0)
                assert not any("Traceback" in running.output(index) for index in (0, 1))
                newest = max(checkpoints(workdir))
                continue
            (status,) = running.wait(1 - victim)
            said, who = running.output(1 - victim), running.processes[victim].pid
            assert status == 75, said
            assert (
                f"tokenlab: process {1 - victim}: error: process {victim} (" in said and f"pid {who})" in said
            )
            assert ("has given no sign of life for" if victim else "the coordinator, is gone") in said
            assert time.monotonic() - begun < 60, said
            assert f"going on from step {newest}" in running.output(0)
        newest = max(checkpoints(workdir))
    with job(workdir, CONFIG, 2, 4) as running:
        assert running.wait() == [0, 0], running.told()
        assert f"going on from step {newest}" in running.output(0)
    assert_same(workdir, one)


def test_what_one_process_cannot_do_ends_all(tmp_path: Path) -> None:
    other = {**CONFIG, "seed": 1}
    with job(tmp_path / "run", {0: CONFIG, 1: other}, 2, 2) as running:
        assert running.wait() == [2, 2], running.told()
        for index in (0, 1):
            assert "was started with another configuration than process 0: seed" in running.output(index)


CRASH = """
from tokenlab.train import loop
prepare = loop.Trainer._prepare
def crash(self, batch):
    if self.step == 3:
        raise ValueError("what nobody foresaw")
    return prepare(self, batch)
loop.Trainer._prepare = crash
"""


def test_a_crash_of_one_is_told_to_the_others_at_once(tmp_path: Path) -> None:
    flags = ("--host-timeout=600", "--stuck-timeout=6000")
    with job(tmp_path / "run", ALONE, 2, 1, *flags, first={1: CRASH}) as running:
        running.until("step 1/")
        begun = time.monotonic()
        assert running.wait() == [1, 1], running.told()
        assert time.monotonic() - begun < 120, running.told()
        assert "stopped: what nobody foresaw" in running.output(0)
        assert "ValueError: what nobody foresaw" in running.output(1)
