"""Tokens by modality with static shapes: where those of each stand in their sequence, in order.

    text, image = lanes(modality, (12, 8))     two lanes of at most 12 and 8 tokens
    rows = gather_lane(x, text)                [B, 12, D], zeros behind the last
    back = scatter_lane(x, text, rows)         the rows at their places again

How many tokens of a modality a sequence has is known at run time only, so each lane has a bound. What is beyond it is
in no lane and is counted (`left_out`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from tokenlab.core.errors import ShapeError, TokenLabError


@struct.dataclass
class Lane:
    """The tokens of one modality.

    Attributes:
      index: [B, C] int32, where each stands in its sequence, ascending; N where there is none.
      tokens: N. Static.
    """

    index: Array
    tokens: int = struct.field(pytree_node=False)

    @property
    def there(self) -> Array:
        """[B, C] bool, False behind the last token."""
        return self.index < self.tokens

    @property
    def count(self) -> Array:
        """Tokens in the lane, [B] int32."""
        return jnp.sum(self.there, axis=1, dtype=jnp.int32)


def lanes(modality: Array, bounds: Sequence[int], valid: Array | None = None) -> tuple[Lane, ...]:
    """One lane for each modality.

    Args:
      modality: [B, N], a whole number; m for the tokens of lane m.
      bounds: C of each lane, 1..N. Tokens of a modality beyond its bound, the last of the sequence, are in no lane.
      valid: [B, N] bool; padding is in no lane.

    Raises: ShapeError for a modality that is not [B, N] of whole numbers, or a mask of another shape; TokenLabError for
      a bound out of range, or ids that are concrete and not in 0..len(bounds) - 1.
    """
    check_modality(modality, modality.shape, len(bounds), valid)
    tokens = modality.shape[1]
    for number, bound in enumerate(bounds):
        if not 1 <= bound <= tokens:
            raise TokenLabError(
                f"lane {number} has room for {bound} tokens of {tokens}; expected 1..{tokens}."
            )
    return tuple(_lane(own_tokens(modality, number, valid), bound) for number, bound in enumerate(bounds))


def own_tokens(modality: Array, number: int, valid: Array | None) -> Array:
    """Which tokens are of the modality and no padding, [B, N] bool."""
    own = modality == number
    return own if valid is None else own & valid


def left_out(found: Sequence[Lane], valid: Array | None = None) -> Array:
    """Tokens in no lane, padding aside, [B] int32: those beyond a bound, and those of an unknown modality."""
    batch, tokens = found[0].index.shape[0], found[0].tokens
    there = (
        jnp.full((batch,), tokens, jnp.int32) if valid is None else jnp.sum(valid, axis=1, dtype=jnp.int32)
    )
    return there - sum(lane.count for lane in found)


def gather_lane(x: Array, lane: Lane) -> Array:
    """[B, N, ...] -> [B, C, ...]; zeros behind the last token."""
    return jax.vmap(lambda rows, index: rows.at[index].get(mode="fill", fill_value=0))(x, lane.index)


def scatter_lane(x: Array, lane: Lane, rows: Array) -> Array:
    """x [B, N, ...] with the rows [B, C, ...] at their places; what stands behind the last token goes nowhere."""
    return jax.vmap(lambda x, index, rows: x.at[index].set(rows, mode="drop"))(x, lane.index, rows)


def check_modality(modality: Array, shape: Sequence[int], kinds: int, valid: Array | None = None) -> None:
    """Raise unless `modality` is [B, N] = `shape` of whole numbers in 0..kinds - 1; numbers are seen where concrete."""
    whole = jnp.issubdtype(modality.dtype, jnp.integer)
    if modality.ndim != 2 or tuple(modality.shape) != tuple(shape) or not whole:
        raise ShapeError(
            f"modality is {modality.dtype}{list(modality.shape)}; expected whole numbers [B, N] = {list(shape)}."
        )
    if valid is not None and (valid.shape != modality.shape or valid.dtype != jnp.bool_):
        raise ShapeError(f"valid is {valid.dtype}{list(valid.shape)}; expected bool{list(modality.shape)}.")
    if not isinstance(modality, jax.core.Tracer):
        known = np.asarray(modality)
        known = known if valid is None or isinstance(valid, jax.core.Tracer) else known[np.asarray(valid)]
        if known.size and not (0 <= known.min() and known.max() < kinds):
            raise TokenLabError(
                f"modalities are 0..{kinds - 1}; got numbers from {known.min()} to {known.max()}."
            )


def _lane(own: Array, bound: int) -> Lane:
    """The first `bound` of the tokens [B, N] that are True."""
    batch, tokens = own.shape
    rank = jnp.cumsum(own, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(own & (rank < bound), rank, bound)
    at = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), own.shape)

    def one(place: Array, at: Array) -> Array:
        return jnp.full((bound,), tokens, jnp.int32).at[place].set(at, mode="drop")

    return Lane(jax.vmap(one)(place, at), tokens)
