"""keep: the best-scored tokens go on, the rest is dropped for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from tokenlab.core.tokens import Tokens
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.item import Amount, Body, Item, Params, Score, choose, kept
from tokenlab.layers.scores.norm import Norm
from tokenlab.ops import carry, select
from tokenlab.ops.gate import straight_through
from tokenlab.ops.gather import gather


@dataclass(frozen=True)
class Keep(Item):
    """`keep(0.5, by=cls)`: keep half of the unprotected tokens; the blocks that follow are cheaper by what is gone.

    In generation it prunes the prompt, whose last token always stays; of a prompt shorter than the longest, a fraction
    is of its own length. The tokens that follow all go on.

    Attributes:
      amount: how many to keep: an int in 1..present, or a fraction in (0, 1] of the unprotected tokens present.
      by: the score; the larger, the sooner kept. Ties go to the earlier token.
    """

    amount: Amount
    by: Score = Norm()

    generates: ClassVar[bool] = True
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
        if context.mode == "step":
            return tokens, Aux()
        if context.mode == "prefill":
            return self.prune(params, tokens, readings, key), Aux()
        wanted = kept(self.amount, tokens.count, tokens.protected, "keep")
        indices, gate = choose(self.by, params, tokens, readings, key, wanted)
        part = carry.take(tokens, indices)
        if gate is not None:  # the score learns through what it keeps
            part = part.replace(x=straight_through(part.x, part.x, gate, protected=part.protected))
        return part, Aux()

    def prune(self, params: Params, tokens: Tokens, readings: Mapping[str, Array], key: Array) -> Tokens:
        """The best of every prompt, as many as its own length asks for; rows that are left over become padding."""
        wanted = kept(self.amount, tokens.count, tokens.protected, "keep")
        scores = self.by(params.get("score", {}), tokens, readings, key)
        place = jnp.arange(tokens.count)
        last = jnp.max(jnp.where(tokens.valid, place, -1), axis=1, keepdims=True)
        scores = jnp.where(place == last, jnp.inf, scores.astype(jnp.float32))
        best = select.top_k(
            scores, wanted, protected=tokens.protected, valid=tokens.valid, order="score"
        )  # best first, so that a short prompt keeps the first few of them
        length = jnp.sum(tokens.valid, axis=1, keepdims=True) - tokens.protected
        enough = wanted
        if not isinstance(self.amount, int):
            # Looked up, as float32 would round some lengths another way than `select.count` does. The last token of a
            # prompt is always kept.
            own = [1, *(select.count(self.amount, n, least=1) for n in range(1, tokens.free + 1))]
            enough = jnp.asarray(own)[length]
        rank = jnp.arange(wanted + tokens.protected) - tokens.protected
        alive = gather(tokens.valid, best) & (rank < enough)
        order = jnp.argsort(jnp.where(alive, best, tokens.count), axis=1, stable=True)
        part = carry.take(tokens, jnp.take_along_axis(best, order, axis=1))
        return part.replace(valid=jnp.take_along_axis(alive, order, axis=1))


item = Keep
BENCHMARK = {
    "after 2": "block*2 + keep(0.5, by=cls) + block*10",
    "after 4": "block*4 + keep(0.5, by=cls) + block*8",
}
