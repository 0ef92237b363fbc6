"""masked_lm: guess hidden tokens from those on both sides; cross-entropy, accuracy, bits per byte of what is hidden.

What is hidden in training is drawn anew at every step, from (seed, step, row of the batch) alone; at evaluation it
depends on the example alone, so that every evaluation asks the same. Of a row with n tokens that may be hidden it is
round(ratio * n) of them, at most (K of the batch) ceil(ratio * N): nothing is left out for want of room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.layers import statistics
from tokenlab.layers.context import name_seed
from tokenlab.ops import hide
from tokenlab.ops.gather import gather
from tokenlab.tasks.next_token import scored


@dataclass(frozen=True)
class MaskedLMConfig:
    """Settings.

    Attributes:
      ratio: share of the tokens that is hidden, in (0, 1).
      hide: "tokens" one by one, "words" whole, or "spans" of whole words (SpanBERT); see `tokenlab.ops.hide`.
      mask, random: in the place of a hidden token the model sees the mask with the first probability, a random token
        of the vocabulary that is no special one with the second, and else the token itself; together at most 1 (0.8
        and 0.1: Devlin et al. 2019).
      span_p, span_longest: of "spans": their length in words is geometric with this p, in (0, 1], cut off at so many.
    """

    ratio: float = 0.15
    hide: Literal["tokens", "words", "spans"] = "tokens"
    mask: float = 0.8
    random: float = 0.1
    span_p: float = 0.2
    span_longest: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ConfigError(f"config.task.ratio must be between 0 and 1; got {self.ratio}.")
        if not (self.mask >= 0 and self.random >= 0 and self.mask + self.random <= 1):
            raise ConfigError(
                f"config.task.mask and random must be probabilities, together at most 1; got {self.mask} and "
                f"{self.random}."
            )
        if not 0 < self.span_p <= 1:
            raise ConfigError(f"config.task.span_p must be in (0, 1]; got {self.span_p}.")
        if self.span_longest < 1:
            raise ConfigError(f"config.task.span_longest must be at least 1; got {self.span_longest}.")

    def most(self, length: int) -> int:
        """K: places of a row of N tokens that are guessed at most."""
        return math.ceil(self.ratio * length)


def hidden(
    batch: Mapping[str, Array], keys: Array, settings: MaskedLMConfig, vocab_size: int
) -> dict[str, Array]:
    """The batch with tokens hidden.

    Args:
      batch: "ids", "word" [B, N], "mask_id" [B] and "special_ids" [B, S] int32, and what else there is; see
        `tokenlab.data.text.source.TextSource`.
      keys: [B], typed: a row is hidden by its own.
      settings: how.
      vocab_size: V.

    Returns:
      The batch with other "ids", as the model sees them, and with "predict" [B, K] int32, the places that are
      guessed, ascending, "label" [B, K] int32, what stood there, and "weight" [B, K] float32, 0 where a row has fewer.
    """
    most = settings.most(batch["ids"].shape[1])
    ways = {
        "tokens": hide.hide_tokens,
        "words": hide.hide_words,
        # Many spans fall on what is hidden already, or are cut to nothing near the end.
        "spans": partial(
            hide.hide_spans, p=settings.span_p, longest=settings.span_longest, attempts=4 * most
        ),
    }
    way = ways[settings.hide]

    def row(key: Array, ids: Array, word: Array, mask_id: Array, special: Array) -> tuple[Array, ...]:
        which, what = jax.random.split(key)
        found = way(which, word, hide.budget(word, settings.ratio, most))
        shares = {"mask": settings.mask, "random": settings.random}
        shown = hide.seen(what, ids, found, mask_id, vocab_size, special=special, **shares)
        places, there = hide.places_of(found.hidden, most)
        return shown, places, ids[places], there.astype(jnp.float32)

    with jax.named_scope("embed"):
        names = ("ids", "predict", "label", "weight")
        read = (batch[name] for name in ("ids", "word", "mask_id", "special_ids"))
        made = jax.vmap(row)(keys, *read)
    return {**batch, **dict(zip(names, made, strict=True))}


def row_keys(batch: Mapping[str, Array], rng: Array, *, train: bool) -> Array:
    """A key for each row, [B]: of its number and `rng` in training, of its tokens alone at evaluation."""
    ids = batch["ids"]
    if train:
        key = jax.random.fold_in(rng, name_seed("masked_lm"))
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(ids.shape[0], dtype=jnp.uint32))
    # A polynomial hash: powers of an odd number, modulo 2^32.
    factors = np.cumprod(np.full(ids.shape[1], 0x9E3779B1, np.uint64) | 1, dtype=np.uint64).astype(np.uint32)
    digest = jnp.sum((ids.astype(jnp.uint32) + 1) * factors, axis=1, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(name_seed("masked_lm")), digest)


class Guessed(NamedTuple):
    """The K hidden tokens of each of B rows, and how well they were guessed; [B, K] each.

    Attributes:
      label: int32, what was hidden.
      weight: float32, 1 where the guess counts: the place is one, its token has got through the stack, and its row
        is an example.
      nats: float32, cross-entropy, 0 where the guess does not count.
      hit: float32, 1 where it counts and the label is the likeliest.
    """

    label: Array
    weight: Array
    nats: Array
    hit: Array


def judged(output: Any, batch: Mapping[str, Array]) -> Guessed:
    """What a model's logits are worth, guess by guess.

    Args:
      output: of the model, for the batch: logits [B, K, V] and their places [B, K], -1 for tokens that are gone.
      batch: as `hidden` gives it, with "mask" [B].

    Raises:
      ConfigError: the model gives other logits, which is said when a run is built.
    """
    logits, wanted = output.logits.shape, batch["label"].shape
    if output.places is None or logits[:2] != wanted:
        raise ConfigError(
            f"the task asks for logits of the {wanted[1]} hidden places of each example, [{wanted[0]}, {wanted[1]}, V],"
            f" and the model gives {list(logits)}: expected config.model.name='encoder_lm' with "
            "config.model.head='masked_lm'."
        )
    weight = batch["weight"] * batch["mask"][:, None] * (output.places >= 0)
    total, own, likeliest = scored(output.logits.astype(jnp.float32), batch["label"])
    hit = (likeliest == batch["label"]) * weight
    return Guessed(batch["label"], weight, (total - own) * weight, hit)


@dataclass(frozen=True)
class MaskedLM:
    """Reads "ids", "word" [B, N], "mask_id" [B], "special_ids" [B, S] int32, "bytes" [B, N] and "mask" [B] float32."""

    settings: MaskedLMConfig = MaskedLMConfig()

    primary: ClassVar[str] = "loss"
    better: ClassVar[str] = "min"
    examples: ClassVar[str] = "sequences"

    def num_outputs(self, source: Any) -> int:
        """Ids in the vocabulary. Raises ConfigError when the data is no text for an encoder."""
        if not {"mask_id", "special_ids"} <= set(source.spec) or not getattr(source, "vocab_size", None):
            raise ConfigError(
                f"masked_lm needs text with a mask; data {source.name!r} has {', '.join(sorted(source.spec))}. Choose "
                "data of text, such as config.data.name='shakespeare', and set config.data.encoder=True."
            )
        return source.vocab_size

    def hidden(self, model: Any, batch: Mapping[str, Array], *, rng: Array, train: bool) -> dict[str, Array]:
        """The batch with tokens hidden, see `hidden`."""
        return hidden(batch, row_keys(batch, rng, train=train), self.settings, model.vocab_size)

    def loss(
        self, model: Any, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Mean loss over the guesses plus the model's own losses; see `tokenlab.tasks.Task`.

        Metrics: see `metrics_of`; `derived` adds "perplexity".
        """
        batch = self.hidden(model, batch, rng=rng, train=train)
        output = model.apply(params, batch, train=train, rng=rng)
        found = judged(output, batch)
        value = jnp.sum(found.nats) / jnp.maximum(jnp.sum(found.weight), 1.0)
        metrics = metrics_of(found, batch)
        if train:
            metrics |= statistics.observed(model, found.label, found.nats, found.weight)
        for name, more in output.losses.items():
            value = value + more
            metrics[name] = (more, jnp.float32(1))
        metrics.update(output.aux.metrics)
        return value, metrics

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are functions of means over a split: "perplexity", of a hidden token."""
        return {"perplexity": math.exp(min(metrics["loss"], 700.0))}


def metrics_of(found: Guessed, batch: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
    """Metrics of guesses: (sum, weight) by name.

    "loss" in nats a guess, "bits_per_byte" of the text that was hidden, "accuracy" of the likeliest token, and
    "guessed", the guesses that count as a share of the tokens that may be hidden.
    """
    count = jnp.sum(found.weight)
    size = gather(batch["bytes"], batch["predict"])
    free = jnp.sum((batch["word"] > 0) * batch["mask"][:, None])
    return {
        "loss": (jnp.sum(found.nats), count),
        "bits_per_byte": (jnp.sum(found.nats) / math.log(2), jnp.sum(size * found.weight)),
        "accuracy": (jnp.sum(found.hit), count),
        "guessed": (count, free.astype(jnp.float32)),
    }


Config = MaskedLMConfig


def build(settings: MaskedLMConfig) -> MaskedLM:
    """The task with these settings."""
    return MaskedLM(settings)
