"""Batches from threads and worker processes: the same as without them, and nobody is left behind.

What `Prefetch` does with one thread is tested with the pipeline (test_pipeline.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tokenlab.core.errors import DataError
from tokenlab.data.dataset import Dataset
from tokenlab.data.loader import Prefetch
from tokenlab.data.pipeline import TrainStream
from tokenlab.data.sources import digits

ROOT = Path(__file__).resolve().parents[2]


def stream() -> TrainStream:
    return TrainStream(
        Dataset(digits.build(digits.Config()), digits.Config(transform="rotate(10)")), "train", 8, seed=0
    )


def failing(step: int) -> int:
    if step == 3:
        raise DataError("record 7 of step 3 is torn")
    return step


def dying(step: int) -> int:
    if step == 2:
        os._exit(9)
    return step


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


class TestThreads:
    def test_same_batches_in_order(self) -> None:
        one = stream()
        with Prefetch(one.batch, 5, stop=25, depth=4, threads=3, put=lambda batch: batch) as batches:
            found = list(batches)
        assert len(found) == 20
        for step, batch in enumerate(found, start=5):
            np.testing.assert_array_equal(batch["image"], one.batch(step)["image"])

    def test_without_an_end_and_left_early(self) -> None:
        before = threading.active_count()
        with Prefetch(lambda step: step, 7, depth=3, threads=2) as numbers:
            assert [next(numbers) for _ in range(5)] == [7, 8, 9, 10, 11]
        assert list(numbers) == []
        for _ in range(100):
            if threading.active_count() <= before:
                break
            time.sleep(0.05)
        assert threading.active_count() <= before

    def test_an_error_comes_at_its_step(self) -> None:
        with Prefetch(failing, depth=4, threads=2) as numbers:
            assert [next(numbers) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(DataError, match="record 7 of step 3 is torn"):
                next(numbers)

    def test_none_to_make(self) -> None:
        with Prefetch(failing, 3, stop=3, depth=1, threads=2) as numbers:
            assert list(numbers) == []

    @pytest.mark.parametrize(
        "options",
        [{"threads": 0}, {"workers": -1}, {"threads": 2}, {"workers": 1}, {"workers": True, "depth": 1}],
    )
    def test_numbers_out_of_range(self, options: dict[str, int]) -> None:
        with pytest.raises(DataError, match="expected"):
            Prefetch(failing, **options)


class TestWorkers:
    def test_same_batches_an_error_and_nobody_left(self) -> None:
        one = stream()
        with Prefetch(one.batch, 3, stop=9, depth=2, workers=2) as batches:
            found = list(batches)
        assert len(found) == 6
        for step, batch in enumerate(found, start=3):
            np.testing.assert_array_equal(batch["image"], one.batch(step)["image"])
            np.testing.assert_array_equal(batch["label"], one.batch(step)["label"])
        assert multiprocessing.active_children() == []
        with Prefetch(failing, depth=2, workers=1) as numbers:
            assert [next(numbers) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(DataError, match="record 7 of step 3 is torn"):
                next(numbers)
        assert multiprocessing.active_children() == []

    def test_a_worker_that_dies_is_told(self) -> None:
        with (
            Prefetch(dying, depth=1, workers=1) as numbers,
            pytest.raises(DataError, match="a worker that makes"),
        ):
            for _ in range(4):
                next(numbers)
        assert multiprocessing.active_children() == []


SCRIPT = """
import multiprocessing, signal, sys, time
from tests.data.test_loader import stream
from tokenlab.data.loader import Prefetch

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests beside others ignores it
    with Prefetch(stream().batch, depth=2, workers=2) as batches:
        for _ in range(4):
            next(batches)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        while True:
            next(batches)
            time.sleep(0.01)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(
    tmp_path: Path, how: signal.Signals, request: pytest.FixtureRequest
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    request.addfinalizer(parent.kill)  # whatever fails below
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(alive(pid) for pid in workers)
    if how is signal.SIGINT:
        os.killpg(parent.pid, how)  # as a terminal does: to every process of the group
    else:
        parent.send_signal(how)
    _, errors = parent.communicate(timeout=180)
    for _ in range(100):
        if not any(alive(pid) for pid in workers):
            break
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)
    if how is signal.SIGINT:
        # One traceback, the parent's own.
        assert errors.count("Traceback (most recent call last)") == 1 and "KeyboardInterrupt" in errors
    else:
        # Python's own tracker of semaphores says what it cleaned up; nobody else speaks.
        assert "Traceback" not in errors and "Exception" not in errors
