"""Keys and values of tokens already seen, in room of a fixed size: what generation reads instead of the past.

Every example fills its rows from the front and remembers where each key stood, so examples of one batch may hold
different numbers of tokens, and a layer that only some tokens enter holds only those. Empty rows have a position after
every other, which a causal mask hides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from tokenlab.core.errors import ShapeError

EMPTY = jnp.iinfo(jnp.int32).max
"""Position of a row without a key."""


@struct.dataclass
class KVCache:
    """M rows of keys and values for each of B examples.

    Attributes:
      key, value: [B, G, M, Dh], rotary positions applied. Heads stand before rows, as attention multiplies them: the
        other way round every step would begin by copying all of it.
      position: [B, M] int32, of each key in the full sequence; EMPTY where there is none.
      used: [B] int32, rows in use; they are the first.
      lost: [B] int32, tokens that found no room.
    """

    key: Array
    value: Array
    position: Array
    used: Array
    lost: Array

    @classmethod
    def empty(cls, batch: int, rows: int, heads: int, width: int, dtype: Any = jnp.float32) -> KVCache:
        """Nothing in it: B examples, M rows, G key heads of width Dh."""
        shape = (batch, heads, rows, width)
        none = jnp.zeros((batch,), jnp.int32)
        return cls(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.full((batch, rows), EMPTY, jnp.int32),
            none,
            none,
        )

    @property
    def rows(self) -> int:
        """M, a Python int."""
        return self.position.shape[-1]

    def has_room(self) -> Array:
        """Whether one more token fits, [B] bool."""
        return self.used < self.rows

    def insert(self, key: Array, value: Array, position: Array, valid: Array | None = None) -> KVCache:
        """The cache with more tokens behind those it holds.

        Args:
          key, value: [B, N, G, Dh], cast to the cache's dtype.
          position: [B, N] int, of each in the full sequence.
          valid: [B, N] bool, False for what is not to be kept; None keeps all.

        Returns:
          A new cache. Tokens for which no row is left are counted in `lost` and left out.

        Raises:
          ShapeError: shapes that do not fit the cache.
        """
        self._check(key, value, position)
        row, used, lost = self._rows_for(self.used, position, valid)

        return KVCache(
            key=_write(self.key, row[..., None], key),
            value=_write(self.value, row[..., None], value),
            position=_write(self.position, row[..., None], position),
            used=used,
            lost=self.lost + lost,
        )

    def _check(self, key: Array, value: Array, position: Array) -> None:
        """Raise ShapeError unless the new tokens fit; the leading axis of a stack does not count."""
        batch, count = position.shape
        own, heads, _, width = self.key.shape[-4:]
        if key.shape != (batch, count, heads, width) or value.shape != key.shape or batch != own:
            raise ShapeError(
                f"cache of {list(self.key.shape)}: keys {list(key.shape)}, values {list(value.shape)} and positions "
                f"{list(position.shape)} do not fit; expected [B, N, G, Dh] and [B, N]."
            )

    def _rows_for(self, used: Array, position: Array, valid: Array | None) -> tuple[Array, Array, Array]:
        """The row of each new token [B, N], rows in use then [B], tokens that found none [B]."""
        wanted = jnp.ones(position.shape, jnp.int32) if valid is None else valid.astype(jnp.int32)
        behind = jnp.cumsum(wanted, axis=1)
        # A token that is not to be kept, or too late, is sent past the last row, where it is dropped.
        row = jnp.where(wanted > 0, used[:, None] + behind - 1, self.rows)
        total = used + behind[:, -1]
        return row, jnp.minimum(total, self.rows), total - jnp.minimum(total, self.rows)


@dataclass(frozen=True)
class Stacked:
    """One layer of caches that lie in a stack [n, ...]: used like a `KVCache`, and rows are written into the stack.

    Taking a layer out and putting it back would copy all its rows twice for every token.

    Attributes:
      stack: caches whose leaves have a leading axis n.
      at: which of them this is, an int or int32 [].
    """

    stack: KVCache
    at: Array | int

    @property
    def key(self) -> Array:
        """[B, G, M, Dh]."""
        return self._own(self.stack.key)

    @property
    def value(self) -> Array:
        """[B, G, M, Dh]."""
        return self._own(self.stack.value)

    @property
    def position(self) -> Array:
        """[B, M] int32."""
        return self._own(self.stack.position)

    def insert(self, key: Array, value: Array, position: Array, valid: Array | None = None) -> Stacked:
        """As `KVCache.insert`."""
        stack, used = self.stack, self._own(self.stack.used)
        stack._check(key, value, position)
        row, now, lost = stack._rows_for(used, position, valid)
        place = jnp.stack([jnp.broadcast_to(jnp.asarray(self.at, jnp.int32), row.shape), row], axis=-1)

        def note(old: Array, new: Array) -> Array:
            return lax.dynamic_update_index_in_dim(old, new, self.at, 0)

        new = KVCache(
            key=_write(stack.key, place, key),
            value=_write(stack.value, place, value),
            position=_write(stack.position, place, position),
            used=note(stack.used, now),
            lost=note(stack.lost, self._own(stack.lost) + lost),
        )
        return Stacked(new, self.at)

    def _own(self, leaf: Array) -> Array:
        return lax.dynamic_index_in_dim(leaf, self.at, keepdims=False)


def _write(old: Array, place: Array, new: Array) -> Array:
    """`old` with the rows of `new` [B, N, ...] at `place` [B, N, row] or [B, N, (layer, row)]; out of bounds: nowhere.

    One scatter in which examples are a batch: a sharded batch stays where it is, and inside a loop nothing is copied.
    """
    layer = place.shape[-1] - 1
    if new.shape[0] * new.shape[1] == 1:
        # XLA makes one row alone a slice update, fuses that with what reads the cache, and then copies all of it (CPU,
        # JAX 0.10.2: half the tokens a second). A second row that goes nowhere keeps it a scatter.
        nowhere = jnp.full_like(place, jnp.iinfo(jnp.int32).max)
        place, new = jnp.concatenate([place, nowhere], axis=1), jnp.concatenate([new, new], axis=1)
    rows = old.ndim - (2 if new.ndim == 4 else 1)
    where = (0, rows) if layer else (rows,)
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(2, new.ndim)),
        inserted_window_dims=where,
        scatter_dims_to_operand_dims=where,
        operand_batching_dims=(layer,),
        scatter_indices_batching_dims=(0,),
    )
    return lax.scatter(old, place, new.astype(old.dtype), numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)
