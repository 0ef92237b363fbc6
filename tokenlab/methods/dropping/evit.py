"""evit: keep what CLS attends to, fuse the rest into one token (Liang et al., ICLR 2022, arXiv 2202.07800).

Claim: DeiT-S on ImageNet keeps 79.5 % of 79.8 % top-1 at 3.0 of 4.6 GFLOPs (keep rate 0.7 at blocks 4, 7 and 10).

In a reducing block, between attention and feed-forward, with n tokens beside CLS:

    s_j = mean over heads of A[h, CLS, j]                 how much CLS attends to token j         (section 3.1)
    K = ceil(rate * n);  kept = the K largest s_j
    e = sum over dropped j of s_j * x_j                   one fused token, weights not renormalised   (section 3.2)
    x = [CLS, kept, e]

so `block(between=evit(0.7))` is the paper's block. Only the CLS row of the attention map is computed for the scores. A
fused token is an ordinary token at the next reduction. In training the rate falls along a cosine from 1 (`keep_rate`).

Here the kept tokens stay in the order of position (the authors sort them by score; attention does not care).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jax import Array, lax

from tokenlab.core.errors import TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.layers.attention import Reading, cls_attention
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.item import Body, Item, Params
from tokenlab.ops import carry, select
from tokenlab.ops.merge import fuse


@dataclass(frozen=True)
class EViT(Item):
    """Keep the `rate` most attended tokens; the rest becomes one token, or is dropped with `fused=False`.

    Attributes:
      rate: share of the unprotected tokens that is kept, in (0, 1], rounded up. With nothing to drop, nothing is done.
      fused: append the fused token.
    """

    rate: float
    fused: bool = True

    reads: ClassVar[Mapping[str, Reading]] = {"cls_attention": cls_attention}
    needs_cls: ClassVar[bool] = True
    identity: ClassVar[str] = "block(between=evit(1.0)) + block"
    examples: ClassVar[tuple[str, ...]] = (
        "block(between=evit(0.7))*2",
        "block + evit(0.5, fused=False) + block",
    )

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise TokenLabError(f"evit: rate must be in (0, 1]; got {self.rate}.")

    def kept(self, present: int, protected: int) -> int:
        """K = ceil(rate * n)."""
        free = present - protected
        if free < 1:
            raise TokenLabError("evit: there is no unprotected token to choose from.")
        return min(free, math.ceil(round(self.rate * free, 6)))  # 0.7 * 10 is 7.000000000000001 in binary

    def count(self, present: int, protected: int) -> int:
        """CLS, the kept, and the fused token when anything is dropped."""
        wanted = self.kept(present, protected)
        return protected + wanted + int(self.fused and wanted < present - protected)

    def reorders(self, present: int, protected: int) -> bool:
        """The fused token stands behind all others, also where it takes the place of a single one."""
        return self.fused and self.kept(present, protected) < present - protected

    def __call__(
        self,
        params: Params,
        tokens: Tokens,
        context: Context,
        readings: Mapping[str, Array],
        key: Array,
        body: Body | None = None,
    ) -> tuple[Tokens, Aux]:
        """[B, N, ...] -> [B, protected + K (+ 1), ...]."""
        scores = readings["cls_attention"]
        wanted = self.kept(tokens.count, tokens.protected)
        indices = select.top_k(
            lax.stop_gradient(scores), wanted, protected=tokens.protected, valid=tokens.valid
        )
        part = carry.take(tokens, indices)
        if not self.fused or wanted == tokens.free:
            return part, Aux()
        return carry.append_rest(part, tokens, indices, fuse(tokens.x, scores, indices)), Aux()


def keep_rate(step: int, *, rate: float, start: int, end: int) -> float:
    """The training schedule: 1 until `start`, then along a cosine down to `rate` at `end` (section 4.1).

    Args:
      step: of training, >= 0.
      rate: final keep rate in (0, 1].
      start, end: steps between which it falls.
    """
    if step < start:
        return 1.0
    if step >= end:
        return rate
    return rate + (1 - rate) * (math.cos(math.pi * (step - start) / (end - start)) + 1) / 2


item = EViT
BENCHMARK = {"0.7 at 4, 7, 10": "block*3 + (block(between=evit(0.7)) + block*2)*3"}
