"""learned: a linear score of the features, trained through a straight-through gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.tokens import Tokens
from tokenlab.layers.item import Axes, Params, Score


@dataclass(frozen=True)
class Learned(Score):
    """sigmoid(w . x / sqrt(D) + b), in [0, 1].

    Which tokens are kept is a hard choice without gradient. The score learns because items multiply what they keep by
    a gate whose value is exactly 1 and whose gradient is the score's (`straight_through`): a token whose features the
    loss wants larger gets a larger score.
    """

    def init(self, key: Array, width: int) -> Params:
        """A kernel [D] and a bias []."""
        return {"kernel": jax.random.normal(key, (width,)), "bias": jnp.zeros(())}

    def axes(self) -> Axes:
        """Small enough to be replicated."""
        return {"kernel": (None,), "bias": ()}

    def __call__(self, params: Params, tokens: Tokens, readings: Mapping[str, Array], key: Array) -> Array:
        """[B, N], float32."""
        del readings, key
        x = tokens.x.astype(jnp.float32)
        with jax.named_scope("router"):
            logits = jnp.einsum("bnd,d->bn", x, params["kernel"]) * x.shape[-1] ** -0.5
        return jax.nn.sigmoid(logits + params["bias"])


score = Learned
