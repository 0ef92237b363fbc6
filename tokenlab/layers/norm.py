"""Norms over the width, by name: layer norm and root-mean-square norm, statistics in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

NormName: TypeAlias = Literal["layer", "rms"]

NormPlacement: TypeAlias = Literal["pre", "res_post", "post"]
"""Where the norm of half a block stands: before what is added, after it, or after the sum (see `layers.block`)."""


class LayerNorm(nn.Module):
    """Layer norm over D with scale and bias, statistics in float32 (Ba et al. 2016, arXiv 1607.06450).

    Attributes:
      dtype: of the result; parameters stay float32.
      eps: added to the variance, > 0.
    """

    dtype: Any = jnp.float32
    eps: float = 1e-6

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {"scale": (None,), "bias": (None,)}

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return self.AXES

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, width, jnp.float32)
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over D, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).

    Attributes:
      dtype: of the result; parameters stay float32.
      eps: added to the mean square, > 0.
    """

    dtype: Any = jnp.float32
    eps: float = 1e-6

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {"scale": (None,)}

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return self.AXES

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        square = (wide * wide).mean(axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(square + self.eps) * scale).astype(self.dtype)


NORMS: Mapping[NormName, type[LayerNorm] | type[RMSNorm]] = {"layer": LayerNorm, "rms": RMSNorm}
