"""swiglu: the gated feed-forward network (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.layers.ffn import FFNDefaults, width_of
from tokenlab.ops.grouped import Implementation, grouped_matmul


class SwiGLU(nn.Module):
    """y = (silu(x W_gate) * (x W_up)) W_down on every token alone, without biases.

    Attributes:
      hidden: width F of the gated layer.
      dtype: compute dtype; parameters stay float32.
    """

    hidden: int
    dtype: Any = jnp.float32

    tokenwise: ClassVar[bool] = True
    added: ClassVar[tuple[str, ...]] = ()
    rounded: ClassVar[tuple[str, ...]] = ("gate/kernel", "up/kernel", "down/kernel")
    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "gate/kernel": ("embed", "mlp"),
        "up/kernel": ("embed", "mlp"),
        "down/kernel": ("mlp", "embed"),
    }

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return self.AXES

    def part(self, ways: int) -> SwiGLU:
        """The same layer with one `ways`-th of its hidden units; results of all parts add up, see `added`."""
        return self.clone(hidden=self.hidden // ways)

    @nn.compact
    def __call__(self, x: Array, *, valid: Array | None = None, train: bool = False) -> Array:
        """[B, N, D] -> [B, N, D]. Tokens do not meet here, so neither `valid` nor `train` changes anything."""
        del valid, train

        def dense(width: int, name: str) -> nn.Dense:
            init = nn.initializers.xavier_uniform()
            return nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)

        with jax.named_scope("up"):
            hidden = jax.nn.silu(dense(self.hidden, "gate")(x)) * dense(self.hidden, "up")(x)
        with jax.named_scope("down"):
            return dense(x.shape[-1], "down")(hidden)

    def grouped(
        self,
        params: Mapping[str, Any],
        rows: Array,
        sizes: Array,
        *,
        implementation: Implementation | None = None,
    ) -> Array:
        """As experts on sorted rows: params each [E, ...], rows [M, D] in groups of `sizes` [E] -> [M, D]."""
        params, rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), (params, rows))

        def dense(name: str, x: Array) -> Array:
            return grouped_matmul(x, params[name]["kernel"], sizes, implementation=implementation)

        with jax.named_scope("up"):
            hidden = jax.nn.silu(dense("gate", rows)) * dense("up", rows)
        with jax.named_scope("down"):
            return dense("down", hidden)


def ffn(defaults: FFNDefaults, *, hidden: int | None = None) -> SwiGLU:
    """`block(ffn=swiglu(hidden=...))`; by default the model's own, or 2/3 of its MLP's width, which costs as much."""
    return SwiGLU(width_of(hidden, defaults.gated or round(defaults.hidden * 2 / 3)), defaults.dtype)
