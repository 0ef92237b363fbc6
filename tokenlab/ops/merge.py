"""Merging tokens: who merges into whom (a plan), and the weighted average it stands for.

Bipartite soft matching: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461), section 3
and appendix D. The tokens are split into sources and destinations; each source finds its most similar destination
(cosine of the metric); the r sources with the best match merge. One pass, no iteration, and r tokens fewer whatever
the data, so shapes are static. A plan is indices only and may be applied to any array of the sequence.
Fusing the dropped tokens: Liang et al., "Not All Patches are What You Need", ICLR 2022 (arXiv 2202.07800), eq. 4.
"""

from __future__ import annotations

import numbers
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.core.errors import ShapeError, TokenLabError, suggest
from tokenlab.ops.gather import check_indices, gather, inverse, keep_mask, scatter, scatter_add
from tokenlab.ops.select import check_protected, check_valid

ORDERS = ("position", "reference")
MODES = ("sum", "amax")


@flax.struct.dataclass
class MergePlan:
    """Which tokens merge. All int32, N tokens in, N-r out.

    source [B, r] merges into destination [B, r] (both indices into N); kept [B, N-r] are the tokens that remain, in
    output order; assignment [B, N] is the output index that carries each input: `assignment[b] == m` are the inputs
    of output m, so the outputs partition the inputs. Following tokens through several merges is
    `gather(plan.assignment, owner)`.
    """

    source: jax.Array
    destination: jax.Array
    kept: jax.Array
    assignment: jax.Array


def merge_limit(n: int, protected: int = 0) -> int:
    """The most tokens the default matching can merge: half of the unprotected ones, rounded down."""
    check_protected(protected, n)
    return (n - protected) // 2


def make_plan(source: jax.Array, destination: jax.Array, kept: jax.Array) -> MergePlan:
    """A plan from one's own matching.

    source, destination: [B, r]; kept: [B, N-r] in the wanted output order. Source and kept together must be a
    permutation of 0..N-1, and every destination must be kept.
    """
    source, destination, kept = jnp.asarray(source), jnp.asarray(destination), jnp.asarray(kept)
    if source.shape != destination.shape:
        raise ShapeError(
            f"source {source.shape} and destination {destination.shape} must have one shape [B, r]."
        )
    check_indices(source, kept)
    check_indices(kept, kept)
    where = inverse(kept, source.shape[1] + kept.shape[1])
    return MergePlan(
        source=source,
        destination=check_indices(destination, kept),
        kept=kept,
        assignment=scatter(where, source, gather(where, destination)),
    )


