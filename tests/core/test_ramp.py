"""Ramps: rounding, buckets, mirror images; pieces found by halving are those met step by step."""

from __future__ import annotations

import math

import pytest

from tokenlab.core.errors import ConfigError
from tokenlab.core.ramp import MOST_VALUES, Ramp

RAMPS = [
    Ramp(64, 256, 0, 70, values=4),
    Ramp(32, 197, 5, 91, multiple=8),
    Ramp(100, 1000, 0, 33, multiple=7),
    Ramp(256, 60, 0, 50, multiple=16),
    Ramp(1, 17, 3, 60, "cosine"),
    Ramp(128, 2048, 0, 77, multiple=16, values=5),
    Ramp(0.1, 0.9, 0, 64, values=9),
    Ramp(1.0, 0.5, 10, 64, "cosine", values=6),
]


@pytest.mark.parametrize("ramp", RAMPS)
def test_pieces_are_what_is_met_step_by_step(ramp: Ramp) -> None:
    for end in (ramp.start + 1, ramp.until, 120):
        met = [(step, ramp.at(step)) for step in range(ramp.start, end)]
        expected = [met[0]] + [b for a, b in zip(met, met[1:], strict=False) if a[1] != b[1]]
        assert ramp.pieces(end) == expected
    assert ramp.at(10**6) == ramp.last
    values = [ramp.at(step) for step in range(ramp.start, 120)]
    assert values == sorted(values, reverse=ramp.last < ramp.first)
    assert ramp.values is None or len(set(values)) == ramp.values


def test_buckets_of_the_line() -> None:
    assert RAMPS[0].pieces(100) == [(0, 64), (24, 128), (47, 192), (70, 256)]
    assert [value for _, value in RAMPS[6].pieces(100)] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert RAMPS[6].pieces(100)[1] == (8, 0.2) and RAMPS[6].at(64) == 0.9 and RAMPS[6].at(63) == 0.8


def test_what_falls_is_the_mirror_image() -> None:
    rise, fall = Ramp(0, 96, 0, 40, multiple=16), Ramp(96, 0, 0, 40, multiple=16)
    assert [fall.at(step) for step in range(60)] == [96 - rise.at(step) for step in range(60)]


def test_values_of_what_falls_begin_where_it_does() -> None:
    ramp = Ramp(100, 50, 0, 10, multiple=16, values=3)
    assert [ramp.at(step) for step in (0, 3, 4, 10, 11)] == [100, 100, 80, 80, 50]


def test_cosine_is_half_a_period() -> None:
    ramp = Ramp(0, 1000, 0, 50, "cosine")
    for step in range(51):
        expected = math.floor(1000 * (1 - math.cos(math.pi * step / 50)) / 2) if step < 50 else 1000
        assert ramp.at(step) == expected


def test_a_long_ramp_is_halved_not_walked() -> None:
    found = Ramp(128, 2048, 0, 7 * 10**11, multiple=16).pieces(10**12)
    assert len(found) == 121 and found[-1] == (7 * 10**11, 2048)
    with pytest.raises(ConfigError, match=f"more than {MOST_VALUES} values"):
        Ramp(1, 2048, 0, 10**9).pieces(10**9)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (dict(first=4, last=4), "from 4 to 4"),
        (dict(first=4, last=0.5), "two different counts"),
        (dict(until=0), "at least 1 step"),
        (dict(multiple=0), "multiple is 0"),
        (dict(first=0.1, last=0.5, multiple=2), "between counts"),
        (dict(values=1), "1 values"),
        (dict(shape="square"), "'square'"),
        (dict(first=4, multiple=8), "begins at 4, which multiple=8 rounds down to 0"),
        (dict(first=7, last=9, multiple=8, values=2), "at least 8, or 0"),
    ],
)
def test_wrong_ramps(arguments: dict, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        Ramp(**{"first": 4, "last": 16, "start": 0, "until": 10, **arguments})
