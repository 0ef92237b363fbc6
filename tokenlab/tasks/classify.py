"""classify: one label an example; softmax or sigmoid cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.ops import mix

TOP = 5
"""Of "top5_accuracy"."""


@dataclass(frozen=True)
class ClassifyConfig:
    """Settings.

    Attributes:
      loss: "softmax" cross-entropy, or "sigmoid": the sum over classes of binary ones (Beyer et al. 2020, arXiv
        2006.07159).
      label_smoothing: share of the target spread over all classes in training, in [0, 1).
      mixup, cutmix: alpha >= 0 of `tokenlab.ops.mix` in training; 0 for none. With both, each example takes one
        of them at even odds. Accuracy in training is then of the label that an image began with.
    """

    loss: Literal["softmax", "sigmoid"] = "softmax"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ConfigError(f"config.task.{name} must be at least 0; got {getattr(self, name)}.")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"config.task.label_smoothing must be in [0, 1); got {self.label_smoothing}.")


@dataclass(frozen=True)
class Classify:
    """Reads "label" [B] int32 and "mask" [B] float32 (0 for padding rows) of a batch, beside what the model reads."""

    settings: ClassifyConfig = ClassifyConfig()

    primary: ClassVar[str] = "accuracy"
    better: ClassVar[str] = "max"
    examples: ClassVar[str | None] = None
    classifies: ClassVar[bool] = True

    def num_outputs(self, source: Any) -> int:
        """Number of classes. Raises ConfigError when the data has no labels, or no images to be mixed."""
        if "label" not in source.spec or not getattr(source, "num_classes", None):
            raise ConfigError(
                f"classify needs labels; data {source.name!r} has {', '.join(sorted(source.spec))}."
            )
        if (self.settings.mixup or self.settings.cutmix) and "image" not in source.spec:
            raise ConfigError(
                f"config.task.mixup and config.task.cutmix mix images; data {source.name!r} has "
                f"{', '.join(sorted(source.spec))}: expected 0 for both."
            )
        return source.num_classes

    def loss(
        self, model: Any, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Mean loss over the unmasked rows plus the model's own losses; see `tokenlab.tasks.Task`.

        Raises ConfigError, when a run is built, for a model whose logits are not of examples.

        At evaluation, with more than 5 classes, the metrics have "top5_accuracy" too. A tie across the fifth place
        counts as the share of the orders of the tied classes that put the label in.
        """
        mask, label = batch["mask"], batch["label"]
        share = None
        if train and (self.settings.mixup or self.settings.cutmix):
            rng, key = jax.random.split(rng)
            image, share = self._mix(key, batch["image"], mask)
            batch = {**batch, "image": image}
        output = model.apply(params, batch, train=train, rng=rng)
        logits = output.logits.astype(jnp.float32)
        if logits.ndim != 2:
            raise ConfigError(
                f"classify asks for logits of each example, [{len(label)}, classes], and the model gives "
                f"{list(logits.shape)}: expected another config.model, or a head that classifies, such as "
                "config.model.head='classify' of encoder_lm."
            )
        target = jnp.asarray(label[:, None] == jnp.arange(logits.shape[-1]), jnp.float32)
        if train and self.settings.label_smoothing:
            target = optax.smooth_labels(target, self.settings.label_smoothing)
        if share is not None:
            target = mix.mix_targets(target, share)
        if self.settings.loss == "softmax":
            each = optax.softmax_cross_entropy(logits, target)
        else:
            each = optax.sigmoid_binary_cross_entropy(logits, target).sum(axis=-1)
        weight = jnp.sum(mask)
        mean = jnp.sum(each * mask) / jnp.maximum(weight, 1.0)
        hit = (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)
        metrics = {"loss": (jnp.sum(each * mask), weight), "accuracy": (jnp.sum(hit * mask), weight)}
        if not train and logits.shape[-1] > TOP:
            own = jnp.sum(logits * (label[:, None] == jnp.arange(logits.shape[-1])), axis=-1, keepdims=True)
            above, tied = jnp.sum(logits > own, axis=-1), jnp.sum(logits == own, axis=-1)
            # Nothing equals NaN: such a row is no hit.
            top = jnp.clip((TOP - above) / jnp.maximum(tied, 1), 0.0, 1.0) * (tied > 0)
            metrics["top5_accuracy"] = (jnp.sum(top * mask), weight)
        total = mean
        for name, value in output.losses.items():
            total = total + value
            metrics[name] = (value, jnp.float32(1))
        metrics.update(output.aux.metrics)
        return total, metrics

    def _mix(self, key: Array, images: Array, mask: Array) -> tuple[Array, Array]:
        """Mixed images, and the share of each that is its own. A row without weight is mixed into none."""
        which, *keys = jax.random.split(key, 3)
        ways = [(mix.mixup, self.settings.mixup), (mix.cutmix, self.settings.cutmix)]
        done = [way(k, images, alpha, mask) for (way, alpha), k in zip(ways, keys, strict=True) if alpha]
        if len(done) == 1:
            return done[0]
        (first, first_share), (second, second_share) = done
        heads = jax.random.bernoulli(which, shape=mask.shape)
        return jnp.where(heads[:, None, None, None], first, second), jnp.where(
            heads, first_share, second_share
        )


Config = ClassifyConfig


def build(settings: ClassifyConfig) -> Classify:
    """The task with these settings."""
    return Classify(settings)
