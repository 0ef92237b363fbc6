"""jumbo: the special tokens as one wide token with a wide MLP of its own (Fuller et al., ICLR 2026, arXiv 2502.15021).

Claim: a ViT-nano with a Jumbo token is 13 points better on ImageNet-1K than one with 16 registers (the authors'
abstract); the wider the ViT, the smaller the gain: about 4 points at tiny, 0.8 at small.

In a narrow ViT the whole image has to fit into one CLS token of width D. Here it gets J D: J pieces of width D stand in
front of the patches for attention, and are joined for a feed-forward layer of their own. After attention, in a block,

    z = join(pieces)                          [B, J D], the D features of piece 0 first
    z = z + W_down gelu(W_up LN(z))           W_up [J D, m J D], m = 4, exact GELU
    p = p + MLP(LN(p))                        [B, N, D], the patches alone

W_up and W_down are one copy for all blocks (`shared/jumbo`), the layer norm over J D is each block's own
(`blocks/jumbo_norm`). With shared=False each block has a copy: the authors find 0.3 points for 1.6 times the memory.

What a block computes, beside a dense one of J + N tokens: 16 J^2 D^2 FLOPs for the wide token in place of 16 J D^2 for
its pieces in the MLP; with J = 6 and N = 196 a narrow block costs about a twelfth more.

`block(special=jumbo)*12` is the paper's depth. The rest of its model are settings of `vit`: `registers=J` without a CLS
token, `head="special"`, exact GELU, norm_eps 1e-5 and a constant drop path; `configs/jumbo.py` has the published sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError, ShapeError
from tokenlab.layers.activation import activation
from tokenlab.layers.attention import Attention
from tokenlab.layers.block import drop_path
from tokenlab.layers.ffn import FFNDefaults
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.layers.initialize import kernel_initializer
from tokenlab.layers.norm import LayerNorm
from tokenlab.layers.special import Special
from tokenlab.ops.pieces import join_pieces, split_pieces


class JumboMLP(nn.Module):
    """`JumboMLP()(z)` with z [B, J * D]: act(z W_up + b_up) W_down + b_down, hidden width m J D.

    Attributes:
      mult: m, at least 1.
      activation: its name; the paper has exact GELU.
      dtype: compute dtype; parameters stay float32.
      kernel_std: as of `tokenlab.layers.attention.Attention`.
    """

    mult: int = 4
    activation: str = "gelu"
    dtype: Any = jnp.float32
    kernel_std: float | None = None

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = MLP.AXES

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return self.AXES

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """[B, J * D] -> [B, J * D]. Raises ConfigError for a `mult` below 1."""
        check_mult(self.mult)
        width, init = z.shape[-1], kernel_initializer(self.kernel_std)
        with jax.named_scope("up"):
            hidden = nn.Dense(self.mult * width, dtype=self.dtype, kernel_init=init, name="up")(z)
        hidden = activation(self.activation)(hidden)
        with jax.named_scope("down"):
            return nn.Dense(width, dtype=self.dtype, kernel_init=init, name="down")(hidden)


class JumboBlock(nn.Module):
    """One block on plain arrays: `JumboBlock(num_heads=3)(pieces, patches, feed)`.

    Its parameters have the names that a stack's have under `blocks/`, one entry of each.

    Attributes:
      num_heads: H; D must be a multiple of it.
      mlp_dim: hidden width of the patches' MLP; None for 4 D.
      drop_path: rate of all three residual branches, in [0, 1); in training it needs the rng "drop_path".
      activation: of the patches' MLP.
      norm_eps: of the three layer norms.
      dtype: compute dtype; parameters stay float32.
    """

    num_heads: int
    mlp_dim: int | None = None
    drop_path: float = 0.0
    activation: str = "gelu"
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, pieces: Array, patches: Array, feed: Callable[[Array], Array], *, train: bool = False
    ) -> tuple[Array, Array]:
        """The pieces and the patches after the block.

        Args:
          pieces: [B, J, D].
          patches: [B, N, D].
          feed: [B, J * D] -> [B, J * D], such as a bound `JumboMLP`; the same one in every block shares its weights.
          train: drop path on.

        Raises:
          ShapeError: arrays that do not fit each other, or no piece.
        """
        alike = pieces.ndim == patches.ndim == 3 and pieces.shape[::2] == patches.shape[::2]
        if not alike or pieces.shape[1] < 1:
            raise ShapeError(
                f"JumboBlock: pieces {pieces.shape} and patches {patches.shape}; expected [B, J, D] with J >= 1 and "
                "[B, N, D]."
            )
        count, width = pieces.shape[1:]

        def norm(name: str, x: Array) -> Array:
            return LayerNorm(self.dtype, self.norm_eps, name=f"{name}_norm")(x)

        def drop(y: Array) -> Array:
            if not (train and self.drop_path):
                return y
            return drop_path(y, jnp.float32(self.drop_path), self.make_rng("drop_path"))

        tokens = norm("attention", jnp.concatenate([pieces, patches], axis=1))
        mixed = drop(Attention(self.num_heads, dtype=self.dtype, name="attention")(tokens))
        pieces, patches = pieces + mixed[:, :count], patches + mixed[:, count:]
        wide = split_pieces(feed(norm("jumbo", join_pieces(pieces))), count)
        mlp = MLP(self.mlp_dim or 4 * width, self.activation, self.dtype, name="mlp")
        return pieces + drop(wide), patches + drop(mlp(norm("ffn", patches)))


def check_mult(mult: int) -> None:
    """Raise ConfigError unless the hidden width is at least the width."""
    if isinstance(mult, bool) or not isinstance(mult, int) or mult < 1:
        raise ConfigError(f"jumbo: mult must be a whole number of at least 1; got {mult!r}.")


def special(defaults: FFNDefaults, *, mult: int = 4, shared: bool = True) -> Special:
    """`block(special=jumbo(mult=4, shared=True))`, with the model's activation."""
    check_mult(mult)
    return Special(JumboMLP(mult, defaults.activation, defaults.dtype, defaults.kernel_std), shared)


# A block behind them lets what the last of them gives the patches reach the CLS token.
special.examples = (
    "block(special=jumbo)*2 + block",
    "block + block(special=jumbo(mult=2, shared=False)) + block",
)
BENCHMARK = {"CLS alone": "block(special=jumbo)*12"}
