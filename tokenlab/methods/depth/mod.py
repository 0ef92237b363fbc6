"""mod: mixture-of-depths (Raposo et al. 2024, arXiv 2404.02258): a router lets a few tokens into a block.

A transformer spends the same on every token. Here a fixed number K of the N tokens of a sequence enters the block (or
any stack), chosen by a learned score of its input; the others go round it on the residual:

    r = X w                                 [B, N], the router, float32 (section 3.4)
    x_i <- x_i + g(r_i) f_i(X~)             for the K tokens with the largest r, of which X~ is made
    x_i <- x_i                              for the others, which nobody can attend to in there       (eq. 1)

f is what the body adds to its input, so the total is known before training: K tokens, at their own positions. Weighting
f by the score puts the router on the gradient's path. The best the authors found is K = N / 8 in every second block:
`(block + mod(keep=0.125)(block))*6`.

The top K of a sequence are known at its end only, so a language model cannot be sampled or judged with them. What
decides then (section 3.5):

    predictor   a small MLP reads X under stop_gradient and learns which tokens are among the K (binary cross-entropy);
                a token enters when it says more than one half
    router      the same loss on r itself, whose sigmoid then has its middle between those in and those out
    topk        still the top K; it looks ahead, and is there to compare with

With either decision tokens enter in order while there is room for `room` times as many as K, and are left out after
that, in whole sequences as in generation; the metric "mod_left_out" is their share. Documents packed into one row share
its K and its room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from tokenlab.core.errors import TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.item import Amount, Axes, Body, Item, Params, kept, replicated
from tokenlab.ops import carry, gate, select
from tokenlab.ops.gather import gather, keep_mask


@dataclass(frozen=True)
class MixtureOfDepths(Item):
    """`mod(keep=0.125)(block)`: an eighth of the tokens goes through the block, the others around it.

    Attributes:
      keep: K, how many go through in training: a fraction in (0, 1] of the unprotected tokens, or an int in 1..present,
        which stays the same however long the sequence is that is judged or generated.
      gate: g of the score: "raw" is r itself, as in the paper's equation; "sigmoid"; "tanh"; "tanh_scaled" is
        0.2 tanh(r) + 1, near one, to start from a dense model (p-MoD, arXiv 2412.04449); "one" leaves the score no
        gradient.
      by: "learned", or "random": the K are drawn, and at evaluation each enters with probability K / N (the paper's
        control).
      decide: who decides outside training, see the module; with "predictor" and "router" a loss trains it.
      weight: of that loss, >= 0.
      room: tokens that may enter outside training, as a multiple of K, at least 1; never more than there are.
    """

    keep: Amount
    gate: gate.Gate = "raw"
    by: Literal["learned", "random"] = "learned"
    decide: Literal["predictor", "router", "topk"] = "predictor"
    weight: float = 0.01
    room: float = 2.0

    wraps: ClassVar[bool] = True
    sifts: ClassVar[bool] = True
    identity: ClassVar[str] = "block + mod(keep=1.0, gate=one)(block)"
    examples: ClassVar[tuple[str, ...]] = (
        "mod(keep=0.5)(block) + block",
        "block + mod(keep=0.5, gate=sigmoid, decide=router)(block) + block",
        "mod(keep=4, gate=tanh_scaled, decide=topk)(block*2) + block",
    )

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise TokenLabError(f"mod: weight is {self.weight}; expected at least 0.")
        if not (math.isfinite(self.room) and self.room >= 1):
            raise TokenLabError(f"mod: room is {self.room}; expected at least 1, a multiple of what is kept.")
        if self.by == "random" and not isinstance(self.keep, float):
            raise TokenLabError(
                f"mod: keep is the count {self.keep} with by=random, which needs the fraction of tokens that enter; "
                "write it as a float."
            )

    # ------------------------------------------------------------------------------------------ what it is to the stack

    @property
    def causal(self) -> bool:
        """Outside training a decision looks at its own token alone; the top K look ahead."""
        return self.by == "random" or self.decide != "topk"

    @property
    def generates(self) -> bool:
        """A decision is needed to generate."""
        return self.causal

    @property
    def stochastic(self) -> bool:
        """Draws from `context`."""
        return self.by == "random"

    @property
    def predicts(self) -> bool:
        """Whether there is a predictor to train."""
        return self.by == "learned" and self.decide == "predictor"

    def capacity(self, present: int, protected: int) -> int:
        """K."""
        return kept(self.keep, present, protected, "mod: keep")

    def inside(self, present: int, protected: int) -> int:
        """K and the protected tokens."""
        return protected + self.capacity(present, protected)

    def inside_prompt(self, present: int, protected: int, rows: int) -> int:
        """Of a prompt as many as may ever enter."""
        return min(present, self.remembered(rows))

    def inside_evaluated(self, present: int, protected: int) -> int:
        """Tokens that may enter a whole sequence when each decides for itself, and the protected ones."""
        if self.by == "learned" and self.decide == "topk":
            return self.inside(present, protected)
        return protected + min(
            math.ceil(round(self.room * self.capacity(present, protected), 6)), present - protected
        )

    def remembered(self, rows: int) -> int:
        """Of a sequence of `rows` tokens, those that may enter."""
        return self.inside_evaluated(rows, 0)

    def init(self, key: Array, width: int) -> Params:
        """The router's kernel [D], and the predictor D -> D/2 -> 1."""
        router, hidden, out = jax.random.split(key, 3)
        params: dict[str, Array] = {}
        if self.by == "learned" or self.gate != "one":
            # Small, and not zero: with the raw score as weight neither router nor body would learn from zeros.
            params["router"] = 0.02 * jax.random.normal(router, (width,))
        if self.predicts:
            init, half = nn.initializers.lecun_normal(), max(1, width // 2)
            params["predictor_hidden"] = init(hidden, (width, half), jnp.float32)
            params["predictor_bias"] = jnp.zeros((half,))
            params["predictor_out"] = init(out, (half, 1), jnp.float32)[:, 0]
            params["predictor_out_bias"] = jnp.zeros(())
        return params

    def axes(self) -> Axes:
        """Small enough to be replicated."""
        return replicated(self)

    # ------------------------------------------------------------------------------------------ the method

    def __call__(
        self,
        params: Params,
        tokens: Tokens,
        context: Context,
        readings: Mapping[str, Array],
        key: Array,
        body: Body | None = None,
    ) -> tuple[Tokens, Aux]:
        """[B, N, ...] -> [B, N, ...]; tokens that do not enter come out as they went in."""
        score = self.score(params, tokens)
        if context.mode == "step":
            entering = self.decision(params, tokens, score, key) & tokens.there
            room = body.has_room()[:, None]
            body.turn_away(jnp.sum(entering & ~room, axis=1))
            done, aux = body(tokens.replace(valid=entering & room))
            return tokens.replace(x=self.weighted(tokens.x, done, score)), aux
        if context.train or (self.by == "learned" and self.decide == "topk"):
            ranked = jax.random.normal(key, score.shape) if self.by == "random" else score
            wanted = self.capacity(tokens.count, tokens.protected)
            indices = select.top_k(ranked, wanted, protected=tokens.protected, valid=tokens.valid)
            part = carry.take(tokens, indices)
            aux = self.judge(params, tokens, score, indices) if context.train else Aux()
        else:
            entering = self.decision(params, tokens, score, key) & tokens.there
            # The first of those that enter, in order. Behind them what is left of the room are others, which count as
            # padding: a later token then moves no earlier one to another row, where sums would round another way.
            indices = select.top_k(
                entering.astype(jnp.float32),
                body.count - tokens.protected,
                protected=tokens.protected,
                order="score",
            )
            part = carry.take(tokens, indices)
            part = part.replace(valid=gather(entering, indices) & part.there)
            inside = keep_mask(indices, tokens.count)
            body.turn_away(jnp.sum(entering & ~inside, axis=1))
            aux = _report(entering, inside, tokens)
        done, more = body(part)
        x = self.weighted(part.x, done, gather(score, indices))
        return carry.restore(tokens, done.replace(x=x), indices), aux + more

    def score(self, params: Params, tokens: Tokens) -> Array:
        """r = X w, [B, N], float32."""
        if "router" not in params:
            return jnp.zeros(tokens.position.shape, jnp.float32)
        with jax.named_scope("router"):
            return jnp.einsum("bnd,d->bn", tokens.x.astype(jnp.float32), params["router"])

    def weighted(self, x: Array, done: Tokens, score: Array) -> Array:
        """x + g(r) (done - x) for the valid tokens, protected ones with weight one; x for the others. [B, K, D]."""
        if self.gate == "one":
            y = done.x
        else:
            weight = gate.weight(score, self.gate)
            weight = jnp.where(jnp.arange(x.shape[1]) < done.protected, 1.0, weight)
            y = gate.weighed(x, done.x, weight)
        return y if done.valid is None else jnp.where(done.valid[..., None], y, x)

    def decision(self, params: Params, tokens: Tokens, score: Array, key: Array) -> Array:
        """Which tokens enter, each by itself: [B, N] bool; protected ones always do."""
        protected = jnp.arange(tokens.count) < tokens.protected
        if self.by == "random":
            return (self.draw(tokens, key) < self.keep) | protected
        logit = self.predicted(params, tokens) if self.predicts else score
        return (logit > 0) | protected

    def predicted(self, params: Params, tokens: Tokens) -> Array:
        """The predictor's logit that a token is among the top K, [B, N], float32; no gradient reaches the tokens."""
        with jax.named_scope("predictor"):
            x = lax.stop_gradient(tokens.x).astype(jnp.float32)
            hidden = jax.nn.silu(x @ params["predictor_hidden"] + params["predictor_bias"])
            return hidden @ params["predictor_out"] + params["predictor_out_bias"]

    def draw(self, tokens: Tokens, key: Array) -> Array:
        """A number in [0, 1) for each token that depends on its row and position alone, [B, N]."""
        rows = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(tokens.batch))
        each = jax.vmap(lambda own, places: jax.vmap(lambda place: jax.random.fold_in(own, place))(places))
        return jax.vmap(jax.vmap(jax.random.uniform))(each(rows, tokens.position))

    def judge(self, params: Params, tokens: Tokens, score: Array, indices: Array) -> Aux:
        """The loss that teaches the decision what the top K are, and how often it is right."""
        if self.by == "random" or self.decide == "topk":
            return Aux()
        member = keep_mask(indices, tokens.count)
        counted = tokens.there & (jnp.arange(tokens.count) >= tokens.protected)
        logit = self.predicted(params, tokens) if self.predicts else score
        each = optax.sigmoid_binary_cross_entropy(logit, member.astype(jnp.float32))
        total = jnp.maximum(jnp.sum(counted), 1)
        loss = jnp.sum(jnp.where(counted, each, 0.0)) / total
        right = jnp.sum(jnp.where(counted, (logit > 0) == member, False)) / total
        return Aux.of({"mod_loss": self.weight * loss}, {"mod_accuracy": right})


def _report(entering: Array, inside: Array, tokens: Tokens) -> Aux:
    """The share of tokens that enter, and of those that would have and found no room."""
    total = jnp.maximum(jnp.sum(tokens.there), 1)
    return Aux.of(
        metrics={
            "mod_share": jnp.sum(entering & inside) / total,
            "mod_left_out": jnp.sum(entering & ~inside) / total,
        }
    )


item = MixtureOfDepths
BENCHMARK = {"1/8, every second": "(block + mod(keep=0.125)(block))*6"}
