"""The transformer block, in two halves so that something may happen between them.

    pre         x = x + scale_a * Attention(Norm(x))         x = x + scale_f * FFN(Norm(x))
    res_post    x = x + scale_a * Norm(Attention(x))         x = x + scale_f * Norm(FFN(x))
    post        x = Norm(x + scale_a * Attention(x))         x = Norm(x + scale_f * FFN(x))

Dropout and drop path act on what is added, just before the sum.

With `special` the special tokens in front go another way than the FFN, see `tokenlab.layers.special`.

A block is not one Linen module but a bundle of them, since its weights live stacked by kind over the whole stack:
`blocks/attention_norm [L, ...]`, `blocks/attention [L, ...]`, `blocks/ffn_norm [L, ...]`, `blocks/mlp [L_mlp, ...]`.
What several blocks share stands in `shared/`, one copy of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ShapeError
from tokenlab.core.modality import MODALITIES
from tokenlab.core.tokens import Tokens
from tokenlab.layers.attention import Attention, Projections, Reading, Seen
from tokenlab.layers.by_modality import NormByModality
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.norm import NORMS, NormName, NormPlacement
from tokenlab.layers.special import Special
from tokenlab.ops import carry
from tokenlab.ops.cache import KVCache, Stacked
from tokenlab.ops.pieces import join_pieces, split_pieces
from tokenlab.sharding.constrain import constrain


class LayerScale(nn.Module):
    """One learned factor a channel on a residual branch (Touvron et al. 2021, arXiv 2103.17239, eq. 2).

    Attributes:
      initial: value of all factors at initialisation.
    """

    initial: float

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {"scale": (None,)}

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return self.AXES

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", nn.initializers.constant(self.initial), (x.shape[-1],), jnp.float32)
        return x * scale.astype(x.dtype)


@dataclass(frozen=True)
class Block:
    """The modules of one block.

    Attributes:
      attention: maps [B, N, D] to [B, N, D]. With weights for each modality, norms have them, too.
      ffn: the same; called with `valid` and `train`.
      ffn_name: the kind under which its weights are stacked, "mlp" or a method's name.
      special: runs on the special tokens in place of `ffn`; None sends them through it with the others.
      special_name: its name, the kind under which its weights stand.
      layer_scale: initial value of LayerScale, None for none.
      dropout: rate at which single features of what a half adds are dropped in training, in [0, 1).
      drop_path: True when residual branches are dropped in training (rates are per block, in `Depth.rate`).
      dtype: compute dtype.
      norm_eps: eps of both norms (BERT's is 1e-12).
      norm: "layer" or "rms".
      norm_placement: "pre" norms what each half reads, "res_post" what it adds (Liu et al. 2022, Swin V2, arXiv
        2111.09883, 3.2), "post" the sum (Vaswani et al. 2017, arXiv 1706.03762; BERT).
    """

    attention: Attention
    ffn: nn.Module
    ffn_name: str = "mlp"
    special: Special | None = None
    special_name: str = ""
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: bool = False
    dtype: Any = jnp.float32
    norm_eps: float = 1e-6
    norm: NormName = "layer"
    norm_placement: NormPlacement = "pre"

    @property
    def by_modality(self) -> bool:
        """Whether a part of it must be told what tokens stand for."""
        return bool(self.attention.modalities) or getattr(self.ffn, "by_modality", False)

    def untied(self) -> Block:
        """The same with attention projections and norms for each modality."""
        return replace(self, attention=self.attention.clone(modalities=len(MODALITIES)))

    def modules(self) -> dict[str, nn.Module]:
        """Slot -> module, in order of use; `kind_of` says where the weights of a slot are."""
        norm: nn.Module = NORMS[self.norm](self.dtype, self.norm_eps)
        if self.attention.modalities:
            norm = NormByModality(self.attention.modalities, self.norm, self.dtype, self.norm_eps)
        found: dict[str, nn.Module] = {
            "attention_norm": norm,
            "attention": self.attention,
        }
        if self.layer_scale is not None:
            found["attention_scale"] = LayerScale(self.layer_scale)
        found |= {"ffn_norm": norm, "ffn": self.ffn}
        if self.layer_scale is not None:
            found["ffn_scale"] = LayerScale(self.layer_scale)
        if self.special is not None:
            found |= {
                "special_norm": NORMS[self.norm](self.dtype, self.norm_eps),
                "special": self.special.module,
            }
            if self.layer_scale is not None:
                found["special_scale"] = LayerScale(self.layer_scale)
        return found

    def kind_of(self, slot: str) -> tuple[str, str]:
        """The group and the name of a slot's weights: its own in "blocks", but for layers that have names."""
        if slot == "ffn":
            return "blocks", self.ffn_name
        if slot.startswith("special"):
            shared = slot == "special" and self.special is not None and self.special.shared
            return "shared" if shared else "blocks", slot.replace("special", self.special_name, 1)
        return "blocks", slot

    def attend(
        self,
        params: Mapping[str, Any],
        tokens: Tokens,
        context: Context,
        depth: Depth,
        readings: Mapping[str, Reading],
        seen: Tokens | None = None,
    ) -> tuple[Tokens, dict[str, Array]]:
        """The attention half, and what the next item wants to read of it.

        Args:
          params: slot -> parameters.
          tokens: [B, N, ...].
          context: of this step.
          depth: which block this is.
          readings: name -> what to compute from the projections.
          seen: the tokens that these attend to, instead of to each other: [B, M, ...].

        Returns:
          tokens with new features; name -> reading.
        """
        mixed, projections = self._mix(params, tokens, context, depth, seen=seen, projections=True)
        with jax.named_scope("attention"), jax.named_scope("readings"):
            found = {name: reading(projections, tokens) for name, reading in readings.items()}
        return mixed, found

    def remember(
        self,
        params: Mapping[str, Any],
        tokens: Tokens,
        context: Context,
        depth: Depth,
        memory: KVCache | Stacked,
        readings: Mapping[str, Reading] | None = None,
    ) -> tuple[Tokens, KVCache | Stacked, dict[str, Array]]:
        """The attention half in generation, and the memory with these tokens in it.

        With `context.mode` "prefill" the tokens see each other, and the memory must be empty; with "step" they see what
        the memory holds, themselves included. Readings are of a prefill.
        """
        if context.mode == "step":
            tokens, memory = self._mix(params, tokens, context, depth, memory=memory)
            return tokens, memory, {}
        mixed, projections = self._mix(params, tokens, context, depth, projections=True)
        with jax.named_scope("attention"):
            memory = memory.insert(projections.key, projections.value, tokens.position, tokens.valid)
            with jax.named_scope("readings"):
                found = {name: reading(projections, tokens) for name, reading in (readings or {}).items()}
        return mixed, memory, found

    def _mix(
        self,
        params: Mapping[str, Any],
        tokens: Tokens,
        context: Context,
        depth: Depth,
        *,
        seen: Tokens | None = None,
        **how: Any,
    ) -> tuple[Tokens, Projections | KVCache | Stacked]:
        modules = self.modules()
        facts = self._facts(tokens, context)
        if seen is not None:
            x = self._normed(modules, params, "attention", seen.x, seen, at="pre")
            how["seen"] = Seen(x, **self._facts(seen, context))
        if self.attention.dropout and context.train:
            how["dropout_key"] = context.key("dropout_attention_map", depth.index)
        normed = self._normed(modules, params, "attention", tokens.x, tokens, at="pre")
        with jax.named_scope("attention"):
            mixed, more = _apply(self.attention, params["attention"], normed, **facts, **how)
        mixed = self._normed(modules, params, "attention", mixed, tokens, at="res_post")
        return self._residual(modules, params, "attention", tokens, mixed, context, depth), more

    def _facts(self, tokens: Tokens, context: Context) -> dict[str, Array | None]:
        """What attention is told of tokens."""
        facts = {"coords": tokens.coords, "size": tokens.size, "valid": tokens.valid}
        if self.attention.causal:
            facts["position"] = tokens.position
        if context.mode != "step":
            facts["segment"] = tokens.segment
        if self.attention.modalities:
            facts["modality"] = tokens.modality
        return facts

    def _normed(
        self,
        modules: Mapping[str, nn.Module],
        params: Mapping[str, Any],
        half: str,
        x: Array,
        tokens: Tokens,
        *,
        at: NormPlacement,
    ) -> Array:
        if at != self.norm_placement:
            return x
        name = f"{half}_norm"
        more = (tokens.modality,) if self.attention.modalities and half != "special" else ()
        return _apply(modules[name], params[name], x, *more)

    def feed(
        self, params: Mapping[str, Any], tokens: Tokens, context: Context, depth: Depth
    ) -> tuple[Tokens, Aux]:
        """The feed-forward half, with the losses and metrics of its router, if it has one.

        With `special` the tokens part here and meet again behind it; they stay one array between blocks, as all that
        moves tokens needs them.

        Raises:
          ShapeError: `special`, and no special token in front.
        """
        if self.special is None:
            return self._feed_tokens(params, tokens, context, depth)
        count = tokens.protected
        if count < 1:
            raise ShapeError(
                f"block: special={self.special_name} feeds special tokens; these have none in front."
            )
        first, rest = carry.part(tokens, 0, count), carry.part(tokens, count, tokens.count)
        first = self._feed_special(params, first, context, depth)
        rest, aux = self._feed_tokens(params, rest, context, depth)
        x = jnp.concatenate([first.x, rest.x], axis=1)
        return tokens.replace(x=constrain(x, "batch", "sequence", None)), aux

    def _feed_special(
        self, params: Mapping[str, Any], tokens: Tokens, context: Context, depth: Depth
    ) -> Tokens:
        """The special tokens, joined: z + special(Norm(z))."""
        modules = self.modules()
        normed = self._normed(modules, params, "special", join_pieces(tokens.x), tokens, at="pre")
        with jax.named_scope(self.special_name):
            y = _apply(modules["special"], params["special"], normed)
        y = self._normed(modules, params, "special", y, tokens, at="res_post")
        y = self._weighted(split_pieces(y, tokens.count), tokens)
        return self._residual(modules, params, "special", tokens, y, context, depth)

    def _weighted(self, y: Array, tokens: Tokens) -> Array:
        """What is added to each token, times what a wrapper gives it."""
        if "ffn_weight" not in tokens.extra:
            return y
        return (y * tokens.extra["ffn_weight"][..., None]).astype(y.dtype)

    def _feed_tokens(
        self, params: Mapping[str, Any], tokens: Tokens, context: Context, depth: Depth
    ) -> tuple[Tokens, Aux]:
        """Tokens through the feed-forward layer.

        A wrapper may weigh what it adds to each token: `extra["ffn_weight"]` [B, N], float32. A layer whose tokens
        compete for room has another form for generation, where they come one by one: its method `in_generation`. One
        that says `by_modality` is told what its tokens stand for.
        """
        modules = self.modules()
        ffn = self.ffn
        if context.mode != "full" and hasattr(ffn, "in_generation"):
            ffn = ffn.in_generation()
        normed = self._normed(modules, params, "ffn", tokens.x, tokens, at="pre")
        with jax.named_scope(self.ffn_name):
            rngs = {"ffn": context.key("ffn", depth.index)} if context.train else None
            more = {"modality": tokens.modality} if getattr(ffn, "by_modality", False) else {}
            out = _apply(
                ffn, params["ffn"], normed, rngs=rngs, valid=tokens.valid, train=context.train, **more
            )
        y, aux = out if isinstance(out, tuple) else (out, Aux())
        y = self._normed(modules, params, "ffn", y, tokens, at="res_post")
        y = self._weighted(y, tokens)
        return self._residual(modules, params, "ffn", tokens, y, context, depth), aux

    def _residual(
        self,
        modules: Mapping[str, nn.Module],
        params: Mapping[str, Any],
        half: str,
        tokens: Tokens,
        y: Array,
        context: Context,
        depth: Depth,
    ) -> Tokens:
        if self.layer_scale is not None:
            y = _apply(modules[f"{half}_scale"], params[f"{half}_scale"], y)
        if self.dropout and context.train:
            y = dropout(y, self.dropout, context.key(f"dropout_{half}", depth.index))
        if self.drop_path and context.train:
            y = drop_path(y, depth.rate, context.key(f"drop_path_{half}", depth.index))
        x = tokens.x + y
        if half == "special" and self.norm_placement == "post":  # its norm is of the joined tokens
            x = split_pieces(
                self._normed(modules, params, half, join_pieces(x), tokens, at="post"), x.shape[1]
            )
        else:
            x = self._normed(modules, params, half, x, tokens, at="post")
        return tokens.replace(x=constrain(x, "batch", "sequence", None))


@dataclass(frozen=True)
class Depth:
    """Which block this is: arrays, since a scanned block does not know it statically.

    Attributes:
      index: k, [], int32.
      rate: probability that a residual branch is dropped, [], float32 in [0, 1).
    """

    index: Array
    rate: Array


def dropout(y: Array, rate: float, key: Array) -> Array:
    """Drop each number with probability `rate`, scaling the rest by 1 / (1 - rate).

    Source: Srivastava et al. 2014, JMLR 15. y: any shape; rate in [0, 1).
    """
    alive = jax.random.bernoulli(key, 1 - rate, y.shape)
    return jnp.where(alive, y / (1 - rate), jnp.zeros((), y.dtype))


def drop_path(y: Array, rate: Array, key: Array) -> Array:
    """Drop the whole branch of an example with probability `rate`, scaling the rest by 1 / (1 - rate).

    Source: Huang et al. 2016, arXiv 1603.09382. y: [B, N, D]; rate: [], in [0, 1).
    """
    alive = jax.random.bernoulli(key, 1 - rate, (y.shape[0], 1, 1))
    return jnp.where(alive, y / (1 - rate).astype(y.dtype), jnp.zeros((), y.dtype))


def _apply(module: nn.Module, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    return module.apply({"params": params}, *args, **kwargs)
