"""The right of one process to write to a folder of a bucket, where there are no locks.

The owner keeps an object `.lock` and writes it anew every few seconds, each time only where it is still the one that it
wrote before. Who wants the folder looks whether the object changes. When it has not changed for long enough by the
clock of the one who looks, its owner is gone, and it is replaced, again only where it is still the same: so no clocks
are compared, and of two who want it one gets it. An owner that was only asleep finds at its next write that the folder
is another's now.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenlab.core.bucket import Bucket, Changed
from tokenlab.core.errors import ConfigError, StorageError

NAME = ".lock"

BEAT = 10.0
"""Seconds between two signs of life."""

STALE = 60.0
"""Seconds without one after which an owner counts as gone."""


class TakenOver(StorageError):
    """The folder is another process's by now; what is in it is left as it is."""


class Lease:
    """Taken with `take`, given back with `release`; in between a thread keeps it.

    Args:
        bucket: the folder.
        tell: gets one line when the taking has to wait.
    """

    def __init__(self, bucket: Bucket, tell: Callable[[str], None] = print) -> None:
        self._bucket, self._tell = bucket, tell
        self._token, self._count = uuid.uuid4().hex, 0
        self._generation: int | None = None
        self._lost: str | None = None
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self) -> str | None:
        """Takes the folder, and waits up to `STALE` seconds for an owner that may be gone.

        Returns:
            A note where it was taken over.

        Raises:
            ConfigError: another process shows that it lives.
            StorageError: as `Bucket`.
        """
        while True:
            note, found = None, self._bucket.generation(NAME)
            holder = {} if found is None else self._holder()
            if holder.get("token") == self._token:  # written, and the answer was lost
                self._generation = found
            else:
                if found is not None:
                    if not _is_dead(holder):
                        self._wait(found, holder)
                    note = (
                        f"{_named(holder)} is gone without giving {self._bucket} free: going on in its place"
                    )
                try:
                    self._generation = self._bucket.write(NAME, self._content(), generation=found or 0)
                except Changed:  # another one was quicker, or the owner gave it free
                    continue
            self._thread.start()
            return note

    def check(self) -> None:
        """Raises TakenOver when the folder is another's by now; on return it was this process's a moment ago."""
        with self._writing:
            self._beat()
        self.tell_if_lost()

    def tell_if_lost(self) -> None:
        """Raises TakenOver when the thread has found that the folder is another's; asks nobody."""
        if self._lost is not None:
            raise TakenOver(
                f"{self._bucket} was taken over by {self._lost}, as this process had shown no sign of life: it ends, "
                "and leaves the run to the other."
            )

    def release(self) -> None:
        """Gives the folder free."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._generation is not None and self._lost is None:
            with contextlib.suppress(Changed, StorageError):  # it will count as gone
                self._bucket.delete(NAME, generation=self._generation)
            self._generation = None

    def _content(self) -> bytes:
        self._count += 1
        said = {"process": os.getpid(), "host": socket.gethostname(), "machine": _machine()}
        return json.dumps({**said, "token": self._token, "count": self._count}).encode()

    def _keep(self) -> None:
        while not self._stop.wait(BEAT) and self._lost is None:
            # Out of reach: whether it is still ours will be seen.
            with contextlib.suppress(StorageError), self._writing:
                self._beat()

    def _beat(self) -> None:
        if self._lost is not None:
            return
        try:
            self._generation = self._bucket.write(NAME, self._content(), generation=self._generation)
        except Changed:
            now = self._bucket.generation(NAME)
            holder = self._holder()
            if holder.get("token") == self._token and now is not None:
                self._generation = now  # written, and the answer was lost
            else:
                self._lost = _named(holder)

    def _holder(self) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            found = json.loads(self._bucket.read(NAME) or b"{}")
            if isinstance(found, dict):
                return found
        return {}

    def _wait(self, generation: int, holder: dict[str, Any]) -> None:
        """Returns when the object is gone or has not changed for long; raises ConfigError when it changes."""
        self._tell(
            f"{self._bucket} is in use by {_named(holder)}: looking up to {STALE:g} s whether it lives"
        )
        deadline = time.monotonic() + STALE
        while time.monotonic() < deadline:
            time.sleep(min(BEAT / 4, STALE / 10))
            now = self._bucket.generation(NAME)
            if now is None:
                return
            if now != generation:
                raise ConfigError(
                    f"{self._bucket} is in use by {_named(self._holder() or holder)}; wait for it, end it, or give "
                    "another workdir"
                )


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']}" if "host" in holder else "another process"


def _machine() -> str:
    """What has the same process numbers: this boot of this machine, and in it a container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is not there any more."""
    if not holder.get("machine") or holder["machine"] != _machine():
        return False
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return False
