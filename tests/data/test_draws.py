from __future__ import annotations

import numpy as np
import pytest

from tokenlab.core.errors import DataError
from tokenlab.data.draws import Purpose, check_seed, permutation, uniform, words


def test_words_are_those_of_philox_for_ever() -> None:
    # Written down once; other numbers here would silently reorder the data of every run that goes on.
    assert words(0, Purpose.ORDER, 0, 2).tolist() == [16006495525962256124, 11263462740154766164]
    assert permutation(7, Purpose.ORDER, 3, 8).tolist() == [4, 2, 1, 6, 0, 7, 5, 3]


def test_streams_differ_by_seed_purpose_and_index() -> None:
    streams = [
        tuple(words(seed, purpose, index, 4).tolist())
        for seed in (0, 1)
        for purpose in Purpose
        for index in (0, 1, 2)
    ]
    assert len(set(streams)) == len(streams)


def test_fewer_words_are_a_prefix() -> None:
    many = words(5, Purpose.AUGMENT, 9, 33)
    for count in (1, 2, 3, 4, 5, 32):
        np.testing.assert_array_equal(words(5, Purpose.AUGMENT, 9, count), many[:count])


def test_uniform_range_and_moments() -> None:
    drawn = uniform(1, Purpose.AUGMENT, 0, (1000, 20))
    assert drawn.dtype == np.float32 and drawn.shape == (1000, 20)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(drawn.var() - 1 / 12) < 0.002


def test_permutation_is_one_and_looks_uniform() -> None:
    counts = np.zeros((5, 5), int)
    for epoch in range(2000):
        order = permutation(0, Purpose.ORDER, epoch, 5)
        assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
        counts[np.arange(5), order] += 1
    # Expected 400 in each cell, standard deviation 18.
    assert np.abs(counts - 400).max() < 90


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "0", None])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(DataError, match="seed is .*expected an integer from 0"):
        check_seed(seed)


def test_largest_seed() -> None:
    assert words(check_seed(2**64 - 1), Purpose.ORDER, 0, 1).shape == (1,)
