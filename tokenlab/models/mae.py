"""mae: masked-autoencoder pre-training of a ViT (He et al., CVPR 2022, arXiv 2111.06377), over any stack.

    tokens = embed(image)                        [CLS, registers, patches] -> [B, special + N, D], positions added
    seen = take(tokens, a random K of N)         [B, special + K, D], ascending; special tokens always stay
    seen = norm(stack(seen))                     the encoder really runs on K patches
    full = restore(linear(seen), mask token)     [B, special + N, Dd], positions of the decoder's own added
    pixels = linear(norm(block*Ld(full)))        [B, N, p*p*C]

The encoder's weights are those of a ViT of the same settings, {"embed", "blocks", "items", "head/norm"}; what is added
is "decoder". So another run takes them with `init_from`, and a classifier starts anew on them.

As published but for two things. The sin-cos tables are this library's (`tokenlab.ops.position.sincos_2d`), whose
frequencies end at 1/10000 where the authors' end just before. And patches stay in their order instead of being
shuffled: the encoder cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError, ShapeError, TokenLabError
from tokenlab.core.stack import parse
from tokenlab.core.tokens import Tokens
from tokenlab.cost.table import RowInfo
from tokenlab.layers import execute
from tokenlab.layers.attention import Attention
from tokenlab.layers.block import Block
from tokenlab.layers.build_program import build_program
from tokenlab.layers.context import Context
from tokenlab.layers.embed import Position
from tokenlab.layers.ffn import FFNDefaults
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.layers.norm import LayerNorm
from tokenlab.layers.output import Output
from tokenlab.layers.program import Program
from tokenlab.models import Names, vit
from tokenlab.models.state import flat
from tokenlab.models.trunk import Execution, Remat
from tokenlab.models.vit import ViT, ViTConfig
from tokenlab.ops import carry, select
from tokenlab.ops.gather import restore
from tokenlab.ops.position import sincos_2d
from tokenlab.sharding.constrain import constrain

DECODERS: Mapping[str, tuple[int, int, int]] = {
    # size of the encoder: width Dd, depth Ld, heads
    "nano": (16, 1, 2),
    "micro": (16, 1, 2),
    "toy": (32, 2, 2),
    "Ti": (96, 2, 3),
    "S": (192, 4, 6),
    "B": (512, 8, 16),
    "L": (512, 8, 16),
    "H": (512, 8, 16),
}
"""B, L and H as published (section 4.1); the smaller ones are ours."""

MLP_RATIO = 4
"""Hidden width of the decoder's feed-forward layers over its width."""


@dataclass(frozen=True)
class MAEConfig(ViTConfig):
    """Settings of the ViT that is trained, and of what pre-training adds.

    Attributes:
      position: of the encoder; the published recipe has "sincos".
      keep: patches that the encoder sees: an int is a count, a float a fraction of them in (0, 1].
      decoder_width, decoder_depth, decoder_heads: None takes what `DECODERS` says for the size.
    """

    position: Position = "sincos"
    keep: int | float = 0.25
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("decoder_width", "decoder_depth", "decoder_heads"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"config.model.{field} must be at least 1; got {value}.")
        width, _, heads = self.decoder_dims()
        if width % heads or width % 4 or width < 8:
            raise ConfigError(
                f"config.model.decoder_width is {width} with {heads} heads; expected a multiple of the heads and of 4, "
                "at least 8, as its positions are sin-cos."
            )

    def decoder_dims(self) -> tuple[int, int, int]:
        """Width Dd, depth Ld, heads of the decoder."""
        width, depth, heads = DECODERS[self.size.partition("/")[0]]
        return self.decoder_width or width, self.decoder_depth or depth, self.decoder_heads or heads


class EncoderNorm(nn.Module):
    """The final norm of the encoder, where a ViT has it: under "norm".

    Attributes:
      dtype: of the result.
      eps: of the norm.
    """

    dtype: Any
    eps: float

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {"norm/scale": (None,), "norm/bias": (None,)}

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return self.AXES

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        return LayerNorm(self.dtype, self.eps, name="norm")(x)


class Visible(NamedTuple):
    """What masking leaves.

    Attributes:
      tokens: `special + K` of them.
      places: [B, K] int32, which patches these are, ascending.
    """

    tokens: Tokens
    places: Array


