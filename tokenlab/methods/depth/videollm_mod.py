"""videollm_mod: of each frame the best vision tokens enter a block, text always does (VideoLLM-MoD, arXiv 2408.16730).

A streaming video model reads frames of V vision tokens between words. Dropping tokens loses what a later question may
ask for; here every token stays in the stream, and most vision tokens skip every second layer (Wu et al. 2024, NeurIPS;
they report 0.6 of the training FLOPs and a video 1.7 times as long in the same cache, at a fifth kept):

    s = X w (+ b)                           [B, N], a router a layer, float32
    kept of frame t: the k largest s of its V tokens, k = keep V rounded; `always` names some that are kept anyway
    x_i <- x_i + g(s_i) f_i(A)              for kept vision tokens
    x_i <- x_i + f_i(A)                     for text
    x_i <- x_i                              for the others, which nobody can attend to in there

f is what the body adds; A are all text tokens and the kept ones of all frames, at their own positions. A frame arrives
whole and is compared with itself alone, so frames to come change nothing, and no predictor is needed: what is kept
while a video streams is what was kept in training. Between full blocks: `(block + videollm_mod(keep=0.2, frames=T)
(block))*16`.

Which tokens are frames: `Tokens.extra["frame"]` [B, N] int32 gives each its frame, 0..T-1 in the order of the sequence,
and -1 for text. Without it the unprotected tokens are T frames of V, one after the other, and what is left behind them,
where `per_frame` leaves some, is text.

The paper gives neither g nor what happens to positions; tokens keep theirs, and g is a choice. Its relative p-MoD
(arXiv 2412.04449) is `gate=tanh_scaled, bias=True, on=ffn, skip=scaled, always=none`, and lets the keep ratio fall with
depth, see `keep_ratios`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.item import Amount, Axes, Body, Item, Params, replicated
from tokenlab.ops import carry, gate, select
from tokenlab.ops.gather import gather


@dataclass(frozen=True)
class VideoMixtureOfDepths(Item):
    """`videollm_mod(keep=0.2, frames=24)(block)`: a fifth of each frame's tokens goes through the block, and all text.

    Attributes:
      keep: k, of each frame: an int in 1..V, or a fraction in (0, 1] of V. A frame with padding in it keeps as much in
        proportion.
      frames: T, at least 1.
      per_frame: V; None when frames are all there is, so that V is the unprotected tokens over T.
      by: "learned", or the paper's controls: "random", or "uniform", evenly spaced over the frame.
      always: tokens of each frame that are kept anyway, within k: its "last" (which decides whether to speak), its
        "first" (CLS), "both" or "none".
      gate: g of the score: "raw", "sigmoid", "tanh", "tanh_scaled" (0.2 tanh(s) + 1) or "one".
      on: what g multiplies of a kept token: all the body adds ("block"), or what its feed-forward layers add ("ffn").
      skip: a vision token that is not kept leaves as it came ("identity"), or times g ("scaled").
      bias: the router has one.
    """

    keep: Amount
    frames: int
    per_frame: int | None = None
    by: Literal["learned", "random", "uniform"] = "learned"
    always: Literal["last", "first", "both", "none"] = "last"
    gate: gate.Gate = "sigmoid"
    on: Literal["block", "ffn"] = "block"
    skip: Literal["identity", "scaled"] = "identity"
    bias: bool = False

    wraps: ClassVar[bool] = True
    identity: ClassVar[str] = "block + videollm_mod(keep=1.0, frames=4, gate=one)(block)"
    examples: ClassVar[tuple[str, ...]] = (
        "block + videollm_mod(keep=0.5, frames=4)(block) + block",
        "videollm_mod(keep=2, frames=2, always=both, gate=tanh_scaled, on=ffn, skip=scaled, bias=True)(block) + block",
        "block + videollm_mod(keep=0.25, frames=4, by=uniform)(block) + block",
    )

    def __post_init__(self) -> None:
        for name, value in (("frames", self.frames), ("per_frame", self.per_frame)):
            if value is not None and value < 1:
                raise TokenLabError(f"videollm_mod: {name} is {value}; expected at least 1.")
        if self.per_frame is not None:
            self.of_frame(self.per_frame)

    # ------------------------------------------------------------------------------------------ what it is to the stack

    @property
    def causal(self) -> bool:
        """A token is compared with later ones of its frame."""
        return False

    @property
    def stochastic(self) -> bool:
        """Draws from `context`."""
        return self.by == "random"

    def of_frame(self, tokens: int) -> int:
        """k of a frame of V `tokens`. Raises TokenLabError when it cannot be, or is less than is always kept."""
        k = select.count(self.keep, tokens, what="videollm_mod: keep, of a frame,")
        wanted = {"none": 0, "both": 2}.get(self.always, 1)
        if k < min(wanted, tokens):
            raise TokenLabError(
                f"videollm_mod: keep={self.keep} of {tokens} tokens a frame is {k}, and always={self.always} keeps "
                f"{wanted}; keep more, or say always=none."
            )
        return k

    def tokens_of_frame(self, present: int, protected: int) -> int:
        """V. Raises TokenLabError when so many frames cannot be in `present` tokens."""
        free = present - protected
        size = self.per_frame
        if size is None:
            size, rest = divmod(free, self.frames)
            if rest or not size:
                raise TokenLabError(
                    f"videollm_mod: {free} tokens are not {self.frames} frames of equal size; give per_frame when "
                    "some of them are text."
                )
        if self.frames * size > free:
            raise TokenLabError(
                f"videollm_mod: {self.frames} frames of {size} tokens are {self.frames * size}, and {free} are there."
            )
        return size

    def inside(self, present: int, protected: int) -> int:
        """All that is no frame, and k of each frame."""
        size = self.tokens_of_frame(present, protected)
        return present - self.frames * (size - self.of_frame(size))

    def init(self, key: Array, width: int) -> Params:
        """The router's kernel [D], and its bias []."""
        params: dict[str, Array] = {}
        if self.by == "learned" or self.gate != "one":
            params["router"] = 0.02 * jax.random.normal(key, (width,))
            if self.bias:
                params["router_bias"] = jnp.zeros(())
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
        """[B, N, ...] -> [B, N, ...]. A row with more text than N - T V has no place for it and comes out as NaN.

        Raises ShapeError for a "frame" that is not int [B, N].
        """
        frame = self.frame(tokens)
        vision, valid = frame < self.frames, tokens.there
        score = self.score(params, tokens)
        entering = valid & (~vision | self.kept(score, tokens, frame, key))

        # Those that enter come first, in order. Where a row has fewer than there is room for, others follow as padding.
        room = body.count - tokens.protected
        indices = select.top_k(entering.astype(jnp.float32), room, protected=tokens.protected, order="score")
        part = carry.take(tokens, indices)
        if tokens.valid is not None or "frame" in tokens.extra:
            part = part.replace(valid=gather(entering, indices))
        weight = jnp.where(vision, gate.weight(score, self.gate), 1.0)
        inside = gather(weight, indices)
        if self.on == "ffn":
            done, aux = body(part.replace(extra={**part.extra, "ffn_weight": inside}))
            x = done.x
        else:
            done, aux = body(part)
            weighed = gate.weighed(part.x, done.x, inside)
            x = (
                done.x
                if self.gate == "one"
                else jnp.where(gather(vision, indices)[..., None], weighed, done.x)
            )
        if part.valid is not None:
            x = jnp.where(part.valid[..., None], x, part.x)
        left = tokens
        if self.skip == "scaled":
            skipped = (vision & valid & ~entering)[..., None]
            scaled = (tokens.x.astype(jnp.float32) * weight[..., None]).astype(tokens.x.dtype)
            left = tokens.replace(x=jnp.where(skipped, scaled, tokens.x))
            if part.valid is not None:
                x = jnp.where(part.valid[..., None], x, gather(left.x, indices))
        out = carry.restore(left, done.replace(x=x), indices)
        fits = jnp.sum(entering[:, tokens.protected :], axis=1) <= room
        return out.replace(x=jnp.where(fits[:, None, None], out.x, jnp.nan)), aux

    def frame(self, tokens: Tokens) -> Array:
        """The frame of each token, [B, N] int32; T for text, padding and protected tokens."""
        given, shape = tokens.extra.get("frame"), tokens.position.shape
        if given is None:
            size = self.tokens_of_frame(tokens.count, tokens.protected)
            place = jnp.arange(tokens.count) - tokens.protected
            # Without a word about frames, text stands behind them.
            frame = jnp.broadcast_to(jnp.where(place < 0, -1, place // size), shape)
        elif given.shape != shape or not jnp.issubdtype(given.dtype, jnp.integer):
            raise ShapeError(
                f'videollm_mod: extra["frame"] is {given.dtype}{list(given.shape)}; expected an int for each token, '
                f"{list(shape)}, -1 for text."
            )
        else:
            frame = jnp.where(jnp.arange(tokens.count) < tokens.protected, -1, given)
        there = tokens.there & (frame >= 0) & (frame < self.frames)
        return jnp.where(there, frame, self.frames).astype(jnp.int32)

    def score(self, params: Params, tokens: Tokens) -> Array:
        """s = X w + b, [B, N], float32."""
        if "router" not in params:
            return jnp.zeros(tokens.position.shape, jnp.float32)
        with jax.named_scope("router"):
            score = jnp.einsum("bnd,d->bn", tokens.x.astype(jnp.float32), params["router"])
            return score + params["router_bias"] if self.bias else score

    def kept(self, score: Array, tokens: Tokens, frame: Array, key: Array) -> Array:
        """Which vision tokens enter, [B, N] bool."""
        size = self.tokens_of_frame(tokens.count, tokens.protected)
        k = self.of_frame(size)
        place = select.rank_in_groups(jnp.zeros_like(score), frame)
        present = select.group_sizes(frame, self.frames)
        allowed = jnp.clip((2 * present * k + size) // (2 * size), jnp.minimum(present, 1), k)
        if self.by == "random":
            score = select.random_scores(key, *score.shape)
        elif self.by == "uniform":
            score = jnp.where((place + 1) * k // size > place * k // size, 1.0, 0.0)
        if self.always in ("first", "both"):
            score = jnp.where(place == 0, jnp.inf, score)
        if self.always in ("last", "both"):
            score = jnp.where(place == _of_group(present, frame) - 1, jnp.inf, score)
        return select.rank_in_groups(score, frame) < _of_group(allowed, frame)


def keep_ratios(
    layers: int, average: float = 0.5, shape: Literal["cosine", "linear"] = "cosine"
) -> list[float]:
    """p-MoD's keep ratio of each layer, falling with depth, not clamped: cos(pi l / (L - 1)) / 2 + average.

    Args:
      layers: L, at least 2.
      average: of all layers before clamping.
      shape: "cosine", or "linear": 1/2 - l / (L - 1) + average.
    """
    if layers < 2:
        raise TokenLabError(f"keep_ratios: a schedule over depth needs at least 2 layers; got {layers}.")
    depth = [layer / (layers - 1) for layer in range(layers)]
    fall = {"cosine": lambda d: math.cos(math.pi * d) / 2, "linear": lambda d: 0.5 - d}
    if shape not in fall:
        raise TokenLabError(f"keep_ratios: shape is {shape!r}; expected 'cosine' or 'linear'.")
    return [fall[shape](d) + average for d in depth]


def _of_group(values: Array, group: Array) -> Array:
    """values [B, G] of each token's group, [B, N]; 0 for those of no group (G)."""
    padded = jnp.pad(values, ((0, 0), (0, 1)))
    return jnp.take_along_axis(padded, group, axis=1)


item = VideoMixtureOfDepths
BENCHMARK = {
    "1/5 of 14 rows, every second": "(block + videollm_mod(keep=0.2, frames=14)(block))*6",
}
