"""vit: the Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) over any stack.

    tokens = embed(image)          [CLS, registers, patches] -> [B, N, D]
    tokens = stack(tokens)         block*12, block*4 + keep(0.5, by=cls) + block*8, ...
    logits = head(tokens)          final norm, CLS token or mean (or all special tokens and mean), linear

The weights are one plain nested dict, {"embed", "blocks", "items", "shared", "head"}; the same weights serve
every stack of as many blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError, ShapeError, StackError, suggest
from tokenlab.core.tokens import Tokens
from tokenlab.layers.activation import activation
from tokenlab.layers.attention import Attention
from tokenlab.layers.block import Block
from tokenlab.layers.build_program import build_program
from tokenlab.layers.context import Context
from tokenlab.layers.embed import PatchEmbed
from tokenlab.layers.ffn import FFNDefaults
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.layers.head import Head
from tokenlab.layers.output import Output
from tokenlab.layers.program import Program
from tokenlab.models import Names
from tokenlab.models.trunk import Execution, Remat, Trunk
from tokenlab.sharding.constrain import constrain

SIZES: Mapping[str, tuple[int, int, int, int]] = {
    # name: width D, depth L, hidden F, heads H
    "nano": (16, 2, 32, 2),
    "micro": (32, 4, 128, 2),
    "toy": (64, 6, 256, 4),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
}
"""Toys first; Ti and S of Touvron et al. 2021 (arXiv 2012.12877), B, L and H of Dosovitskiy et al. 2021, table 1."""


@dataclass(frozen=True)
class ViTConfig:
    """Settings of a ViT; None takes what the size says.

    Attributes:
      size: "S/16": a row of `SIZES` and the patch side in pixels.
      stack: the depth as an expression; None for `block*L`.
      width, num_heads, mlp_dim, patch: in place of the size's D, H, F, p.
      num_kv_heads: G, grouped-query heads; None for G = H.
      head: "cls" token, "mean" of the patches, or "special": all registers and that mean, joined, without a CLS token.
      head_bias: initial bias of every class; -log(classes) makes the first sigmoid loss small.
      registers: number of register tokens.
      position: "learned", "sincos", "rope" or "none".
      position_grid: (rows, columns) the positions are made for; None for the grid of the data. Set it when weights
        trained at one resolution are used at another.
      qk_norm: layer-norm queries and keys.
      layer_scale: initial value of LayerScale; None for none.
      kernel_std: standard deviation of the normal, cut off at two, that kernels of attention and MLPs start from; None
        for Glorot's uniform distribution.
      drop_path: rate of the last block, in [0, 1).
      drop_path_rates: of the others: "linear", rising from 0 at the first, or "constant", the same.
      activation: "gelu_tanh", "gelu" (exact), "relu" or "silu".
      norm_eps: added to the variance in the layer norms of blocks and head, > 0.
      dtype: "float32" or "bfloat16" for computation; parameters, softmax, norms and losses are float32 always.
      execution: "auto", "scan" or "unroll".
      remat: "none", "full" or "dots".
      attention: implementation of attention: None, "xla" or "cudnn".
    """

    size: str = "toy/2"
    stack: str | None = None
    width: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    mlp_dim: int | None = None
    patch: int | None = None
    head: Literal["cls", "mean", "special"] = "cls"
    head_bias: float = 0.0
    registers: int = 0
    position: Literal["learned", "sincos", "rope", "none"] = "learned"
    position_grid: tuple[int, int] | None = None
    qk_norm: bool = False
    layer_scale: float | None = None
    kernel_std: float | None = None
    drop_path: float = 0.0
    drop_path_rates: Literal["linear", "constant"] = "linear"
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    execution: Execution = "auto"
    remat: Remat = "none"
    attention: Literal["xla", "cudnn"] | None = None

    def __post_init__(self) -> None:
        name, _, patch = self.size.partition("/")
        if name not in SIZES:
            raise ConfigError(f"config.model.size {self.size!r} is unknown.{suggest(name, SIZES)}")
        if not (patch.isdigit() and int(patch) > 0) and self.patch is None:
            raise ConfigError(
                f"config.model.size {self.size!r} has no patch side; write for example '{name}/16'."
            )
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"config.model.drop_path must be in [0, 1); got {self.drop_path}.")
        if self.kernel_std is not None and not self.kernel_std > 0:
            raise ConfigError(f"config.model.kernel_std must be above 0; got {self.kernel_std}.")
        for field in ("width", "num_heads", "num_kv_heads", "mlp_dim", "patch"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"config.model.{field} must be at least 1; got {value}.")
        if self.registers < 0:
            raise ConfigError(f"config.model.registers must be at least 0; got {self.registers}.")
        if self.head == "special" and self.registers < 1:
            raise ConfigError(
                "config.model.head is 'special', which reads the registers, and there are none; set "
                "config.model.registers to at least 1."
            )
        if self.position_grid is not None and (len(self.position_grid) != 2 or min(self.position_grid) < 1):
            raise ConfigError(
                f"config.model.position_grid must be (rows, columns); got {self.position_grid}."
            )
        if not self.norm_eps > 0:
            raise ConfigError(f"config.model.norm_eps must be above 0; got {self.norm_eps}.")
        activation(self.activation)

    def dims(self) -> tuple[int, int, int, int, int]:
        """Width D, depth L of the size, hidden F, heads H, patch side p."""
        name, _, patch = self.size.partition("/")
        width, depth, hidden, heads = SIZES[name]
        ratio = hidden / width
        chosen = self.width or width
        return (
            chosen,
            depth,
            self.mlp_dim or round(chosen * ratio),
            self.num_heads or heads,
            self.patch or int(patch),
        )


@dataclass(frozen=True, eq=False)
class ViT(Trunk):
    """A Vision Transformer for images of one size.

    Attributes:
      settings: see `ViTConfig`.
      image: (height, width, channels) in pixels.
      num_outputs: logits.
      stack_vars: numbers that names in the stack stand for.
      train: False takes `train_only` items out of the stack.

    Raises (when built):
      StackError, ConfigError, ShapeError, NameLookupError: settings that do not fit each other or the images.
    """

    settings: ViTConfig
    image: tuple[int, int, int]
    num_outputs: int
    stack_vars: Mapping[str, int | float]
    train: bool = True

    def __post_init__(self) -> None:
        width, _, _, heads, patch = self.settings.dims()
        if self.image[0] % patch or self.image[1] % patch:
            raise ShapeError(
                f"vit: patch {patch} does not divide the image {self.image[0]}x{self.image[1]}; "
                "set config.model.patch or config.model.size to a patch side that does."
            )
        groups = self.settings.num_kv_heads or heads
        if width % heads or heads % groups:
            raise ShapeError(
                f"vit: width {width}, num_heads {heads}, num_kv_heads {groups}: "
                "width must be a multiple of num_heads, and num_heads of num_kv_heads."
            )
        if self.settings.position == "rope" and (width // heads) % 4:
            raise ShapeError(
                f"vit: rope over two axes needs head width in multiples of 4; got {width // heads}."
            )
        if self.settings.position == "sincos" and width % 4:
            raise ShapeError(f"vit: sincos positions need a width in multiples of 4; got {width}.")
        if self.by_modality:  # a wrong stack is said here too, not at the first call
            raise StackError(
                "stack: it has weights for text and for images, and a vit has tokens of images alone: "
                f"{self.program.stack.text!r}. Take parts that do not tell them apart, such as moma(mixed=8), or "
                "config.model.name='decoder_lm' on data of both."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = self.settings.dims()[4]
        return self.image[0] // patch, self.image[1] // patch

    @cached_property
    def embed(self) -> PatchEmbed:
        """The module under state["embed"]."""
        s = self.settings
        width, *_, patch = s.dims()
        grid = s.position_grid or self.grid
        return PatchEmbed(width, patch, s.head == "cls", s.registers, s.position, grid, self.dtype)

    @cached_property
    def head(self) -> Head:
        """The module under state["head"]."""
        return Head(
            self.num_outputs, self.settings.head, self.dtype, self.settings.norm_eps, self.settings.head_bias
        )

    def make_program(self) -> Program:
        """The stack, worked out for these images."""
        s = self.settings
        width, depth, hidden, heads, _ = s.dims()
        attention = Attention(
            num_heads=heads,
            num_kv_heads=s.num_kv_heads,
            qk_norm=s.qk_norm,
            rope_theta=100.0 if s.position == "rope" else None,
            dtype=self.dtype,
            implementation=s.attention,
            kernel_std=s.kernel_std,
        )
        block = Block(
            attention=attention,
            ffn=MLP(hidden, s.activation, self.dtype, s.kernel_std),
            layer_scale=s.layer_scale,
            drop_path=s.drop_path > 0,
            dtype=self.dtype,
            norm_eps=s.norm_eps,
        )
        return build_program(
            self.parsed(depth),
            Names(),
            block=block,
            ffn_defaults=FFNDefaults(hidden, s.activation, self.dtype, kernel_std=s.kernel_std),
            width=width,
            tokens=self.tokens_per_example,
            protected=self.embed.special,
            has_cls=s.head == "cls",
            coordinates=2,
            train=self.train,
        )

    @property
    def tokens_per_example(self) -> int:
        """Tokens after embedding: CLS, registers and patches."""
        return self.grid[0] * self.grid[1] + self.embed.special

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what `apply` reads of a batch."""
        return {"image": jax.ShapeDtypeStruct((batch, *self.image), jnp.float32)}

    def init_embed(self, key: Array) -> dict[str, Any]:
        """Fresh weights of the patches' kernel, positions, CLS and registers."""
        return self.embed.init(key, jnp.zeros((1, *self.image)))["params"]

    def init_head(self, key: Array, embed: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh weights of the final norm and the classifier."""
        width = self.settings.dims()[0]
        blank = Tokens(jnp.zeros((1, 1 + self.embed.special, width)), jnp.zeros((1, 1), jnp.int32))
        return self.head.init(key, blank.replace(protected=self.embed.special))["params"]

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
        """One forward pass.

        Args:
          state: weights, see `init`.
          batch: "image" [B, H, W, C], float32.
          train: drop path and router noise on.
          rng: key of this step; needed in training and by random scores. None: a fixed key, so that evaluation gives
            the same at every call.
          record: collect the tokens at every reduction in `Output.trace`, and the load of experts in `Output.loads`
            (unrolls the stack).
          execution, remat: in place of the settings'.

        Raises:
          ShapeError: images of another shape than the model was built for.
        """
        image = batch["image"]
        if image.shape[1:] != self.image:
            raise ShapeError(
                f"vit: built for images {self.image}, got {image.shape[1:]} (batch {image.shape})."
            )
        context = Context(jax.random.key(0) if rng is None else rng, train)
        with jax.named_scope("embed"):
            tokens = self.embed.apply({"params": state["embed"]}, image)
            tokens = tokens.replace(x=constrain(tokens.x, "batch", "sequence", None))
        ran = self.run(state, tokens, context, record=record, execution=execution, remat=remat)
        with jax.named_scope("head"):
            logits, features, normed = self.head.apply({"params": state["head"]}, ran.tokens)
        return Output(logits, features, normed, ran.aux, ran.trace, ran.loads)


Config = ViTConfig


def build(
    config: ViTConfig,
    *,
    spec: Mapping[str, tuple[tuple[int, ...], str]],
    num_outputs: int,
    stack_vars: Mapping[str, int | float],
    train: bool,
) -> ViT:
    """A ViT for the images of a data source; see `tokenlab.models.build`."""
    return ViT(config, image_shape(spec, "vit"), num_outputs, stack_vars, train)


def image_shape(spec: Mapping[str, tuple[tuple[int, ...], str]], name: str) -> tuple[int, int, int]:
    """(height, width, channels) of the images of a data source, for the model `name`.

    Raises:
      ConfigError: the data has no images. ShapeError: they are of no fixed shape, or not of floats.
    """
    if "image" not in spec:
        raise ConfigError(
            f"{name} reads 'image'; the data has {', '.join(sorted(spec))}. Choose another model or data."
        )
    shape = tuple(spec["image"][0])
    if len(shape) != 3:
        raise ShapeError(f"{name} reads images [H, W, C]; the data's 'image' has shape {shape}.")
    if not jnp.issubdtype(spec["image"][1], jnp.floating):
        raise ShapeError(
            f"{name} reads images of floats; the data's 'image' is {spec['image'][1]}: end config.data.transform and "
            "config.data.eval_transform with value_range(-1, 1)."
        )
    return shape
