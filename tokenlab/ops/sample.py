"""From logits to the next token: greedy, temperature, top-k and top-p, in static shapes."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import TokenLabError

TINY = 1e-30
"""The least temperature that is divided by; float32 has no reciprocal of much smaller ones."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
      temperature: the logits are divided by it; 0 takes the likeliest token.
      top_k: of the k likeliest tokens only; None for all. Ties at the last place stay in.
      top_p: of the likeliest tokens that together have at least this probability (nucleus sampling, Holtzman et al.
        2020, arXiv 1904.09751), after temperature and top_k; in (0, 1], the likeliest always stays in. None for all.

    Raises:
      TokenLabError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not real and (name, value) != ("top_p", None):
                raise TokenLabError(f"{name} is {value!r}; expected a number.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise TokenLabError(f"temperature is {self.temperature}; expected at least 0, where 0 is greedy.")
        whole = isinstance(self.top_k, numbers.Integral) and not isinstance(self.top_k, bool)
        if self.top_k is not None and not (whole and self.top_k >= 1):
            raise TokenLabError(
                f"top_k is {self.top_k!r}; expected a number of tokens >= 1, or None for all."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise TokenLabError(
                f"top_p is {self.top_p!r}; expected a probability in (0, 1], or None for all."
            )


def sample(logits: Array, key: Array, how: Sampling) -> Array:
    """One token an example: logits [B, V] -> [B] int32. Greedy sampling does not read the key; ties: the lower id."""
    logits = logits.astype(jnp.float32)
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, allowed(logits, how), axis=-1).astype(jnp.int32)


def allowed(logits: Array, how: Sampling) -> Array:
    """What is sampled from, [B, V] float32: logits less the largest, over the temperature; -inf: left out."""
    logits = logits.astype(jnp.float32)
    # With the largest at 0 no temperature, however small, makes it infinite.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / max(how.temperature, TINY)
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, how.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if how.top_p is not None and how.top_p < 1:
        order = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(order, axis=-1)
        # A token stays while those likelier than it do not reach the wanted probability by themselves.
        needed = jnp.cumsum(share, axis=-1) - share < how.top_p
        least = jnp.min(jnp.where(needed, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits
