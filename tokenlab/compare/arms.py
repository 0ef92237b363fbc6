"""Arms with everything decided: the configuration of each, how many steps it trains, and where its runs are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict

from tokenlab import data
from tokenlab.compare import budget
from tokenlab.compare.config import Budget, CompareConfig
from tokenlab.core.config import override, to_json
from tokenlab.core.errors import ConfigError, DataError, TokenLabError
from tokenlab.train import experiment as experiments
from tokenlab.train.experiment import Experiment
from tokenlab.train.records import write_json

PLAN, FORMAT = "plan.json", 1


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm, ready to be trained.

    Attributes:
      name: of the arm.
      changes: dotted key -> value, what it changes in the base configuration.
      config: of its runs, but for the seed.
      source: its data; arms with the same settings share one.
      step_seconds: measured before training, for a budget of seconds.
    """

    name: str
    changes: Mapping[str, Any]
    config: ConfigDict
    source: data.Dataset
    step_seconds: float | None = None

    @property
    def steps(self) -> int:
        """Of each run."""
        return self.config.steps

    @property
    def hash(self) -> str:
        """Of the configuration without the seed, 8 hexadecimal digits."""
        return _hash(self.config)

    @property
    def folder(self) -> str:
        """Of its runs, below the folder of the comparison."""
        return f"arms/{self.name.replace(' ', '_')}-{self.hash}"

    def run_config(self, seed: int) -> ConfigDict:
        """The configuration of one run."""
        return override(self.config, {"seed": seed})

    @cached_property
    def experiment(self) -> Experiment:
        """The arm's parts, built once for all seeds. Raises what is wrong, with the arm's name."""
        try:
            return experiments.build(self.config, source=self.source)
        except TokenLabError as error:
            raise type(error)(f"arm {self.name!r}: {error}") from error


def resolve(config: CompareConfig, folder: Path) -> list[Arm]:
    """The arms of a comparison with their steps, as the plan in `folder` says them or newly solved.

    The plan is written before anything is trained. Of an arm that is in it unchanged the steps are taken from there,
    so that a measured budget is measured once.

    Raises:
      ConfigError: what is wrong with an arm, which is named, or with the budget.
      DataError: the plan in the folder cannot be read, or is of another format.
    """
    base = ConfigDict(dict(config.base))
    sources: dict[str, data.Dataset] = {}
    arms: dict[str, Arm] = {}
    for given in config.arms:
        changes = {key: value for key, value in given.items() if key != "name"}
        try:
            changed = budget.scalable(override(base, changes))
            key = to_json(changed.data)
            if key not in sources:
                sources[key] = data.build(changed.data)
            arms[given["name"]] = Arm(given["name"], changes, changed, sources[key])
        except TokenLabError as error:
            raise type(error)(f"arm {given['name']!r}: {error}") from error
    _distinct(arms)
    plan = _read(folder / PLAN)
    known = _known(plan, config, arms)
    solved = _solved(arms, config, known)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make {folder}: {error.strerror}; expected a folder to write to."
        ) from error
    write_json(folder / PLAN, _plan(config, arms, solved))
    return [
        Arm(
            name,
            arm.changes,
            override(arm.config, {"steps": solved[name]["steps"]}),
            arm.source,
            solved[name]["step_seconds"],
        )
        for name, arm in arms.items()
    ]


def _distinct(arms: Mapping[str, Arm]) -> None:
    """No two arms do the same."""
    seen: dict[str, str] = {}
    for name, arm in arms.items():
        if arm.hash in seen:
            raise ConfigError(
                f"arms {seen[arm.hash]!r} and {name!r} have the same configuration: leave one of them out."
            )
        seen[arm.hash] = name


def _known(
    plan: Mapping[str, Any], config: CompareConfig, arms: Mapping[str, Arm]
) -> dict[str, dict[str, Any]]:
    """What the plan says of arms that are as they were, under the same budget."""
    if plan.get("asked") != _asked(config, arms):
        return {}
    before = {name: entry for name, entry in plan["arms"].items() if name in arms}
    return {name: entry for name, entry in before.items() if entry["before"] == arms[name].hash}


def _asked(config: CompareConfig, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """What a budget's amount depends on."""
    open_end = config.budget.amount is None
    return {
        "kind": config.budget.kind,
        "amount": config.budget.amount,
        "baseline": arms[config.baseline].hash if open_end else None,
    }


def _solved(
    arms: Mapping[str, Arm], config: CompareConfig, known: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Steps, and measured seconds a step, of every arm."""
    kind = config.budget.kind
    new = [name for name in arms if name not in known]
    wanted = {*new, config.baseline} if config.budget.amount is None and new else {*new}
    seconds: dict[str, float | None] = {name: entry["step_seconds"] for name, entry in known.items()}
    if kind == "seconds":
        to_time = {name: arms[name].experiment for name in arms if name in wanted and name not in known}
        seconds |= budget.step_seconds(to_time)
    spending = {name: budget.Spending(arms[name].experiment, kind, seconds.get(name)) for name in wanted}
    found = {
        name: {"steps": entry["steps"], "step_seconds": entry["step_seconds"]}
        for name, entry in known.items()
    }
    if new:
        total = amount(config.budget, spending.get(config.baseline), arms[config.baseline].steps)
        for name in new:
            steps = budget.solve(name, spending[name], kind, total)
            found[name] = {"steps": steps, "step_seconds": seconds.get(name)}
    return found


def amount(wanted: Budget, baseline: budget.Spending | None, steps: int) -> float:
    """What every arm may spend: what was asked for, or what the baseline spends in so many steps."""
    return wanted.amount if wanted.amount is not None else baseline(steps)


def _plan(config: CompareConfig, arms: Mapping[str, Arm], solved: Mapping[str, Any]) -> dict[str, Any]:
    entries = {name: {"before": arms[name].hash, **solved[name]} for name in arms}
    return {"format": FORMAT, "asked": _asked(config, arms), "arms": entries}


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; move it away to plan the comparison anew.") from error
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        said = plan.get("format") if isinstance(plan, dict) else None
        raise DataError(
            f"{path} is of format {said!r}; expected {FORMAT}: give another --workdir, or move it away."
        )
    return plan


def _hash(config: ConfigDict) -> str:
    known = override(config, {"seed": 0})
    return hashlib.sha256(to_json(known).encode()).hexdigest()[:8]
