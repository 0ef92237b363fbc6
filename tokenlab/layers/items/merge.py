"""merge: the most similar tokens become one (ToMe, Bolya et al. 2023, arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jax import Array

from tokenlab.core.errors import TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.layers.attention import Reading, mean_key
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.item import Amount, Body, Item, Params
from tokenlab.ops import carry
from tokenlab.ops.merge import bipartite_soft_matching


@dataclass(frozen=True)
class Merge(Item):
    """`merge(8)`: eight tokens fewer, by bipartite soft matching on the keys of the block just before.

    Every other token looks for the most similar of the rest; the `amount` closest pairs become one token, the average
    weighted by how many inputs each stood for. Attention that follows adds log(size) to the logits of merged keys.
    Tokens stay in the order of position. `block(between=merge(8))` merges between attention and feed-forward, as the
    paper does; `block + merge(8)` after the block.

    Attributes:
      amount: how many merge away: an int >= 0, or a fraction in [0, 0.5] of the unprotected tokens; at most half of
        these can.
    """

    amount: Amount

    reads: ClassVar[Mapping[str, Reading]] = {"mean_key": mean_key}
    merges: ClassVar[bool] = True
    order: ClassVar[str] = "position"
    identity: ClassVar[str] = "block + merge(0) + block"
    examples: ClassVar[tuple[str, ...]] = (
        "block + merge(4) + block + merge(3) + block",
        "(block + merge(0.25))*2",
        "block(between=merge(4))*2",
    )

    def merged(self, present: int, protected: int) -> int:
        """r, the tokens that merge away."""
        free = present - protected
        amount, most = self.amount, free // 2
        if isinstance(amount, float) and 0 <= amount <= 0.5:
            return min(round(amount * free), most)
        if isinstance(amount, int) and 0 <= amount <= most:
            return amount
        given = f"{amount!r} of {free} unprotected tokens"
        raise TokenLabError(
            f"merge: {given}: expected a count in 0..{most} or a fraction in [0.0, 0.5]; "
            "a token can only merge into one of the other half."
        )

    def count(self, present: int, protected: int) -> int:
        """N - r."""
        return present - self.merged(present, protected)

    def __call__(
        self,
        params: Params,
        tokens: Tokens,
        context: Context,
        readings: Mapping[str, Array],
        key: Array,
        body: Body | None = None,
    ) -> tuple[Tokens, Aux]:
        """[B, N, ...] -> [B, N - r, ...], sizes added up."""
        count = self.merged(tokens.count, tokens.protected)
        plan = bipartite_soft_matching(
            readings["mean_key"],
            count,
            protected=tokens.protected,
            valid=tokens.valid,
            order=self.order if count else "position",  # with nothing merged nothing moves
        )
        return carry.merge(tokens, plan), Aux()


item = Merge
BENCHMARK = {"8 a block": "block(between=merge(8))*12"}
