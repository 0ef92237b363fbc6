"""Tokens: the one small pytree that flows between blocks and carries every fact about its tokens.

Features alone are not enough once tokens are dropped, merged or reordered: positions, sizes, modalities and
validity must go where their token goes. `tokenlab.ops.carry` moves all leaves together, so that no method can
forget one. Layers take plain arrays; only the stack knows `Tokens`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array


@struct.dataclass
class Tokens:
    """B sequences of N tokens and what is known of each.

    Every leaf a stack will need exists before its first block, because a leaf that appears inside `lax.scan` or
    `lax.cond` changes the structure of the carry, which is an error in JAX. `None` means "not tracked here".

    Attributes:
      x: features [B, N, D], in the compute dtype.
      position: index in the full sequence [B, N], int32. Position tables and restoring read it.
      coords: coordinates for rotary positions [B, N, A], float32 (row, column, ...), or None.
      valid: False marks padding [B, N], bool, or None when every token is real.
      size: how many inputs a merged token stands for [B, N], float32, or None when nothing merges.
      modality: modality index [B, N], int32, or None.
      segment: document index of packed sequences [B, N], int32, or None.
      extra: further per-token leaves of a method's own, each [B, N, ...].
      owner: for each of the M original tokens the index of the token that carries it now, -1 once dropped
        [B, M], int32, or None. Asked for by pictures and partition tests; costs nothing otherwise.
      protected: the first `protected` tokens (CLS, registers) are never dropped or merged. Static.
    """

    x: Array
    position: Array
    coords: Array | None = None
    valid: Array | None = None
    size: Array | None = None
    modality: Array | None = None
    segment: Array | None = None
    extra: dict[str, Any] = struct.field(default_factory=dict)
    owner: Array | None = None
    protected: int = struct.field(pytree_node=False, default=0)

    @property
    def there(self) -> Array:
        """`valid`, or True for every token where it is not tracked: [B, N] bool."""
        return jnp.ones(self.position.shape, bool) if self.valid is None else self.valid

    @property
    def batch(self) -> int:
        """B, a Python int."""
        return self.x.shape[0]

    @property
    def count(self) -> int:
        """N, the tokens present now (protected ones included), a Python int."""
        return self.x.shape[1]

    @property
    def free(self) -> int:
        """Tokens that may be dropped or merged: N less the protected ones, a Python int."""
        return self.count - self.protected
