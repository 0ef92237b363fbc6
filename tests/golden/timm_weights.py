"""Weights of a timm-style pre-norm ViT, as the golden files hold them, into the state of `tokenlab.models.vit.ViT`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np


def to_state(params: Mapping[str, np.ndarray], depth: int, heads: int) -> dict[str, Any]:
    """timm names -> {"embed", "blocks", "head"}; torch layouts ([out, in], [out, in, h, w]) -> ours."""
    width = params["cls_token"].shape[-1]

    def block(name: str) -> np.ndarray:
        return np.stack([params[f"blocks.{k}.{name}"] for k in range(depth)])

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": block(f"{name}.weight").transpose(0, 2, 1), "bias": block(f"{name}.bias")}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": block(f"{name}.weight"), "bias": block(f"{name}.bias")}

    qkv = block("attn.qkv.weight").reshape(depth, 3, heads, width // heads, width)
    qkv_bias = block("attn.qkv.bias").reshape(depth, 3, heads, width // heads)
    attention = {
        name: {"kernel": qkv[:, i].transpose(0, 3, 1, 2), "bias": qkv_bias[:, i]}
        for i, name in enumerate(("query", "key", "value"))
    }
    out = block("attn.proj.weight").transpose(0, 2, 1).reshape(depth, heads, width // heads, width)
    attention["out"] = {"kernel": out, "bias": block("attn.proj.bias")}
    patch = params["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    state = {
        "embed": {
            "patch": {"kernel": patch.reshape(-1, width), "bias": params["patch_embed.proj.bias"]},
            # timm adds a position to CLS too; here its embedding is all there is.
            "cls": params["cls_token"][0] + params["pos_embed"][0, :1],
            "position": params["pos_embed"][0, 1:],
        },
        "blocks": {
            "attention_norm": norm("norm1"),
            "attention": attention,
            "ffn_norm": norm("norm2"),
            "mlp": {"up": dense("mlp.fc1"), "down": dense("mlp.fc2")},
        },
        "head": {
            "norm": {"scale": params["norm.weight"], "bias": params["norm.bias"]},
            "classifier": {"kernel": params["head.weight"].T, "bias": params["head.bias"]},
        },
    }
    return _map(jnp.asarray, state)


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


def _map(function: Any, tree: Any) -> Any:
    return {k: _map(function, v) for k, v in tree.items()} if isinstance(tree, dict) else function(tree)
