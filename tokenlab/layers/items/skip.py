"""skip: only some tokens pass through the body, the others go around it and are there again after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jax import Array

from tokenlab.core.tokens import Tokens
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.item import Amount, Body, Item, Params, Score, choose, kept
from tokenlab.layers.scores.random import Random
from tokenlab.ops import carry
from tokenlab.ops.gate import straight_through


@dataclass(frozen=True)
class Skip(Item):
    """`skip(keep=0.5, by=random)(block*2)`: gather the kept tokens, run the body on them, scatter them back.

    Attention inside the body sees the kept tokens alone, at their own positions. `skip(keep=0.5)(block)*10` lets every
    block draw its own subset (random-LTD, Yao et al. 2022, arXiv 2211.11586, section 3).

    Attributes:
      keep: how many pass through the body: an int in 1..present, or a fraction in (0, 1] of the unprotected tokens.
      by: the score; the larger, the sooner a token passes through the body.
    """

    keep: Amount
    by: Score = Random()

    wraps: ClassVar[bool] = True
    identity: ClassVar[str] = "block + skip(keep=1.0)(block)"
    examples: ClassVar[tuple[str, ...]] = (
        "block + skip(keep=0.5, by=random)(block)*2",
        "block + skip(keep=6, by=cls)(block*2)",
        "skip(keep=0.5, by=learned)(block) + block",
    )

    def kept(self, present: int, protected: int) -> int:
        """K, of the tokens that are not protected."""
        return kept(self.keep, present, protected, "skip: keep")

    def inside(self, present: int, protected: int) -> int:
        """K plus the protected tokens."""
        return protected + self.kept(present, protected)

    def __call__(
        self,
        params: Params,
        tokens: Tokens,
        context: Context,
        readings: Mapping[str, Array],
        key: Array,
        body: Body | None = None,
    ) -> tuple[Tokens, Aux]:
        """[B, N, ...] -> [B, N, ...]; tokens that are not kept come out as they went in."""
        done, indices, aux = self.around(params, tokens, readings, key, body)
        return carry.restore(tokens, done, indices), aux

    def around(
        self, params: Params, tokens: Tokens, readings: Mapping[str, Array], key: Array, body: Body
    ) -> tuple[Tokens, Array, Aux]:
        """The kept tokens behind the body, [B, protected + K, ...], and the places they are from."""
        wanted = self.kept(tokens.count, tokens.protected)
        indices, gate = choose(self.by, params, tokens, readings, key, wanted)
        part = carry.take(tokens, indices)
        done, aux = body(part)
        if gate is not None:  # the score learns through what the body changed
            done = done.replace(x=straight_through(done.x, done.x - part.x, gate, protected=done.protected))
        return done, indices, aux


item = Skip
BENCHMARK = {"10 of 12": "block + skip(keep=0.5)(block)*10 + block"}
