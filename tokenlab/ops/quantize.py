"""Vectors to codes and back: the nearest row of a codebook, or rounding to a grid; straight-through gradients, usage.

    z_q = e_k,  k = argmin_j |z - e_j|                        vector quantisation (VQ-VAE, van den Oord et al. 2017)
    z_q = round(bound(z)) / floor(L / 2), one axis at a time  finite scalar quantisation (FSQ, Mentzer et al. 2023)

Both are piecewise constant, so their gradient is lent by `straight_through`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from tokenlab.core.errors import ConfigError, ShapeError

Distance: TypeAlias = Literal["cosine", "euclidean"]

FSQ_EPS = 1e-3
"""How far beyond the outermost level `fsq_bound` reaches, so that tanh need not be infinite to get there."""


def unit(x: Array) -> Array:
    """x / |x| over the last axis, in float32; a vector of zeros stays one, with a gradient that is finite."""
    wide = x.astype(jnp.float32)
    return wide * lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-12)


def nearest(z: Array, codebook: Array, distance: Distance = "cosine") -> Array:
    """The row of a codebook that is nearest to each vector; of rows equally near, the first.

    Args:
      z: [..., D], any floating dtype; distances are computed in float32.
      codebook: [K, D].
      distance: "cosine" (the angle) or "euclidean".

    Returns:
      Codes [...] int32 in [0, K). No gradient flows through them.

    Raises:
      ShapeError: a codebook of another width, or that is no matrix.
    """
    if codebook.ndim != 2 or z.shape[-1] != codebook.shape[1]:
        raise ShapeError(
            f"nearest: vectors of shape {z.shape} and a codebook of shape {codebook.shape}; "
            "expected [..., D] and [K, D]."
        )
    z, rows = lax.stop_gradient((z.astype(jnp.float32), codebook.astype(jnp.float32)))
    if distance == "cosine":
        far = -_products(unit(z), unit(rows))
    else:  # |z|^2 is the same for every row
        far = jnp.sum(rows * rows, axis=-1) - 2 * _products(z, rows)
    return jnp.argmin(far, axis=-1).astype(jnp.int32)


def _products(z: Array, rows: Array) -> Array:
    # Not the accelerators' default precision, which would call the wrong one of two near rows the nearest.
    return jnp.einsum("...d,kd->...k", z, rows, precision=lax.Precision.HIGHEST)


def straight_through(z: Array, quantised: Array) -> Array:
    """`quantised`, bit for bit, with the gradient of `z` (Bengio et al. 2013, arXiv 1308.3432). Both of one shape."""
    return lax.stop_gradient(quantised) + (z - lax.stop_gradient(z))


class Distances(NamedTuple):
    """How far vectors are from their codes, twice the same numbers with other gradients; [...] float32."""

    codebook: Array
    commitment: Array


def distances(z: Array, rows: Array) -> Distances:
    """|sg(z) - e|^2, which moves the codes to the vectors, and |z - sg(e)|^2, which keeps the vectors near the codes.

    Equation 3 of van den Oord et al. 2017 (arXiv 1711.00937) without its weight of the second, beta.

    Args:
      z: vectors [..., D].
      rows: e, the code of each, [..., D].
    """
    z, rows = z.astype(jnp.float32), rows.astype(jnp.float32)
    return Distances(
        jnp.sum((lax.stop_gradient(z) - rows) ** 2, axis=-1),
        jnp.sum((z - lax.stop_gradient(rows)) ** 2, axis=-1),
    )


# ------------------------------------------------------------------------------------------ finite scalars


def check_levels(levels: Sequence[int]) -> None:
    """Raise a ConfigError for levels that make no codes, or more than int32 can count."""
    if not levels or any(level < 2 for level in levels):
        raise ConfigError(
            f"levels are {tuple(levels)}: expected one number or more, each at least 2, such as (8, 6, 5)."
        )
    if math.prod(levels) >= 2**31:
        raise ConfigError(
            f"levels {tuple(levels)} make {math.prod(levels)} codes: expected fewer than 2**31."
        )


def fsq_bound(z: Array, levels: Sequence[int]) -> Array:
    """Squash axis i so that rounding it gives L = levels[i] whole numbers, from -floor(L / 2) upwards.

    Args:
      z: [..., A] with A the number of levels.
      levels: L of each axis, at least 2.

    Returns:
      [..., A] float32.
    """
    levels = jnp.asarray(levels, jnp.float32)
    half = (levels - 1) * (1 + FSQ_EPS) / 2
    offset = jnp.where(levels % 2 == 0, 0.5, 0.0)  # an even number of levels lies half a step off zero
    return jnp.tanh(z.astype(jnp.float32) + jnp.arctanh(offset / half)) * half - offset


def fsq(z: Array, levels: Sequence[int]) -> Array:
    """Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505, section 3.1), gradients straight through.

    Args:
      z: [..., A], any range.
      levels: L of each axis.

    Returns:
      [..., A] float32, whole multiples of 1 / floor(L / 2) in [-1, 1]; the gradient is that of `fsq_bound`.

    Raises: ConfigError as `check_levels`, ShapeError for another number of axes.
    """
    _check_axes(z, levels)
    bounded = fsq_bound(z, levels)
    return straight_through(bounded, jnp.round(bounded)) / _halves(levels)


def fsq_codes(quantised: Array, levels: Sequence[int]) -> Array:
    """The number of each vector that `fsq` gives, the first axis counting fastest; raises as `fsq`.

    Args:
      quantised: [..., A] as `fsq` gives them.
      levels: L of each axis.

    Returns:
      [...] int32 in [0, product of levels).
    """
    _check_axes(quantised, levels)
    digits = jnp.round(quantised * _halves(levels)).astype(jnp.int32) + jnp.asarray(_lowest(levels))
    return jnp.sum(digits * jnp.asarray(_basis(levels)), axis=-1, dtype=jnp.int32)


def fsq_values(codes: Array, levels: Sequence[int]) -> Array:
    """The vector of each code, the inverse of `fsq_codes`: [...] int -> [..., A] float32. Raises as `check_levels`."""
    check_levels(levels)
    sides = jnp.asarray(levels, jnp.int32)
    digits = codes[..., None] // jnp.asarray(_basis(levels)) % sides
    return (digits - jnp.asarray(_lowest(levels))).astype(jnp.float32) / _halves(levels)


def _check_axes(z: Array, levels: Sequence[int]) -> None:
    check_levels(levels)
    if z.shape[-1] != len(levels):
        raise ShapeError(
            f"fsq: {len(levels)} levels {tuple(levels)} for vectors of shape {z.shape}; expected [..., {len(levels)}]."
        )


def _lowest(levels: Sequence[int]) -> list[int]:
    """What is to be added to the lowest whole number of each axis to make it 0."""
    return [level // 2 for level in levels]


def _halves(levels: Sequence[int]) -> Array:
    return jnp.asarray(_lowest(levels), jnp.float32)


def _basis(levels: Sequence[int]) -> list[int]:
    return [math.prod(levels[:axis]) for axis in range(len(levels))]


# ------------------------------------------------------------------------------------------ usage


def histogram(codes: Array, count: int, weight: Array | None = None) -> Array:
    """How often each code occurs.

    Args:
      codes: [B, ...] int32 in [0, count).
      count: K.
      weight: [B] of each example; None for ones.

    Returns:
      [K] float32, the sum of the weights of the examples at each of its occurrences.
    """
    weight = jnp.ones(codes.shape[0], jnp.float32) if weight is None else weight.astype(jnp.float32)
    places = codes.reshape(codes.shape[0], -1)
    each = jnp.broadcast_to(weight[:, None], places.shape)
    return jnp.zeros(count, jnp.float32).at[places].add(each)


class Usage(NamedTuple):
    """How a set of codes uses a codebook; float32 scalars.

    Attributes:
      perplexity: exp of the entropy of their distribution, 1 (a single code) to K (all alike); 0 of no codes at all.
      used: share of the K codes that occur, 0 to 1.
    """

    perplexity: Array
    used: Array


def usage(counts: Array) -> Usage:
    """Of a `histogram` [K]."""
    total = jnp.sum(counts)
    share = counts / jnp.maximum(total, 1e-9)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
    return Usage(jnp.where(total > 0, jnp.exp(entropy), 0.0), jnp.mean((counts > 0).astype(jnp.float32)))
