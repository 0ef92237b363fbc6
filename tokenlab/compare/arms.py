"""Arms with everything decided: the configuration of each, how many steps it trains, and where its runs are."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict

from tokenlab import data
from tokenlab.compare import budget
from tokenlab.compare.config import CompareConfig, changes_of
from tokenlab.core.config import diff, flatten, override, to_json
from tokenlab.core.errors import ConfigError, DataError, TokenLabError, suggest
from tokenlab.cost import Cost
from tokenlab.train import experiment as experiments
from tokenlab.train.experiment import Experiment
from tokenlab.train.records import MAY_CHANGE, write_json

PLAN, FORMAT = "plan.json", 1

NO_PART = frozenset({"seed", *MAY_CHANGE} - {"steps"})
"""Keys that are no part of an arm's hash: what is learned does not depend on them, or each run has its own."""

TRAINING_DATA = frozenset({"data.transform", *MAY_CHANGE})
"""Keys of `data` in which arms may differ."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm, ready to be trained.

    Attributes:
      name: of the arm.
      changes: dotted key -> value, what it changes in the base configuration.
      config: of its runs, but for the seed.
      source: its data; arms with the same settings share one.
      step_seconds: measured before training for each set of numbers in the stack, for a budget of seconds.
      costs: counted so far, of a step for each set of numbers in the stack; they do not depend on the number of steps.
        Arms that differ in their steps alone share them.
      steps_of: name of the arm that it has the steps of; None where the budget decides.
    """

    name: str
    changes: Mapping[str, Any]
    config: ConfigDict
    source: data.Dataset
    step_seconds: Mapping[str, float] | None = None
    costs: dict[str, Cost] = field(default_factory=dict, repr=False)
    steps_of: str | None = None

    @property
    def steps(self) -> int:
        """Of each run."""
        return self.config.steps

    @property
    def hash(self) -> str:
        """Of the configuration without `NO_PART`, 8 hexadecimal digits."""
        parts = {key: value for key, value in flatten(self.config) if key not in NO_PART}
        return hashlib.sha256(to_json(parts).encode()).hexdigest()[:8]

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
        with _named(self.name):
            return experiments.build(self.config, source=self.source)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors in the block say which arm they are about."""
    try:
        yield
    except TokenLabError as error:
        raise type(error)(f"arm {name!r}: {error}") from error


def resolve(config: CompareConfig, folder: Path, *, measure: bool = True) -> tuple[list[Arm], float]:
    """The arms of a comparison with their steps, as the plan in `folder` says them or newly solved.

    The plan is written before anything is trained. It keeps what was solved for other budgets and for arms that are
    left out, so that a measured budget is measured once.

    Args:
      config: the comparison.
      folder: of it.
      measure: whether arms may be timed, where the budget is of seconds and the plan does not know them.

    Returns:
      The arms, and the amount of the budget.

    Raises:
      ConfigError: what is wrong with an arm, which is named, or with the budget.
      DataError: the plan in the folder cannot be read, is of another format, or lacks what may not be measured.
    """
    base = ConfigDict(dict(config.base))
    sources: dict[str, data.Dataset] = {}
    arms: dict[str, Arm] = {}
    costs: dict[str, dict[str, Cost]] = {}
    for given in config.arms:
        changes = changes_of(given)
        with _named(given["name"]):
            changed = budget.scalable(override(base, changes))
            key = to_json(changed.data)
            if key not in sources:
                sources[key] = data.build(changed.data)
            arm = Arm(given["name"], changes, changed, sources[key], steps_of=given.get("steps_of"))
            arms[arm.name] = replace(arm, costs=costs.setdefault(arm.hash, {}))
    _distinct(arms)
    _measured_alike(arms, config.baseline)
    if config.also:
        for arm in arms.values():
            _gives(arm, config.also)
    asked = _asked(config, arms)
    plans = _read(folder / PLAN)
    found = next(
        (plan for plan in plans if plan["asked"] == asked), {"asked": asked, "amount": None, "arms": {}}
    )
    new = {name: arm for name, arm in arms.items() if _entry(arm, arms) not in found["arms"]}
    if new and config.budget.kind == "seconds" and not measure:
        raise DataError(
            f"{folder / PLAN} does not say how many steps arm {next(iter(new))!r} trains, and a report measures "
            "nothing: copy plan.json beside the arms."
        )
    plan = _solved(found, new, arms, config) if new else found
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make {folder}: {error.strerror}; expected a folder to write to."
        ) from error
    others = [other for other in plans if other is not found]
    write_json(folder / PLAN, {"format": FORMAT, **plan, "others": others})
    ready = []
    for arm in arms.values():
        entry = plan["arms"][_entry(arm, arms)]
        settled = override(arm.config, {"steps": entry["steps"]})
        ready.append(replace(arm, config=settled, step_seconds=entry["step_seconds"]))
    return ready, plan["amount"]


def _distinct(arms: Mapping[str, Arm]) -> None:
    """No two arms do the same."""
    seen: dict[str, str] = {}
    for name, arm in arms.items():
        entry = _entry(arm, arms)
        if entry in seen:
            raise ConfigError(
                f"arms {seen[entry]!r} and {name!r} have the same configuration, apart from keys that change no "
                "result: leave one of them out."
            )
        seen[entry] = name


def _entry(arm: Arm, arms: Mapping[str, Arm]) -> str:
    """Where a plan has its steps: the arm's hash, and behind it that of the arm whose steps it has."""
    return arm.hash if arm.steps_of is None else f"{arm.hash}, steps of {arms[arm.steps_of].hash}"


