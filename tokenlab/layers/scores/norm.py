"""norm: the Euclidean length of a token's features; needs no block before it and no parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from tokenlab.core.tokens import Tokens
from tokenlab.layers.item import Params, Score


@dataclass(frozen=True)
class Norm(Score):
    """||x||_2 of the residual stream; long tokens are kept."""

    def __call__(self, params: Params, tokens: Tokens, readings: Mapping[str, Array], key: Array) -> Array:
        """[B, N], float32. Squared length ranks the same and saves the root."""
        del params, readings, key
        x = lax.stop_gradient(tokens.x).astype(jnp.float32)
        return jnp.sum(x * x, axis=-1)


score = Norm