def bipartite_soft_matching(
    metric: jax.Array,
    r: int,
    *,
    protected: int = 0,
    valid: jax.Array | None = None,
    order: Literal["position", "reference"] = "position",
    partition: tuple[jax.Array | np.ndarray, jax.Array | np.ndarray] | None = None,
) -> MergePlan:
    """Match each source with its most similar destination and merge the r best pairs (ToMe, section 3).

    Args:
      metric: [B, N, C], what similarity is measured on (ToMe: the keys, mean over heads). Compared by cosine in
        float32; carries no gradient.
      r: tokens to merge, 0..limit, static. The limit is half of the unprotected tokens (`merge_limit`), or the
        number of sources of `partition`. r = 0 in any order is the identity.
      protected: leading tokens that neither merge nor are merged into (CLS, distillation, registers).
      valid: [B, N] bool. A valid token never merges into padding, padding merges only when the valid sources do not
        suffice for r, and then into padding where there is any. Padding should have size 0 in `merge_weighted`. An
        example needs one valid destination for this to hold.
      order: of the output. "position" is ascending. "reference" is that of the authors' code: protected tokens, the
        unmerged sources (by descending score without protected tokens, ascending with), the destinations.
      partition: (sources, destinations), each [S] or [B, S] indices which together are the unprotected tokens;
        None takes even positions as sources and odd ones as destinations.

    Returns: MergePlan for N tokens in, N-r out.

    Raises: ShapeError for wrong shapes or dtypes, TokenLabError for r, protected or order out of range.
    """
    metric = jnp.asarray(metric)
    if metric.ndim != 3 or not jnp.issubdtype(metric.dtype, jnp.floating):
        raise ShapeError(f"metric is {metric.dtype}{list(metric.shape)}; expected floats [B, N, C].")
    batch, n, _ = metric.shape
    check_protected(protected, n)
    if order not in ORDERS:
        raise TokenLabError(f"order is {order!r}.{suggest(str(order), ORDERS)}")
    if partition is None:
        unprotected = np.arange(protected, n, dtype=np.int32)
        sources, destinations = unprotected[unprotected % 2 == 0], unprotected[unprotected % 2 == 1]
        limit = merge_limit(n, protected)
    else:
        sources, destinations = _check_partition(partition, batch, n, protected)
        limit = sources.shape[-1] if destinations.shape[-1] else 0
    if isinstance(r, bool) or not isinstance(r, numbers.Integral) or not 0 <= r <= limit:
        raise TokenLabError(
            f"r is {r!r}; of {n} tokens with {protected} protected at most {limit} merge; give an int in 0..{limit}."
        )

    def one(metric: jax.Array, valid: jax.Array | None, sources: jax.Array, destinations: jax.Array):
        ranked, target = _rank_sources(metric, valid, sources, destinations)
        merged, unmerged = sources[ranked[:r]], sources[ranked[r:]]
        if protected:
            unmerged = jnp.sort(unmerged)
        kept = jnp.concatenate([jnp.arange(protected, dtype=jnp.int32), unmerged, destinations])
        # The authors' code does nothing at all when r is 0.
        if order == "position" or r == 0:
            kept = jnp.sort(kept)
        return merged, destinations[target[ranked[:r]]], kept

    metric = jax.lax.stop_gradient(metric)
    valid = None if valid is None else check_valid(valid, (batch, n))
    if destinations.shape[-1] == 0 or sources.shape[-1] == 0:
        none = jnp.zeros((batch, 0), jnp.int32)
        return make_plan(none, none, jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n)))
    axes = (0, None if valid is None else 0, *(None if a.ndim == 1 else 0 for a in (sources, destinations)))
    return make_plan(
        *jax.vmap(one, in_axes=axes)(metric, valid, jnp.asarray(sources), jnp.asarray(destinations))
    )


