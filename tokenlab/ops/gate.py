"""Gates: how much of what was done to a token counts, by its score."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

Gate: TypeAlias = Literal["raw", "sigmoid", "tanh", "tanh_scaled", "one"]


def weight(score: Array, gate: Gate) -> Array:
    """g of a score, in its shape: itself, sigmoid, tanh, 0.2 tanh(score) + 1 (p-MoD, arXiv 2412.04449), or one."""
    return {
        "raw": lambda r: r,
        "sigmoid": jax.nn.sigmoid,
        "tanh": jnp.tanh,
        "tanh_scaled": lambda r: 0.2 * jnp.tanh(r) + 1.0,
        "one": jnp.ones_like,
    }[gate](score)


def weighed(x: Array, done: Array, weight: Array) -> Array:
    """x + weight (done - x), computed in float32, in the dtype of x. x, done: [B, K, D]; weight: [B, K]."""
    added = done.astype(jnp.float32) - x.astype(jnp.float32)
    return (x.astype(jnp.float32) + weight[..., None] * added).astype(x.dtype)


def straight_through(x: Array, change: Array, gate: Array, *, protected: int = 0) -> Array:
    """x, unchanged bit for bit, with the gradient of `x + change * (gate - value of gate)`.

    Hard selection gives its score no gradient. This lends it one: d/dgate = <gradient of x, change>, the first-order
    effect of letting `change` weigh a little more (straight-through estimation, Bengio et al. 2013, arXiv 1308.3432).

    Args:
      x: [B, K, D].
      change: [B, K, D], what the gate stands before: x itself, or what a wrapped body added to it.
      gate: [B, K], float32.
      protected: the first `protected` tokens have no gate.

    Returns:
      [B, K, D] in the dtype of x.
    """
    slack = gate - lax.stop_gradient(gate)  # exactly 0
    slack = jnp.where(jnp.arange(gate.shape[1]) < protected, 0.0, slack)
    return x + change * slack[..., None].astype(x.dtype)
