"""Statistics: state that training updates and the optimizer does not, such as the running loss of every token id.

A model whose stack reads statistics has them beside its weights, under "statistics" of what `init` gives. They are
constants of the gradient. A task returns what a batch says of them among its metrics, as pairs of additive arrays under
"statistics/NAME" (`observed` makes them); so they add up over microbatches and devices as metrics do. The train step
updates the statistics with them, and records none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jax import Array

from tokenlab.core.errors import ConfigError

STATISTICS = "statistics"
"""The key of statistics beside "embed", "blocks", "items" and "head"."""

Pair = tuple[Array, Array]
"""Sums and counts: what a batch says, or several batches together."""


@dataclass(frozen=True)
class Vocabulary:
    """What a model knows of the ids of its tokens.

    Attributes:
      size: V, how many there are.
      always_kept: ids whose tokens are dropped last, such as that of [CLS].
      first_dropped: ids whose tokens are dropped first, such as that of padding.
    """

    size: int
    always_kept: tuple[int, ...] = ()
    first_dropped: tuple[int, ...] = ()


class Statistic(Protocol):
    """One statistic, an array. Equal ones are one."""

    def init(self) -> Array:
        """Its value before the first step."""
        ...

    def lookup(self, value: Array, ids: Array) -> Array:
        """What it says of each token of ids [B, N] int32: [B, N], without gradient."""
        ...

    def observe(self, ids: Array, losses: Array, weights: Array) -> Pair:
        """What the losses of labels `ids`, all of one shape, say; pairs of parts of a batch add up."""
        ...

    def updated(self, value: Array, observed: Pair) -> Array:
        """Its value after a step."""
        ...


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """(weights, statistics) of a model's state; None where it has none."""
    return {name: part for name, part in state.items() if name != STATISTICS}, state.get(STATISTICS)


def join(params: Any, statistics: Mapping[str, Any] | None) -> Any:
    """The state that a model's `apply` reads: weights and statistics, or the weights themselves without any."""
    return params if statistics is None else {**params, STATISTICS: statistics}


def of(model: Any) -> Mapping[str, Statistic]:
    """The statistics of a model by name; of most there are none."""
    return getattr(model, STATISTICS, {})


def observed(model: Any, ids: Array, losses: Array, weights: Array) -> dict[str, Pair]:
    """What a task adds to its metrics in training, of each statistic of the model.

    Args:
      model: from `models.build`.
      ids: labels, int32 of any shape.
      losses: cross-entropy of each, of that shape.
      weights: 0 where a label does not count, else 1.
    """
    return {f"{STATISTICS}/{name}": each.observe(ids, losses, weights) for name, each in of(model).items()}


def taken_out(metrics: Mapping[str, Pair]) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """(metrics, what a batch says of statistics by name) of what a task returned."""
    start = f"{STATISTICS}/"
    found = {name.removeprefix(start): pair for name, pair in metrics.items() if name.startswith(start)}
    return {name: pair for name, pair in metrics.items() if not name.startswith(start)}, found


def check_observed(model: Any, said: Mapping[str, Pair], task: str) -> None:
    """Raise ConfigError when a task says nothing of a statistic, which would then never change."""
    for name in of(model):
        if name not in said:
            raise ConfigError(
                f"the stack reads the statistic {name!r}, of which task {task} says nothing, so that it would stay as "
                "it began: train with a task that knows it, such as config.task.name='masked_lm', or use another score."
            )


def updated(model: Any, statistics: Mapping[str, Array] | None, said: Mapping[str, Pair]) -> Any:
    """The statistics after a step; None where there are none."""
    if statistics is None:
        return None
    return {name: each.updated(statistics[name], said[name]) for name, each in of(model).items()}