def _rank_sources(
    metric: jax.Array, valid: jax.Array | None, sources: jax.Array, destinations: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One example: the sources in order of their best score (places in `sources`), and each one's best destination."""
    metric = metric.astype(jnp.float32)
    norm = jnp.linalg.norm(metric, axis=-1, keepdims=True)
    unit = metric / jnp.where(norm == 0, 1.0, norm)
    # HIGHEST: in a TPU's default bfloat16 passes near ties would fall another way than elsewhere.
    scores = jnp.matmul(unit[sources], unit[destinations].T, precision=jax.lax.Precision.HIGHEST)
    if valid is not None:
        from_valid, to_valid = valid[sources][:, None], valid[destinations][None, :]
        # Cosines are at least -1: padding ranks behind every true pair (and prefers padding), and ahead only of
        # what must not happen, a valid token that merges into padding.
        padding = jnp.where(to_valid, -4.0, -3.0)
        scores = jnp.where(from_valid, jnp.where(to_valid, scores, -jnp.inf), padding)
    return jnp.argsort(-scores.max(axis=1), stable=True), scores.argmax(axis=1)


def merge(plan: MergePlan, x: jax.Array, mode: Literal["sum", "amax"] = "sum") -> jax.Array:
    """Combine x over each group of merged tokens: [B, N, ...] -> [B, N-r, ...].

    mode "sum" adds (floats, ints), "amax" takes the largest (for bool: any). Tokens that nothing merged into come
    out bit for bit as they were.
    """
    x = jnp.asarray(x)
    _check_fits(plan, x, plan.assignment.shape[1], "x")
    if mode not in MODES:
        raise TokenLabError(f"mode is {mode!r}.{suggest(str(mode), MODES)}")
    if mode == "sum" and x.dtype == jnp.bool_:
        raise ShapeError('x is bool, which has no sum; use mode "amax" (any) or cast it.')
    kept, merged = gather(x, plan.kept), gather(x, plan.source)
    into = gather(plan.assignment, plan.source)
    if mode == "sum":
        return scatter_add(kept, into, merged)
    return jax.vmap(lambda kept, into, merged: kept.at[into].max(merged))(kept, into, merged)


def merge_weighted(plan: MergePlan, x: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The size-weighted average of each group, and its size: x' = sum(size * x) / sum(size) (ToMe, section 3).

    Args:
      plan: from `bipartite_soft_matching` or `make_plan`.
      x: [B, N, ...] float. Averaged in float32.
      size: [B, N], how many inputs each token stands for, >= 0; ones for a plain mean. 0 for padding, which then
        weighs nothing; a group of size 0 keeps the value of its kept token.

    Returns: (x' [B, N-r, ...] in x's dtype, size' [B, N-r] float32).
    """
    x, size = jnp.asarray(x), jnp.asarray(size)
    _check_fits(plan, x, plan.assignment.shape[1], "x")
    if size.shape != plan.assignment.shape:
        raise ShapeError(
            f"size has shape {size.shape}; expected [B, N] = {plan.assignment.shape}, one a token."
        )
    size = size.astype(jnp.float32)
    total = merge(plan, size)
    whole = gather(total, plan.assignment)
    # Shares, not a division after the sum: the share of a lone token is size/size = 1 exactly, so it is unchanged.
    share = jnp.where(whole > 0, size / jnp.where(whole > 0, whole, 1.0), keep_mask(plan.kept, size.shape[1]))
    share = share.reshape(share.shape + (1,) * (x.ndim - 2))
    return merge(plan, share * x.astype(jnp.float32)).astype(x.dtype), total


def unmerge(plan: MergePlan, y: jax.Array) -> jax.Array:
    """Copy each merged token back to all of its inputs: [B, N-r, ...] -> [B, N, ...]."""
    y = jnp.asarray(y)
    _check_fits(plan, y, plan.kept.shape[1], "y")
    return gather(y, plan.assignment)


def fuse(x: jax.Array, scores: jax.Array, keep_indices: jax.Array) -> jax.Array:
    """One token out of all that are not kept: sum over them of scores * x, weights not renormalised (EViT, eq. 4).

    Args:
      x: [B, N, D] float.
      scores: [B, N] float, e.g. the mean CLS attention row. Gradients flow to x and to the scores.
      keep_indices: [B, K] the kept tokens, protected ones included (as `top_k` returns them), so that CLS is not
        fused.

    Returns: [B, 1, D] in x's dtype; summed in float32, zero when everything is kept.
    """
    x, scores = jnp.asarray(x), jnp.asarray(scores)
    if x.ndim != 3 or scores.shape != x.shape[:2]:
        raise ShapeError(f"x {x.shape} and scores {scores.shape} do not fit; expected [B, N, D] and [B, N].")
    kept = keep_mask(check_indices(keep_indices, x), x.shape[1])
    # A masked sum over all tokens, not (all - kept), which cancels and loses digits.
    weights = jnp.where(kept, 0.0, scores.astype(jnp.float32))
    return jnp.einsum("bn,bnd->bd", weights, x.astype(jnp.float32))[:, None].astype(x.dtype)


def _check_fits(plan: MergePlan, x: jax.Array, n: int, name: str) -> None:
    if x.ndim < 2 or x.shape[:2] != (plan.assignment.shape[0], n):
        raise ShapeError(
            f"{name} has shape {x.shape}; the plan takes [{plan.assignment.shape[0]}, {n}, ...]."
        )


def _check_partition(partition, batch: int, n: int, protected: int):
    if not isinstance(partition, tuple) or len(partition) != 2:
        raise TokenLabError("partition must be a tuple (sources, destinations) of index arrays, or None.")
    known = all(isinstance(indices, np.ndarray) for indices in partition)
    for name, indices in zip(("sources", "destinations"), partition, strict=True):
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise ShapeError(f"{name} have dtype {indices.dtype}; expected ints (int32).")
        if indices.ndim not in (1, 2) or (indices.ndim == 2 and indices.shape[0] != batch):
            raise ShapeError(f"{name} have shape {indices.shape}; expected [S] or [{batch}, S].")
    sources, destinations = (indices.astype(np.int32) for indices in partition)
    found = sources.shape[-1] + destinations.shape[-1]
    if found != n - protected:
        raise ShapeError(
            f"partition holds {found} tokens; sources and destinations must be the {n - protected} unprotected."
        )
    if known and sources.ndim == destinations.ndim:
        both = np.sort(np.concatenate([sources, destinations], axis=-1), axis=-1)
        if (both != np.arange(protected, n)).any():
            raise TokenLabError(
                f"partition must hold each of the positions {protected}..{n - 1} exactly once."
            )
    return sources, destinations
