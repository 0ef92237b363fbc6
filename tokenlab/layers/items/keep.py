"""keep: the best-scored tokens go on, the rest is dropped for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jax import Array

from tokenlab.core.tokens import Tokens
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.item import Amount, Body, Item, Params, Score, choose, kept
from tokenlab.layers.scores.norm import Norm
from tokenlab.ops import carry
from tokenlab.ops.gate import straight_through


@dataclass(frozen=True)
class Keep(Item):
    """`keep(0.5, by=cls)`: keep half of the unprotected tokens; the blocks that follow are cheaper by what is gone.

    Attributes:
      amount: how many to keep: an int in 1..present, or a fraction in (0, 1] of the unprotected tokens present.
      by: the score; the larger, the sooner kept. Ties go to the earlier token.
    """

    amount: Amount
    by: Score = Norm()

    identity: ClassVar[str] = "block + keep(1.0, by=cls) + block"
    examples: ClassVar[tuple[str, ...]] = (
        "block + keep(0.5, by=cls) + block",
        "keep(5, by=random) + block*2",
        "block + keep(0.5, by=learned) + block",
        "block(between=keep(0.5, by=cls)) + block",
    )

    def count(self, present: int, protected: int) -> int:
        """K plus the protected tokens."""
        return protected + kept(self.amount, present, protected, "keep")

    def __call__(
        self,
        params: Params,
        tokens: Tokens,
        context: Context,
        readings: Mapping[str, Array],
        key: Array,
        body: Body | None = None,
    ) -> tuple[Tokens, Aux]:
        """[B, N, ...] -> [B, protected + K, ...], in the order of position."""
        wanted = kept(self.amount, tokens.count, tokens.protected, "keep")
        indices, gate = choose(self.by, params, tokens, readings, key, wanted)
        part = carry.take(tokens, indices)
        if gate is not None:  # the score learns through what it keeps
            part = part.replace(x=straight_through(part.x, part.x, gate, protected=part.protected))
        return part, Aux()


item = Keep
BENCHMARK = {
    "after 2": "block*2 + keep(0.5, by=cls) + block*10",
    "after 4": "block*4 + keep(0.5, by=cls) + block*8",
}
