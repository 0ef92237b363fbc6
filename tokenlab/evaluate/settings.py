"""With which settings a trained model is evaluated: those of its run, and the few that may be others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenlab.core.config import override, to_dataclass
from tokenlab.core.errors import ConfigError
from tokenlab.core.stack import Span, fail, parse
from tokenlab.train import hardware, schedule
from tokenlab.train.config import TrainConfig
from tokenlab.train.records import TOKENIZER, read_config

MAY_CHANGE = (
    "model.stack",
    "model.execution",
    "model.dtype",
    "model.attention",
    "model.leaks",
    "model.keep",
    "model.position_grid",
    "eval.stack",
    "eval.batch_size",
    "stack_vars.*",
    "data.*",
    "mesh.*",
    "compilation_cache",
)
"""What may be other than in training: none of it changes which weights there are, or what they were trained on."""

SEPARATOR = ";"
"""Between stacks that are evaluated one beside the other."""

_WHY_NOT = {
    "eval.split": "give --split instead",
    "eval.final_split": "give --split instead",
    "data.transform": "it is done to training images; give config.data.eval_transform",
    "data.workers": "they make training batches",
    "data.tokenizer": "the weights know one vocabulary, which the run keeps as tokenizer.json in its workdir",
}


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Attributes:
      config: of the run, with what was overridden; `data.transform` is that of evaluation.
      stacks: the expressions to evaluate with, one or more; None for the model's own default.
      overridden: names of the stack variables that were given anew.
    """

    config: TrainConfig
    stacks: tuple[str | None, ...]
    overridden: frozenset[str]

    def stack_vars(self, step: int) -> list[dict[str, int | float]]:
        """For each stack, the numbers that names in it stand for after `step` steps of training.

        A schedule holds as it did in the last step, and what alternates has the value of most steps. Variables of the
        training run that a stack does not name are left out; one that was given for this evaluation and that no stack
        names is left in, and so told.

        Raises:
          StackError: a stack is not of the grammar.
        """
        values = schedule.stack_vars(self.config.stack_vars, self.config.steps).usual(max(step - 1, 0))
        used = [frozenset() if stack is None else parse(stack, values).used for stack in self.stacks]
        unused = self.overridden.difference(*used)
        return [{name: value for name, value in values.items() if name in names | unused} for names in used]


def read(workdir: str | Path, overrides: Mapping[str, Any]) -> Settings:
    """The settings of a run's workdir, with overrides.

    Args:
      workdir: of a training run.
      overrides: dotted key -> text or value, as `tokenlab.core.config.override` takes them.

    Raises:
      ConfigError: no configuration there; a key that makes no sense at evaluation, or an unknown one; a value of
        another type; both config.model.stack and config.eval.stack.
    """
    saved = read_config(workdir)
    saved.stack_vars.unlock()  # a stack given here may name variables of its own
    saved.data.unlock()  # another source may have options of its own
    config = override(saved, overrides)  # first, so that a misspelt key is told as such
    for key in overrides:
        _check(key)
    if {"model.stack", "eval.stack"} <= overrides.keys():
        raise ConfigError(
            "config.model.stack and config.eval.stack are both given: at evaluation they mean the same, give one."
        )
    if (kept := Path(workdir) / TOKENIZER).is_file():
        config.data.tokenizer = str(kept)
    config.data.transform = config.data.eval_transform  # of training images, which nobody makes here
    checked, _ = hardware.on(to_dataclass(TrainConfig, config))
    chosen = checked.model.get("stack")
    if "model.stack" not in overrides and checked.eval.stack is not None:
        chosen = checked.eval.stack
    given = {key.partition(".")[2] for key in overrides if key.startswith("stack_vars.")}
    return Settings(checked, _stacks(chosen), frozenset(given))


def _stacks(text: str | None) -> tuple[str | None, ...]:
    """The stacks of "A; B; C". Raises StackError for an empty one."""
    if text is None or SEPARATOR not in text:
        return (text,)
    found, place = [], 0
    for part in text.split(SEPARATOR):
        if not part.strip():
            at = min(place + len(part), len(text) - 1)
            fail(text, Span(at, at + 1), f"no stack on one side of this {SEPARATOR!r}; expected 'A; B; C'.")
        found.append(part.strip())
        place += len(part) + 1
    return tuple(found)


def _check(key: str) -> None:
    """Raise a ConfigError for a key that has no business at evaluation."""
    group = f"{key.split('.')[0]}.*"
    if key in _WHY_NOT or not {key, group} & {*MAY_CHANGE}:
        why = _WHY_NOT.get(key, f"what may be changed at evaluation is {', '.join(MAY_CHANGE)}")
        raise ConfigError(f"config.{key} belongs to training and cannot be changed at evaluation: {why}.")
