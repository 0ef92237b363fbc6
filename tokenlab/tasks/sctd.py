"""sctd: guess hidden tokens with some dropped, and now and then also with all (Zhong et al. 2023, arXiv 2305.15273).

The loss is in `tokenlab/methods/dropping/sctd.py`. Whether a step also runs dense is a number in the stack, as in
`sctd(keep=0.5, align=a)(block*6)` with config.stack_vars.a="every 10: 1 else 0"; with any other stack this is masked_lm
with another normalisation. Evaluation is that of masked_lm, on the stack without `train_only` items, and says how far
apart the two are: "cls_cosine", between what the head reads of the first token with and without those items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.layers import statistics
from tokenlab.layers.context import name_seed
from tokenlab.layers.program import ItemStep, steps_of
from tokenlab.methods.dropping.sctd import LAMBDA, Sctd, SctdPath, sctd_loss
from tokenlab.tasks.masked_lm import MaskedLM, MaskedLMConfig, judged, metrics_of


@dataclass(frozen=True)
class SctdConfig(MaskedLMConfig):
    """Settings, those of masked_lm and:

    Attributes:
      lam: weight of each KL, which is a sum over sequences, beside sums over hidden tokens; >= 0.
      mlm_mix: share of the dense cross-entropy in a step that aligns, in [0, 1].
      stop_gradient: whether the dense states are constants; False as in the released code.
      reference_compat: take the sparse cross-entropy in the place of the dense one, as the released code does.
      normalize: divide all of it by the "tokens" of the batch, as published, or by the "hidden" ones, which makes the
        loss of steps that do not align that of masked_lm. Gradients of microbatches weigh as these in both.
    """

    lam: float = LAMBDA
    mlm_mix: float = 0.5
    stop_gradient: bool = False
    reference_compat: bool = False
    normalize: Literal["tokens", "hidden"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.lam >= 0 and math.isfinite(self.lam)):
            raise ConfigError(f"config.task.lam must be a number at least 0; got {self.lam}.")
        if not 0 <= self.mlm_mix <= 1:
            raise ConfigError(f"config.task.mlm_mix must be in [0, 1]; got {self.mlm_mix}.")


@dataclass(frozen=True)
class SctdTask(MaskedLM):
    """Reads what masked_lm reads."""

    settings: SctdConfig = SctdConfig()

    def layer_tokens(self, model: Any) -> int:
        """Of a step that aligns also those of the dense run; see `tokenlab.tasks.Task`."""
        return model.layer_tokens + (model.rebuilt(train=False).layer_tokens if _aligns(model) else 0)

    def loss(
        self, model: Any, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """The published loss over the batch plus the model's own losses; see `tokenlab.tasks.Task`.

        Metrics: those of masked_lm, of the run that drops tokens. In training, of steps that align, "dense_loss", in
        nats a guess, and "kl_penultimate" and "kl_last", of an example; at evaluation "cls_cosine", where the stack
        has items that are there in training only.
        """
        s = self.settings
        batch = self.hidden(model, batch, rng=rng, train=train)
        align = train and _aligns(model)
        last = model.program.depth - 1
        asked = {"train": True, "entering": (last,)} if align else {"train": train}
        output = model.apply(params, batch, rng=rng, **asked)
        found = judged(output, batch)
        metrics = metrics_of(found, batch)
        sparse, dense = _path(output, found.nats), None
        none = (jnp.zeros(()), jnp.zeros(()))
        if align:
            other = jax.random.fold_in(rng, name_seed("sctd"))  # draws of its own
            whole = model.rebuilt(train=False).apply(params, batch, rng=other, **asked)
            guessed = judged(whole, batch)
            dense = _path(whole, guessed.nats)
            metrics["dense_loss"] = (dense.nats, jnp.sum(guessed.weight))
        elif train:
            metrics["dense_loss"] = none
        total, kls = sctd_loss(
            sparse,
            dense,
            align=align,
            lam=s.lam,
            mlm_mix=s.mlm_mix,
            stop_gradient=s.stop_gradient,
            reference_compat=s.reference_compat,
            weights=batch["mask"],
        )
        if train:
            rows = jnp.sum(batch["mask"])
            pairs = [(kl, rows) for kl in kls] or [none, none]
            metrics |= dict(zip(("kl_penultimate", "kl_last"), pairs, strict=True))
            metrics |= statistics.observed(model, found.label, found.nats, found.weight)
        else:
            metrics |= _cosine(model, params, batch, rng, output)
        count = jnp.sum(found.weight) if s.normalize == "hidden" else _tokens(batch)
        value = total / jnp.maximum(count, 1.0)
        for name, more in output.losses.items():
            value = value + more
            metrics[name] = (more, jnp.float32(1))
        metrics.update(output.aux.metrics)
        return value, metrics


def _aligns(model: Any) -> bool:
    """Whether a step with this model also runs dense."""
    return any(isinstance(item, Sctd) and item.align for item in _items(model))


def _items(model: Any) -> list[Any]:
    """The active items of a model's stack."""
    return [step.item for step in steps_of(model) if isinstance(step, ItemStep) and step.active]


def _path(output: Any, nats: Array) -> SctdPath:
    """The sum of the cross-entropy, and the first token's state before and behind the last block, [B, D] each."""
    before = [x[:, 0] for _, x in sorted(output.entering.items())]
    return SctdPath(jnp.sum(nats), (*before, output.features))


def _tokens(batch: Mapping[str, Array]) -> Array:
    """How many tokens the examples of a batch have, without padding."""
    there = jnp.ones(batch["ids"].shape, jnp.float32)
    if "segment" in batch:
        there = (batch["segment"] > 0).astype(jnp.float32)
    if "length" in batch:
        there = there * (jnp.arange(there.shape[1]) < batch["length"][:, None])
    return jnp.sum(there * batch["mask"][:, None])


def _cosine(
    model: Any, params: Any, batch: Mapping[str, Array], rng: Array, dense: Any
) -> dict[str, tuple[Array, Array]]:
    """The cosine between the features of the first token with and without items of training; {} without such items.

    {} also where the statistics that such an item reads are not there: a stack without it does not load them.
    """
    other = model.rebuilt(train=True)
    if len(_items(other)) == len(_items(model)):
        return {}
    if set(statistics.of(other)) - set(params.get(statistics.STATISTICS, {})):
        return {}
    sparse = other.apply(params, batch, train=False, rng=rng).features
    a, b = sparse.astype(jnp.float32), dense.features.astype(jnp.float32)
    cosine = jnp.sum(a * b, axis=-1) / jnp.maximum(
        jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1), 1e-12
    )
    return {"cls_cosine": (jnp.sum(cosine * batch["mask"]), jnp.sum(batch["mask"]))}


Config = SctdConfig


def build(settings: SctdConfig) -> SctdTask:
    """The task with these settings."""
    return SctdTask(settings)
