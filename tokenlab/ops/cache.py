"""Keys and values of tokens already seen, in room of a fixed size: what generation reads instead of the past.

Every example fills its rows from the front and remembers where each key stood, so examples of one batch may hold
different numbers of tokens, and a layer that only some tokens enter holds only those. Empty rows have a position after
every other, which a causal mask hides.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from tokenlab.core.errors import ShapeError

EMPTY = jnp.iinfo(jnp.int32).max
"""Position of a row without a key."""


@struct.dataclass
class KVCache:
    """M rows of keys and values for each of B examples.

    Attributes:
      key, value: [B, M, G, Dh], rotary positions applied.
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
        shape = (batch, rows, heads, width)
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
        batch, count = position.shape
        expected = (batch, count, *self.key.shape[2:])
        if key.shape != expected or value.shape != expected or batch != self.key.shape[0]:
            raise ShapeError(
                f"cache of {list(self.key.shape)}: keys {list(key.shape)}, values {list(value.shape)} and positions "
                f"{list(position.shape)} do not fit; expected [B, N, G, Dh] and [B, N]."
            )
        wanted = jnp.ones((batch, count), jnp.int32) if valid is None else valid.astype(jnp.int32)
        behind = jnp.cumsum(wanted, axis=1)
        # A token that is not to be kept, or too late, is sent past the last row, where it is dropped.
        row = jnp.where(wanted > 0, self.used[:, None] + behind - 1, self.rows)
        total = self.used + behind[:, -1]
        used = jnp.minimum(total, self.rows)

        def put(old: Array, new: Array) -> Array:
            return jax.vmap(lambda o, r, n: o.at[r].set(n.astype(o.dtype), mode="drop"))(old, row, new)

        return KVCache(
            key=put(self.key, key),
            value=put(self.value, value),
            position=put(self.position, position),
            used=used,
            lost=self.lost + total - used,
        )
