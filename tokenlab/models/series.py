"""series: a ViT over patches of a time series (PatchTST, Nie et al., ICLR 2023, arXiv 2211.14730), over any stack.

    x = (series - mean) / deviation            each channel over its own window, [B, T, C]
    tokens = embed(patches of p steps)         [CLS, registers, patches], N = T / p, or with channels="independent"
                                               each channel a sequence of its own, [B * C, special + N, D]
    tokens = stack(tokens)
    answer = head(tokens)                      classes [B, outputs], or the steps that follow [B, S, C], scaled back

All of it but the first and the last line is `tokenlab.models.vit.ViT` on a picture of one row, so heads, registers and
positions are the ViT's, and so are the weights. Two things differ from PatchTST: patches do not overlap, and the head
reads what a ViT's head reads in place of all tokens side by side, so that one set of weights serves every stack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError, ShapeError
from tokenlab.layers.output import Output
from tokenlab.models.trunk import Execution, Remat
from tokenlab.models.vit import ViT, ViTConfig

EPSILON = 1e-5
"""Added to the variance of a window, as Kim et al. do (RevIN, ICLR 2022)."""


@dataclass(frozen=True)
class SeriesConfig(ViTConfig):
    """Settings of the ViT, and how a series becomes tokens. `size` "toy/16" has patches of 16 steps.

    Attributes:
      channels: "independent" runs the stack on each channel alone, with the same weights; "joint" puts all channels of
        a patch into one token.
      output: "classes" of the whole series, or "steps" that follow it.
      instance_norm: scale every channel of every window to mean 0 and deviation 1, and steps that are predicted back
        (RevIN without its learned factors).
    """

    size: str = "toy/16"
    channels: Literal["independent", "joint"] = "independent"
    output: Literal["classes", "steps"] = "classes"
    instance_norm: bool = True


@dataclass(frozen=True, eq=False)
class Series(ViT):
    """A transformer over series of one length.

    Attributes:
      image: (1, N, p * C'), the picture of one row that the patches are: C' = 1 of independent channels, else C.
      series: (T, C).

    See `tokenlab.models.vit.ViT` for the others. A token's position is that of its patch in time.
    """

    settings: SeriesConfig
    series: tuple[int, int] = (0, 0)

    @property
    def independent(self) -> bool:
        """Whether each channel is a sequence of its own."""
        return self.settings.channels == "independent"

    @property
    def sequences(self) -> int:
        """C of independent channels, else 1."""
        return self.series[1] if self.independent else 1

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what `apply` reads of a batch."""
        return {"series": jax.ShapeDtypeStruct((batch, *self.series), jnp.float32)}

    def patches(self, series: Array) -> Array:
        """[B, T, C] -> [B', 1, N, p*C'], with B' = B * C of independent channels; steps before channels."""
        rows, (steps, channels) = series.shape[0], self.series
        count = self.image[1]
        if self.independent:
            return series.transpose(0, 2, 1).reshape(rows * channels, 1, count, steps // count)
        return series.reshape(rows, 1, count, steps // count * channels)

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
        """One forward pass; `batch` has "series" [B, T, C] float32, the rest is as in `ViT.apply`.

        Returns:
          `logits` [B, outputs], of independent channels their mean; or [B, S, C] steps in the units of the series.
          `features` [B, D], of independent channels their mean; `tokens` [B', N, D].

        Raises:
          ShapeError: series of another shape than the model was built for.
        """
        series = batch["series"]
        if series.shape[1:] != self.series:
            raise ShapeError(
                f"series: built for series {list(self.series)}, got {list(series.shape[1:])} (batch {series.shape})."
            )
        series = series.astype(jnp.float32)
        mean, scale = jnp.float32(0), jnp.float32(1)
        if self.settings.instance_norm:
            mean = jnp.mean(series, axis=1, keepdims=True)
            scale = jnp.sqrt(jnp.var(series, axis=1, keepdims=True) + EPSILON)
        image = self.patches((series - mean) / scale)
        how = {"train": train, "rng": rng, "record": record, "execution": execution, "remat": remat}
        output = super().apply(state, {"image": image}, **how)
        rows, channels = series.shape[0], self.series[1]
        logits, features = output.logits, output.features
        if self.independent:
            features = jnp.mean(features.reshape(rows, channels, -1), axis=1)
            split = logits.reshape(rows, channels, -1)
            logits = split.transpose(0, 2, 1) if self.settings.output == "steps" else jnp.mean(split, axis=1)
        elif self.settings.output == "steps":
            logits = logits.reshape(rows, -1, channels)
        if self.settings.output == "steps":
            logits = logits * scale + mean
        return output.replace(logits=logits, features=features)


Config = SeriesConfig


def build(
    config: SeriesConfig,
    *,
    spec: Mapping[str, tuple[tuple[int, ...], str]],
    num_outputs: int,
    stack_vars: Mapping[str, int | float],
    train: bool,
) -> Series:
    """A model for the series of a data source; see `tokenlab.models.build`.

    Raises:
      ConfigError: the data has no series, or `output` is not what the task asks for. ShapeError: the patch does not
        divide the series.
    """
    if "series" not in spec:
        raise ConfigError(
            f"series reads 'series'; the data has {', '.join(sorted(spec))}. Choose another model or data."
        )
    steps, channels = spec["series"][0]
    length = config.dims()[4]
    if steps % length:
        raise ShapeError(
            f"series: patches of {length} steps do not divide a series of {steps}; set config.model.patch to a length "
            "that does, or config.data.window to a multiple of it."
        )
    if config.output == "steps":
        target = spec.get("target")
        if target is None or num_outputs != target[0][0] * channels:
            raise ConfigError(
                "config.model.output is 'steps', and the task asks for no steps of the data's channels: set "
                "config.task.name='forecast' and config.data.horizon, or config.model.output='classes'."
            )
        num_outputs = target[0][0] * (1 if config.channels == "independent" else channels)
    elif "target" in spec and num_outputs == spec["target"][0][0] * channels and "label" not in spec:
        raise ConfigError(
            "config.model.output is 'classes', and the task asks for the steps that follow: set "
            "config.model.output='steps'."
        )
    width = length * (1 if config.channels == "independent" else channels)
    settings = dataclasses.replace(config, patch=1)
    return Series(settings, (1, steps // length, width), num_outputs, stack_vars, train, (steps, channels))
