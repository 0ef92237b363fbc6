"""All processes of a job say where they are before jax connects them.

jax's own connection ends the process, from C++, when an address is taken, nobody answers or somebody is missing, and
says neither who nor where. Here process 0 listens at the coordinator's address, the others report to it, and all learn
the same: that everybody is there, or what is wrong. Then the port is free again for jax's coordination service.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from tokenlab.core.errors import HostsError

LONGEST = 65536
"""Bytes of a message, at most: what comes through an open port may be anything."""

RETRY = 0.25
"""Seconds between attempts to reach process 0."""


def roll_call(
    coordinator: str, process_id: int, num_processes: int, timeout: float, versions: Mapping[str, str]
) -> dict[int, str]:
    """Waits until all processes are there.

    Args:
        coordinator: HOST:PORT of process 0, where nothing listens yet.
        process_id: this process, in [0, num_processes).
        num_processes: of the job, >= 2.
        timeout: seconds, > 0.
        versions: name -> version of what has to be the same everywhere.

    Returns:
        Process id -> its host and process number, as errors are to name it.

    Raises:
        HostsError: the address is taken, is not to be reached, or not all processes reported within `timeout` (the
            message names those that are missing); or they disagree on their number, on who is who, or on versions.
    """
    host, port = split(coordinator)
    me = {
        "process": process_id,
        "of": num_processes,
        "where": f"{socket.gethostname()}, pid {os.getpid()}",
        "versions": dict(versions),
    }
    deadline = time.monotonic() + timeout
    if process_id == 0:
        return _Register(coordinator, me, timeout).listen(port, deadline)
    return _report(coordinator, host, port, me, timeout, deadline)


def split(coordinator: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT. Raises HostsError."""
    host, colon, port = coordinator.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise HostsError(
            f"the coordinator's address is {coordinator!r}: expected HOST:PORT, such as 10.0.0.1:8476."
        )
    return host.strip("[]"), int(port)


class _Register:
    """Process 0's list of who has reported."""

    def __init__(self, coordinator: str, me: Mapping[str, Any], timeout: float):
        self._coordinator, self._timeout = coordinator, timeout
        self._me, self._of = me, me["of"]
        self._known: dict[int, Mapping[str, Any]] = {0: me}
        self._lines: list[socket.socket] = []

    def listen(self, port: int, deadline: float) -> dict[int, str]:
        try:
            server = _server(port)
        except OSError as error:
            raise HostsError(
                f"process 0 cannot listen on port {port} for --coordinator={self._coordinator}: {error.strerror}; give "
                "a port that is free on its host, or end the run that holds it."
            ) from None
        with server, contextlib.ExitStack() as lines:
            while len(self._known) < self._of:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    line, _ = server.accept()
                except TimeoutError:
                    self._refuse(self._who_is_missing())
                lines.enter_context(line)
                line.settimeout(5)
                self._enter(line, _read(line))
            names = {number: said["where"] for number, said in sorted(self._known.items())}
            self._answer({"names": names})
            for line in self._lines:  # who closes first keeps the port for a while
                with contextlib.suppress(OSError):
                    line.settimeout(2)
                    line.recv(1)
        return names

    def _enter(self, line: socket.socket, said: Any) -> None:
        if not isinstance(said, dict) or said.keys() != self._me.keys():
            return  # not one of ours
        number, of, where = said["process"], said["of"], said["where"]
        self._lines.append(line)
        if of != self._of:
            self._refuse(
                f"process {number} ({where}) was started as one of {of} processes, and process 0 "
                f"({self._me['where']}) as one of {self._of}; give all the same --num-processes."
            )
        known = self._known.get(number)
        if known is not None and known["where"] != where:
            self._refuse(
                f"two processes say they are process {number}: {known['where']} and {where}; give each its own "
                f"--process-id, from 0 to {self._of - 1}."
            )
        if said["versions"] != self._me["versions"]:
            mine, theirs = (", ".join(f"{k} {v}" for k, v in x["versions"].items()) for x in (self._me, said))
            self._refuse(
                f"process {number} ({where}) has {theirs}, and process 0 ({self._me['where']}) has {mine}; install the "
                "same everywhere."
            )
        self._known[number] = said

    def _who_is_missing(self) -> str:
        missing = [str(number) for number in range(self._of) if number not in self._known]
        here = ", ".join(f"{number} ({said['where']})" for number, said in sorted(self._known.items()))
        one = len(missing) == 1
        return (
            f"process{'' if one else 'es'} {', '.join(missing)} of {self._of} did not report at {self._coordinator} in "
            f"{self._timeout:g} s; here: {here}. Start all within that "
            "time, with the same --coordinator, or give --start-timeout=SECONDS."
        )

    def _refuse(self, why: str) -> None:
        self._answer({"error": why})
        raise HostsError(why)

    def _answer(self, answer: Mapping[str, Any]) -> None:
        for line in self._lines:
            with contextlib.suppress(OSError):
                line.sendall(json.dumps(answer).encode() + b"\n")


def _report(
    coordinator: str, host: str, port: int, me: Mapping[str, Any], timeout: float, deadline: float
) -> dict[int, str]:
    """The other processes' side."""
    reason = ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 10)) as line:
                line.sendall(json.dumps(me).encode() + b"\n")
                line.settimeout(max(deadline - time.monotonic(), 0) + 10)  # process 0 knows who is missing
                answer = _read(line)
            if isinstance(answer, dict) and "error" in answer:
                raise HostsError(answer["error"])
            if isinstance(answer, dict) and "names" in answer:
                return {int(number): where for number, where in answer["names"].items()}
            reason = "what listens there is no process 0 of ours, or it ended"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(RETRY)
    raise HostsError(
        f"process {me['process']} of {me['of']} did not reach process 0 at {coordinator} in {timeout:g} s "
        f"({reason}); start process 0 there, or give its address with --coordinator=HOST:PORT."
    )


def _server(port: int) -> socket.socket:
    """Listens on every interface, as jax's service will."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(
            OSError
        ):  # a kernel that has no IPv6 after all; the port is tried again below
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _read(line: socket.socket) -> Any:
    """A message as JSON; None where the other side says nothing, or something else."""
    got = b""
    with contextlib.suppress(OSError, ValueError):
        while not got.endswith(b"\n") and len(got) < LONGEST:
            more = line.recv(4096)
            if not more:
                return None
            got += more
        return json.loads(got)
    return None
