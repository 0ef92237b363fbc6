"""Moving tokens: take the chosen ones out, put results back.

Each function is written for one example and vmapped, which keeps the batch a batch dimension of the gather or
scatter: under a batch sharding nothing is communicated (tests/ops/test_gather.py reads the compiled program).

implementation: None is "gather", which moves rows by index and always works. "one_hot" multiplies by a 0/1 matrix: a
TPU can prefer that for short sequences; it is exact in every float and int dtype for finite values and costs K * N * D
multiply-adds. On two CPU cores at B 32, N 197, K 98, D 384, float32, "gather" takes 0.3 ms and "one_hot" 4 ms:

    python -m timeit -n 20 -r 7 -s "import jax; from jax.numpy import arange, ones, tile" \\
      -s "from tokenlab.ops.gather import gather; x, i = ones((32, 197, 384)), tile(arange(0, 196, 2), (32, 1))" \\
      -s "f = jax.jit(lambda x, i: gather(x, i, implementation='one_hot')); f(x, i)" "f(x, i).block_until_ready()"

An index outside 0..N-1 is a mistake of the caller's that a compiled program cannot raise. `gather` shows it as NaN
(the lowest int, False), the scatters leave it out.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from tokenlab.core.errors import ShapeError, TokenLabError, suggest

Implementation = Literal["gather", "one_hot"]
IMPLEMENTATIONS = ("gather", "one_hot")


def gather(x: jax.Array, indices: jax.Array, *, implementation: Implementation | None = None) -> jax.Array:
    """Rows `indices` of each example: y[b, k] = x[b, indices[b, k]].

    Args:
      x: [B, N, ...], any dtype ("one_hot": floats and ints, no bool).
      indices: [B, K] int in 0..N-1; repeats are allowed.
      implementation: see the module.

    Returns: [B, K, ...] in x's dtype. The gradient adds up over repeats.

    Raises: ShapeError for wrong shapes or dtypes, TokenLabError for an implementation that is unknown or cannot serve.
    """
    x = jnp.asarray(x)
    indices = check_indices(indices, x)
    if _pick(implementation, x) == "one_hot":
        return jax.vmap(lambda x, i: _contract("kn,n...->k...", _one_hot(i, x), x))(x, indices)
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", wrap_negative_indices=False))(x, indices)


def scatter(
    x: jax.Array, indices: jax.Array, y: jax.Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """x with the rows `indices` of each example replaced by y.

    Args:
      x: [B, N, ...].
      indices: [B, K] int in 0..N-1, distinct within an example (else the result is undefined).
      y: [B, K, ...], cast to x's dtype (both float, both int or both bool).
      implementation: see the module.

    Returns: [B, N, ...] in x's dtype.

    Raises: ShapeError, TokenLabError as `gather`.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    indices = check_indices(indices, x)
    y = _check_rows(y, x, indices).astype(x.dtype)

    def by_product(x: jax.Array, i: jax.Array, y: jax.Array) -> jax.Array:
        rows = _one_hot(i, x)
        replaced = rows.any(axis=0).reshape((-1,) + (1,) * (x.ndim - 1))
        return jnp.where(replaced, _contract("kn,k...->n...", rows, y), x)

    def by_index(x: jax.Array, i: jax.Array, y: jax.Array) -> jax.Array:
        return x.at[i].set(y, mode="drop", unique_indices=True, wrap_negative_indices=False)

    return jax.vmap(by_product if _pick(implementation, x) == "one_hot" else by_index)(x, indices, y)


