"""cls: how much the CLS token attends to a token, mean over heads (EViT, Liang et al. 2022, arXiv 2202.07800)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jax import Array, lax

from tokenlab.core.tokens import Tokens
from tokenlab.layers.attention import Reading, cls_attention
from tokenlab.layers.item import Params, Score


@dataclass(frozen=True)
class Cls(Score):
    """The CLS row of the softmax attention of the block just before; only that row is computed."""

    reads: ClassVar[Mapping[str, Reading]] = {"cls_attention": cls_attention}
    needs_cls: ClassVar[bool] = True

    def __call__(self, params: Params, tokens: Tokens, readings: Mapping[str, Array], key: Array) -> Array:
        """[B, N], float32, in [0, 1]."""
        del params, tokens, key
        return lax.stop_gradient(readings["cls_attention"])


score = Cls
