"""A gate that is exactly one in value and the score in gradient."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


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
