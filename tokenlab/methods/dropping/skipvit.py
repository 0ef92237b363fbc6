"""skipvit: patches that CLS attends to little go around a run of blocks and come back (Ataiefard et al., 2401.15293).

Claim: ViT-small on ImageNet-1K, from scratch: 55 % of the tokens skipped, 13.23 % more training throughput, no accuracy
lost (the authors' abstract, arXiv, 2024). There is no public code.

Behind block d, with n patches and the share rho that is kept:

    s_j = mean over heads of softmax(q_CLS k^T / sqrt(Dh))_j      without CLS's own; no gradient
    K = ceil(rho n);  kept = the K largest s_j, in raster order
    blocks d + 1 ... r - 1 on [CLS; kept]
    before block r the others return to their places as they left block d

    block*4 + skipvit(0.45)(block*7) + block                        d = 3, r = 11 of 12 (`span`)
    block*3 + skipvit(0.45, split=pre_mlp)(block*8) + block         the same, parted within block d

With `split=pre_mlp` tokens leave between attention and feed-forward of block d, as EViT's do, so that block d is the
first of the body: its attention is that of all tokens, its feed-forward layer that of the kept ones, and the others
return as they left its attention. With `rejoin=False` it is `block(between=evit(0.45, fused=False)) + block*7`.

Known from the abstract: the share skipped, CLS's softmax attention as score, that skipped tokens return, and that
nothing is learned. Assumed, as the paper's text was not at hand, and so a field or a part of the stack: d and r, the
mean over heads, the split at the output of block d (`split`), that dropping begins at once (`config.stack_vars` warms
up: "0:1.0, 10%:0.45"), and that evaluation skips too (`train_only=True` makes it dense).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from jax import Array, lax

from tokenlab.core.errors import ConfigError, TokenLabError, suggest
from tokenlab.core.tokens import Tokens
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.item import Amount, Body, Params, Score, kept
from tokenlab.layers.items.skip import Skip
from tokenlab.layers.scores.cls import Cls
from tokenlab.ops.attention import attention_rows

Split = Literal["post_block", "pre_mlp"]


def cls_attention_scores(query: Array, key: Array, *, num_prefix: int = 1) -> Array:
    """s above: how much the first token attends to each patch, from the clean softmax, mean over heads.

    Args:
      query, key: [B, N, H, Dh] and [B, N, G, Dh] of block d, CLS first.
      num_prefix: leading tokens that are no patches, at least 1; they are in the softmax and not in the result.

    Returns:
      [B, N - num_prefix], float32, without gradient. With what the prefix gets, a row sums to 1.
    """
    if not 1 <= num_prefix <= key.shape[1]:
        raise TokenLabError(
            f"skipvit: num_prefix is {num_prefix} of {key.shape[1]} tokens: expected 1 or more, as CLS asks."
        )
    rows = attention_rows(query[:, :1], key)[:, :, 0].mean(axis=1)
    return lax.stop_gradient(rows[:, num_prefix:])


@dataclass(frozen=True)
class SkipViT(Skip):
    """`skipvit(0.45)(block*7)`: 45 % of the patches pass through seven blocks, all are there again behind them.

    Attributes:
      keep: rho in (0, 1], of which K = ceil(rho n); or K itself, an int.
      by: the score; `random` is the paper's control, `learned` another choice.
      rejoin: False drops the others for good, to see what the skip connection is worth.
      split: tokens leave "post_block", behind the block just before the body, or "pre_mlp", between the halves of the
        body's first block.
    """

    keep: Amount = 0.45
    by: Score = Cls()
    rejoin: bool = True
    split: Split = "post_block"

    identity: ClassVar[str] = "block + skipvit(1.0)(block) + block"
    examples: ClassVar[tuple[str, ...]] = (
        "block + skipvit(0.45)(block*2) + block",
        "block + skipvit(5, rejoin=False)(block) + block",
        "block + skipvit(0.45, by=learned, train_only=True)(block) + block",
        "skipvit(0.45, split=pre_mlp)(block*2) + block",
    )

    @property
    def halves(self) -> bool:
        """The first block of the body is block d, parted before its feed-forward layer."""
        return self.split == "pre_mlp"

    def kept(self, present: int, protected: int) -> int:
        """K = ceil(rho n), of the tokens that are not protected."""
        free = present - protected
        if isinstance(self.keep, int):
            return kept(self.keep, present, protected, "skipvit: keep")
        if not 0 < self.keep <= 1 or free < 1:
            raise TokenLabError(
                f"skipvit: keep is the share {self.keep} of {free} unprotected tokens: expected a share in (0, 1] of "
                "at least one."
            )
        return math.ceil(round(self.keep * free, 6))  # 0.55 * 20 is 11.000000000000002 in binary

    def count(self, present: int, protected: int) -> int:
        """All; without `rejoin` those that were kept."""
        return present if self.rejoin else self.inside(present, protected)

    def __call__(
        self,
        params: Params,
        tokens: Tokens,
        context: Context,
        readings: Mapping[str, Array],
        key: Array,
        body: Body | None = None,
    ) -> tuple[Tokens, Aux]:
        """[B, N, ...] -> [B, N, ...], or [B, protected + K, ...] without `rejoin`."""
        if self.rejoin:
            return super().__call__(params, tokens, context, readings, key, body)
        done, _, aux = self.around(params, tokens, readings, key, body)
        return done, aux


def span(
    item: str = "skipvit(0.45)",
    *,
    layers: int = 12,
    drop: int = 3,
    back: int = 11,
    split: Split = "post_block",
) -> str:
    """The stack in which tokens leave behind block d = `drop` and return before block r = `back`, counted from 0.

    d = 3 and r = 11 are assumed, see the module. With r = d + 1 nothing lies between, and the stack is the dense one;
    with `split` "pre_mlp", where tokens leave within block d, there they skip its feed-forward layer alone.

    Args:
      item: with its arguments, but for `split`.
      layers: L.
      drop, back: d and r.
      split: see `SkipViT`.

    Raises:
      ConfigError: not 0 <= d < r <= L, or another `split`.
    """
    if split not in get_args(Split):
        raise ConfigError(f"skipvit: split is {split!r}.{suggest(split, get_args(Split))}")
    if not 0 <= drop < back <= layers:
        raise ConfigError(
            f"skipvit: tokens leave behind block {drop} and return before block {back} of {layers}: expected "
            "0 <= drop < back <= layers."
        )
    if split == "pre_mlp":
        item, drop = f"{item.removesuffix(')')}, split=pre_mlp)", drop - 1
    elif back == drop + 1:
        return f"block*{layers}"
    before, behind = ([f"block*{count}"] if count else [] for count in (drop + 1, layers - back))
    return " + ".join([*before, f"{item}(block*{back - drop - 1})", *behind])


item = SkipViT
BENCHMARK = {"55 % around 7 of 12": span()}
