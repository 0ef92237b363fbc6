"""Tasks: what a batch means, the loss and the metrics; one a file, found by its name.

A task file offers `Config`, a frozen dataclass of its settings, and `build(config) -> task`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jax import Array

from tokenlab.core import names
from tokenlab.core.config import to_dataclass

EXAMPLES: Mapping[str, str] = {"image": "images", "ids": "texts", "series": "windows"}
"""A key of a batch that a model reads -> what an example is then called."""


class Task(Protocol):
    """What the training loop knows of an objective.

    Attributes:
      primary: the metric by which checkpoints are compared.
      better: "max" or "min" of it.
      examples: what an example is called, in the plural; None where the data decide, see `examples_of`.

    A task with metrics that are no means, such as perplexity, has `derived(means) -> dict`, which makes them of those
    that are. A task whose logits [B, C] say which of the data's C classes an example is of, as its "label" does, has
    `classifies` True too. Evaluation then tells of calibration and of each class. A task that runs the model more than
    once in a training step has `layer_tokens(model) -> int`, tokens of one example that enter blocks in all of it.
    """

    primary: str
    better: str
    examples: str | None

    def num_outputs(self, source: Any) -> int:
        """Logits the model must give for this data. Raises ConfigError when the data does not fit the task."""

    def loss(
        self, model: Any, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        """Scalar float32 loss, and metrics as name -> (sum, weight), so that they add up over batches."""


def examples_of(task: Task, source: Any) -> str:
    """What an example is called, in the plural: as the task says, or else by what the data have."""
    if task.examples is not None:
        return task.examples
    return next((name for key, name in EXAMPLES.items() if key in source.spec), "examples")


def build(settings: Mapping[str, Any]) -> Task:
    """The task that `config.task` describes: `name` of its file, the rest its settings."""
    settings = dict(settings)
    module = names.find("tokenlab.tasks", settings.pop("name", "classify"))
    return module.build(to_dataclass(module.Config, settings, path="config.task"))