@dataclass(frozen=True, eq=False)
class MAE(ViT):
    """A masked autoencoder for images of one size; see `tokenlab.models.vit.ViT` for the attributes.

    `num_outputs` are the values of a picture. The program, and all that is said of the stack, is of the
    encoder on the tokens it sees.

    Raises (when built):
      ConfigError: `keep` is out of range; `num_outputs` are not the values of a picture. And what a ViT raises.
    """

    settings: MAEConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        values = math.prod(self.image)
        if self.num_outputs != values:
            raise ConfigError(
                f"mae gives the {values} values of a picture, and the task asks for {self.num_outputs} outputs: set "
                "config.task.name='mae'."
            )

    # ------------------------------------------------------------------------------------------ sizes

    @property
    def patch(self) -> int:
        """Side p of a patch in pixels."""
        return self.settings.dims()[4]

    @property
    def patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def kept(self) -> int:
        """K, patches that the encoder sees."""
        try:
            return select.count(self.settings.keep, self.patches, what="config.model.keep")
        except TokenLabError as error:
            raise ConfigError(str(error)) from None

    @property
    def tokens_per_example(self) -> int:
        """Tokens that enter the encoder: CLS, registers and K patches."""
        return self.kept + self.embed.special

    @property
    def layer_tokens(self) -> int:
        """Tokens of one example that enter blocks, those of the decoder too."""
        return super().layer_tokens + self.decoder.present * self.decoder.depth

    @property
    def dense_layer_tokens(self) -> int:
        """The same of an encoder in which every token that enters stays."""
        return super().dense_layer_tokens + self.decoder.present * self.decoder.depth

    @property
    def dense_settings(self) -> dict[str, Any]:
        """Settings of the model that saves nothing, for benchmarks: every patch is seen."""
        return {"keep": 1.0}

    # ------------------------------------------------------------------------------------------ parts

    @cached_property
    def head(self) -> Any:
        """The module under state["head"]: the encoder's final norm."""
        return EncoderNorm(self.dtype, self.settings.norm_eps)

    @cached_property
    def whole(self) -> ViT:
        """The encoder as a ViT that sees all patches; its classifier has one output, which nobody reads."""
        return ViT(self.settings, self.image, 1, self.stack_vars, self.train)

    @cached_property
    def decoder(self) -> Program:
        """The decoder's blocks, on all patches and the special tokens."""
        s = self.settings
        width, depth, heads = s.decoder_dims()
        ffn = MLP(MLP_RATIO * width, s.activation, self.dtype)
        attention = Attention(num_heads=heads, dtype=self.dtype, implementation=s.attention)
        special = self.embed.special
        return build_program(
            parse(f"block*{depth}"),
            Names(),
            block=Block(attention=attention, ffn=ffn, dtype=self.dtype, norm_eps=s.norm_eps),
            ffn_defaults=FFNDefaults(MLP_RATIO * width, s.activation, self.dtype),
            width=width,
            tokens=special + self.patches,
            protected=special,
            has_cls=s.head == "cls",
            coordinates=2,
            train=self.train,
        )

    @property
    def _linear(self) -> tuple[nn.Dense, nn.Dense]:
        """Into the decoder, and out of it to pixels."""
        init = nn.initializers.xavier_uniform()
        width = self.settings.decoder_dims()[0]
        into = nn.Dense(width, dtype=self.dtype, kernel_init=init)
        return into, nn.Dense(self.patch**2 * self.image[2], kernel_init=init)

    # ------------------------------------------------------------------------------------------ weights

    def init_head(self, key: Array, embed: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh weights of the final norm."""
        del embed
        return self.head.init(key, jnp.zeros((1, 1, self.settings.dims()[0])))["params"]

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh weights: those of a ViT without its classifier, and "decoder"."""
        return {**super().init(key), "decoder": self._init_decoder(jax.random.fold_in(key, 3))}

    def _init_decoder(self, key: Array) -> dict[str, Any]:
        into, pixels = self._linear
        width = self.settings.decoder_dims()[0]
        keys = jax.random.split(key, 4)
        x = jnp.zeros((1, 1, width))
        return {
            "embed": into.init(keys[0], jnp.zeros((1, 1, self.settings.dims()[0])))["params"],
            "mask_token": nn.initializers.normal(0.02)(keys[1], (1, width), jnp.float32),
            **self.decoder.init(keys[2]),
            **EncoderNorm(self.dtype, self.settings.norm_eps).init(key, x)["params"],
            "pixels": pixels.init(keys[3], x)["params"],
        }

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Parameter path -> logical axes of its trailing dimensions, for `tokenlab.sharding.rules`."""
        own = {
            "embed/kernel": ("embed", None),
            "embed/bias": (None,),
            "mask_token": (None, None),
            **self.decoder.axes(),
            **EncoderNorm.AXES,
            "pixels/kernel": ("embed", None),
            "pixels/bias": (None,),
        }
        return {**super().logical_axes(), **{f"decoder/{path}": axes for path, axes in own.items()}}

    def further_rows(self) -> list[RowInfo]:
        """Rows of a cost table beside embedding, stack and head: the decoder, layer by layer."""
        state = self.abstract_state()["decoder"]
        blocks = sum(leaf.size for leaf in jax.tree.leaves(state["blocks"]))
        rest = sum(leaf.size for leaf in flat(state).values()) - blocks
        each = blocks // self.decoder.depth
        rows = [RowInfo(f"decoder/{step.name}", step.present, each) for step in self.decoder.flat()]
        return [*rows, RowInfo("decoder", self.decoder.present, rest)]

    # ------------------------------------------------------------------------------------------ running

    def visible(self, tokens: Tokens, rng: Array) -> Visible:
        """A uniformly random K patches of each example, and all special tokens.

        Args:
          tokens: as embedded, [B, special + N, ...].
          rng: key of this step.
        """
        special = tokens.protected
        scores = select.random_scores(rng, tokens.batch, tokens.count)
        indices = select.top_k(scores, self.kept, protected=special)
        return Visible(carry.take(tokens, indices), indices[:, special:] - special)

    def apply(
        self,
        state: Mapping[str, Any],
        batch: Mapping[str, Array],
        *,
        train: bool = False,
        rng: Array | None = None,
        record: bool = False,
        execution: Execution | None = None,
        remat: Remat | None = None,
    ) -> Output:
        """One forward pass; arguments as `ViT.apply`. Patches are masked in evaluation too, by the key that is given.

        Returns:
          `logits` are the values of all patches, [B, N, p*p*C] float32, in the order of `layers.embed.patchify`;
          `places` [B, K] int32 which patches were seen. `features` are what a ViT's head reads: in training of the
          patches seen, otherwise of the whole image, which costs a second pass of the encoder on all patches unless
          nobody reads them (a compiled program then leaves it out).

        Raises:
          ShapeError: images of another shape than the model was built for.
        """
        image = batch["image"]
        if image.shape[1:] != self.image:
            raise ShapeError(
                f"mae: built for images {self.image}, got {image.shape[1:]} (batch {image.shape})."
            )
        context = Context(jax.random.key(0) if rng is None else rng, train)
        how = {"execution": execution, "remat": remat}
        with jax.named_scope("embed"):
            tokens = self.embed.apply({"params": state["embed"]}, image)
            seen, places = self.visible(tokens, context.key("mask", 0))
            seen = seen.replace(x=constrain(seen.x, "batch", "sequence", None))
        ran = self.run(state, seen, context, record=record, **how)
        with jax.named_scope("head"):
            normed = self.head.apply({"params": state["head"]}, ran.tokens.x)
        pixels = self._decode(state["decoder"], ran.tokens.replace(x=normed), context, **how)
        if train:
            features = self.whole.head.apply({"params": self._classifier(state)}, ran.tokens)[1]
        else:
            whole = {**state, "head": self._classifier(state)}
            features = self.whole.apply(whole, batch, rng=rng, **how).features
        return Output(pixels, features, normed, ran.aux, ran.trace, ran.loads, places)

    def _decode(
        self,
        state: Mapping[str, Any],
        tokens: Tokens,
        context: Context,
        *,
        execution: Execution | None,
        remat: Remat | None,
    ) -> Array:
        """Normed tokens of the encoder -> values of all patches [B, N, p*p*C]; what is gone is a mask token."""
        into, pixels = self._linear
        special = tokens.protected
        with jax.named_scope("decoder"):
            x = into.apply({"params": state["embed"]}, tokens.x)
            token = state["mask_token"].astype(x.dtype)
            patches = restore(x[:, special:], tokens.position[:, special:] - special, self.patches, token)
            patches = patches + sincos_2d(*self.grid, x.shape[-1]).astype(x.dtype)
            x = constrain(jnp.concatenate([x[:, :special], patches], axis=1), "batch", "sequence", None)
            position = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
            done, _ = execute.run(
                self.decoder,
                state,
                Tokens(x, position, protected=special),
                context,
                execution=execution or self.settings.execution,
                remat=remat or self.settings.remat,
            )
            norm = EncoderNorm(self.dtype, self.settings.norm_eps)
            normed = norm.apply({"params": {"norm": state["norm"]}}, done.x[:, special:])
            return pixels.apply({"params": state["pixels"]}, normed.astype(jnp.float32))

    def _classifier(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The ViT's head with the norm that was trained; of what else it holds nothing is read, so it is zeros."""
        wanted = jax.eval_shape(self.whole.init_head, jax.random.key(0), state["embed"])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wanted)
        return {**zeros, "norm": state["head"]["norm"]}


Config = MAEConfig


def build(
    config: MAEConfig,
    *,
    spec: Mapping[str, tuple[tuple[int, ...], str]],
    num_outputs: int,
    stack_vars: Mapping[str, int | float],
    train: bool,
) -> MAE:
    """A masked autoencoder for the images of a data source; see `tokenlab.models.build`."""
    shape = vit.image_shape(spec, "mae")
    return MAE(config, shape, num_outputs, stack_vars, train)
