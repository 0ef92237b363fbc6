"""vq_image: a picture as a small grid of codes, and back (VQ-VAE, van den Oord et al. 2017, arXiv 1711.00937).

    z = encoder(image)             [B, H, W, C] -> [B, h, w, D], h = H / factor
    codes, z_q = quantizer(z)      one of K codes at each place, gradients straight through
    image = decoder(z_q)           [B, h, w, D] -> [B, H, W, C]

The weights are one plain nested dict, {"encoder", "quantizer", "decoder"}. There is no stack here. What `tokenlab
encode` writes is read by `Decoder.load`, which needs nothing else to give pictures again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import ConfigError, DataError, ShapeError, StackError, suggest
from tokenlab.cost.table import RowInfo
from tokenlab.layers import conv
from tokenlab.layers.context import Aux
from tokenlab.layers.output import Output
from tokenlab.layers.quantizer import DECODING, FSQ, VQ, Quantized
from tokenlab.models import codes_file
from tokenlab.models.state import flat
from tokenlab.ops.quantize import Distance, check_levels
from tokenlab.sharding.constrain import constrain

SIZES: Mapping[str, tuple[int, int]] = {
    # name: channels after the first halving, residual blocks after each
    "tiny": (16, 1),
    "small": (32, 1),
    "base": (128, 2),
}

WIDEST = 4
"""Channels double at each further halving, up to so many times those after the first."""

_OF_VQ = {"codes": 512, "code_width": 4, "distance": "cosine", "commitment": 0.25}
_OF_FSQ = {"levels": (8, 6, 5)}


@dataclass(frozen=True)
class VQImageConfig:
    """Settings; None takes what the size or the quantizer says.

    Attributes:
      size: a row of `SIZES`.
      factor: pixels along a side that become one code: 2, 4, 8, 16, ...
      width, blocks: in place of the size's.
      quantizer: "vq", the nearest row of a learned codebook, or "fsq", rounding (`tokenlab.layers.quantizer`).
      codes: K of "vq", at least 2; None for 512.
      code_width: dimensions of a code of "vq", at least 1; None for 4.
      distance: of "vq", "cosine" or "euclidean"; None for cosine.
      commitment: weight of the commitment loss of "vq", >= 0; None for 0.25.
      levels: of each dimension of "fsq", each at least 2; None for (8, 6, 5), 240 codes.
      dtype: "float32" or "bfloat16" for convolutions; parameters, norms, codes and losses are float32 always.
    """

    size: str = "small"
    factor: int = 4
    width: int | None = None
    blocks: int | None = None
    quantizer: Literal["vq", "fsq"] = "vq"
    codes: int | None = None
    code_width: int | None = None
    distance: Distance | None = None
    commitment: float | None = None
    levels: tuple[int, ...] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"config.model.size {self.size!r} is unknown.{suggest(self.size, SIZES)}")
        if self.factor < 2 or self.factor & (self.factor - 1):
            raise ConfigError(f"config.model.factor must be a power of two from 2 on; got {self.factor}.")
        for name, least in (("width", 1), ("blocks", 0), ("codes", 2), ("code_width", 1), ("commitment", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"config.model.{name} must be at least {least}; got {value}.")
        for name in _OF_FSQ if self.quantizer == "vq" else _OF_VQ:
            if getattr(self, name) is not None:
                other = "fsq" if self.quantizer == "vq" else "vq"
                raise ConfigError(
                    f"config.model.{name} is {getattr(self, name)}, and the quantizer is {self.quantizer!r}, which has "
                    f"no such thing: leave it out, or set config.model.quantizer={other!r}."
                )
        if self.levels is not None:
            check_levels(self.levels)

    @property
    def of_quantizer(self) -> dict[str, Any]:
        """The settings of the quantizer, with its defaults."""
        defaults = _OF_VQ if self.quantizer == "vq" else _OF_FSQ
        given = {name: getattr(self, name) for name in defaults}
        return {name: defaults[name] if value is None else value for name, value in given.items()}


@dataclass(frozen=True, eq=False)
class VQImage:
    """A tokenizer of pictures of one size.

    Attributes:
      settings: see `VQImageConfig`.
      image: (height, width, channels) in pixels.

    Raises (when built):
      ShapeError: a side of the pictures is no multiple of the factor.
    """

    settings: VQImageConfig
    image: tuple[int, int, int]

    program: ClassVar[None] = None
    stack_text: ClassVar[str] = ""

    def __post_init__(self) -> None:
        factor = self.settings.factor
        if self.image[0] % factor or self.image[1] % factor:
            raise ShapeError(
                f"vq_image: factor {factor} does not divide the image {self.image[0]}x{self.image[1]}; "
                "set config.model.factor to a power of two that does, or resize the images in config.data.transform "
                "and config.data.eval_transform."
            )

    # ------------------------------------------------------------------------------------------ parts

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes, (h, w)."""
        return self.image[0] // self.settings.factor, self.image[1] // self.settings.factor

    @property
    def tokens_per_example(self) -> int:
        """Codes of a picture."""
        return self.grid[0] * self.grid[1]

    @property
    def codes_count(self) -> int:
        """K, how many codes there are."""
        return self.quantizer.codes_count

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each halving."""
        first = self.settings.width or SIZES[self.settings.size][0]
        return tuple(first * min(2**level, WIDEST) for level in range(self.settings.factor.bit_length() - 1))

    @property
    def _blocks(self) -> int:
        given = self.settings.blocks
        return SIZES[self.settings.size][1] if given is None else given

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return jnp.dtype(self.settings.dtype)

    @property
    def described(self) -> dict[str, Any]:
        """`config.model` with every default filled in that decides how codes are read, of JSON values."""
        blocks, first = self._blocks, self.widths[0]
        given = {**asdict(self.settings), "width": first, "blocks": blocks, **self.settings.of_quantizer}
        if given["levels"] is not None:
            given["levels"] = list(given["levels"])
        return {"name": "vq_image", **given}

    @cached_property
    def encoder(self) -> conv.ConvEncoder:
        """The module under state["encoder"]."""
        return conv.ConvEncoder(self.widths, self._blocks, self.dtype)

    @cached_property
    def quantizer(self) -> VQ | FSQ:
        """The module under state["quantizer"]."""
        given = self.settings.of_quantizer
        if self.settings.quantizer == "fsq":
            return FSQ(self.widths[-1], self.dtype, **given)
        return VQ(self.widths[-1], self.dtype, width=given.pop("code_width"), **given)

    @cached_property
    def decoder(self) -> conv.ConvDecoder:
        """The module under state["decoder"]."""
        return conv.ConvDecoder(self.widths, self._blocks, self.image[2], self.dtype)

    # ------------------------------------------------------------------------------------------ weights

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh weights, float32."""
        keys = jax.random.split(key, 3)
        grid = jnp.zeros((1, *self.grid, self.widths[-1]))
        return {
            "encoder": self.encoder.init(keys[0], jnp.zeros((1, *self.image)))["params"],
            "quantizer": self.quantizer.init(keys[1], grid)["params"],
            "decoder": self.decoder.init(keys[2], grid)["params"],
        }

    def abstract_state(self) -> dict[str, Any]:
        """Shapes and dtypes of the weights, without making them."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Parameter path -> logical axes of its dimensions, for `tokenlab.sharding.rules`."""
        parts = {"encoder": self.encoder, "quantizer": self.quantizer, "decoder": self.decoder}
        return {f"{name}/{path}": axes for name, part in parts.items() for path, axes in part.axes().items()}

    def decoder_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The part of the weights that `decode` reads."""
        quantizer = {name: leaf for name, leaf in state["quantizer"].items() if name in DECODING}
        return {"quantizer": quantizer, "decoder": state["decoder"]}

    # ------------------------------------------------------------------------------------------ running

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what `apply` reads of a batch."""
        return {"image": jax.ShapeDtypeStruct((batch, *self.image), jnp.float32)}

    def cost_rows(self) -> list[RowInfo]:
        """The parts that a cost table tells apart; the tokens are the codes of a picture."""

        def size(tree: Any) -> int:
            return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

        return [
            RowInfo(name, self.tokens_per_example, size(part)) for name, part in self.abstract_state().items()
        ]

    def apply(
        self,
        state: Mapping[str, Any],
        batch: Mapping[str, Array],
        *,
        train: bool = False,
        rng: Array | None = None,
    ) -> Output:
        """One forward pass, the same in training and evaluation: nothing in it is random.

        Args:
          state: weights, see `init`.
          batch: "image" [B, H, W, C] floats; where it has a "mask" [B], rows of 0 count in no loss and no metric.
          train, rng: read by no part of this model.

        Returns:
          `logits` are the pictures again, [B, H, W, C] float32; `features` z_q [B, h, w, D], `tokens` the same
          [B, h w, D].

        Raises:
          ShapeError: images of another shape than the model was built for.
        """
        del train, rng
        found = self._quantized(state, batch["image"], batch.get("mask"))
        pictures = self._pictures(state, found.z_q)
        tokens = found.z_q.reshape(found.z_q.shape[0], self.tokens_per_example, -1)
        return Output(pictures, found.z_q, tokens, Aux(found.losses, found.metrics))

    def encode(self, state: Mapping[str, Any], images: Array) -> Array:
        """Pictures [B, H, W, C] -> codes [B, h, w] int32 in [0, codes_count). Raises ShapeError for another shape."""
        return self._quantized(state, images, None).codes

    def decode(self, state: Mapping[str, Any], codes: Array) -> Array:
        """Codes -> pictures, those that `apply` gives for pictures of these codes.

        Args:
          state: weights; those of `decoder_state` suffice.
          codes: [B, h, w] int in [0, codes_count).

        Returns:
          [B, H, W, C] float32; values may lie a little outside the range of the data.

        Raises:
          ShapeError: codes of another shape, or that are no whole numbers.
        """
        if codes.ndim != 3 or codes.shape[1:] != self.grid or not jnp.issubdtype(codes.dtype, jnp.integer):
            raise ShapeError(
                f"vq_image: decodes int [B, {self.grid[0]}, {self.grid[1]}], got {codes.dtype}{list(codes.shape)}."
            )
        with jax.named_scope("quantizer"):
            z_q = self.quantizer.apply(
                {"params": state["quantizer"]}, codes.astype(jnp.int32), method=type(self.quantizer).lookup
            )
        return self._pictures(state, z_q)

    def _quantized(self, state: Mapping[str, Any], images: Array, mask: Array | None) -> Quantized:
        if images.shape[1:] != self.image:
            raise ShapeError(
                f"vq_image: built for images {self.image}, got {images.shape[1:]} (batch {images.shape})."
            )
        with jax.named_scope("encoder"):
            z = self.encoder.apply({"params": state["encoder"]}, images)
        with jax.named_scope("quantizer"):
            return self.quantizer.apply({"params": state["quantizer"]}, z, mask)

    def _pictures(self, state: Mapping[str, Any], z_q: Array) -> Array:
        with jax.named_scope("decoder"):
            z_q = constrain(z_q, "batch", None, None, None)
            return self.decoder.apply({"params": state["decoder"]}, z_q).astype(jnp.float32)


