"""SIGTERM and SIGINT as a request to stop between two steps, so that the state can be saved first.

Of several processes all must stop after the same step. jax's preemption service sees to that: who gets SIGTERM tells
the coordination service, all processes say there how far they are, and the step after the furthest one is agreed on.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """While its `with` block runs, the first signal is only noted; a second one acts as it would have before.

    With several processes SIGTERM to any of them is noted by jax's preemption service, which has a handler of its own
    from the start of the job to its end; SIGINT is passed on to it. Outside the main thread Python gives no signals
    away; there nothing is noted.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._several = jax.process_count() > 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            handled = (signal.SIGINT,) if self._several else SIGNALS
            self._before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def requested(self, step: int) -> bool:
        """Whether to stop after `step` steps; to be asked after every step, with the same answer in every process."""
        if self._several and self._received is None and multihost_utils.reached_preemption_sync_point(step):
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
        self._restore()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # which all processes will be told of
        else:
            self._received = number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
