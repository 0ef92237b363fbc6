"""The two ends of a language model: ids to features, features to logits over the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from tokenlab.layers.norm import NORMS, NormName


class TokenEmbed(nn.Module):
    """A row of a table for each id.

    Attributes:
      rows: V, ids are in [0, V).
      width: D.
      dtype: of the result; the table stays float32.
    """

    rows: int
    width: int
    dtype: Any = jnp.float32

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {"table": ("vocab", "embed")}

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return self.AXES

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """[B, N] int -> [B, N, D]; an id outside the table gives NaN."""
        table = self.param("table", nn.initializers.normal(0.02), (self.rows, self.width), jnp.float32)
        outside = jnp.where(ids < 0, self.rows, ids)  # or they would count from the end
        return table.astype(self.dtype).at[outside].get(mode="fill", fill_value=jnp.nan)


class LMHead(nn.Module):
    """Final norm and a linear map to the vocabulary, or to the embedding's rows where the two are tied.

    Attributes:
      outputs: ids a token can be followed by.
      rows: V, at least `outputs`: rows beyond, which only fill the table up to a multiple, get the logit -1e9.
      tied: use the embedding's table (Press and Wolf 2017, arXiv 1608.05859).
      norm, norm_eps: of the final norm.
      dtype: compute dtype of the product; it adds up in float32.
    """

    outputs: int
    rows: int
    tied: bool
    norm: NormName = "rms"
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        norm = {f"norm/{name}": axes for name, axes in NORMS[self.norm].AXES.items()}
        return norm if self.tied else {**norm, "kernel": ("embed", "vocab")}

    @nn.compact
    def __call__(self, x: Array, table: Array | None = None) -> tuple[Array, Array]:
        """Features [B, N, D] -> logits [B, N, V] float32, normed features [B, N, D].

        `table` [V, D] is the embedding's, read when `tied`.
        """
        x = NORMS[self.norm](self.dtype, self.norm_eps, name="norm")(x)
        if self.tied:
            kernel = table.T
        else:
            init = nn.initializers.normal(0.02)
            kernel = self.param("kernel", init, (x.shape[-1], self.rows), jnp.float32)
        logits = jnp.einsum("bnd,dv->bnv", x, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        if self.rows > self.outputs:
            logits = jnp.where(jnp.arange(self.rows) < self.outputs, logits, -1e9)
        return logits, x
