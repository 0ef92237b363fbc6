"""forecast: the steps that follow a series; mean squared and absolute error, beside what knows nothing.

Errors are in the units of the data, which `series_csv` scales to deviation 1 of the train split, as it is usual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError


@dataclass(frozen=True)
class ForecastConfig:
    """Settings.

    Attributes:
      season: steps after which series repeat themselves, 24 of hours for a day; evaluation then tells how good it is to
        say what was so many steps before. None for none.
    """

    season: int | None = None

    def __post_init__(self) -> None:
        if self.season is not None and self.season < 1:
            raise ConfigError(
                f"config.task.season must be at least 1 step, or None for none; got {self.season}."
            )


@dataclass(frozen=True)
class Forecast:
    """Reads "series" [B, T, C], "target" [B, S, C] float32 and "mask" [B] of a batch."""

    settings: ForecastConfig = ForecastConfig()

    primary: ClassVar[str] = "mse"
    better: ClassVar[str] = "min"
    examples: ClassVar[str] = "windows"

    def num_outputs(self, source: Any) -> int:
        """Values to be predicted, S * C.

        Raises:
          ConfigError: the data has nothing to predict, or a season is longer than its series.
        """
        if "series" not in source.spec or "target" not in source.spec:
            raise ConfigError(
                f"forecast needs series and what follows them; data {source.name!r} has "
                f"{', '.join(sorted(source.spec))}. Choose for example config.data.name='series_csv' with "
                "config.data.horizon=96."
            )
        steps = source.spec["series"][0][0]
        if self.settings.season is not None and self.settings.season > steps:
            raise ConfigError(
                f"config.task.season is {self.settings.season}, and a series of the data has {steps} steps; expected "
                "at most as many."
            )
        return math.prod(source.spec["target"][0])

    def loss(
        self, model: Any, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Mean squared error over the unmasked rows plus the model's own losses; see `tokenlab.tasks.Task`.

        Metrics: "loss" and "mse" (the same), "mae". At evaluation also "last_mse", "last_mae": the last step of each
        channel goes on; and with a season "season_mse", "season_mae": what was a season before, again and again.
        """
        output = model.apply(params, batch, train=train, rng=rng)
        target, mask = batch["target"].astype(jnp.float32), batch["mask"]
        if output.logits.shape != target.shape:
            raise ConfigError(
                f"forecast: the model gives {list(output.logits.shape)} for {list(target.shape)}; expected "
                "config.model.name='series' with config.model.output='steps'."
            )
        weight = jnp.sum(mask)

        def errors(name: str, predicted: Array) -> dict[str, tuple[Array, Array]]:
            off = predicted.astype(jnp.float32) - target
            each = {"mse": off * off, "mae": jnp.abs(off)}
            return {
                name + key: (jnp.sum(jnp.mean(value, axis=(1, 2)) * mask), weight)
                for key, value in each.items()
            }

        metrics = errors("", output.logits)
        metrics["loss"] = metrics["mse"]
        if not train:
            series = batch["series"].astype(jnp.float32)
            steps, count = series.shape[1], target.shape[1]
            metrics |= errors("last_", jnp.broadcast_to(series[:, -1:], target.shape))
            if season := self.settings.season:
                metrics |= errors("season_", series[:, steps - season + jnp.arange(count) % season])
        total = metrics["loss"][0] / jnp.maximum(weight, 1.0)
        for name, value in output.losses.items():
            total = total + value
            metrics[name] = (value, jnp.float32(1))
        metrics.update(output.aux.metrics)
        return total, metrics


Config = ForecastConfig


def build(settings: ForecastConfig) -> Forecast:
    """The task with these settings."""
    return Forecast(settings)
