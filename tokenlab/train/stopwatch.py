"""Seconds of training: the steps themselves, without evaluation, checkpoints and compilation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the time in which it runs.

    Args:
        seconds: where to go on from (a resumed run).
        now: a monotonic clock in seconds.
    """

    def __init__(self, seconds: float = 0.0, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._total = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._total if self._since is None else self._total + self._now() - self._since

    @contextmanager
    def running(self) -> Iterator[None]:
        """The time of the block counts."""
        self._since = self._now()
        try:
            yield
        finally:
            self._total, self._since = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside a `running` block: the time of this block does not count."""
        self._total, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = self._now()
