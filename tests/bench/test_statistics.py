"""The realised fraction and its interval."""

from __future__ import annotations

import numpy as np
import pytest

from tokenlab.bench.statistics import realised, time_ratio
from tokenlab.core.errors import ConfigError


def test_rounds_are_compared_with_their_own() -> None:
    # The machine was five times slower in the second round; the ratio is 0.6 in each.
    assert time_ratio([0.6, 3.0, 0.6], [1.0, 5.0, 1.0]) == pytest.approx(0.6)


def test_all_that_is_counted_is_saved() -> None:
    found = realised([0.5] * 5, [1.0] * 5, 0.5)
    assert found == pytest.approx((1.0, 1.0, 1.0))


def test_a_half_is_saved_and_the_interval_holds_it() -> None:
    generator = np.random.default_rng(3)
    dense = 1 + 0.05 * generator.standard_normal(25)
    arm = dense * (0.8 + 0.02 * generator.standard_normal(25))
    found = realised(list(arm), list(dense), 0.6)
    assert found.value == pytest.approx(0.5, abs=0.05)
    assert found.low < found.value < found.high
    assert 0.4 < found.low and found.high < 0.6


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    """Of 200 measurements with a true ratio of 0.7 about 95 % of intervals hold it; a 50 % interval would not."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        dense = 1 + 0.1 * generator.random(15)
        arm = dense * (0.7 + 0.05 * generator.standard_normal(15))
        found = realised(list(arm), list(dense), 0.4)
        held += found.low <= 0.5 <= found.high
    assert 0.88 <= held / 200 <= 0.995


def test_a_slower_arm_realises_less_than_nothing() -> None:
    assert realised([1.1] * 3, [1.0] * 3, 0.5).value == pytest.approx(-0.2)


def test_the_same_rounds_give_the_same_interval() -> None:
    arm, dense = list(0.7 + 0.01 * np.arange(20) ** 1.5), [1.0] * 20
    assert realised(arm, dense, 0.6) == realised(arm, dense, 0.6)
    assert realised(arm, dense, 0.6) != realised(arm, dense, 0.6, seed=1)


@pytest.mark.parametrize("ratio", [0.98, 1.0, 1.3])
def test_where_nothing_is_saved_on_paper_there_is_no_fraction_of_it(ratio: float) -> None:
    assert realised([0.9] * 3, [1.0] * 3, ratio) is None


@pytest.mark.parametrize(("arm", "dense"), [([], []), ([1.0], [1.0, 2.0])])
def test_rounds_must_match(arm: list[float], dense: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected as many of both"):
        realised(arm, dense, 0.5)
    with pytest.raises(ConfigError, match="expected as many of both"):
        time_ratio(arm, dense)
