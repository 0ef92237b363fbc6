"""All processes of a job find each other, or every one is told who is missing and what is wrong."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tokenlab.core.errors import HostsError
from tokenlab.sharding import roll_call as roll_calls
from tokenlab.sharding.roll_call import roll_call, split

VERSIONS = {"jax": "1"}


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


@pytest.fixture(autouse=True)
def hosts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes, so each call gets a host name of its own."""
    names = iter(f"host-{letter}" for letter in "abcdefgh")
    monkeypatch.setattr(roll_calls.socket, "gethostname", lambda: next(names))
    monkeypatch.setattr(roll_calls, "RETRY", 0.02)


def call(address: str, *who: tuple[Any, ...], timeout: float = 20) -> list[Any]:
    """What each of (id, count, versions) gets: its names, or its error."""
    with ThreadPoolExecutor(len(who)) as pool:
        tasks = [
            pool.submit(roll_call, address, each[0], each[1], timeout, *each[2:] or (VERSIONS,))
            for each in who
        ]
    return [task.exception() or task.result() for task in tasks]


def test_all_learn_where_the_others_are_and_the_port_is_free_again(address: str) -> None:
    found = call(address, (2, 3), (1, 3), (0, 3))
    assert found[0] == found[1] == found[2] and list(found[0]) == [0, 1, 2]
    assert all(where.startswith("host-") and ", pid " in where for where in found[0].values())
    assert call(address, (1, 2), (0, 2))[0].keys() == {0, 1}


def test_who_is_missing_is_told_to_all(address: str) -> None:
    found = call(address, (0, 4), (2, 4), timeout=0.5)
    for error in found:
        assert isinstance(error, HostsError)
        assert f"processes 1, 3 of 4 did not report at {address} in 0.5 s; here: 0 (host-" in str(error)


def test_nobody_answers(address: str) -> None:
    with pytest.raises(
        HostsError, match=f"process 1 of 2 did not reach process 0 at {address} in 0.3 s .*refused"
    ):
        roll_call(address, 1, 2, 0.3, VERSIONS)
    with pytest.raises(HostsError, match="did not reach process 0 at no-such-host.invalid:80"):
        roll_call("no-such-host.invalid:80", 1, 2, 0.3, VERSIONS)


def test_the_port_is_taken(address: str) -> None:
    with socket.create_server(("", split(address)[1])):
        with pytest.raises(
            HostsError, match=f"cannot listen on port {split(address)[1]} for --coordinator={address}"
        ):
            roll_call(address, 0, 2, 1, VERSIONS)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((1, 3), "process 1 (host-?, pid ?) was started as one of 3 processes, and process 0 .* as one of 2"),
        (
            (1, 2, {"jax": "2"}),
            "process 1 (host-?, pid ?) has jax 2, and process 0 (host-?, pid ?) has jax 1",
        ),
    ],
)
def test_processes_that_disagree(address: str, other: tuple[Any, ...], message: str) -> None:
    pattern = message.replace("(", r"\(").replace(")", r"\)").replace("?", r"\w+")
    for error in call(address, (0, 2), other):
        assert isinstance(error, HostsError)
        assert re.search(pattern, str(error)), error


def test_two_of_one_number(address: str) -> None:
    found = call(address, (0, 3), (1, 3), (1, 3))
    assert all("two processes say they are process 1: host-" in str(error) for error in found)


def test_strangers_at_the_port_are_left_alone(address: str) -> None:
    host, port = split(address)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll_call, address, 0, 2, 20, VERSIONS)
        for said in (b"GET / HTTP/1.1\r\n\r\n", json.dumps({"process": 1}).encode() + b"\n", b""):
            while True:
                try:
                    with socket.create_connection((host, port), timeout=5) as line:
                        line.sendall(said)
                    break
                except ConnectionRefusedError:
                    continue
        assert pool.submit(roll_call, address, 1, 2, 20, VERSIONS).result() == first.result()


@pytest.mark.parametrize("bad", ["", "host", "host:", ":80", "host:http", "host:0", "host:65536"])
def test_addresses(bad: str) -> None:
    with pytest.raises(HostsError, match="expected HOST:PORT"):
        split(bad)
    assert split("[::1]:80") == ("::1", 80)
