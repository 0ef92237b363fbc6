"""token_dropping: tokens whose ids are predicted well skip the middle blocks (Hou et al., ACL 2022, arXiv 2203.13240).

Claim: BERT pretrains at 25 % less cost and fine-tunes as well (the authors' abstract). Of L blocks, with N tokens and
the K < N most important of them (section 3.1):

    blocks 0 .. L/2-2         all N tokens
    block  L/2-1, the bridge  queries of the K kept tokens, keys and values of all N as they stand before it
    blocks L/2 .. L-2         the K kept tokens
    block  L-1                all N again: the kept ones from block L-2, the others from block L/2-2

so that a stack of 12 blocks is `block*5 + token_dropping(keep=0.5)(block*6) + block`. The bridge computes

    20 K D^2 + 4 N D^2 + 4 K N D FLOPs          of 24 N D^2 + 4 N^2 D

A token is as important as the running loss of its id (`tokenlab/layers/scores/importance.py`), which a task of masked
tokens keeps up to date. Ids of special tokens, which are kept whatever happens, are settings of the model. What is
trained is an ordinary encoder: at evaluation the item is taken out (`train_only`).

Kept tokens stay in the order of their positions here; the reference has them in that of their importance
(`order=score`), which changes rounding only, since positions were added before the first block. Padding comes last
whatever its importance, unless `rank_padding` says otherwise.

Reference: tensorflow/models, official/projects/token_dropping, and its selector in official/nlp/modeling/layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.item import Amount, Body, Item, Params, Score, kept
from tokenlab.layers.scores.importance import NAME, PINNED, Importance
from tokenlab.ops import carry, select
from tokenlab.ops.gate import straight_through
from tokenlab.ops.gather import gather

Order = Literal["position", "score"]


def top_k_tokens(
    scores: Array,
    k: int,
    order: Order = "score",
    n_random: int = 0,
    *,
    key: Array | None = None,
    protected: int = 0,
    valid: Array | None = None,
) -> tuple[Array, Array]:
    """Which tokens are kept and which are not: the best ones, or some of the best and some of the others at random.

    Args:
      scores: [B, N]; the larger, the sooner a token is kept. Ties go to the lower index.
      k: K, how many unprotected tokens are kept, in 1..N - protected.
      order: of the kept ones, "score" for the best first, "position" for ascending indices.
      n_random: of the K, how many are drawn from those that are not among the K - n_random best, each as likely as any
        other; k for a purely random choice.
      key: for that draw; needed with `n_random`.
      protected: number of leading tokens that are kept besides.
      valid: [B, N] bool, False for padding, which is kept only where fewer than K others are.

    Returns:
      keep [B, protected + K], drop [B, N - protected - K], int32; together a permutation of 0..N-1. What is dropped is
      in the order of its score, or of its position.

    Raises:
      TokenLabError: k or n_random out of range, or no key. ShapeError: wrong shapes.
    """
    count = scores.shape[1]
    if not 1 <= k <= count - protected:
        raise TokenLabError(
            f"k is {k!r}; of {count} tokens with {protected} protected it must be in 1..{count - protected}."
        )
    if isinstance(n_random, bool) or not isinstance(n_random, int) or not 0 <= n_random <= k:
        raise TokenLabError(f"n_random is {n_random!r}; of k = {k} tokens it must be an int in 0..{k}.")
    if n_random and key is None:
        raise TokenLabError(f"n_random is {n_random}, and there is no key to draw them with.")
    how = {"protected": protected, "order": "score"}
    ranked = select.top_k(scores, count - protected, valid=valid, **how)
    if n_random:
        place = jnp.arange(count)
        # The best keep their order, before all draws, which are below 1.
        again = jnp.where(
            place < protected + k - n_random, count - place, select.random_scores(key, *scores.shape)
        )
        there = None if valid is None else gather(valid, ranked)
        ranked = gather(ranked, select.top_k(again, count - protected, valid=there, **how))
    keep, drop = ranked[:, : protected + k], ranked[:, protected + k :]
    if order == "position":
        keep = jnp.concatenate([keep[:, :protected], jnp.sort(keep[:, protected:], axis=1)], axis=1)
        drop = jnp.sort(drop, axis=1)
    return keep, drop


@dataclass(frozen=True)
class TokenDropping(Item):
    """`token_dropping(keep=0.5)(block*6)`: the first block of the body is the bridge, the others see what is kept.

    Attributes:
      keep: K, an int in 1..present, or a fraction in (0, 1] of the unprotected tokens.
      by: the score; the larger, the sooner a token is kept.
      order: of the kept tokens inside, "position" or "score".
      random: how many of the K are drawn at random from the rest instead: an int in 0..K, or a fraction of K.
      rank_padding: rank padding by its score as any token, as the references do, instead of last.
      train_only: True takes the item out at evaluation, which is then dense.

    Metrics: `pinned_left_out`, of the tokens whose ids are always kept, the share for which K had no room.
    """

    keep: Amount
    by: Score = Importance()
    order: Order = "position"
    random: Amount = 0
    rank_padding: bool = False
    train_only: bool = field(default=True, kw_only=True)

    wraps: ClassVar[bool] = True
    bridges: ClassVar[bool] = True
    identity: ClassVar[str | None] = "block + token_dropping(keep=1.0, by=norm)(block*2) + block"
    examples: ClassVar[tuple[str, ...]] = (
        "block + token_dropping(keep=0.5, by=norm)(block*3) + block",
        "block + token_dropping(keep=6, by=cls, order=score)(block) + block",
        "block + token_dropping(keep=0.5, by=norm, random=0.5)(block*2) + block",
    )

    def inside(self, present: int, protected: int) -> int:
        """K plus the protected tokens."""
        wanted = kept(self.keep, present, protected, "token_dropping: keep")
        self.drawn(wanted)
        return protected + wanted

    def drawn(self, wanted: int) -> int:
        """How many of `wanted` tokens are drawn at random. Raises TokenLabError when that cannot be."""
        if not self.random:
            return 0
        return select.count(self.random, wanted, what="token_dropping: random")

    def choose(self, params: Params, tokens: Tokens, readings: Mapping[str, Array], key: Array) -> tuple:
        """Indices of what is kept, [B, protected + K], and all scores [B, N]."""
        wanted = kept(self.keep, tokens.count, tokens.protected, "token_dropping: keep")
        own, draws = jax.random.split(key)
        scores = self.by(params.get("score", {}), tokens, readings, own)
        indices, _ = top_k_tokens(
            scores,
            wanted,
            self.order,
            self.drawn(wanted),
            key=draws,
            protected=tokens.protected,
            valid=None if self.rank_padding else tokens.valid,
        )
        return indices, scores

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
        indices, scores = self.choose(params, tokens, readings, key)
        part = carry.take(tokens, indices)
        done, aux = body(part, tokens)
        if params:  # the score learns through what the body changed
            gate = gather(scores, indices)
            done = done.replace(x=straight_through(done.x, done.x - part.x, gate, protected=done.protected))
        if NAME in tokens.extra:
            aux += _left_out(tokens.extra[NAME], indices)
        return carry.restore(tokens, done, indices), aux


def _left_out(importance: Array, indices: Array) -> Aux:
    """Of the tokens [B, N] that are always kept, how many were not, and how many there are."""
    pinned = (importance >= PINNED).astype(jnp.float32)
    count = jnp.sum(pinned)
    return Aux(metrics={"pinned_left_out": (count - jnp.sum(gather(pinned, indices)), count)})


item = TokenDropping
BENCHMARK = {"half for 6 of 12": "block*5 + token_dropping(keep=0.5, by=random)(block*6) + block"}
