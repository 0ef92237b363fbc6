"""Several processes as one: their output line by line under a prefix, one that fails ends all, signals reach all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO, Any

from tokenlab.core.errors import ConfigError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE = 60.0
"""Seconds that the others have to save their state once one has failed."""


def together(commands: Sequence[Sequence[str]], *, grace: float = GRACE) -> int:
    """Run all commands at once until the last ends.

    Each line they print is printed with "[k] " before it, k being the command's number. When one ends with a status
    other than 0, the others get SIGTERM, and SIGKILL after `grace` seconds. SIGTERM, SIGINT, SIGHUP and SIGUSR1 to
    this process are passed on to all of them.

    Returns:
      0, or the status of the one that failed first: 128 + its number for a signal.

    Raises:
      ConfigError: a program cannot be started; those that had been started are ended.
    """
    running: list[subprocess.Popen[bytes]] = []
    before: dict[int, Any] = {}

    def tell(number: int, frame: FrameType | None = None) -> None:
        del frame
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, tell) for number in SIGNALS}
    printers: list[threading.Thread] = []
    lock = threading.Lock()
    try:
        for index, words in enumerate(commands):
            running.append(_start(words))
            prefix = f"[{index}] " if len(commands) > 1 else ""
            pipe = running[-1].stdout
            printers.append(threading.Thread(target=_print, args=(pipe, prefix, lock), daemon=True))
            printers[-1].start()
        return _wait(running, tell, grace)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for printer in printers:
            printer.join(timeout=10.0)  # a grandchild may hold the pipe open
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C in the terminal then reaches it once, by way of this process.
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(f"{words[0]} cannot be run: {error.strerror}.") from error


def _print(pipe: IO[bytes], prefix: str, lock: threading.Lock) -> None:
    for line in pipe:
        with lock:
            sys.stdout.write(prefix + line.decode(errors="replace").rstrip("\r\n") + "\n")
            sys.stdout.flush()
    pipe.close()


def _wait(running: Sequence[subprocess.Popen[bytes]], tell: Any, grace: float) -> int:
    failed, deadline = 0, None
    while any(process.poll() is None for process in running):
        if not failed and (failed := _first_failure(running)):
            tell(signal.SIGTERM)
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            tell(signal.SIGKILL)
        time.sleep(0.05)
    return failed or _first_failure(running)


def _first_failure(running: Sequence[subprocess.Popen[bytes]]) -> int:
    for index, process in enumerate(running):
        status = process.poll()
        if status:
            status = 128 - status if status < 0 else status
            if any(other.poll() is None for other in running):
                note = f"process {index} ended with status {status}; the others are stopped"
                print(f"tokenlab: {note}", file=sys.stderr, flush=True)
            return status
    return 0


def free_port(port: int) -> bool:
    """Whether a server of this machine could take the port."""
    import socket

    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("", port))
        except OSError:
            return False
    return True


def environ(words: Sequence[str], environment: dict[str, str]) -> tuple[str, ...]:
    """The words with `env NAME=TEXT ...` before them, PYTHONPATH going before what this process has."""
    if rest := os.environ.get("PYTHONPATH"):
        environment = environment | {"PYTHONPATH": f"{environment['PYTHONPATH']}{os.pathsep}{rest}"}
    return ("env", *(f"{name}={text}" for name, text in environment.items()), *words)
