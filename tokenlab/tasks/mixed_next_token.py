"""mixed_next_token: predict the token that follows in rows of text and pictures; the loss of each modality apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.core.modality import MODALITIES
from tokenlab.tasks.next_token import NextTokenConfig, judged, with_other_losses


@dataclass(frozen=True)
class MixedNextTokenConfig(NextTokenConfig):
    """Settings.

    Attributes:
      text_weight, image_weight: of targets of text and of codes in the loss that is trained on, >= 0 and not both 0. No
        metric knows of them.
    """

    text_weight: float = 1.0
    image_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_weight", "image_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"config.task.{name} must be a number >= 0; got {getattr(self, name)}.")
        if not self.text_weight + self.image_weight:
            raise ConfigError(
                "config.task.text_weight and config.task.image_weight are both 0; expected one that is not: nothing "
                "would be learnt."
            )


@dataclass(frozen=True)
class MixedNextToken:
    """Reads "target_modality" int32 [B, N] of a batch beside what `tokenlab.tasks.next_token.NextToken` reads.

    What delimits pictures, and the ends of documents, are targets of text, of no bytes.
    """

    settings: MixedNextTokenConfig = MixedNextTokenConfig()

    primary: ClassVar[str] = "loss"
    better: ClassVar[str] = "min"
    examples: ClassVar[str] = "sequences"

    def num_outputs(self, source: Any) -> int:
        """Ids in the vocabulary. Raises ConfigError when the data has no modalities."""
        if "target_modality" not in source.spec or not getattr(source, "vocab_size", None):
            raise ConfigError(
                f"mixed_next_token needs rows of pictures and text; data {source.name!r} has "
                f"{', '.join(sorted(source.spec))}. Choose for example config.data.name='image_text'."
            )
        return source.vocab_size

    def loss(
        self, model: Any, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Mean loss over the targets that count plus the model's own losses; see `tokenlab.tasks.Task`.

        In training the mean is weighted by modality. Metrics: "loss" in nats a target, and of each modality alone
        "loss_text", "loss_image", "accuracy_text" and "accuracy_image"; "bits_per_byte" of the targets of text.
        """
        output = model.apply(params, batch, train=train, rng=rng)
        found = judged(output, batch, ("bytes", "target_modality"))
        metrics = {"loss": (jnp.sum(found.nats), jnp.sum(found.weight))}
        value = weights = jnp.float32(0)
        for number, name in enumerate(MODALITIES):
            own = found.leaves["target_modality"] == number
            nats, count = jnp.sum(found.nats * own), jnp.sum(found.weight * own)
            metrics[f"loss_{name}"] = (nats, count)
            metrics[f"accuracy_{name}"] = (jnp.sum(found.hit * own), count)
            share = getattr(self.settings, f"{name}_weight") if train else 1.0
            value, weights = value + share * nats, weights + share * count
        nats, _ = metrics["loss_text"]
        metrics["bits_per_byte"] = (nats / math.log(2), jnp.sum(found.leaves["bytes"] * found.weight))
        # Weights below 1 may add up to less than 1, which is no empty batch.
        value = value / jnp.where(weights > 0, weights, 1.0)
        return with_other_losses(value, metrics, found, output, z_loss=self.settings.z_loss if train else 0.0)


Config = MixedNextTokenConfig


def build(settings: MixedNextTokenConfig) -> MixedNextToken:
    """The task with these settings."""
    return MixedNextToken(settings)
