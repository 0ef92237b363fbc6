"""What counts as seconds of training, on a clock that the test moves."""

from __future__ import annotations

from tokenlab.train.stopwatch import Stopwatch


def test_only_running_time_counts() -> None:
    now = [100.0]
    watch = Stopwatch(7.0, now=lambda: now[0])
    now[0] += 50
    assert watch.seconds == 7.0
    with watch.running():
        now[0] += 2
        assert watch.seconds == 9.0
        with watch.paused():
            now[0] += 30
            assert watch.seconds == 9.0
        now[0] += 1
    now[0] += 50
    assert watch.seconds == 10.0


def test_a_pause_that_ends_in_an_error_counts_nothing_either() -> None:
    now = [0.0]
    watch = Stopwatch(now=lambda: now[0])
    try:
        with watch.running():
            now[0] += 1
            with watch.paused():
                now[0] += 5
                raise ValueError
    except ValueError:
        pass
    assert watch.seconds == 1.0
