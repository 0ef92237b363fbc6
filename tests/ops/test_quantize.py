"""Quantisation against numpy: the nearest code, straight-through gradients, both losses, finite scalars, usage."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ConfigError, ShapeError
from tokenlab.ops import quantize

K, D = 17, 5
nearest = jax.jit(quantize.nearest, static_argnums=2)
unit = jax.jit(quantize.unit)
fsq, fsq_bound, fsq_codes, fsq_values = (
    jax.jit(each, static_argnums=1)
    for each in (quantize.fsq, quantize.fsq_bound, quantize.fsq_codes, quantize.fsq_values)
)
histogram, usage = jax.jit(quantize.histogram, static_argnums=1), jax.jit(quantize.usage)
LEVELS = [(2,), (3,), (2, 3, 2), (8, 6, 5), (7, 5, 5, 5)]


def vectors(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("shape", [(D,), (40, D), (2, 3, 4, D)])
def test_the_nearest_code_is_that_of_a_loop_in_numpy(distance: str, shape: tuple[int, ...]) -> None:
    z, rows = 3 * vectors(*shape), vectors(K, D, seed=1)
    found = np.asarray(nearest(z, rows, distance))
    assert found.shape == shape[:-1] and found.dtype == np.int32
    for place in np.ndindex(*shape[:-1]):
        a, b = z[place].astype(np.float64), rows.astype(np.float64)
        if distance == "cosine":
            a, b = a / np.linalg.norm(a), b / np.linalg.norm(b, axis=1, keepdims=True)
        assert found[place] == np.argmin(np.linalg.norm(a - b, axis=1))


def test_the_two_distances_differ_and_of_equal_rows_the_first_is_taken() -> None:
    rows = jnp.array([[10.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    z = jnp.array([[1.0, 0.1]])
    assert nearest(z, rows, "cosine").tolist() == [0]
    assert nearest(z, rows, "euclidean").tolist() == [1]
    # Half precision would call these rows equal.
    close = jnp.array([[1.0, 1.0], [1.0, 1.001]])
    assert nearest(jnp.array([[1.0, 1.001]]), close, "euclidean").tolist() == [1]


def test_a_codebook_of_another_width_is_refused() -> None:
    for rows in (vectors(K, D + 1), vectors(K)):
        with pytest.raises(ShapeError, match=r"nearest: vectors of shape \(4, 5\).* expected \[..., D\] and"):
            quantize.nearest(jnp.asarray(vectors(4, D)), jnp.asarray(rows))


def test_a_vector_of_zeros_has_a_direction_and_a_gradient_that_are_finite() -> None:
    value, gradient = jax.jit(jax.value_and_grad(lambda x: quantize.unit(x).sum()))(jnp.zeros(D))
    assert value == 0 and np.isfinite(gradient).all()
    np.testing.assert_allclose(np.linalg.norm(unit(vectors(9, D)), axis=-1), 1, 1e-6)


def test_straight_through_is_the_code_bit_for_bit_and_its_gradient_exactly_the_identity() -> None:
    z, quantised = jnp.asarray(1e4 * vectors(6, D)), jnp.asarray(1e-3 * vectors(6, D, seed=1))
    value, pull = jax.vjp(quantize.straight_through, z, quantised)
    np.testing.assert_array_equal(value, quantised)
    onto = jnp.asarray(vectors(6, D, seed=2))
    of_z, of_quantised = pull(onto)
    np.testing.assert_array_equal(of_z, onto)
    np.testing.assert_array_equal(of_quantised, 0)


def test_each_distance_moves_one_side_alone() -> None:
    z, rows = jnp.asarray(vectors(6, D)), jnp.asarray(vectors(6, D, seed=1))
    found = jax.jit(quantize.distances)(z, rows)
    wanted = ((np.asarray(z) - np.asarray(rows)) ** 2).sum(-1)
    for which, moves_z in (("codebook", False), ("commitment", True)):
        np.testing.assert_allclose(getattr(found, which), wanted, rtol=1e-6)

        def total(z, rows, which=which):
            return getattr(quantize.distances(z, rows), which).sum()

        of_z, of_rows = jax.jit(jax.grad(total, (0, 1)))(z, rows)
        moved, still = (of_z, of_rows) if moves_z else (of_rows, of_z)
        sign = 1 if moves_z else -1
        np.testing.assert_array_equal(still, 0)
        np.testing.assert_allclose(moved, sign * 2 * (np.asarray(z) - np.asarray(rows)), rtol=1e-6)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_code_of_finite_scalars_gives_its_values_and_comes_back(levels: tuple[int, ...]) -> None:
    count = math.prod(levels)
    codes = jnp.arange(count)
    values = np.asarray(fsq_values(codes, levels))
    np.testing.assert_array_equal(fsq_codes(values, levels), codes)
    assert np.abs(values).max() <= 1 and len(np.unique(values, axis=0)) == count


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_code_of_finite_scalars_can_be_reached(levels: tuple[int, ...]) -> None:
    """Also through a tanh that never gets to its ends: some z within [-8, 8] gives every level."""
    line = np.linspace(-8, 8, 400, dtype=np.float32)
    for axis, level in enumerate(levels):
        z = np.zeros((len(line), len(levels)), np.float32)
        z[:, axis] = line
        given = np.asarray(fsq(z, levels))
        wanted = (np.arange(level) - level // 2) / (level // 2)
        np.testing.assert_allclose(np.unique(given[:, axis]), wanted, rtol=1e-6)
    codes = np.asarray(fsq_codes(given, levels))
    assert 0 <= int(codes.min()) and int(codes.max()) < math.prod(levels)


def test_finite_scalars_round_what_is_bounded_and_pass_its_gradient() -> None:
    levels, z = (8, 5), jnp.asarray(vectors(30, 2))
    half, offset = np.array([7, 4]) * 1.001 / 2, np.array([0.5, 0.0])
    bounded = np.tanh(np.asarray(z, np.float64) + np.arctanh(offset / half)) * half - offset
    np.testing.assert_allclose(fsq_bound(z, levels), bounded, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fsq(z, levels), np.round(bounded) / [4, 2], rtol=1e-6)
    through = jax.grad(lambda z: quantize.fsq(z, levels).sum())(z)
    of_bound = jax.grad(lambda z: (quantize.fsq_bound(z, levels) / jnp.array([4.0, 2.0])).sum())(z)
    np.testing.assert_array_equal(through, of_bound)


def test_levels_that_make_no_codes_are_refused() -> None:
    for levels in ((), (1,), (8, 1, 5), (0,), (-3, 2)):
        with pytest.raises(ConfigError, match="each at least 2"):
            quantize.fsq_values(jnp.arange(2), levels)
    with pytest.raises(ConfigError, match="expected fewer than"):
        quantize.check_levels((2,) * 31)
    with pytest.raises(ShapeError, match=r"2 levels \(8, 5\) for vectors of shape \(4, 3\)"):
        quantize.fsq(jnp.zeros((4, 3)), (8, 5))


def test_usage_is_the_entropy_of_the_codes_that_count() -> None:
    codes = jnp.array([[[0, 0], [1, 1]], [[2, 2], [2, 2]], [[3, 3], [3, 3]]])
    counts = histogram(codes, 8, jnp.array([1.0, 0.0, 1.0]))
    assert counts.tolist() == [2, 2, 0, 4, 0, 0, 0, 0]
    found = usage(counts)
    assert float(found.perplexity) == pytest.approx(math.exp(1.5 * math.log(2)), rel=1e-6)
    assert float(found.used) == pytest.approx(3 / 8)
    assert float(usage(histogram(jnp.arange(8)[None], 8)).perplexity) == pytest.approx(8)
    assert tuple(map(float, usage(jnp.zeros(8)))) == (0, 0)
