"""Who is gone, who is stuck, and who failed: verdicts on heartbeats, and the threads that carry them."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from tokenlab.sharding import watch
from tokenlab.sharding.watch import EXIT_LOST, Beat, Judge, Watch

NAMES = {0: "a, pid 10", 1: "b, pid 11", 2: "c, pid 12"}


def judge() -> Judge:
    return Judge(0, NAMES, host_timeout=10, stuck_timeout=100, now=0.0)


def beats(count: int, **others: Beat) -> dict[int, Beat]:
    return {number: others.get(f"p{number}", Beat(count, step=5)) for number in NAMES}


def test_all_well() -> None:
    found = judge()
    for second in range(1000):
        assert found.look(beats(second), float(second)) is None


def test_one_that_is_silent_is_named_with_its_last_word() -> None:
    found = judge()
    last = Beat(3, step=7, doing="waits for a batch")
    assert found.look(beats(1, p2=last), 1.0) is None
    assert found.look(beats(2, p2=last), 10.9) is None
    verdict = found.look(beats(3, p2=last), 12.0)
    assert verdict is not None and verdict.status == EXIT_LOST
    expected = (
        "process 2 (c, pid 12) has given no sign of life for 11 s; its last word: step 7, waits for a batch"
    )
    assert verdict.why.startswith(expected)
    assert "process 1" not in verdict.why and "from the last checkpoint" in verdict.why


def test_one_that_was_never_heard_of() -> None:
    verdict = judge().look({0: Beat(1), 1: Beat(1)}, 11.0)
    assert (
        verdict is not None
        and "process 2 (c, pid 12) has given no sign of life for 11 s and was never" in verdict.why
    )


def test_one_that_has_done_its_work_may_be_silent() -> None:
    found, done = judge(), Beat(3, ended="done")
    for second in range(50):
        assert found.look(beats(second, p1=done, p2=done), float(second)) is None
    assert found.all_ended()


def test_what_another_failed_of_is_said_as_it_said_it() -> None:
    failed = Beat(9, ended="failed", status=2, why="process 1 (b, pid 11) stopped: no space")
    verdict = judge().look(beats(1, p1=failed), 1.0)
    assert verdict == watch.Verdict("process 1 (b, pid 11) stopped: no space", 2)


def test_a_job_in_which_nobody_gets_further_names_who_is_behind() -> None:
    idle = {"p0": Beat(1, step=9, idle=101), "p1": Beat(1, step=9, idle=120)}
    found = judge()
    assert found.look(beats(1, **idle, p2=Beat(1, step=5, doing="waits for a batch", idle=99)), 1.0) is None
    verdict = found.look(beats(1, **idle, p2=Beat(1, step=5, doing="waits for a batch", idle=101)), 2.0)
    assert verdict is not None and verdict.status == EXIT_LOST
    assert "no process got further for 100 s" in verdict.why
    assert "at step 5: process 2 (c, pid 12): waits for a batch; the 2 others are further" in verdict.why


class Store:
    """The coordination service's store, in this process."""

    def __init__(self) -> None:
        self.content: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        assert allow_overwrite
        self.content[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [item for item in self.content.items() if item[0].startswith(key)]


class Ended(threading.Event):
    """In the place of the end of a process."""

    status = 0

    def __call__(self, status: int) -> None:
        self.status = status
        self.set()


def watches(count: int, host_timeout: float = 1.0, **options: Any) -> list[tuple[Watch, Ended]]:
    store, found = Store(), []
    for me in range(count):
        ended = Ended()
        made = Watch(
            store,
            me,
            NAMES,
            "localhost:1",
            host_timeout=host_timeout,
            stuck_timeout=100,
            end=ended,
            interval=0.02,
            **options,
        )
        made._speak_when_aborted = lambda: None  # the abort of this process is pytest's
        made.start()
        found.append((made, ended))
    return found


def test_the_end_of_one_ends_all_that_wait_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    (first, first_ended), (second, second_ended), (third, _) = watches(3)
    second.progress("in a train step", 4)
    third._stop.set()  # it dies
    assert first_ended.wait(20) and second_ended.wait(20)
    assert (first_ended.status, second_ended.status) == (EXIT_LOST, EXIT_LOST)
    said = capfd.readouterr().err
    for me in (0, 1):
        assert f"tokenlab: process {me}: error: process 2 (c, pid 12) has given no sign of life" in said
    first._close(), second._close()


def test_an_error_of_one_reaches_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    (first, first_ended), (second, _), (third, third_ended) = watches(3)
    second.fail("record 7 cannot be read", 2)
    assert first_ended.wait(20) and third_ended.wait(20)
    assert (first_ended.status, third_ended.status) == (2, 2)
    assert "process 1 (b, pid 11) stopped: record 7 cannot be read" in capfd.readouterr().err
    first._close(), third._close()


def test_a_crash_is_told_as_soon_as_all_others_have_shown_that_they_live() -> None:
    (first, first_ended), (second, _), (third, _) = watches(3, host_timeout=60.0)
    begun = time.monotonic()
    second.wait_for_verdict()
    assert time.monotonic() - begun < 20
    second.fail("list index out of range", 1)
    assert first_ended.wait(20) and first_ended.status == 1
    for each in (first, second, third):
        each._close()


def test_a_crash_waits_for_the_verdict_on_one_that_is_silent() -> None:
    (first, _), (second, _), (third, _) = watches(3, host_timeout=60.0)
    while second._judge.counts()[2] < 1:
        time.sleep(0.01)
    third._stop.set()  # it dies: of its heartbeats one may be under way
    third._thread.join()
    waits = threading.Thread(target=second.wait_for_verdict, daemon=True)
    waits.start()
    waits.join(1.0)
    assert waits.is_alive()
    first._close(), second._close()


def test_all_wait_for_the_last(capfd: pytest.CaptureFixture[str]) -> None:
    (first, _), (second, _), (third, _) = watches(3)
    threads = [threading.Thread(target=each.finish) for each in (first, second)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert all(thread.is_alive() for thread in threads)
    third.finish()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert capfd.readouterr().err == ""


def test_progress_of_a_process_that_is_alone_is_nothing() -> None:
    watch.progress("in a train step", 3)