@dataclass(frozen=True, eq=False)
class Decoder:
    """What a file of codes needs to be pictures again.

    Attributes:
      model: whose codes they are.
      state: the weights that decoding reads.
      value_range: (low, high) of the pictures it learned from.
    """

    model: VQImage
    state: Mapping[str, Any]
    value_range: tuple[float, float]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Decoder:
        """The decoder in a file that `tokenlab encode` wrote.

        Raises:
          DataError: it cannot be read, or its weights are not those of the model it names.
        """
        return cls.of(codes_file.read(path), what=str(path))

    @classmethod
    def of(cls, coded: codes_file.Coded, *, what: str = "the codes") -> Decoder:
        """The decoder of what was read already; `what` names it in messages. Raises as `load`."""
        settings = dict(coded.model)
        name = settings.pop("name", None)
        if name != "vq_image":
            raise DataError(f"{what} are of model {name!r}; expected codes of 'vq_image'.")
        model = VQImage(to_dataclass(VQImageConfig, settings, path=f"{what}: model"), coded.image)
        have, need = flat(coded.decoder), flat(model.decoder_state(model.abstract_state()))
        if model.grid != coded.grid or model.codes_count != coded.num_codes:
            raise DataError(
                f"{what}: a grid {coded.grid} of {coded.num_codes} codes, but its model gives {model.grid} of "
                f"{model.codes_count}: encode the pictures again."
            )
        for leaf in sorted(have.keys() | need.keys()):
            given, wanted = (tuple(side[leaf].shape) if leaf in side else None for side in (have, need))
            if given != wanted:
                raise DataError(
                    f"{what}: decoder/{leaf} is of shape {given}, the model needs {wanted} (None: there is none): "
                    "encode the pictures again."
                )
        return cls(model, jax.tree.map(jnp.asarray, coded.decoder), coded.value_range)

    def __call__(self, codes: np.ndarray | Array) -> Array:
        """Codes [B, h, w] int -> pictures [B, H, W, C] float32, of the value range or a little outside it.

        Raises:
          ShapeError: codes of another shape, or that are no whole numbers in [0, K).
        """
        codes = np.asarray(codes)
        if codes.size and not 0 <= codes.min() <= codes.max() < self.model.codes_count:
            raise ShapeError(
                f"vq_image: codes are {codes.min()} to {codes.max()}; expected 0 to {self.model.codes_count - 1}."
            )
        return self._run(self.state, codes)

    @cached_property
    def _run(self) -> Callable[..., Array]:
        return jax.jit(self.model.decode)


