"""Pictures to a grid of features and back, by convolutions: residual blocks between halvings and doublings.

    encoder   [B, H, W, C] -> (4x4 convolution of stride 2, residual blocks) for every halving -> norm -> [B, h, w, D]
    decoder   [B, h, w, D] -> (residual blocks, doubling) for every halving, the last one to pixels -> [B, H, W, C]

Convolutions of stride 2 as in VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937), residual blocks as in VQGAN (Esser
et al. 2021, arXiv 2012.09841) without its attention, doublings by sub-pixel convolution (Shi et al. 2016, arXiv
1609.05158). Nothing but the first and the last convolution sees the full resolution, where a CPU would spend its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from tokenlab.layers.norm import RMSNorm
from tokenlab.sharding.constrain import constrain

Axes = Mapping[str, tuple[str | None, ...]]

_SPLIT: tuple[str | None, ...] = (None, None, None, "embed")


def conv(channels: int, side: int, dtype: Any, name: str, stride: int = 1) -> nn.Conv:
    """A square convolution [B, h, w, D'] -> [B, h / stride, w / stride, channels]."""
    return nn.Conv(channels, (side, side), stride, padding="SAME", dtype=dtype, name=name)


def depth_to_space(x: Array) -> Array:
    """[B, h, w, 4 D] -> [B, 2 h, 2 w, D]; the four of a place are its (row, column) in reading order."""
    batch, h, w, channels = x.shape
    split = x.reshape(batch, h, w, 2, 2, channels // 4)  # b h w p q d
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * h, 2 * w, channels // 4)


def _split(module: nn.Module, x: Array) -> Array:
    """Pictures over the batch axes of the mesh; weights are made with a single picture, which cannot be split."""
    return x if module.is_initializing() else constrain(x, "batch", None, None, None)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 3x3 convolutions, norms over the channels of each place.

    Attributes:
      dtype: compute dtype.
    """

    dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, D] -> [B, h, w, D]."""
        y = x
        for number in range(2):
            y = RMSNorm(self.dtype, name=f"norm_{number}")(y)
            y = conv(x.shape[-1], 3, self.dtype, f"conv_{number}")(jax.nn.silu(y))
        return _split(self, x + y)


class ConvEncoder(nn.Module):
    """Pictures to features.

    Attributes:
      widths: channels after each halving; the last is D.
      blocks: residual blocks after each halving.
      dtype: compute dtype.
    """

    widths: Sequence[int]
    blocks: int
    dtype: Any = "float32"

    def axes(self) -> Axes:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        found: dict[str, tuple[str | None, ...]] = {"norm/scale": (None,)}
        for level in range(len(self.widths)):
            found |= {f"down_{level}/kernel": _SPLIT, f"down_{level}/bias": (None,)}
            found |= _block_axes(level, self.blocks)
        return found

    @nn.compact
    def __call__(self, image: Array) -> Array:
        """[B, H, W, C] -> [B, h, w, D], of root mean square 1 at each place."""
        x = image.astype(self.dtype)
        for level, width in enumerate(self.widths):
            x = _split(self, conv(width, 4, self.dtype, f"down_{level}", stride=2)(x))
            for number in range(self.blocks):
                x = ResidualBlock(self.dtype, name=f"block_{level}_{number}")(x)
        return RMSNorm(self.dtype, name="norm")(x)


class ConvDecoder(nn.Module):
    """Features to pictures, the encoder's way backwards.

    Attributes:
      widths: as of the encoder.
      blocks: residual blocks before each doubling.
      channels: C of the pictures.
      dtype: compute dtype.
    """

    widths: Sequence[int]
    blocks: int
    channels: int
    dtype: Any = "float32"

    def axes(self) -> Axes:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        # The pixels' channels are too few to be split.
        found: dict[str, tuple[str | None, ...]] = {"norm/scale": (None,), "up_0/kernel": (None,) * 4}
        for level in range(len(self.widths)):
            found |= {f"up_{level}/kernel": _SPLIT} if level else {}
            found[f"up_{level}/bias"] = (None,)
            found |= _block_axes(level, self.blocks)
        return found

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, h, w, D] -> [B, H, W, C]."""
        for level in reversed(range(len(self.widths))):
            for number in range(self.blocks):
                x = ResidualBlock(self.dtype, name=f"block_{level}_{number}")(x)
            width = self.widths[level - 1] if level else self.channels
            if not level:
                x = jax.nn.silu(RMSNorm(self.dtype, name="norm")(x))
            x = _split(self, depth_to_space(conv(4 * width, 3, self.dtype, f"up_{level}")(x)))
        return x


def _block_axes(level: int, blocks: int) -> Axes:
    found: dict[str, tuple[str | None, ...]] = {}
    for number in range(blocks):
        for part in range(2):
            name = f"block_{level}_{number}"
            found[f"{name}/norm_{part}/scale"] = (None,)
            found |= {f"{name}/conv_{part}/kernel": _SPLIT, f"{name}/conv_{part}/bias": (None,)}
    return found
