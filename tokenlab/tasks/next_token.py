"""next_token: predict the token that follows; cross-entropy, bits per byte, perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

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


class Judged(NamedTuple):
    """The K targets that are left of each of B rows, and how well they were predicted; float32 [B, K] each.

    Attributes:
      weight: 1 where the target counts, else 0.
      nats: cross-entropy, 0 where the target does not count.
      hit: 1 where it counts and is the likeliest.
      total: log of the softmax's sum.
      leaves: what the batch says of each target, by key.
    """

    weight: Array
    nats: Array
    hit: Array
    total: Array
    leaves: Mapping[str, Array]


def judged(output: Any, batch: Mapping[str, Array], keys: tuple[str, ...] = ("bytes",)) -> Judged:
    """What a model's logits are worth.

    Args:
      output: of the model: logits [B, K, V] and, of a stack that has dropped tokens, the places [B, K] they are of.
      batch: "target", "weight" [B, N] and "mask" [B].
      keys: of further leaves [B, N] of the batch that say something of each target.
    """
    logits = output.logits.astype(jnp.float32)
    leaves = {
        "weight": batch["weight"] * batch["mask"][:, None],
        **{key: batch[key] for key in ("target", *keys)},
    }
    if logits.shape[1] != batch["target"].shape[1]:  # some were dropped on the way
        leaves = {key: gather(leaf, output.places) for key, leaf in leaves.items()}
    weight, target = leaves.pop("weight"), leaves.pop("target")
    total, own, likeliest = scored(logits, target)
    return Judged(weight, (total - own) * weight, (likeliest == target) * weight, total, leaves)


def scored(logits: Array, target: Array) -> tuple[Array, Array, Array]:
    """Of logits [..., V] float32: the log of the softmax's sum, the logit of `target` [...], and the likeliest id."""
    total = jax.nn.logsumexp(logits, axis=-1)
    # A sum over the vocabulary stays where the vocabulary is split over devices; picking one logit would not.
    own = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0.0), axis=-1)
    return total, own, jnp.argmax(logits, axis=-1)


def with_other_losses(
    value: Array, metrics: Mapping[str, tuple[Array, Array]], found: Judged, output: Any, *, z_loss: float
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """The loss with the z-loss, if there is one, and the losses of the model; and the metrics with theirs."""
    metrics = dict(metrics)
    if z_loss:
        spread = z_loss * jnp.sum(found.total**2 * found.weight) / jnp.maximum(jnp.sum(found.weight), 1.0)
        value = value + spread
        metrics["z_loss"] = (spread, jnp.float32(1))
    for name, more in output.losses.items():
        value = value + more
        metrics[name] = (more, jnp.float32(1))
    metrics.update(output.aux.metrics)
    return value, metrics


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
        found = judged(output, batch)
        count = jnp.sum(found.weight)
        metrics = {
            "loss": (jnp.sum(found.nats), count),
            "bits_per_byte": (
                jnp.sum(found.nats) / math.log(2),
                jnp.sum(found.leaves["bytes"] * found.weight),
            ),
            "accuracy": (jnp.sum(found.hit), count),
        }
        value = jnp.sum(found.nats) / jnp.maximum(count, 1.0)
        return with_other_losses(value, metrics, found, output, z_loss=self.settings.z_loss if train else 0.0)

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of means over a split: "perplexity", of a token."""
        return {"perplexity": math.exp(min(metrics["loss"], 700.0))}


Config = NextTokenConfig


def build(settings: NextTokenConfig) -> NextToken:
    """The task with these settings."""
    return NextToken(settings)
