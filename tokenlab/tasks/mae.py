"""mae: predict the pixels of patches that the encoder did not see (He et al., CVPR 2022, arXiv 2111.06377)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.layers.embed import patchify, unpatchify
from tokenlab.ops.gather import keep_mask

EPSILON = 1e-6
"""Added to the variance of a patch, as the authors do."""


@dataclass(frozen=True)
class MaskedPixelsConfig:
    """Settings.

    Attributes:
      normalize: each patch is predicted less its mean and over its standard deviation (table 1d: better features).
      value_range: (low, high), the darkest and the brightest value of the data; pictures are drawn in it.
    """

    normalize: bool = True
    value_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.value_range
        if not -math.inf < low < high < math.inf:
            raise ConfigError(
                f"config.task.value_range must be two numbers (low, high) with low < high; got {self.value_range}."
            )


@dataclass(frozen=True)
class MaskedPixels:
    """Reads "image" [B, H, W, C] float32 and "mask" [B] of a batch; the model is `tokenlab.models.mae.MAE`."""

    settings: MaskedPixelsConfig = MaskedPixelsConfig()

    primary: ClassVar[str] = "loss"
    better: ClassVar[str] = "min"
    examples: ClassVar[str] = "images"

    def num_outputs(self, source: Any) -> int:
        """Values of a picture. Raises ConfigError when the data has no pictures."""
        if "image" not in source.spec:
            raise ConfigError(
                f"mae needs pictures; data {source.name!r} has {', '.join(sorted(source.spec))}."
            )
        return math.prod(source.spec["image"][0])

    def target(self, image: Array, patch: int) -> tuple[Array, Array, Array]:
        """What is to be predicted of each patch, and what makes pixels of it again: `target * scale + mean`.

        Args:
          image: [B, H, W, C].
          patch: side p in pixels.

        Returns:
          target [B, N, p*p*C], mean and scale [B, N, 1], float32; without `normalize` the pixels, 0 and 1. The
          variance is over one less than the values of a patch, as the authors' is.
        """
        pixels = patchify(image.astype(jnp.float32), patch)
        if not self.settings.normalize:
            zeros = jnp.zeros((*pixels.shape[:2], 1), jnp.float32)
            return pixels, zeros, zeros + 1
        mean = jnp.mean(pixels, axis=-1, keepdims=True)
        off = pixels - mean
        variance = jnp.sum(off * off, axis=-1, keepdims=True) / max(pixels.shape[-1] - 1, 1)
        scale = jnp.sqrt(variance + EPSILON)
        return off / scale, mean, scale

    def loss(
        self, model: Any, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Mean squared error over hidden patches plus the model's own losses; see `tokenlab.tasks.Task`.

        Where all patches are seen it is 0. Metric: "loss" without the model's losses.
        """
        output = model.apply(params, batch, train=train, rng=rng)
        predicted = output.logits.astype(jnp.float32)
        if output.places is None or predicted.ndim != 3:
            raise ConfigError(
                f"mae: the model gives {list(output.logits.shape)}; expected a masked autoencoder, "
                "config.model.name='mae'."
            )
        wanted, _, _ = self.target(batch["image"], model.patch)
        hidden = 1.0 - keep_mask(output.places, wanted.shape[1]).astype(jnp.float32)
        weight = hidden * batch["mask"][:, None]
        error = jnp.sum(jnp.mean((predicted - wanted) ** 2, axis=-1) * weight)
        metrics = {"loss": (error, jnp.sum(weight))}
        total = error / jnp.maximum(jnp.sum(weight), 1.0)
        for name, value in output.losses.items():
            total = total + value
            metrics[name] = (value, jnp.float32(1))
        metrics.update(output.aux.metrics)
        return total, metrics

    def pictures(self, model: Any, output: Any, image: Array) -> tuple[Array, Array]:
        """What the encoder saw, and what the model makes of it.

        Args:
          model: a masked autoencoder.
          output: of it, for `image`.
          image: [B, H, W, C].

        Returns:
          two arrays like `image`: hidden patches at the middle of the value range; and hidden patches as predicted,
          scaled by their true mean and deviation where these are left out of the target, as the authors draw them.
        """
        wanted, mean, scale = self.target(image, model.patch)
        seen = keep_mask(output.places, wanted.shape[1])[..., None]
        pixels = wanted * scale + mean
        grey = sum(self.settings.value_range) / 2
        again = jnp.where(seen, pixels, output.logits * scale + mean)
        shape = (model.grid, image.shape[-1])
        return unpatchify(jnp.where(seen, pixels, grey), *shape), unpatchify(again, *shape)


Config = MaskedPixelsConfig


def build(settings: MaskedPixelsConfig) -> MaskedPixels:
    """The task with these settings."""
    return MaskedPixels(settings)
