"""tokenlab.ops.sample: what may be drawn and how often, against numpy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import TokenLabError
from tokenlab.ops.sample import Sampling, allowed, sample

V = 11
DRAWS = 4000


def by_hand(logits, how):
    """Probabilities [V] in float64."""
    logits = logits.astype(np.float64) / how.temperature
    stays = np.ones(V, bool)
    if how.top_k is not None:
        stays &= logits >= np.sort(logits)[::-1][min(how.top_k, V) - 1]
    weight = np.where(stays, np.exp(logits - logits.max()), 0)
    p = weight / weight.sum()
    if how.top_p is not None:
        before = 0.0
        for i in np.argsort(-p, kind="stable"):
            if before >= how.top_p:
                stays[i] = False
            before += p[i]
    weight = np.where(stays, weight, 0)
    return weight / weight.sum()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.none() | st.integers(1, V + 2),
    st.none() | st.sampled_from([1e-6, 0.2, 0.5, 0.9, 0.999, 1.0]),
)
def test_what_is_sampled_from_equals_numpy(seed, temperature, top_k, top_p):
    how = Sampling(temperature, top_k, top_p)
    logits = 2 * np.random.default_rng(seed).standard_normal((2, V)).astype(np.float32)
    found = jax.nn.softmax(allowed(logits, how))
    for row, each in zip(found, logits, strict=True):
        expected = by_hand(each, how)
        np.testing.assert_allclose(row, expected, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(row) > 0, expected > 0)


def test_greedy_takes_the_likeliest_and_of_equals_the_lower_id():
    logits = np.array([[0.0, 3, 1, 3], [5, 5, 5, 5], [0, 1, 2, 9]], np.float32)
    found = sample(logits, jax.random.key(0), Sampling(0.0, top_k=2, top_p=0.5))
    np.testing.assert_array_equal(found, [1, 0, 3])
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(sample(logits, jax.random.key(1), Sampling(0.0)), found)


def test_ties_at_the_last_place_of_top_k_stay_in():
    logits = np.array([[1.0, 4, 2, 2, 2, 0]], np.float32)
    np.testing.assert_array_equal(np.isfinite(allowed(logits, Sampling(top_k=2)))[0], [0, 1, 1, 1, 1, 0])


def test_the_likeliest_stays_whatever_top_p():
    logits = np.log([[0.2, 0.5, 0.3]]).astype(np.float32)
    np.testing.assert_array_equal(np.isfinite(allowed(logits, Sampling(top_p=1e-9)))[0], [0, 1, 0])
    # The second joins where the first does not reach the probability, the third where the two do not.
    np.testing.assert_array_equal(np.isfinite(allowed(logits, Sampling(top_p=0.6)))[0], [0, 1, 1])
    np.testing.assert_array_equal(np.isfinite(allowed(logits, Sampling(top_p=0.85)))[0], [1, 1, 1])


@pytest.mark.parametrize("how", [Sampling(0.7), Sampling(1.5, top_k=4), Sampling(1.0, top_p=0.8)], ids=str)
def test_frequencies_are_the_probabilities(how):
    """Of 4,000 draws each id has its share within five standard deviations of a binomial, and rows differ."""
    logits = np.random.default_rng(0).standard_normal(V).astype(np.float32)
    rows = jnp.broadcast_to(logits, (DRAWS, V))
    drawn = jax.jit(partial(sample, how=how))(rows, jax.random.key(0))
    p = by_hand(logits, how)
    counts = np.bincount(drawn, minlength=V)
    assert (np.abs(counts - DRAWS * p) <= 5 * np.sqrt(DRAWS * p * (1 - p))).all()
    assert counts.sum() == DRAWS and (counts[p == 0] == 0).all()


def test_the_key_decides():
    rows = jnp.zeros((32, V))
    first, again, other = (sample(rows, jax.random.key(seed), Sampling()) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != other).any()


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-300])
def test_next_to_no_temperature_is_greedy(temperature):
    logits = np.array([[0.1, 3, 2, -1, 0], [-5, -7, -6, -9, -8]], np.float32)
    found = sample(logits, jax.random.key(0), Sampling(temperature, top_k=3, top_p=0.9))
    np.testing.assert_array_equal(found, [1, 0])


def test_low_precision_logits_are_read_in_float32():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((1, V)), jnp.bfloat16)
    found = allowed(logits, Sampling(0.37))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, allowed(logits.astype(jnp.float32), Sampling(0.37)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; expected a number of tokens >= 1"),
        ({"top_k": True}, "top_k is True"),
        ({"temperature": "1"}, "temperature is '1'; expected a number"),
        ({"top_p": "0.5"}, "top_p is '0.5'; expected a number"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a probability in (0, 1]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_values_out_of_range_are_refused(given, says):
    with pytest.raises(TokenLabError) as raised:
        Sampling(**given)
    assert says in str(raised.value) and "\n" not in str(raised.value)
