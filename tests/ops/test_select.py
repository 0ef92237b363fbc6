"""tokenlab.ops.select: counts, top-k against a sort by hand, bad inputs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.ops.select import count, random_scores, top_k

FEW = settings(max_examples=20, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize(
    ("amount", "available", "expected"),
    [
        (1, 196, 1),
        (196, 196, 196),
        (np.int32(7), 10, 7),
        (1.0, 196, 196),
        (0.5, 7, 4),  # 3.5: ties go up
        (0.145, 100, 15),  # 14.5 as written, 14.499999999999998 in binary
        (0.7, 16, 11),
        (0.05, 10, 1),
        (np.float64(0.25), 64, 16),
    ],
)
def test_count(amount, available, expected):
    kept = count(amount, available)
    assert kept == expected
    assert type(kept) is int


@pytest.mark.parametrize(
    ("amount", "says"),
    [
        (0, "1..10"),
        (11, "1..10"),
        (-1, "1..10"),
        (0.0, "(0, 1]"),
        (1.5, "(0, 1]"),
        (-0.5, "(0, 1]"),
        (0.049, "rounds to none"),
        (math.nan, "(0, 1]"),
        (math.inf, "(0, 1]"),
        (True, "an int"),
        ("0.5", "an int"),
        (None, "an int"),
    ],
)
def test_count_rejects(amount, says):
    with pytest.raises(TokenLabError, match="keep") as error:
        count(amount, 10, what="keep")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_count_of_nothing():
    with pytest.raises(TokenLabError, match="no unprotected token"):
        count(0.5, 0)


def by_hand(scores, k, protected, valid, order):
    rows = []
    for row, ok in zip(scores, valid, strict=True):
        others = sorted(range(protected, len(row)), key=lambda i: (not ok[i], -float(row[i]), i))[:k]
        rows.append(list(range(protected)) + (sorted(others) if order == "position" else others))
    return np.array(rows)


# Few values, so that ties are the rule. -inf: an invalid token must not beat a valid one with the lowest score.
values = st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0]), min_size=14, max_size=14)
bools = st.lists(st.booleans(), min_size=14, max_size=14)


@FEW
@given(
    values, bools, st.sampled_from([(3, 0), (4, 2), (7, 0), (5, 2)]), st.sampled_from(["position", "score"])
)
def test_top_k_is_a_stable_sort(values, valid, counts, order):
    k, protected = counts
    scores, valid = np.array(values, np.float32).reshape(2, 7), np.array(valid).reshape(2, 7)
    expected = by_hand(scores, k, protected, valid, order)
    found = top_k(scores, k, protected=protected, valid=valid, order=order)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
    expected = by_hand(scores, k, protected, np.ones_like(valid), order)
    np.testing.assert_array_equal(top_k(scores, k, protected=protected, order=order), expected)


def test_top_k_of_integers_at_their_limits():
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    np.testing.assert_array_equal(top_k(np.array([[low, 5, high, -5]]), 4, order="score"), [[2, 1, 3, 0]])
    np.testing.assert_array_equal(
        top_k(np.array([[0, 5, 2**32 - 1]], np.uint32), 3, order="score"), [[2, 1, 0]]
    )


def test_nan_scores_come_last_but_before_padding():
    scores = np.array([[np.nan, 1.0, 9.0, 2.0]], np.float32)
    np.testing.assert_array_equal(top_k(scores, 4, order="score"), [[2, 3, 1, 0]])
    valid = np.array([[True, True, False, True]])
    np.testing.assert_array_equal(top_k(scores, 4, order="score", valid=valid), [[3, 1, 0, 2]])


def test_keep_all_is_the_identity_and_really_executed():
    scores = random_scores(jax.random.key(0), 3, 9)
    np.testing.assert_array_equal(top_k(scores, 8, protected=1), np.tile(np.arange(9), (3, 1)))
    program = jax.jit(lambda s: top_k(s, 8, protected=1)).lower(scores).compile().as_text()
    assert " sort(" in program


def test_no_gradient_through_the_indices():
    x = jnp.arange(6.0).reshape(1, 6)
    gradient = jax.grad(lambda s: (top_k(s, 2).astype(jnp.float32) * s[:, :2]).sum())(x)
    np.testing.assert_array_equal(gradient, [[4, 5, 0, 0, 0, 0]])


def test_permuting_the_batch_permutes_the_indices():
    scores = random_scores(jax.random.key(1), 4, 10)
    np.testing.assert_array_equal(top_k(scores[::-1], 3), top_k(scores, 3)[::-1])


def test_random_scores():
    scores = random_scores(jax.random.key(2), 5, 100)
    assert scores.shape == (5, 100) and scores.dtype == jnp.float32
    assert 0 <= float(scores.min()) and float(scores.max()) < 1
    np.testing.assert_array_equal(scores, random_scores(jax.random.key(2), 5, 100))
    assert len({tuple(row) for row in np.asarray(top_k(scores, 10)).tolist()}) == 5


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"k": 0}, TokenLabError, "1..5"),
        ({"k": 6}, TokenLabError, "1..5"),
        ({"k": 2.0}, TokenLabError, "1..5"),
        ({"k": True}, TokenLabError, "1..5"),
        ({"protected": 7}, TokenLabError, "0..6"),
        ({"protected": -1}, TokenLabError, "0..6"),
        ({"order": "scores"}, TokenLabError, "Did you mean 'score'"),
        ({"scores": np.zeros(6)}, ShapeError, "[B, N]"),
        ({"scores": np.zeros((2, 6), bool)}, ShapeError, "bool"),
        ({"valid": np.ones((2, 5), bool)}, ShapeError, "valid"),
        ({"valid": np.ones((2, 6))}, ShapeError, "valid"),
    ],
)
def test_top_k_rejects(change, error, says):
    arguments = {"scores": np.zeros((2, 6), np.float32), "k": 2, "protected": 1} | change
    with pytest.raises(error) as raised:
        top_k(**arguments)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