Config = VQImageConfig


def build(
    config: VQImageConfig,
    *,
    spec: Mapping[str, tuple[tuple[int, ...], str]],
    num_outputs: int,
    stack_vars: Mapping[str, int | float],
    train: bool,
) -> VQImage:
    """A tokenizer for the pictures of a data source; see `tokenlab.models.build`. Training and evaluation are alike."""
    del train
    if "image" not in spec:
        raise ConfigError(
            f"vq_image reads 'image'; the data has {', '.join(sorted(spec))}. Choose another model or data."
        )
    shape = tuple(spec["image"][0])
    if len(shape) != 3:
        raise ShapeError(f"vq_image reads images [H, W, C]; the data's 'image' has shape {shape}.")
    if not jnp.issubdtype(spec["image"][1], jnp.floating):
        raise ShapeError(
            f"vq_image reads images of floats; the data's 'image' is {spec['image'][1]}: end config.data.transform and "
            "config.data.eval_transform with value_range(-1, 1)."
        )
    if num_outputs != math.prod(shape):
        raise ConfigError(
            f"vq_image gives back its pictures, {math.prod(shape)} values, and the task wants {num_outputs} outputs: "
            "choose config.task.name='reconstruct'."
        )
    if stack_vars:
        raise StackError(f"stack_vars.{sorted(stack_vars)[0]}: vq_image has no stack; take it out.")
    return VQImage(config, shape)
