"""Timing of several programs in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from tokenlab.core.errors import ConfigError

SHORTEST_SAMPLE = 0.02
"""Seconds: steps that are shorter are timed several at once, as the clock and the start of a step take time too."""


Name = TypeVar("Name", bound=Hashable)


def interleaved(
    runs: Mapping[Name, Callable[[int], None]],
    rounds: int,
    *,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, list[float]]:
    """Seconds of one step of each program, once a round.

    Every round runs all programs once, and each round begins with another one. Garbage is not collected meanwhile.

    Args:
      runs: name -> a function that does so many steps and returns when they are done.
      rounds: at least 1.
      warmup: steps of each program before the first round, at least 1; the last one is timed, and says how many steps
        make a sample of `SHORTEST_SAMPLE`.
      clock: seconds, never going back.

    Returns:
      name -> seconds a step, [rounds].

    Raises:
      ConfigError: no programs, or rounds or warm-up steps below 1.
    """
    if not runs or rounds < 1 or warmup < 1:
        raise ConfigError(
            f"timing: got {len(runs)} programs, {rounds} rounds and {warmup} warm-up steps: "
            "expected at least 1 of each."
        )
    order = list(runs)
    seconds: dict[Name, list[float]] = {name: [] for name in order}
    with _without_collection():
        steps = {name: _steps_a_sample(run, warmup, clock) for name, run in runs.items()}
        for number in range(rounds):
            first = number % len(order)
            for name in order[first:] + order[:first]:
                started = clock()
                runs[name](steps[name])
                seconds[name].append((clock() - started) / steps[name])
    return seconds


def _steps_a_sample(run: Callable[[int], None], warmup: int, clock: Callable[[], float]) -> int:
    for _ in range(warmup):
        started = clock()
        run(1)
        length = clock() - started
    return max(1, math.ceil(SHORTEST_SAMPLE / max(length, 1e-6)))


@contextmanager
def _without_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
