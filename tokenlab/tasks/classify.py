"""classify: one label an example; softmax cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import optax
from jax import Array

from tokenlab.core.errors import ConfigError


@dataclass(frozen=True)
class ClassifyConfig:
    """Settings.

    Attributes:
      label_smoothing: share of the target spread over all classes in training, in [0, 1).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"config.task.label_smoothing must be in [0, 1); got {self.label_smoothing}.")


@dataclass(frozen=True)
class Classify:
    """Reads "image", "label" [B] int32 and "mask" [B] float32 (0 for padding rows) of a batch."""

    settings: ClassifyConfig = ClassifyConfig()

    primary: ClassVar[str] = "accuracy"
    better: ClassVar[str] = "max"

    def num_outputs(self, source: Any) -> int:
        """Number of classes. Raises ConfigError when the data has no labels."""
        if "label" not in source.spec or not getattr(source, "num_classes", None):
            raise ConfigError(
                f"classify needs labels; data {source.name!r} has {', '.join(sorted(source.spec))}."
            )
        return source.num_classes

    def loss(
        self, model: Any, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Mean cross-entropy over the unmasked rows plus the model's own losses; see `tokenlab.tasks.Task`."""
        output = model.apply(params, batch, train=train, rng=rng)
        mask, label = batch["mask"], batch["label"]
        logits = output.logits.astype(jnp.float32)
        target = jnp.asarray(label[:, None] == jnp.arange(logits.shape[-1]), jnp.float32)
        if train and self.settings.label_smoothing:
            target = optax.smooth_labels(target, self.settings.label_smoothing)
        each = optax.softmax_cross_entropy(logits, target)
        weight = jnp.sum(mask)
        mean = jnp.sum(each * mask) / jnp.maximum(weight, 1.0)
        hit = (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)
        metrics = {"loss": (jnp.sum(each * mask), weight), "accuracy": (jnp.sum(hit * mask), weight)}
        total = mean
        for name, value in output.losses.items():
            total = total + value
            metrics[name] = (value, jnp.float32(1))
        metrics.update(output.aux.metrics)
        return total, metrics


Config = ClassifyConfig


def build(settings: ClassifyConfig) -> Classify:
    """The task with these settings."""
    return Classify(settings)
