"""Schedules against their equations, worked out by hand in NumPy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tokenlab.core.errors import ConfigError, NameLookupError
from tokenlab.train import schedule
from tokenlab.train.config import ScheduleConfig

PEAK, TOTAL = 0.4, 100


def values(config: ScheduleConfig, total: int = TOTAL) -> np.ndarray:
    rate = jax.vmap(schedule.build(config, PEAK, total))(np.arange(total + 1))
    return np.broadcast_to(np.asarray(rate), (total + 1,))


def test_constant() -> None:
    np.testing.assert_allclose(values(ScheduleConfig("constant", warmup_steps=0)), PEAK, rtol=1e-6)


@pytest.mark.parametrize("name", schedule.SCHEDULES)
@pytest.mark.parametrize("warmup", [10, 0.1])
def test_warmup_is_a_straight_line_from_zero_to_the_peak(name: str, warmup: int | float) -> None:
    rates = values(ScheduleConfig(name, warmup_steps=warmup))
    np.testing.assert_allclose(rates[:11], PEAK * np.arange(11) / 10, rtol=1e-6)
    assert rates.max() <= PEAK * (1 + 1e-6)


@pytest.mark.parametrize("warmup", [0, 20])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_linear_and_cosine(warmup: int, final: float) -> None:
    part = np.arange(TOTAL - warmup + 1) / (TOTAL - warmup)
    linear = values(ScheduleConfig("linear", warmup, final))[warmup:]
    np.testing.assert_allclose(linear, PEAK * (1 - (1 - final) * part), rtol=1e-5, atol=1e-7)
    cosine = values(ScheduleConfig("cosine", warmup, final))[warmup:]
    expected = PEAK * (final + (1 - final) * (1 + np.cos(np.pi * part)) / 2)
    np.testing.assert_allclose(cosine, expected, rtol=1e-5, atol=1e-7)


def test_rsqrt_with_timescale_of_the_warmup_is_the_curve_of_vaswani() -> None:
    rates = values(ScheduleConfig("rsqrt", warmup_steps=16))
    steps = np.arange(TOTAL + 1)
    expected = PEAK * np.minimum(np.sqrt(16 / np.maximum(steps, 1)), steps / 16)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_rsqrt_with_a_cooldown_ends_at_zero_and_is_the_same_before_it() -> None:
    plain = values(ScheduleConfig("rsqrt", warmup_steps=10, timescale=25))
    cooled = values(ScheduleConfig("rsqrt", warmup_steps=10, timescale=25, decay_steps=20))
    total = len(plain) - 1
    np.testing.assert_array_equal(cooled[: total - 20], plain[: total - 20])
    share = np.arange(20, -1, -1) / 20
    np.testing.assert_allclose(cooled[total - 20 :], plain[total - 20 :] * share, rtol=1e-5)


def test_rsqrt_timescale() -> None:
    rates = values(ScheduleConfig("rsqrt", warmup_steps=0, timescale=25))
    np.testing.assert_allclose(rates[[0, 75]], [PEAK, PEAK / 2], rtol=1e-6)


def test_wsd_is_flat_and_then_falls() -> None:
    rates = values(ScheduleConfig("wsd", warmup_steps=10, decay_steps=0.25, final=0.2))
    np.testing.assert_allclose(rates[10:76], PEAK, rtol=1e-6)
    np.testing.assert_allclose(rates[75:], PEAK * (1 - 0.8 * np.arange(26) / 25), rtol=1e-5)


def test_describe_says_what_is_built() -> None:
    text = schedule.describe(ScheduleConfig("wsd", warmup_steps=10, decay_steps=25, final=0.1), PEAK, TOTAL)
    assert text == "wsd from 0.4 to 0.04 over 100 steps, falling in the last 25, the first 10 of them warm-up"


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (dict(name="cosin"), NameLookupError, ["'cosin'", "Did you mean 'cosine'?"]),
        (dict(name="warmup_cosine"), NameLookupError, ["'cosine'", "warmup_steps"]),
        (dict(name="cosine", decay_steps=3), ConfigError, ["decay_steps", "wsd"]),
        (dict(name="constant", final=0.5), ConfigError, ["final", "linear, cosine, wsd"]),
        (dict(name="linear", timescale=3), ConfigError, ["timescale", "rsqrt"]),
        (dict(name="linear", warmup_steps=100), ConfigError, ["warmup_steps", "100"]),
        (dict(name="rsqrt", warmup_steps=0), ConfigError, ["timescale", "at least 1"]),
        (dict(name="wsd", warmup_steps=50, decay_steps=60), ConfigError, ["decay_steps", "1 to 50"]),
        (dict(warmup_steps=-1), ConfigError, ["warmup_steps", "-1"]),
        (dict(warmup_steps=1.5), ConfigError, ["warmup_steps", "1.5"]),
        (dict(final=2.0), ConfigError, ["final", "2.0"]),
        (dict(final=float("nan")), ConfigError, ["final", "nan"]),
    ],
)
def test_wrong_schedules(config: dict, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        schedule.build(ScheduleConfig(**config), PEAK, TOTAL)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_stack_vars_are_a_function_of_the_step() -> None:
    variables = schedule.stack_vars({"k": "0:1.0, 10:0.5,20: 4, 30:1.0", "n": 3}, 40)
    assert [variables.at(step)["k"] for step in (0, 9, 10, 19, 20, 29, 30, 99)] == [
        1.0,
        1.0,
        0.5,
        0.5,
        4,
        4,
        1.0,
        1.0,
    ]
    assert isinstance(variables.at(25)["k"], int)
    assert variables.at(0)["n"] == 3
    assert variables.changes(25) == [0, 10, 20]
    # Back at 1.0 after step 30: no new set of values.
    assert variables.distinct(100) == [{"k": 1.0, "n": 3}, {"k": 0.5, "n": 3}, {"k": 4, "n": 3}]
    assert variables.distinct(10) == [{"k": 1.0, "n": 3}]


def test_stack_vars_by_shares_of_the_run() -> None:
    variables = schedule.stack_vars({"k": "0%:1.0, 25%:0.5, 99: 4"}, 101)
    assert variables.changes(101) == [0, 25, 99]  # 25.25 steps, to the nearest
    assert schedule.stack_vars({"k": "0:1.0, 50%:0.5"}, 5).changes(5) == [0, 3]
    assert schedule.stack_vars({"k": "0:1.0, 25%:0.5, 30%:0.25"}, 1).at(0) == {"k": 0.25}


def test_stack_vars_in_shares_scale_with_the_run() -> None:
    shares = schedule.in_shares({"k": "0:1.0, 7:0.5, 50%: 4, 40:1", "n": 3}, 30)
    assert shares["n"] == 3
    same = schedule.stack_vars(shares, 30)
    assert same.changes(30) == [0, 7, 15]
    assert [same.at(step)["k"] for step in (6, 7, 15)] == [1.0, 0.5, 4] and isinstance(same.at(15)["k"], int)
    assert schedule.stack_vars(shares, 300).changes(300) == [0, 70, 150]


def test_a_count_and_a_fraction_are_distinct_values() -> None:
    variables = schedule.stack_vars({"k": "0:1, 5:1.0"}, 40)
    assert len(variables.distinct(10)) == 2
    assert schedule.values_key(variables.at(0)) != schedule.values_key(variables.at(5))


@pytest.mark.parametrize(
    "value",
    [
        "",
        "5:1.0",
        "0:1.0, 0:0.5",
        "0:1.0, 9:0.5, 8:0.2",
        "0:x",
        "0",
        "0:nan",
        True,
        None,
        "-1:2",
        "0:1, 101%:2",
        "0:1, %:2",
    ],
)
def test_wrong_stack_vars(value: object) -> None:
    with pytest.raises(ConfigError, match=r"config\.stack_vars\.k"):
        schedule.stack_vars({"k": value}, 40)


def test_schedule_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ScheduleConfig().name = "linear"  # type: ignore[misc]


PERIODIC = [
    {"k": "every 10: 1 else 0"},
    {"k": "0:0.5, 7:every 3: 1 else 0, 25:every 2: 1 else 4", "n": 3},
    {"k": "every 4: 1 else 0", "n": "0:every 6: 0.5 else 1.0, 50%:0.25"},
    {"k": "every 2: 1 else 0", "n": "every 4: 1 else 0", "m": "every 6: 1 else 0"},
]


@pytest.mark.parametrize("given", PERIODIC)
@pytest.mark.parametrize("total", [1, 7, 8, 60])
def test_what_is_counted_is_what_is_met(given: dict, total: int) -> None:
    variables = schedule.stack_vars(given, total)
    walked = [variables.at(step) for step in range(total)]
    keys = [schedule.values_key(values) for values in walked]
    counted = variables.counts(total)
    assert [schedule.values_key(found.values) for found in counted] == list(dict.fromkeys(keys))
    for found in counted:
        key = schedule.values_key(found.values)
        assert (found.first, found.count) == (keys.index(key), keys.count(key))
    alternations = [step for step in range(1, total) if keys[step] != keys[step - 1]]
    assert set(alternations) <= set(variables.alternations(0, total))
    for start in (5, 26):
        inside = [step for step in variables.alternations(0, total) if step > start]
        assert list(variables.alternations(start, total)) == inside == sorted(set(inside))


def test_every_counts_from_step_0_of_the_run() -> None:
    variables = schedule.stack_vars({"k": "0:2, 5:every 10: 1 else 0"}, 40)
    assert [step for step in range(40) if variables.at(step)["k"] == 1] == [10, 20, 30]
    assert variables.changes(40) == [0, 5]
    assert list(variables.alternations(0, 40)) == [5, 10, 11, 20, 21, 30, 31]
    assert variables.usual(0) == {"k": 2} and variables.usual(20) == {"k": 0}
    first = schedule.stack_vars({"k": "every 10: 1 else 0"}, 40)
    assert first.at(0) == {"k": 1} and first.at(1) == {"k": 0}


def test_a_long_run_with_a_period_is_counted_not_walked() -> None:
    variables = schedule.stack_vars({"k": "0:every 10: 1 else 0, 50%:every 7: 1 else 0"}, 10**12)
    on, off = variables.counts(10**12)
    assert on.count + off.count == 10**12
    assert on.count == 5 * 10**10 + (10**12 - 1) // 7 - (5 * 10**11 - 1) // 7
    assert variables.changes(10**12) == [0, 5 * 10**11]
    assert next(variables.alternations(10**11 + 3, 10**12)) == 10**11 + 10


def test_a_period_does_not_scale_with_the_run() -> None:
    shares = schedule.in_shares({"k": "0:2, 20:every 10: 1 else 0", "n": "every 3: 1 else 0"}, 40)
    assert shares == {"k": "0:2, 50.000000000%:every 10: 1 else 0", "n": "0:every 3: 1 else 0"}


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("every 1: 1 else 0", "a period of 1: expected at least 2 steps"),
        ("every 10: 1", "'every 10: 1' is not \"every STEPS: VALUE else VALUE\""),
        ("0:1, 5:every x: 1 else 0", "'every x: 1 else 0'"),
        ("every 10: a else 0", "'a' is not a finite number"),
        ("every 10: 1 else inf", "'inf' is not a finite number"),
        ("every", "'every'"),
        ("5:every 10: 1 else 0", "its steps must begin at 0"),
    ],
)
def test_wrong_periods_name_the_part(value: str, part: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.stack_vars\.k") as caught:
        schedule.stack_vars({"k": value}, 40)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_ramps_in_a_schedule_of_the_stack() -> None:
    variables = schedule.stack_vars({"k": "linear(64, 256, until=70%, values=4)", "n": 3}, 100)
    assert [(found.first, found.count, found.values["k"]) for found in variables.counts(100)] == [
        (0, 24, 64),
        (24, 23, 128),
        (47, 23, 192),
        (70, 30, 256),
    ]
    variables = schedule.stack_vars(
        {"k": "0:1.0, 20:cosine(0.9, 0.5, values=3), 60:every 2: 1.0 else 0.25"}, 80
    )
    assert [variables.at(step)["k"] for step in (19, 20, 39, 40, 59, 60, 61)] == [
        1.0,
        0.9,
        0.9,
        0.7,
        0.7,
        1.0,
        0.25,
    ]
    whole = schedule.stack_vars({"k": "0:2, 50%: linear(4, 6, until = 90%)"}, 100)
    assert whole.changes(100) == [0, 50, 70, 90]


def test_ramps_scale_with_the_run() -> None:
    shares = schedule.in_shares({"k": "0:8, 10:linear(16, 64, until=60, multiple=16)"}, 100)
    assert shares == {"k": "0:8, 10.000000000%:linear(16, 64, until=60.000000000%, multiple=16)"}
    assert schedule.stack_vars(shares, 1000).changes(1000) == [0, 100, 267, 434, 600]
    same = {"k": "linear(16, 64, until=60%, values=4)"}
    assert schedule.in_shares(same, 100) == {"k": "0:linear(16, 64, until=60%, values=4)"}


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("liner(1, 4)", "'liner' is no shape. Did you mean 'linear'?"),
        ("linear(1)", "expected two numbers first"),
        ("linear(1, 2, 3)", "expected two numbers first"),
        ("linear(1, x)", "'x' is not a finite number"),
        ("linear(1, 4, steps=3)", "'steps' is no argument"),
        ("linear(1, 4, values=3, values=3)", "'values' is given twice"),
        ("linear(1, 4, values=x)", "values is 'x': expected a whole number"),
        ("linear(1, 4, until=x)", "until is 'x': expected a step or a percentage"),
        ("linear(0.5, 1.0)", "between fractions expected values=4"),
        ("linear(4, 4)", "it goes from 4 to 4"),
        ("0:1, 20:linear(4, 8, until=20)", "begins at step 20 and ends at 20"),
    ],
)
def test_wrong_ramps_name_the_part(value: str, part: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.stack_vars\.k") as caught:
        schedule.stack_vars({"k": value}, 40)
    assert part in str(caught.value) and "\n" not in str(caught.value)
