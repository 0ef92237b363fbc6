"""Where special tokens (CLS, registers, the pieces of a Jumbo token) look in the last block, as a map for display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.layers.attention import Projections, special_attention
from tokenlab.layers.context import Context
from tokenlab.layers.execute import read_last


def attention_map(model: Any, params: Mapping[str, Any], image: Array) -> Array:
    """Attention of the special tokens to each patch in the last block, averaged over heads and over them.

    Args:
      model: with `embed`, `grid` and `program`, see `tokenlab.models.vit.ViT`; its stack ends with a block.
      params: its weights.
      image: [B, H, W, C].

    Returns:
      [B, rows, columns], float32, >= 0; what the special tokens give each other is not in it, so a map adds up to less
      than 1. 0 where a patch was dropped; merged patches stand where the first of them was.

    Raises:
      ShapeError: no special tokens, images of another size, or a stack that does not end with a block.
    """
    tokens = model.embed.apply({"params": params["embed"]}, image)
    if model.program.merges:
        tokens = tokens.replace(size=jnp.ones(tokens.position.shape, jnp.float32))
    readings = {"attention": special_attention, "position": _position}
    found = read_last(model.program, params, tokens, Context(jax.random.key(0)), readings)
    rows = jnp.arange(tokens.batch)[:, None]
    full = jnp.zeros(tokens.position.shape, jnp.float32).at[rows, found["position"]].set(found["attention"])
    return full[:, tokens.protected :].reshape(tokens.batch, *model.grid)


def _position(projections: Projections, tokens: Any) -> Array:
    del projections
    return tokens.position
