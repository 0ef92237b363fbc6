"""reconstruct: the picture itself is the target; mean squared error, PSNR.

Error of pixels alone: no adversarial and no perceptual loss, as VQGAN has (Esser et al. 2021, arXiv 2012.09841). What
is fine and cannot be told from a few codes comes out blurred, not invented.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError

LEAST_MSE = 1e-20
"""Where PSNR ends, so that it stays finite."""


@dataclass(frozen=True)
class ReconstructConfig:
    """Settings.

    Attributes:
      l1: weight of the mean absolute error beside the mean squared error, >= 0.
      value_range: (low, high), the darkest and the brightest value of the data; PSNR is told in its units.
    """

    l1: float = 0.0
    value_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        if not self.l1 >= 0:
            raise ConfigError(f"config.task.l1 must be at least 0; got {self.l1}.")
        low, high = self.value_range
        if not -math.inf < low < high < math.inf:
            raise ConfigError(
                f"config.task.value_range must be two numbers (low, high) with low < high; got {self.value_range}."
            )


@dataclass(frozen=True)
class Reconstruct:
    """Reads "image" [B, H, W, C] float32 and "mask" [B] of a batch; the model's `logits` are its pictures."""

    settings: ReconstructConfig = ReconstructConfig()

    primary: ClassVar[str] = "mse"
    better: ClassVar[str] = "min"
    examples: ClassVar[str] = "images"

    def num_outputs(self, source: Any) -> int:
        """Values of a picture.

        Raises:
          ConfigError: the data has no pictures of one size, or its transform ends in another value range.
        """
        if "image" not in source.spec:
            raise ConfigError(
                f"reconstruct needs pictures; data {source.name!r} has {', '.join(sorted(source.spec))}."
            )
        found = source.eval_transform.value_range
        if found is not None and found != self.settings.value_range:
            raise ConfigError(
                f"config.task.value_range is {self.settings.value_range}, and config.data.eval_transform ends with "
                f"value_range{found}: make them the same."
            )
        return math.prod(source.spec["image"][0])

    def loss(
        self, model: Any, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Mean error over the unmasked rows plus the model's own losses; see `tokenlab.tasks.Task`.

        Metrics: "loss" without the model's losses, "mse", with `l1` also "mae"; `derived` adds "psnr".
        """
        image, mask = batch["image"].astype(jnp.float32), batch["mask"]
        output = model.apply(params, batch, train=train, rng=rng)
        if output.logits.shape != image.shape:
            raise ConfigError(
                f"reconstruct: the model gives {list(output.logits.shape)} for pictures {list(image.shape)}; expected "
                "one that gives pictures, such as config.model.name='vq_image'."
            )
        off = output.logits.astype(jnp.float32) - image
        weight = jnp.sum(mask)
        each = jnp.mean(off**2, axis=(1, 2, 3))
        metrics = {"mse": (jnp.sum(each * mask), weight)}
        if self.settings.l1:
            absolute = jnp.mean(jnp.abs(off), axis=(1, 2, 3))
            metrics["mae"] = (jnp.sum(absolute * mask), weight)
            each = each + self.settings.l1 * absolute
        metrics["loss"] = (jnp.sum(each * mask), weight)
        total = metrics["loss"][0] / jnp.maximum(weight, 1.0)
        for name, value in output.losses.items():
            total = total + value
            metrics[name] = (value, jnp.float32(1))
        metrics.update(output.aux.metrics)
        return total, metrics

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of means over a split: "psnr", see there."""
        return {"psnr": psnr(metrics["mse"], self.settings.value_range)}


def psnr(mse: float, value_range: tuple[float, float]) -> float:
    """10 log10((high - low)^2 / mse) in dB: of the mean error of a whole split, not a mean over its pictures."""
    low, high = value_range
    return 10 * math.log10((high - low) ** 2 / max(mse, LEAST_MSE))


Config = ReconstructConfig


def build(settings: ReconstructConfig) -> Reconstruct:
    """The task with these settings."""
    return Reconstruct(settings)
