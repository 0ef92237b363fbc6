"""Choosing tokens: how many, and which.

Everything here is static in shape: the number kept is a Python int, the indices are arrays. Ranking is a stable
`argsort` for one example, vmapped over the batch: `lax.top_k` on a batch-sharded [B, N] gathers the scores of all
examples onto every device, a sort does not (tests/ops/test_gather.py reads the compiled program).
"""

from __future__ import annotations

import math
import numbers
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal

import jax
import jax.numpy as jnp

from tokenlab.core.errors import ShapeError, TokenLabError, suggest

ORDERS = ("position", "score")


def count(amount: int | float, available: int, *, what: str = "amount", least: int = 0) -> int:
    """The number of tokens that `amount` stands for, out of `available` (unprotected) ones.

    An int is a count in 1..available. A float is a fraction in (0, 1] of `available`, rounded to the nearest
    integer with ties up, and raised to `least`. The rounding is done on the decimal number as written, so that
    count(0.145, 100) is 15 although 0.145 * 100 is 14.499999999999998 in binary.

    Raises: TokenLabError for a bool, a number that is not finite or is out of range, a fraction that rounds to nothing,
      or when nothing is available.
    """
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise TokenLabError(f"{what} is {amount!r}; give an int (a count) or a float (a fraction in (0, 1]).")
    if available < 1:
        raise TokenLabError(f"{what} is {amount!r}, but there is no unprotected token to choose from.")
    if isinstance(amount, numbers.Integral):
        if not 1 <= amount <= available:
            raise TokenLabError(
                f"{what} is the count {amount}; a count must lie in 1..{available}, the unprotected tokens there "
                "(a fraction is written as a float)."
            )
        return int(amount)
    fraction = float(amount)
    if not (math.isfinite(fraction) and 0.0 < fraction <= 1.0):
        raise TokenLabError(f"{what} is the fraction {fraction!r}; a fraction must lie in (0, 1].")
    nearest = int((Decimal(repr(fraction)) * available).to_integral_value(rounding=ROUND_HALF_UP))
    if not max(nearest, least):
        raise TokenLabError(
            f"{what} is the fraction {fraction!r} of {available} unprotected tokens, which rounds to none; give a "
            "larger one, or the count 1."
        )
    return max(nearest, least)


def top_k(
    scores: jax.Array,
    k: int,
    *,
    protected: int = 0,
    valid: jax.Array | None = None,
    order: Literal["position", "score"] = "position",
) -> jax.Array:
    """Indices of the k best tokens of each example, behind the protected ones.

    The first `protected` positions are always kept, stand first and do not compete; k counts the others. Ties go
    to the lower index. Invalid tokens rank behind every valid one whatever their score (they are taken only when
    fewer than k valid tokens exist), NaN scores behind the other scores of their kind. The scores get no gradient
    through the indices.

    Args:
      scores: [B, N] float or int, larger is better. The scores of protected positions are not read.
      k: number kept besides the protected, 1..N-protected. Static.
      protected: number of leading tokens always kept, 0..N. Static.
      valid: [B, N] bool, False for padding.
      order: "position" gives the k indices ascending, so that k = N - protected is the identity; "score" gives
        the best first.

    Returns: [B, protected + k] int32.

    Raises: ShapeError for wrong shapes or dtypes, TokenLabError for k, protected or order out of range.
    """
    scores = jnp.asarray(scores)
    if scores.ndim != 2:
        raise ShapeError(f"scores have shape {scores.shape}; top_k takes [B, N], one score a token.")
    if not (jnp.issubdtype(scores.dtype, jnp.floating) or jnp.issubdtype(scores.dtype, jnp.integer)):
        raise ShapeError(f"scores have dtype {scores.dtype}; top_k ranks floats or ints.")
    n = scores.shape[1]
    check_protected(protected, n)
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or not 1 <= k <= n - protected:
        raise TokenLabError(
            f"k is {k!r}; of {n} tokens with {protected} protected it must be an int in 1..{n - protected}."
        )
    if order not in ORDERS:
        raise TokenLabError(f"order is {order!r}.{suggest(str(order), ORDERS)}")

    def rank(score: jax.Array, last: jax.Array | None) -> jax.Array:
        # ~s reverses the order of integers without the overflow that -s has at the smallest one.
        key = -score if jnp.issubdtype(score.dtype, jnp.floating) else ~score
        if last is None:
            return jnp.argsort(key, stable=True)
        positions = jnp.arange(key.shape[0], dtype=jnp.int32)
        return jax.lax.sort((last.astype(jnp.int32), key, positions), num_keys=2, is_stable=True)[-1]

    def one(score: jax.Array, valid: jax.Array | None) -> jax.Array:
        last = None if valid is None else ~valid[protected:]
        chosen = rank(score[protected:], last)[:k].astype(jnp.int32) + protected
        if order == "position":
            chosen = jnp.sort(chosen)
        return jnp.concatenate([jnp.arange(protected, dtype=jnp.int32), chosen])

    scores = jax.lax.stop_gradient(scores)
    if valid is None:
        return jax.vmap(lambda score: one(score, None))(scores)
    return jax.vmap(one)(scores, check_valid(valid, scores.shape))


def random_scores(key: jax.Array, batch: int, n: int) -> jax.Array:
    """Independent uniform scores in [0, 1), [B, N] float32: with `top_k`, a uniformly random subset per example.

    `key` is a `jax.random.key`; the same key gives the same scores on every mesh.
    """
    return jax.random.uniform(key, (batch, n), jnp.float32)


def rank_in_groups(scores: jax.Array, group: jax.Array) -> jax.Array:
    """The rank of each token among those of its group, 0 for the best; ties go to the lower index, NaN ranks last.

    Args:
      scores: [B, N] float, larger is better; no gradient.
      group: [B, N] int32.

    Returns: [B, N] int32.
    """

    def one(score: jax.Array, group: jax.Array) -> jax.Array:
        place = jnp.arange(score.shape[0], dtype=jnp.int32)
        ordered, _, order = jax.lax.sort((group, -score, place), num_keys=2, is_stable=True)
        first = jnp.searchsorted(ordered, ordered, side="left", method="sort").astype(jnp.int32)
        return jnp.zeros_like(place).at[order].set(place - first, unique_indices=True)

    return jax.vmap(one)(jax.lax.stop_gradient(scores), group)


def group_sizes(group: jax.Array, groups: int) -> jax.Array:
    """Tokens in each of the groups 0..G-1; others are not counted. group: [B, N] int32 -> [B, G] int32."""
    return jax.vmap(lambda row: jnp.zeros((groups,), jnp.int32).at[row].add(1, mode="drop"))(group)


def check_protected(protected: int, n: int) -> None:
    """Raise TokenLabError unless `protected` is an int in 0..n."""
    if isinstance(protected, bool) or not isinstance(protected, numbers.Integral) or not 0 <= protected <= n:
        raise TokenLabError(f"protected is {protected!r}; of {n} tokens it must be an int in 0..{n}.")


def check_valid(valid: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`valid` as an array; raise ShapeError unless it is [B, N] bool."""
    valid = jnp.asarray(valid)
    if valid.shape != shape or valid.dtype != jnp.bool_:
        raise ShapeError(
            f"valid is {valid.dtype}{list(valid.shape)}; expected bool{list(shape)}, False for padding."
        )
    return valid
