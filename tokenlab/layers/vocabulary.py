"""The two ends of language models: ids to features, features to logits over the vocabulary or over classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from tokenlab.layers.activation import activation
from tokenlab.layers.block import dropout
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
        return looked_up(table.astype(self.dtype), ids)


def looked_up(table: Array, ids: Array) -> Array:
    """Rows of a table [V, D] for ids of any shape: [..., D], NaN for an id outside [0, V)."""
    outside = jnp.where(ids < 0, table.shape[0], ids)  # or they would count from the end
    return jnp.asarray(table).at[outside].get(mode="fill", fill_value=jnp.nan)


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


class EncoderEmbed(nn.Module):
    """Word, position and type of each token added up, then a layer norm (Devlin et al. 2019, arXiv 1810.04805, 3).

    Attributes:
      rows: V of the table of words.
      width: D.
      positions: places that have an embedding.
      types: kinds of segments that have one, 0 for none.
      norm_eps: of the norm.
      std: standard deviation of the fresh tables.
      dtype: of the result; norm and tables are float32.
    """

    rows: int
    width: int
    positions: int
    types: int = 2
    norm_eps: float = 1e-12
    std: float = 0.02
    dtype: Any = jnp.float32

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        norm = {f"norm/{name}": axes for name, axes in NORMS["layer"].AXES.items()}
        tables = {"table": ("vocab", "embed"), "position": (None, "embed")}
        return {**tables, **norm, **({"type": (None, "embed")} if self.types else {})}

    @nn.compact
    def __call__(self, ids: Array, position: Array, kind: Array | None = None) -> Array:
        """[B, N] int each -> [B, N, D]; `kind` None is 0 for all. What is outside its table gives NaN."""
        init = nn.initializers.truncated_normal(self.std)
        names = {"table": (self.rows, ids), "position": (self.positions, position)}
        if self.types:
            names["type"] = (self.types, jnp.zeros_like(ids) if kind is None else kind)
        x = jnp.zeros((), jnp.float32)
        for name, (rows, which) in names.items():
            table = self.param(name, init, (rows, self.width), jnp.float32)
            x = x + looked_up(table, which)
        return NORMS["layer"](self.dtype, self.norm_eps, name="norm")(x)


class MaskedLMHead(nn.Module):
    """Dense, activation, layer norm, then the embedding's rows and a bias (Devlin et al. 2019).

    Attributes:
      outputs, rows: as of `LMHead`.
      norm_eps: of the norms.
      activation: its name.
      final_norm: norm what comes in, for stacks whose blocks leave it unnormed.
      std: standard deviation of the fresh kernel.
      dtype: compute dtype of the products; the last adds up in float32.
    """

    outputs: int
    rows: int
    norm_eps: float = 1e-12
    activation: str = "gelu"
    final_norm: bool = False
    std: float = 0.02
    dtype: Any = jnp.float32

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        names = ("norm", "final_norm") if self.final_norm else ("norm",)
        norms = {f"{name}/{leaf}": axes for name in names for leaf, axes in NORMS["layer"].AXES.items()}
        return {**norms, "dense/kernel": ("embed", None), "dense/bias": (None,), "bias": ("vocab",)}

    @nn.compact
    def __call__(self, x: Array, table: Array) -> Array:
        """Features [B, K, D], the embedding's table [V, D] -> logits [B, K, V] float32."""
        if self.final_norm:
            x = NORMS["layer"](self.dtype, self.norm_eps, name="final_norm")(x)
        init = nn.initializers.truncated_normal(self.std)
        x = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, name="dense")(x)
        x = activation(self.activation)(x)
        x = NORMS["layer"](self.dtype, self.norm_eps, name="norm")(x)
        bias = self.param("bias", nn.initializers.zeros, (self.rows,), jnp.float32)
        logits = (
            jnp.einsum("bkd,vd->bkv", x, table.astype(self.dtype), preferred_element_type=jnp.float32) + bias
        )
        if self.rows > self.outputs:
            logits = jnp.where(jnp.arange(self.rows) < self.outputs, logits, -1e9)
        return logits


class PooledHead(nn.Module):
    """A dense layer with tanh on the first token, BERT's pooler, and a linear classifier in float32.

    Attributes:
      outputs: number of logits.
      norm_eps, final_norm, std, dtype: as of `MaskedLMHead`.
      dropout: rate before the classifier in training, in [0, 1).
    """

    outputs: int
    norm_eps: float = 1e-12
    final_norm: bool = False
    std: float = 0.02
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        norm = {f"final_norm/{leaf}": axes for leaf, axes in NORMS["layer"].AXES.items()}
        return {
            **(norm if self.final_norm else {}),
            "pooler/kernel": ("embed", None),
            "pooler/bias": (None,),
            "classifier/kernel": ("embed", None),
            "classifier/bias": (None,),
        }

    @nn.compact
    def __call__(self, first: Array, key: Array | None = None) -> tuple[Array, Array]:
        """First tokens [B, D] -> logits [B, outputs], pooled features [B, D], float32; `key` drops features."""
        init = nn.initializers.truncated_normal(self.std)
        if self.final_norm:
            first = NORMS["layer"](self.dtype, self.norm_eps, name="final_norm")(first)
        pooled = nn.Dense(first.shape[-1], dtype=self.dtype, kernel_init=init, name="pooler")(first)
        pooled = jnp.tanh(pooled.astype(jnp.float32))
        read = pooled if key is None or not self.dropout else dropout(pooled, self.dropout, key)
        return nn.Dense(self.outputs, kernel_init=init, name="classifier")(read), pooled
