"""Which process of a job is gone, or stuck: heartbeats in the coordination service's store, and who reads them.

When a process dies, the others wait for it in their next collective operation: for ever, or until the connection
breaks, with a message that names nobody. So each process writes a heartbeat that says how far it is, and reads those of
all others. Who finds one silent says which, tells the others, and ends: nothing can be saved any more, and the state on
disk is good at every moment. Process 0 holds the store; that it is gone is seen by jax, which ends the process from C++
with SIGABRT.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tokenlab.sharding.roll_call import split

EXIT_LOST = 75
"""Exit status where a process of the job is gone or stuck (EX_TEMPFAIL): the same command goes on from the last
checkpoint."""

EXIT_STOPPED = 2
"""Exit status where another process ended with an error of the user's."""

FOLDER = "tokenlab/alive/"
"""Where heartbeats are in the store."""

LINGER = 30.0
"""Seconds that process 0, once it has failed, keeps the store for the others to read why."""


class Store(Protocol):
    """What is used of jax's coordination service."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


@dataclass(frozen=True)
class Beat:
    """A process's heartbeat.

    Attributes:
        count: of heartbeats so far.
        step: of training, done.
        doing: what, in words.
        idle: seconds since it last got further, by its own clock.
        ended: None while it works; "done", or "failed".
        status: exit status, once ended.
        why: of its failure, to be told as it is.
    """

    count: int
    step: int = 0
    doing: str = "starts"
    idle: float = 0.0
    ended: str | None = None
    status: int = 0
    why: str = ""


@dataclass(frozen=True)
class Verdict:
    """Why this process has to end, and with which status."""

    why: str
    status: int


class Judge:
    """Reads heartbeats, and knows who is gone or stuck.

    Args:
        me: this process.
        names: process id -> how errors name it.
        host_timeout: seconds without a heartbeat after which a process counts as gone.
        stuck_timeout: seconds in which no process gets further after which the job counts as stuck.
        now: seconds, of a clock that never goes back.
    """

    def __init__(
        self, me: int, names: Mapping[int, str], host_timeout: float, stuck_timeout: float, now: float
    ):
        self._me, self._names = me, names
        self._host_timeout, self._stuck_timeout = host_timeout, stuck_timeout
        self._seen = dict.fromkeys(names, (-1, now))
        self._beats: dict[int, Beat] = {}
        self._silent: set[int] = set()

    def look(self, beats: Mapping[int, Beat], now: float) -> Verdict | None:
        """A verdict on the newest heartbeats by process; None while all is well."""
        self._beats |= beats
        for number, beat in beats.items():
            if beat.count != self._seen[number][0]:
                self._seen[number] = (beat.count, now)
        for number, beat in sorted(beats.items()):
            if beat.ended == "failed" and number != self._me:
                return Verdict(beat.why, beat.status)
        silent = {
            number: now - at
            for number, (_, at) in self._seen.items()
            if number != self._me and now - at > self._host_timeout and not self._ended(number)
        }
        self._silent = set(silent)
        if silent:
            return Verdict(self._gone(silent), EXIT_LOST)
        at_work = {number: beat for number, beat in beats.items() if beat.ended is None}
        if len(beats) == len(self._names) and at_work:
            if min(beat.idle for beat in at_work.values()) > self._stuck_timeout:
                return Verdict(self._stuck(at_work), EXIT_LOST)
        return None

    def alive_since(self, counts: Mapping[int, int]) -> bool:
        """Whether every other process has ended by its own word, or beaten twice since there were these counts.

        Twice: one heartbeat may have been under way when its process died.
        """
        return all(
            self._ended(number) or count >= counts[number] + 2
            for number, count in self.counts().items()
            if number != self._me
        )

    def counts(self) -> dict[int, int]:
        """How many heartbeats of each process were seen."""
        return {number: count for number, (count, _) in self._seen.items()}

    def all_ended(self) -> bool:
        """Whether every other process has said that it ended, or is silent."""
        return all(
            self._ended(number) or number in self._silent for number in self._names if number != self._me
        )

    def _ended(self, number: int) -> bool:
        beat = self._beats.get(number)
        return beat is not None and beat.ended is not None

    def _name(self, number: int) -> str:
        return f"process {number} ({self._names[number]})"

    def _gone(self, silent: Mapping[int, float]) -> str:
        who = []
        for number, seconds in sorted(silent.items()):
            beat = self._beats.get(number)
            last = f"; its last word: step {beat.step}, {beat.doing}" if beat else " and was never heard of"
            who.append(f"{self._name(number)} has given no sign of life for {seconds:.0f} s{last}")
        return f"{'. '.join(who)}. {ON_AGAIN}"

    def _stuck(self, beats: Mapping[int, Beat]) -> str:
        last = min(beat.step for beat in beats.values())
        behind = {number: beat for number, beat in beats.items() if beat.step == last}
        who = ", ".join(f"{self._name(number)}: {beat.doing}" for number, beat in sorted(behind.items()))
        rest = len(beats) - len(behind)
        others = f"; the {rest} others are further" if rest else ""
        return (
            f"no process got further for {self._stuck_timeout:g} s. Behind all others, at step {last}: {who}{others}. "
            f"{ON_AGAIN}, and --stuck-timeout=SECONDS waits longer"
        )


ON_AGAIN = "The same command, for all processes, goes on from the last checkpoint"


class Watch:
    """The threads of one process that beat and look; between `start` and `finish` or `fail`.

    Args:
        store: of the coordination service.
        me: this process.
        names: process id -> how errors name it.
        coordinator: HOST:PORT of the store.
        host_timeout, stuck_timeout: see `Judge`.
        end: ends the process with a status; for tests.
        interval: seconds between heartbeats; None: 1, of many processes more (all read those of all), and at most a
            fifth of `host_timeout`.
    """

    def __init__(
        self,
        store: Store,
        me: int,
        names: Mapping[int, str],
        coordinator: str,
        *,
        host_timeout: float,
        stuck_timeout: float,
        end: Callable[[int], Any] = os._exit,
        interval: float | None = None,
    ):
        self._store, self._me, self._names, self._coordinator = store, me, names, coordinator
        self._host_timeout, self._end = host_timeout, end
        self._interval = min(max(1.0, len(names) / 100), host_timeout / 5) if interval is None else interval
        self._judge = Judge(me, names, host_timeout, stuck_timeout, time.monotonic())
        self._count, self._step, self._doing, self._moved = 0, 0, "starts", time.monotonic()
        self._ended: tuple[str | None, int, str] = (None, 0, "")
        self._posting = threading.Lock()  # so that no older heartbeat overwrites a newer one
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tokenlab-watch", daemon=True)
        self._handler: Any = None

    def start(self) -> None:
        """Begins to beat and to look."""
        self._post()
        if self._me:
            self._speak_when_aborted()
        self._thread.start()

    def progress(self, doing: str, step: int | None = None) -> None:
        """Notes that this process got further."""
        self._doing, self._moved = doing, time.monotonic()
        if step is not None:
            self._step = step

    def finish(self) -> None:
        """Says that this process has done its work, and waits for the others to say so; they still may fail."""
        self._ended = ("done", 0, "")
        with contextlib.suppress(Exception):  # of a store that is gone: the watch finds that too
            self._post()  # at once, as this thread may find in the next moment that all others are done
        while not self._judge.all_ended():
            time.sleep(self._interval)
        self._close()

    def fail(self, why: str, status: int) -> None:
        """Tells the others that this process ends with an error, and gives them time to read it."""
        self._ended = ("failed", status, f"process {self._me} ({self._names[self._me]}) stopped: {why}")
        with contextlib.suppress(Exception):
            self._post()
        if not self._me:
            deadline = time.monotonic() + min(LINGER, self._host_timeout)
            while not self._judge.all_ended() and time.monotonic() < deadline:
                time.sleep(self._interval)
        self._close()

    def wait_for_verdict(self) -> None:
        """Gives the watch time to find out who is gone, which ends this process. Returns as soon as nobody is."""
        before, deadline = self._judge.counts(), time.monotonic() + self._host_timeout + 3 * self._interval
        while time.monotonic() < deadline and not self._judge.alive_since(before):
            time.sleep(self._interval)

    def _close(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._handler is not None:
            _libc().signal(signal.SIGABRT, None)  # SIG_DFL
            self._handler = None

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._post()
                beats = self._read()
            except Exception as error:  # whatever the store raises: it is out of reach
                if not _answers(self._coordinator):
                    return self._leave(self._store_gone(error))
                continue
            verdict = self._judge.look(beats, time.monotonic())
            if verdict is not None and self._ended[0] != "failed":
                return self._leave(verdict)

    def _post(self) -> None:
        with self._posting:
            self._count += 1
            idle = time.monotonic() - self._moved
            beat = Beat(self._count, self._step, self._doing, idle, *self._ended)
            text = json.dumps(dataclasses.asdict(beat))
            self._store.key_value_set(f"{FOLDER}{self._me}", text, allow_overwrite=True)

    def _read(self) -> dict[int, Beat]:
        found = self._store.key_value_dir_get(FOLDER)
        return {int(key.rpartition("/")[2]): Beat(**json.loads(text)) for key, text in found}

    def _leave(self, verdict: Verdict) -> None:
        """Passes a verdict on, and ends this process."""
        _say(self._me, verdict.why)
        self._ended = ("failed", verdict.status, verdict.why)
        with contextlib.suppress(Exception):
            self._post()
            deadline = time.monotonic() + (0 if self._me else min(LINGER, self._host_timeout))
            while time.monotonic() < deadline and not self._judge.all_ended():
                time.sleep(self._interval)
                self._judge.look(self._read(), time.monotonic())
        self._end(verdict.status)

    def _store_gone(self, error: Exception | None) -> Verdict:
        reason = f": {' '.join(str(error).split())[:200]}" if error else ""
        return Verdict(
            f"process 0 ({self._names[0]}), the coordinator, is gone: nothing answers at {self._coordinator}{reason}. "
            f"{ON_AGAIN}",
            EXIT_LOST,
        )

    def _speak_when_aborted(self) -> None:
        """Has SIGABRT, with which jax ends a process whose coordinator is gone, say so in one line at the end.

        Python's own handlers would not run: abort() does not return to the interpreter.
        """
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        _libc().signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def _aborted(self, number: int) -> None:
        if self._stop.is_set() or _answers(self._coordinator):
            self._end(128 + number)
            return
        verdict = self._store_gone(None)
        _say(self._me, verdict.why)
        self._end(verdict.status)


_current: Watch | None = None


def use(watch: Watch | None) -> None:
    """Makes `watch` the one that `progress` speaks to; None: none, as in a job of one process."""
    global _current
    _current = watch


def progress(doing: str, step: int | None = None) -> None:
    """Notes that this process of a job got further: what it does now, and how many train steps are done."""
    if _current is not None:
        _current.progress(doing, step)


def _say(me: int, why: str) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, f"tokenlab: process {me}: error: {why}\n".encode())


def _answers(coordinator: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(split(coordinator), timeout=2):
        return True
    return False


def _libc() -> Any:
    found = ctypes.CDLL(None)
    found.signal.restype = ctypes.c_void_p
    found.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return found
