"""Trained weights under the stack they were trained in, or under others of as many blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenlab import data, models, tasks
from tokenlab.core.errors import CheckpointError, ConfigError, TokenLabError
from tokenlab.evaluate import settings
from tokenlab.models.state import fill, fit_state
from tokenlab.train import places
from tokenlab.train.initialize import evaluation_params
from tokenlab.train.manifest import Which
from tokenlab.train.mirror import here
from tokenlab.train.records import read_run


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model, ready to be evaluated.

    Attributes:
      config: of its run, with what was overridden.
      model: without `train_only` items.
      params: nested dicts of numpy arrays, the moving average where the run keeps one.
      task: of the run.
      source: of the data.
      step: steps of training behind the parameters.
      notes: what is to be told, one line each.
    """

    config: settings.TrainConfig
    model: Any
    params: Any
    task: Any
    source: data.Source
    step: int
    notes: tuple[str, ...]


def load(
    workdir: str | Path,
    overrides: Mapping[str, Any] | None = None,
    checkpoint: Which = "latest",
    *,
    examples: bool = True,
) -> Trained:
    """The trained model of a workdir under one stack; see `load_each`, which this calls.

    Raises:
      ConfigError: several stacks are given; and what `load_each` raises.
    """
    found = load_each(workdir, overrides, checkpoint, examples=examples)
    if len(found) > 1:
        raise ConfigError(f"config.eval.stack holds {len(found)} stacks: expected one here.")
    return found[0]


def load_each(
    workdir: str | Path,
    overrides: Mapping[str, Any] | None = None,
    checkpoint: Which = "latest",
    *,
    examples: bool = True,
) -> tuple[Trained, ...]:
    """The trained model of a workdir under each stack that is asked for; checkpoint and data are opened once.

    The run may still be under way; nothing of it is changed.

    Args:
      workdir: of a training run, or its address.
      overrides: dotted key -> text or value; see `settings.MAY_CHANGE`. "eval.stack" may hold several stacks with ";"
        between them.
      checkpoint: "latest", "best" or a step.
      examples: False where no example is read: of text the source then has its vocabulary only, and its files may be
        gone.

    Returns:
      An entry a stack, in their order; parameters that several use are the same arrays.

    Raises:
      ConfigError, StackError, NameLookupError, ShapeError: settings that make no sense at evaluation, or do not fit.
      CheckpointError: no such checkpoint, a damaged one, or one whose parameters do not fit a stack.
    """
    with here(workdir) as folder:
        return _load_each(folder, str(workdir), overrides, checkpoint, examples)


def _load_each(
    workdir: Path, name: str, overrides: Mapping[str, Any] | None, checkpoint: Which, examples: bool
) -> tuple[Trained, ...]:
    chosen = settings.read(workdir, overrides or {})
    config = chosen.config
    task = tasks.build(config.task)
    source = data.build(config.data) if examples else data.without_examples(config.data)
    if not places.of_run(workdir).steps():
        raise CheckpointError(f"{name} holds no checkpoints yet: train it first, or give another workdir.")
    params, meta = evaluation_params(workdir, checkpoint)
    settings_of_model = _with_grid_of_training(config.model, read_run(workdir))
    found = []
    for stack, stack_vars in zip(chosen.stacks, chosen.stack_vars(meta["step"]), strict=True):
        try:
            model = models.build(
                settings_of_model,
                spec=source.spec,
                num_outputs=task.num_outputs(source),
                stack=stack,
                stack_vars=stack_vars,
                train=False,
            )
            wanted = model.abstract_state()
            leaves, notes = fit_state(params, wanted, source=f"checkpoint {meta['step']} of {name}")
        except TokenLabError as error:
            if len(chosen.stacks) == 1:
                raise
            raise type(error)(f"of {len(chosen.stacks)} stacks, {stack!r}: {error}") from error
        found.append(Trained(config, model, fill(wanted, leaves), task, source, meta["step"], tuple(notes)))
    return tuple(found)


def _with_grid_of_training(model: Mapping[str, Any], run: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's settings with its positions made for the images it was trained on, also where others are evaluated."""
    if model.get("position_grid") is not None or "position_grid" not in model or not run.get("grid"):
        return model
    return {**model, "position_grid": tuple(run["grid"])}
