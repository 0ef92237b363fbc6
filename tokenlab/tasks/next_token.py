"""next_token: predict the token that follows; cross-entropy, bits per byte, perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.ops.gather import gather


@dataclass(frozen=True)
class NextTokenConfig:
    """Settings.

    Attributes:
      z_loss: weight of the mean squared log of the softmax's sum in training, >= 0 (PaLM, arXiv 2204.02311, section 5).
    """

    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not self.z_loss >= 0:
            raise ConfigError(f"config.task.z_loss must be at least 0; got {self.z_loss}.")


@dataclass(frozen=True)
class NextToken:
    """Reads "ids", "target" int32, "weight", "bytes" float32 (each [B, N]) and "mask" [B] of a batch.

    "weight" is 0 where a target does not count (padding, the end of another document) and "bytes" how many bytes of
    text the target stands for. A stack that has dropped tokens is judged by those that are left.
    """

    settings: NextTokenConfig = NextTokenConfig()

    primary: ClassVar[str] = "bits_per_byte"
    better: ClassVar[str] = "min"
    examples: ClassVar[str] = "sequences"

    def num_outputs(self, source: Any) -> int:
        """Ids in the vocabulary. Raises ConfigError when the data is no text."""
        if "target" not in source.spec or not getattr(source, "vocab_size", None):
            raise ConfigError(
                f"next_token needs text; data {source.name!r} has {', '.join(sorted(source.spec))}. Choose for example "
                "config.data.name='shakespeare'."
            )
        return source.vocab_size

    def loss(
        self, model: Any, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Mean loss over the targets that count plus the model's own losses; see `tokenlab.tasks.Task`.

        Metrics: "loss" in nats a token, "bits_per_byte", "accuracy" of the likeliest token; `derived` adds
        "perplexity".
        """
        output = model.apply(params, batch, train=train, rng=rng)
        logits = output.logits.astype(jnp.float32)
        weight = batch["weight"] * batch["mask"][:, None]
        target, size = batch["target"], batch["bytes"]
        if logits.shape[1] != target.shape[1]:  # some were dropped on the way
            target, weight, size = (gather(leaf, output.places) for leaf in (target, weight, size))
        total = jax.nn.logsumexp(logits, axis=-1)
        # A sum over the vocabulary stays where the vocabulary is split over devices; picking one logit would not.
        own = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0.0), axis=-1)
        each = (total - own) * weight
        count = jnp.sum(weight)
        hit = (jnp.argmax(logits, axis=-1) == target) * weight
        metrics = {
            "loss": (jnp.sum(each), count),
            "bits_per_byte": (jnp.sum(each) / math.log(2), jnp.sum(size * weight)),
            "accuracy": (jnp.sum(hit), count),
        }
        value = jnp.sum(each) / jnp.maximum(count, 1.0)
        if train and self.settings.z_loss:
            spread = self.settings.z_loss * jnp.sum(total**2 * weight) / jnp.maximum(count, 1.0)
            value = value + spread
            metrics["z_loss"] = (spread, jnp.float32(1))
        for name, more in output.losses.items():
            value = value + more
            metrics[name] = (more, jnp.float32(1))
        metrics.update(output.aux.metrics)
        return value, metrics

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of means over a split: "perplexity", of a token."""
        return {"perplexity": math.exp(min(metrics["loss"], 700.0))}


Config = NextTokenConfig


def build(settings: NextTokenConfig) -> NextToken:
    """The task with these settings."""
    return NextToken(settings)
