"""The end of a model: final norm, one vector an example, logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from tokenlab.core.tokens import Tokens
from tokenlab.layers.norm import LayerNorm
from tokenlab.ops.pieces import join_pieces

Pool: TypeAlias = Literal["cls", "mean", "special"]


def pooled_mean(x: Array, tokens: Tokens) -> Array:
    """Mean over the unprotected tokens, padding left out, merged tokens weighing what they stand for.

    Args:
      x: features [B, N, D].
      tokens: their facts.

    Returns:
      [B, D], float32. With sizes all 1 the same bits as without sizes.
    """
    x = x[:, tokens.protected :].astype(jnp.float32)
    weight = jnp.ones(x.shape[:2], jnp.float32) if tokens.size is None else tokens.size[:, tokens.protected :]
    if tokens.valid is not None:
        weight = jnp.where(tokens.valid[:, tokens.protected :], weight, 0.0)
    total = jnp.sum(x * weight[..., None], axis=1)
    return total / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)[:, None]


class Head(nn.Module):
    """Final layer norm, pooling and a linear classifier.

    Attributes:
      outputs: number of logits.
      pool: "cls" takes the first token, "mean" see `pooled_mean`, "special" joins the J special tokens and that mean to
        one vector of width (J + 1) D, as in Jumbo (Fuller et al. 2026, arXiv 2502.15021).
      dtype: compute dtype of the norm; the classifier runs in float32.
      norm_eps: eps of the norm.
      bias: initial value of the classifier's biases.
    """

    outputs: int
    pool: Pool
    dtype: Any = jnp.float32
    norm_eps: float = 1e-6
    bias: float = 0.0

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "norm/scale": (None,),
        "norm/bias": (None,),
        "classifier/kernel": ("embed", None),
        "classifier/bias": (None,),
    }

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return self.AXES

    @nn.compact
    def __call__(self, tokens: Tokens) -> tuple[Array, Array, Array]:
        """Tokens -> logits [B, outputs], what is pooled [B, D or (J + 1) D], both float32, normed tokens."""
        x = LayerNorm(self.dtype, self.norm_eps, name="norm")(tokens.x)
        pooled = x[:, 0].astype(jnp.float32) if self.pool == "cls" else pooled_mean(x, tokens)
        if self.pool == "special":
            pieces = join_pieces(x[:, : tokens.protected].astype(jnp.float32))
            pooled = jnp.concatenate([pieces, pooled], axis=1)
        logits = nn.Dense(
            self.outputs,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.bias),
            name="classifier",
        )(pooled)
        return logits, pooled, x
