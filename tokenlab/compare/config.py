"""What a comparison is: a base configuration, arms that change it, seeds, and a budget that all arms get."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.core.errors import ConfigError, suggest

KINDS = ("steps", "flops", "seconds", "layer_tokens")
NAME = re.compile(r"[A-Za-z0-9][\w.,+()= -]*")

Arm = dict[str, Any]
"""{"name": ..., "model.stack": ..., ...}: a name, and what it changes in the base configuration."""

OWN = ("name", "steps_of")
"""Keys of an arm that are no keys of the base configuration."""


@dataclass(frozen=True)
class Budget:
    """What every arm may spend on training.

    Attributes:
      kind: "steps"; "flops", counted model FLOPs of training; "seconds", measured on this machine; "layer_tokens",
        tokens that enter blocks, summed over blocks, examples and steps.
      amount: of it, > 0; None for what the baseline spends in `base.steps` steps.
    """

    kind: str = "flops"
    amount: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"config.budget.kind is {self.kind!r}.{suggest(self.kind, KINDS)}")
        if self.amount is not None and not 0 < self.amount < math.inf:
            raise ConfigError(f"config.budget.amount is {self.amount!r}: expected a number > 0, or None.")


@dataclass(frozen=True)
class CompareConfig:
    """A comparison. `default_config()` gives it as the ConfigDict that a file in configs/compare/ starts from.

    Attributes:
      title: of the report.
      base: configuration of a training run, from which every arm starts.
      arms: each {"name": ..., "model.stack": ..., ...}: dotted keys of `base` with the values they get. With
        "steps_of": NAME an arm trains as many steps as that one, whatever the budget; the report says what it spends.
      baseline: name of the arm that the others are compared with.
      seeds: each arm is trained from each; arms share them, so that data come in the same order.
      budget: of each run.
      pictures: images for which the report shows where each arm's tokens went; 0 for none.
      also: further metrics that the report has a table of, and which way is better: {"loss_text": "min"}.
    """

    title: str = ""
    base: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[Mapping[str, Any], ...] = ()
    baseline: str = "dense"
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget = field(default_factory=Budget)
    pictures: int = 4
    also: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.arms:
            raise ConfigError("config.arms is empty: expected an arm or more, each with a name.")
        if not self.base:
            raise ConfigError(
                "config.base is empty: set config.base to the configuration of a run, such as "
                "load('configs/quickstart.py')."
            )
        for number, arm in enumerate(self.arms):
            _check_name(arm, f"config.arms[{number}]")
        names = [arm["name"] for arm in self.arms]
        for name in names:
            if [other.casefold() for other in names].count(name.casefold()) > 1:
                raise ConfigError(
                    f"config.arms has the name {name!r} twice: give every arm a name of its own."
                )
        if self.baseline not in names:
            raise ConfigError(
                f"config.baseline {self.baseline!r} is the name of no arm.{suggest(self.baseline, names)}"
            )
        for number, arm in enumerate(self.arms):
            self._check_steps_of(arm, f"config.arms[{number}].steps_of")
        if not self.seeds:
            raise ConfigError("config.seeds is empty: expected a seed or more, such as (0, 1, 2).")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
                raise ConfigError(f"config.seeds has {seed!r}: expected ints from 0 to 2**32 - 1.")
            if self.seeds.count(seed) > 1:
                raise ConfigError(f"config.seeds has {seed} twice: its two runs would be the same.")
        if self.pictures < 0:
            raise ConfigError(f"config.pictures is {self.pictures}: expected a number of images >= 0.")
        for metric, way in self.also.items():
            if way not in ("min", "max"):
                raise ConfigError(
                    f"config.also.{metric} is {way!r}: expected 'min' or 'max', which is better."
                )

    def _check_steps_of(self, arm: Mapping[str, Any], path: str) -> None:
        if "steps_of" not in arm:
            return
        name, own = arm["steps_of"], arm["name"]
        arms = {other["name"]: other for other in self.arms}
        if name not in arms:
            raise ConfigError(f"{path} {name!r} is the name of no arm.{suggest(str(name), arms)}")
        if name == own:
            raise ConfigError(f"{path} {name!r} is the arm itself: expected another, or leave steps_of out.")
        if "steps_of" in arms[name]:
            raise ConfigError(
                f"{path} {name!r} has the steps of {arms[name]['steps_of']!r} itself: expected an arm whose steps the "
                "budget decides."
            )
        if self.budget.kind == "steps":
            raise ConfigError(
                f"{path} is {name!r}, and config.budget.kind 'steps' gives all arms as many: leave steps_of out, or "
                "choose another budget."
            )
        if own == self.baseline and self.budget.amount is None:
            raise ConfigError(
                f"{path} is of the baseline {own!r}, whose steps decide the budget: give config.budget.amount, or "
                "choose another baseline."
            )


def _check_name(arm: Any, path: str) -> None:
    if not isinstance(arm, Mapping) or "name" not in arm:
        raise ConfigError(f'{path} is {arm!r}: expected {{"name": ..., "model.stack": ..., ...}}.')
    if not isinstance(arm["name"], str) or not NAME.fullmatch(arm["name"]):
        raise ConfigError(
            f"{path}.name is {arm['name']!r}: expected letters, digits and .,+()=_- or blanks, as it names a folder."
        )
    for key in arm:
        if key in ("seed", "steps"):
            owner = "config.seeds" if key == "seed" else "config.budget"
            raise ConfigError(f"{path} sets {key!r}, which {owner} decides: leave it out.")


def changes_of(arm: Mapping[str, Any]) -> dict[str, Any]:
    """What an arm changes in the base configuration: dotted key -> value."""
    return {key: value for key, value in arm.items() if key not in OWN}


def default_config() -> ConfigDict:
    """Every field of a comparison; a file in configs/compare/ sets `base` and `arms`."""
    config = from_dataclass(_Defaults())
    config.base = ConfigDict()
    return config


@dataclass(frozen=True)
class _Defaults(CompareConfig):
    """The defaults before there are arms."""

    def __post_init__(self) -> None:
        pass


def product(
    changes: Mapping[str, Mapping[str, Any] | Sequence[Any]], *, name: str | None = None
) -> tuple[Arm, ...]:
    """An arm for every combination of values.

    Args:
      changes: dotted key -> its values, either by the word that stands for each in the arm's name, or a sequence of
        values that stand for themselves.
      name: of the arms, with "{}" for the word of each key in turn; None joins the words by blanks.

    For example `product({"model.stack": {"dense": "block*4", "keep": "block + keep(0.5) + block*3"},
    "optimizer.learning_rate": (1e-3, 2e-3)}, name="{} at {}")`: "dense at 0.001", "dense at 0.002", ...

    Raises:
      ConfigError: no key, or a key without values.
    """
    return _arms(changes, itertools.product, name)


def zipped(
    changes: Mapping[str, Mapping[str, Any] | Sequence[Any]], *, name: str | None = None
) -> tuple[Arm, ...]:
    """An arm of the first values of all keys, one of the second values, and so on. Arguments as `product`.

    Raises:
      ConfigError: no key, a key without values, or keys that differ in how many they have.
    """
    counts = {key: len(values) for key, values in changes.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{key} {count}" for key, count in counts.items())
        raise ConfigError(
            f"zipped: the keys have different numbers of values ({listed}): expected as many each."
        )
    return _arms(changes, zip, name)


def _arms(changes: Mapping[str, Any], combine: Any, name: str | None) -> tuple[Arm, ...]:
    if not changes or not all(len(values) for values in changes.values()):
        raise ConfigError(f"expected a key or more with a value or more each, got {dict(changes)!r}.")
    words = {
        key: list(values.items()) if isinstance(values, Mapping) else [(_word(v), v) for v in values]
        for key, values in changes.items()
    }
    found = []
    for chosen in combine(*words.values()):
        labels = [label for label, _ in chosen]
        arm = {"name": " ".join(labels) if name is None else name.format(*labels)}
        found.append({**arm, **{key: value for key, (_, value) in zip(words, chosen, strict=True)}})
    return tuple(found)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