def scatter_add(
    x: jax.Array,
    indices: jax.Array,
    y: jax.Array,
    weights: jax.Array | None = None,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """x with weights * y added to the rows `indices` of each example.

    Args:
      x: [B, N, ...].
      indices: [B, K] int in 0..N-1; repeats add up.
      y: [B, K, ...]; multiplied by the weights in float32, added in x's dtype.
      weights: [B, K] float, e.g. router weights; None is 1.
      implementation: see the module.

    Returns: [B, N, ...] in x's dtype.

    Raises: ShapeError, TokenLabError as `gather`.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    indices = check_indices(indices, x)
    if weights is not None:
        weights = jnp.asarray(weights)
        if weights.shape != indices.shape or not jnp.issubdtype(weights.dtype, jnp.floating):
            raise ShapeError(
                f"weights are {weights.dtype}{list(weights.shape)}; expected floats {list(indices.shape)}, one a row."
            )
        y = weights.astype(jnp.float32).reshape(weights.shape + (1,) * (y.ndim - 2)) * y
    y = _check_rows(y, x, indices).astype(x.dtype)

    def by_product(x: jax.Array, i: jax.Array, y: jax.Array) -> jax.Array:
        return x + _contract("kn,k...->n...", _one_hot(i, x), y)

    def by_index(x: jax.Array, i: jax.Array, y: jax.Array) -> jax.Array:
        return x.at[i].add(y, mode="drop", wrap_negative_indices=False)

    return jax.vmap(by_product if _pick(implementation, x) == "one_hot" else by_index)(x, indices, y)


def restore(
    y: jax.Array,
    indices: jax.Array,
    n: int,
    fill: jax.Array | float = 0,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The full sequence again: y at `indices`, `fill` everywhere else.

    Args:
      y: [B, K, ...].
      indices: [B, K] int in 0..n-1, distinct within an example.
      n: length N of the result. Static.
      fill: a scalar, or an array that broadcasts to one row of y (e.g. a learned mask token [D]).
      implementation: see the module.

    Returns: [B, N, ...] in y's dtype; gradients flow to y and to `fill`.

    Raises: ShapeError, TokenLabError as `gather`.
    """
    y = jnp.asarray(y)
    row = jnp.asarray(fill).astype(y.dtype)
    try:
        empty = jnp.broadcast_to(row, (y.shape[0], n) + y.shape[2:])
    except ValueError:
        raise ShapeError(
            f"fill has shape {row.shape}; it must broadcast to one row {y.shape[2:]} of y."
        ) from None
    return scatter(empty, indices, y, implementation=implementation)


def inverse(indices: jax.Array, n: int) -> jax.Array:
    """Where each of the n inputs went: [B, N] int32 with inverse[b, indices[b, k]] = k, and -1 for those not taken.

    indices: [B, K] int in 0..n-1, distinct within an example.
    """
    indices = jnp.asarray(indices)
    absent = jnp.full((*indices.shape[:1], n), -1, jnp.int32)
    places = jnp.broadcast_to(jnp.arange(indices.shape[-1], dtype=jnp.int32), indices.shape)
    return scatter(absent, indices, places)


def keep_mask(indices: jax.Array, n: int) -> jax.Array:
    """Which of the n inputs were taken: [B, N] bool, True at `indices` [B, K]."""
    return inverse(indices, n) >= 0


def check_indices(indices: jax.Array, x: jax.Array) -> jax.Array:
    """`indices` as an array; raise ShapeError unless they are [B, K] ints for an x of [B, N, ...]."""
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ShapeError(f"indices have dtype {indices.dtype}; expected ints (int32).")
    if x.ndim < 2 or indices.ndim != 2 or indices.shape[0] != x.shape[0]:
        raise ShapeError(
            f"indices {indices.shape} do not fit x {x.shape}; expected [B, K] and [B, N, ...] of one B."
        )
    return indices


def _check_rows(y: jax.Array, x: jax.Array, indices: jax.Array) -> jax.Array:
    if y.shape != indices.shape + x.shape[2:]:
        raise ShapeError(
            f"y has shape {y.shape}; indices {indices.shape} into x {x.shape} need {indices.shape + x.shape[2:]}."
        )
    if _kind(y) != _kind(x):
        raise ShapeError(
            f"y is {y.dtype} but x is {x.dtype}; cast one so that both are float, both int or both bool."
        )
    return y


def _kind(x: jax.Array) -> str:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return "float"
    return "bool" if x.dtype == jnp.bool_ else "int"


def _pick(implementation: Implementation | None, x: jax.Array) -> str:
    if implementation is None:
        return "gather"
    if implementation not in IMPLEMENTATIONS:
        raise TokenLabError(
            f"implementation is {implementation!r}.{suggest(str(implementation), IMPLEMENTATIONS)}"
        )
    if implementation == "one_hot" and _kind(x) == "bool":
        raise TokenLabError(
            'implementation "one_hot" multiplies and cannot move bools; use "gather" or None.'
        )
    return implementation


def _one_hot(indices: jax.Array, x: jax.Array) -> jax.Array:
    """[K] indices into [N, ...] -> [K, N] 0/1 in x's dtype."""
    return jax.nn.one_hot(indices, x.shape[0], dtype=x.dtype)


def _contract(equation: str, rows: jax.Array, x: jax.Array) -> jax.Array:
    # HIGHEST: a TPU would otherwise round float32 to bfloat16 on the way through the matrix unit.
    return jnp.einsum(equation, rows, x, precision=jax.lax.Precision.HIGHEST)
