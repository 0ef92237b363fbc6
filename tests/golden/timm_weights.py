"""Weights by timm's names, as the golden files hold them, into the state of a ViT, and its gradients back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.interop import vit_weights


def to_state(params: Mapping[str, np.ndarray], heads: int) -> dict[str, Any]:
    """timm names -> {"embed", "blocks", "head"}, as `tokenlab import` does it."""
    return jax.tree.map(jnp.asarray, vit_weights.read(params).state(heads))


def gradients_like(
    state: Mapping[str, Any], names: list[str], depth: int, width: int
) -> dict[str, np.ndarray]:
    """Gradients in our layout back under the timm names the golden files use (those of `names`)."""
    blocks, embed, head = state["blocks"], state["embed"], state["head"]
    found: dict[str, np.ndarray] = {
        "cls_token": np.asarray(embed["cls"])[None],
        "pos_embed": np.concatenate([embed["cls"], embed["position"]])[None],
        "norm.weight": np.asarray(head["norm"]["scale"]),
        "norm.bias": np.asarray(head["norm"]["bias"]),
        "head.weight": np.asarray(head["classifier"]["kernel"]).T,
    }
    for k in range(depth):
        attention, mlp = blocks["attention"], blocks["mlp"]
        kernels = [
            np.asarray(attention[n]["kernel"][k]).reshape(width, width).T for n in ("query", "key", "value")
        ]
        biases = [np.asarray(attention[n]["bias"][k]).reshape(-1) for n in ("query", "key", "value")]
        found[f"blocks.{k}.attn.qkv.weight"] = np.concatenate(kernels)
        found[f"blocks.{k}.attn.qkv.bias"] = np.concatenate(biases)
        found[f"blocks.{k}.attn.proj.weight"] = (
            np.asarray(attention["out"]["kernel"][k]).reshape(width, width).T
        )
        found[f"blocks.{k}.attn.proj.bias"] = np.asarray(attention["out"]["bias"][k])
        found[f"blocks.{k}.mlp.fc1.weight"] = np.asarray(mlp["up"]["kernel"][k]).T
        found[f"blocks.{k}.mlp.fc1.bias"] = np.asarray(mlp["up"]["bias"][k])
    return {name: found[name] for name in names}
