"""Interleaved timing, with a clock that only the programs move."""

from __future__ import annotations

import gc

import pytest

from tokenlab.bench.timing import SHORTEST_SAMPLE, interleaved
from tokenlab.core.errors import ConfigError


class Clock:
    """Seconds that pass only when a program says so; remembers who ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[tuple[str, int]] = []
        self.collecting: set[bool] = set()

    def __call__(self) -> float:
        return self.now

    def program(self, name: str, seconds: float, slow: dict[int, float] | None = None):
        def run(times: int) -> None:
            number = sum(who == name for who, _ in self.ran)
            self.ran.append((name, times))
            self.collecting.add(gc.isenabled())
            self.now += times * seconds * (slow or {}).get(number, 1.0)

        return run


def test_rounds_begin_with_another_program_each_time() -> None:
    clock = Clock()
    runs = {name: clock.program(name, 1.0) for name in "abc"}
    interleaved(runs, 4, warmup=1, clock=clock)
    assert "".join(name for name, _ in clock.ran) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_short_steps_are_grouped_and_long_ones_are_not() -> None:
    clock = Clock()
    runs = {"short": clock.program("short", 0.003), "long": clock.program("long", 0.5)}
    seconds = interleaved(runs, 2, clock=clock)
    assert clock.ran[:4] == [("short", 1), ("short", 1), ("long", 1), ("long", 1)]
    assert set(clock.ran[4:]) == {("short", 7), ("long", 1)}  # 7 * 3 ms is the first beyond 20 ms
    assert 7 * 0.003 >= SHORTEST_SAMPLE > 6 * 0.003
    assert seconds["short"] == pytest.approx([0.003, 0.003])
    assert seconds["long"] == pytest.approx([0.5, 0.5])


def test_the_first_step_of_the_warm_up_does_not_decide_on_groups() -> None:
    clock = Clock()
    interleaved({"a": clock.program("a", 0.012, slow={0: 1000.0})}, 1, warmup=2, clock=clock)
    assert clock.ran[-1] == ("a", 2)


def test_garbage_is_not_collected_meanwhile_and_is_afterwards() -> None:
    clock = Clock()
    interleaved({"a": clock.program("a", 1.0)}, 2, clock=clock)
    assert clock.collecting == {False} and gc.isenabled()

    def fails(times: int) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        interleaved({"a": fails}, 1, clock=clock)
    assert gc.isenabled()
    gc.disable()
    try:
        interleaved({"a": clock.program("a", 1.0)}, 1, clock=clock)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(("count", "rounds", "warmup"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_there_must_be_something_to_time(count: int, rounds: int, warmup: int) -> None:
    clock = Clock()
    runs = {"a": clock.program("a", 1.0)} if count else {}
    with pytest.raises(ConfigError, match="expected at least 1 of each"):
        interleaved(runs, rounds, warmup=warmup, clock=clock)
    assert clock.ran == []
