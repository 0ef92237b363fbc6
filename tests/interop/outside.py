"""Weights of others: golden files made with PyTorch, and tiny random ones that fit the digits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = sorted(path.stem.removeprefix("vit_weights_") for path in GOLDEN.glob("vit_weights_*.npz"))


@dataclass(frozen=True)
class Golden:
    """What PyTorch made of random weights; see tests/golden/make_vit_weights.py."""

    weights: dict[str, np.ndarray]
    images: np.ndarray
    tokens: np.ndarray
    logits: np.ndarray | None
    expected: Mapping[str, Any]


def golden(name: str) -> Golden:
    arrays = dict(np.load(GOLDEN / f"vit_weights_{name}.npz"))
    weights = {key[8:]: value for key, value in arrays.items() if key.startswith("weights/")}
    expected = json.loads(str(arrays["expected"]))
    return Golden(weights, arrays["images"], arrays["tokens"], arrays.get("logits"), expected)


def timm_like(
    draw: np.random.Generator, width: int = 16, depth: int = 3, classes: int = 10
) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 17, width),
        "patch_embed.proj.weight": (width, 1, 2, 2),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (classes, width),
        "head.bias": (classes,),
    }
    for k in range(depth):
        for name, outputs, inputs in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 2 * width, width),
            ("mlp.fc2", width, 2 * width),
        ):
            shapes |= {f"blocks.{k}.{name}.weight": (outputs, inputs), f"blocks.{k}.{name}.bias": (outputs,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{k}.{name}.weight": (width,), f"blocks.{k}.{name}.bias": (width,)}
    return {name: (0.3 * draw.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
