"""Move whole `Tokens`: every leaf goes where its token goes, so that no method can forget one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ShapeError
from tokenlab.core.tokens import Tokens
from tokenlab.ops.gather import gather, keep_mask, scatter
from tokenlab.ops.merge import MergePlan, merge_weighted


def take(tokens: Tokens, indices: Array) -> Tokens:
    """The tokens at `indices`, in that order.

    Args:
      tokens: B sequences of N tokens.
      indices: [B, K], int32, distinct in each row; the first `tokens.protected` must be the protected tokens, as
        `select.top_k` gives them.

    Returns:
      `Tokens` of K tokens.
    """
    owner = tokens.owner
    if owner is not None:
        place = jax.vmap(
            lambda row: jnp.full((tokens.count,), -1, jnp.int32).at[row].set(jnp.arange(row.shape[0]))
        )(indices)
        owner = _compose(owner, place)
    moved = jax.tree.map(lambda leaf: gather(leaf, indices), tokens.replace(owner=None))
    return moved.replace(owner=owner)


def part(tokens: Tokens, start: int, stop: int) -> Tokens:
    """The tokens from `start` up to `stop`, none of them protected and without owners; start and stop are static."""
    cut = jax.tree.map(lambda leaf: leaf[:, start:stop], tokens.replace(owner=None))
    return cut.replace(protected=0)


def append_rest(part: Tokens, full: Tokens, indices: Array, x: Array) -> Tokens:
    """Put one token behind `part` that stands for everything of `full` that is not in it.

    Its size is the sum of theirs, its position and other facts are those of the first of them, so that positions stay
    distinct.

    Args:
      part: `take(full, indices)`, K tokens.
      full: B sequences of N > K tokens.
      indices: [B, K], int32.
      x: features of the new token [B, 1, D].

    Returns:
      `Tokens` of K + 1 tokens.
    """
    rest = ~keep_mask(indices, full.count)  # [B, N]
    first = jnp.argmax(rest, axis=1)[:, None]  # the lowest index that is not kept
    one = take(full.replace(owner=None), first)
    one = one.replace(x=x.astype(full.x.dtype))
    if full.size is not None:
        one = one.replace(size=jnp.sum(jnp.where(rest, full.size, 0.0), axis=1, keepdims=True))
    if full.valid is not None:
        one = one.replace(valid=jnp.any(rest & full.valid, axis=1, keepdims=True))
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), part.replace(owner=None), one)
    owner = part.owner
    if (
        owner is not None
    ):  # what was dropped just now is carried by the new token; what was dropped before is gone
        owner = jnp.where((owner < 0) & (full.owner >= 0), part.count, owner)
    return joined.replace(owner=owner)


def restore(full: Tokens, part: Tokens, indices: Array) -> Tokens:
    """Put the features of `part` back to the places in `full` they were taken from; the others stay as they are.

    Args:
      full: B sequences of N tokens.
      part: K of them, as `take(full, indices)` gave them, with new features (and new `extra` leaves).
      indices: [B, K], int32.

    Raises:
      ShapeError: `part` has another number of tokens than `indices`.
    """
    if part.count != indices.shape[1]:
        raise ShapeError(f"restore: expected {indices.shape[1]} tokens to put back, got {part.count}.")
    extra = {name: scatter(leaf, indices, part.extra[name]) for name, leaf in full.extra.items()}
    return full.replace(x=scatter(full.x, indices, part.x.astype(full.x.dtype)), extra=extra)


def merge(tokens: Tokens, plan: MergePlan) -> Tokens:
    """Merge tokens by `plan`: features and coordinates become averages weighted by size, sizes add up.

    Position, validity, modality and segment of a merged token are those of the one the others merged into. Padding
    weighs nothing.

    Args:
      tokens: B sequences of N tokens.
      plan: r merges, see `tokenlab.ops.merge.bipartite_soft_matching`.

    Returns:
      `Tokens` of N - r tokens, with `size`.
    """
    size = jnp.ones(tokens.position.shape, jnp.float32) if tokens.size is None else tokens.size
    weight = size if tokens.valid is None else jnp.where(tokens.valid, size, 0.0)
    x, size = merge_weighted(plan, tokens.x, weight)

    def average(leaf: Array) -> Array:
        return merge_weighted(plan, leaf, weight)[0]

    def one(leaf: Array | None) -> Array | None:
        return None if leaf is None else gather(leaf, plan.kept)

    def any_kind(leaf: Array) -> Array:
        return average(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else gather(leaf, plan.kept)

    return tokens.replace(
        x=x,
        position=one(tokens.position),
        coords=None if tokens.coords is None else average(tokens.coords),
        valid=one(tokens.valid),
        size=size,
        modality=one(tokens.modality),
        segment=one(tokens.segment),
        extra={name: any_kind(leaf) for name, leaf in tokens.extra.items()},
        owner=None if tokens.owner is None else _compose(tokens.owner, plan.assignment),
    )


def _compose(owner: Array, place: Array) -> Array:
    """owner [B, M] -> place[owner], -1 staying -1; place [B, N] gives each present token's new index or -1."""

    def one(owner: Array, place: Array) -> Array:
        return jnp.where(owner < 0, -1, place[jnp.maximum(owner, 0)])

    return jax.vmap(one)(owner, place)