def _measured_alike(arms: Mapping[str, Arm], baseline: str) -> None:
    """The quality of all arms is measured on the same examples, in the same way."""
    wanted = _measured(arms[baseline])
    for name, arm in arms.items():
        if changes := diff(wanted, _measured(arm)):
            raise ConfigError(
                f"arm {name!r} differs from {baseline!r} in {changes[0]}: expected the same in all arms, as quality is "
                "measured by it; set it in config.base."
            )


def _gives(arm: Arm, also: Mapping[str, str]) -> None:
    """Evaluations of an arm have the metrics that the report is to have tables of."""
    known = arm.experiment.evaluated(arm.steps)
    for metric in also:
        if metric not in known:
            raise ConfigError(
                f"config.also has the metric {metric!r}, which evaluations of arm {arm.name!r} do not give: expected "
                f"some of {', '.join(known)}.{suggest(metric, known)}"
            )


def _measured(arm: Arm) -> dict[str, Any]:
    """What quality is measured on: task, splits, and the data but for how the training images are changed."""
    settings = {
        "task": arm.config.task,
        "eval": {key: arm.config.eval[key] for key in ("split", "final_split")},
        "data": dataclasses.asdict(arm.source.config),
    }
    return {key: value for key, value in flatten(settings) if key not in TRAINING_DATA}


def _asked(config: CompareConfig, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """What a budget's amount depends on."""
    open_end = config.budget.amount is None
    return {
        "kind": config.budget.kind,
        "amount": config.budget.amount,
        "baseline": arms[config.baseline].hash if open_end else None,
    }


def _solved(
    plan: Mapping[str, Any], new: Mapping[str, Arm], arms: Mapping[str, Arm], config: CompareConfig
) -> dict[str, Any]:
    """A plan with the steps, and measured seconds a step, of further arms: `new` of all `arms`.

    Where it knows no amount yet, it knows no arm either, and what the baseline spends is the amount. An arm with the
    steps of another spends what it spends.
    """
    kind, amount = config.budget.kind, plan["amount"]
    spenders = {name: arm for name, arm in new.items() if arm.steps_of is None}
    seconds: dict[str, dict[str, float]] = {}
    if kind == "seconds" and spenders:
        seconds = budget.step_seconds({name: arm.experiment for name, arm in spenders.items()})
    spending = {
        name: budget.Spending(arm.experiment, kind, seconds.get(name), arm.costs)
        for name, arm in spenders.items()
    }
    if amount is None:
        base = config.baseline
        amount = spending[base](new[base].steps) if config.budget.amount is None else config.budget.amount
    entries = dict(plan["arms"])
    for name, arm in spenders.items():
        steps = budget.solve(name, spending[name], kind, amount)
        entries[_entry(arm, arms)] = {"name": name, "steps": steps, "step_seconds": seconds.get(name)}
    for name, arm in new.items():
        if arm.steps_of is not None:
            steps = entries[_entry(arms[arm.steps_of], arms)]["steps"]
            entries[_entry(arm, arms)] = {"name": name, "steps": steps, "step_seconds": None}
    return {"asked": plan["asked"], "amount": amount, "arms": entries}


def _read(path: Path) -> list[dict[str, Any]]:
    """What was solved for each budget, that of the last call first; [] without a file."""
    if not path.exists():
        return []
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; move it away to plan the comparison anew.") from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        kind = said.get("format") if isinstance(said, dict) else None
        raise DataError(
            f"{path} is of format {kind!r}; expected {FORMAT}: give another --workdir, or move it away."
        )
    try:
        plans = [{key: plan[key] for key in ("asked", "amount", "arms")} for plan in (said, *said["others"])]
        for entry in (entry for plan in plans for entry in plan["arms"].values()):
            _ = entry["steps"], entry["step_seconds"]
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no whole plan ({type(error).__name__}: {error}); move it away to plan the comparison anew."
        ) from error
    return plans
