"""mlp: the dense two-layer feed-forward network of the transformer (Vaswani et al. 2017, arXiv 1706.03762)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.layers.activation import activation
from tokenlab.layers.ffn import FFNDefaults, width_of
from tokenlab.layers.initialize import kernel_initializer
from tokenlab.ops.grouped import Implementation, group_of, grouped_matmul


class MLP(nn.Module):
    """y = act(x W_up + b_up) W_down + b_down on every token alone.

    Attributes:
      hidden: width F of the hidden layer.
      activation: its name.
      kernel_std: as of `tokenlab.layers.attention.Attention`.
      dtype: compute dtype; parameters stay float32.
    """

    hidden: int
    activation: str = "gelu"
    dtype: Any = jnp.float32
    kernel_std: float | None = None

    tokenwise: ClassVar[bool] = True
    added: ClassVar[tuple[str, ...]] = ("down/bias",)
    rounded: ClassVar[tuple[str, ...]] = ("up/kernel", "down/kernel")  # biases too, but they are small
    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "up/kernel": ("embed", "mlp"),
        "up/bias": ("mlp",),
        "down/kernel": ("mlp", "embed"),
        "down/bias": (None,),
    }

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return self.AXES

    def part(self, ways: int) -> MLP:
        """The same layer with one `ways`-th of its hidden units; results of all parts add up, see `added`."""
        return self.clone(hidden=self.hidden // ways)

    @nn.compact
    def __call__(self, x: Array, *, valid: Array | None = None, train: bool = False) -> Array:
        """[B, N, D] -> [B, N, D]. Tokens do not meet here, so neither `valid` nor `train` changes anything."""
        del valid, train
        with jax.named_scope("up"):
            init = kernel_initializer(self.kernel_std)
            hidden = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=init, name="up")(x)
        hidden = activation(self.activation)(hidden)
        with jax.named_scope("down"):
            return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, name="down")(hidden)

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
        group = group_of(sizes, rows.shape[0])

        def dense(name: str, x: Array) -> Array:
            bias = params[name]["bias"].at[group].get(mode="fill", fill_value=0)
            return grouped_matmul(x, params[name]["kernel"], sizes, implementation=implementation) + bias

        with jax.named_scope("up"):
            hidden = activation(self.activation)(dense("up", rows))
        with jax.named_scope("down"):
            return dense("down", hidden)


def ffn(defaults: FFNDefaults, *, hidden: int | None = None) -> MLP:
    """`block(ffn=mlp(hidden=...))`: `hidden` in place of the model's own."""
    return MLP(width_of(hidden, defaults.hidden), defaults.activation, defaults.dtype, defaults.kernel_std)
