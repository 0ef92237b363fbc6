"""SIGTERM and SIGINT as a request to stop between two steps, so that the state can be saved first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """While its `with` block runs, the first signal is only noted; a second one acts as it would have before.

    With several processes, which must all stop after the same step, SIGTERM to any of them is noted by jax's
    preemption service, and SIGINT acts as ever. Outside the main thread Python gives no signals away; there nothing
    is noted.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def requested(self, step: int) -> bool:
        """Whether to stop after `step` steps; to be asked after every step, with the same answer in every process."""
        if jax.process_count() > 1 and self._received is None:
            if multihost_utils.reached_preemption_sync_point(step):
                self._received = signal.SIGTERM
        return self._received is not None

    @property
    def name(self) -> str:
        """ "SIGTERM" or "SIGINT"; only when a stop was requested."""
        return signal.Signals(self._received or 0).name

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 128 + its number."""
        return 128 + (self._received or 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
