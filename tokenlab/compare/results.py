"""What came out: read from the folders of the runs, so that it can be made again at any time."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from scipy import stats

from tokenlab.compare import budget, reach
from tokenlab.compare.arms import Arm
from tokenlab.compare.config import CompareConfig
from tokenlab.core.errors import ConfigError, DataError, suggest
from tokenlab.cost import pretty
from tokenlab.layers.program import BlockStep, steps_of
from tokenlab.train import costs, manifest
from tokenlab.train.records import environment, read_metrics, read_run

FORMAT = 1
CONFIDENCE = 0.95

DIVERGED = "diverged.txt"
"""In the folder of a run that ended because its values were no longer finite: the message that said so."""


def finished(folder: Path, steps: int) -> bool:
    """Whether a run has done all its steps and saved the last."""
    return (folder / "checkpoints").is_dir() and steps in manifest.committed_steps(folder / "checkpoints")


def collect(
    config: CompareConfig, arms: Sequence[Arm], amount: float, folder: Path, command: str
) -> dict[str, Any]:
    """Everything that the report shows, as JSON values; runs that are not finished are left out and said to be missing.

    Args:
      config: the comparison.
      arms: its arms.
      amount: of the budget, as planned.
      folder: of the comparison.
      command: that makes it, to which one is added for each arm.
    """
    task = arms[0].experiment.task
    split = arms[0].experiment.config.eval.final_split or arms[0].experiment.config.eval.split
    entries = [_arm(config, arm, folder, split, command) for arm in arms]
    metric = {"name": task.primary, "split": split, "higher_is_better": task.better == "max"}
    baseline = next(entry for entry in entries if entry["name"] == config.baseline)
    ways = {task.primary: task.better, **config.also}
    environments = [run["environment"] for entry in entries for run in entry["runs"]] or [environment()]
    for entry in entries:
        entry["quality"] = interval(_values(entry, task.primary))
        entry["versus_baseline"] = None if entry is baseline else _versus(entry, baseline, task.primary)
        entry["by_metric"] = {
            name: _by_metric(entry, baseline, arms[0].experiment.config.eval.split, name, higher=way == "max")
            for name, way in ways.items()
        }
    return {
        "format": FORMAT,
        "title": config.title or "A comparison",
        "baseline": config.baseline,
        "metric": metric,
        "budget": _budget(config.budget.kind, amount, entries),
        "device": ", ".join(dict.fromkeys(each["device"] for each in environments)),
        "versions": environments[0],
        "seeds": list(config.seeds),
        "arms": entries,
        "notes": [
            *_unequal(config.budget.kind, amount, entries),
            *_missing(config, entries),
            *_late(config.budget.kind, amount, entries),
            *_unlike(environments),
        ],
    }


def _budget(kind: str, amount: float, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What every run may spend: met within the tolerance where it is counted, and of seconds how far a run was off."""
    if kind != "seconds":
        return {"kind": kind, "amount": amount, "tolerance": 2 * budget.TOLERANCE}
    runs = [run for entry in entries if entry["steps_of"] is None for run in entry["runs"]]
    off = [abs(run["seconds"] / amount - 1) for run in runs]
    return {"kind": kind, "amount": amount, "tolerance": None, "largest_deviation": max(off, default=None)}


def _arm(config: CompareConfig, arm: Arm, folder: Path, split: str, command: str) -> dict[str, Any]:
    experiment = arm.experiment
    model = experiment.eval_model(arm.steps)
    runs = [
        _run(arm, folder, seed, split)
        for seed in config.seeds
        if finished(folder / arm.folder / f"seed_{seed}", arm.steps)
    ]
    done = {run["seed"] for run in runs}
    diverged = {}
    for seed in config.seeds:
        told = folder / arm.folder / f"seed_{seed}" / DIVERGED
        if seed not in done and told.exists():
            diverged[seed] = told.read_text(encoding="utf-8").strip()
    whole = len(done) == len(config.seeds)
    status = "finished" if whole else "diverged" if diverged else "partial" if done else "waiting"
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(experiment.abstract_state.params))
    kinds = ("flops", "flops_with_recompute", "layer_tokens")
    counted = {kind: budget.Spending(experiment, kind, costs=arm.costs)(arm.steps) for kind in kinds}
    blocks = [step for step in steps_of(model) if isinstance(step, BlockStep)]
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    return {
        "name": arm.name,
        "stack": experiment.usual_model.stack_text,
        "eval_stack": model.stack_text,
        "hash": arm.hash,
        "overrides": dict(arm.changes),
        "config": json.loads(arm.config.to_json_best_effort()),
        "command": f"{command} {shlex.quote(f'--arm={arm.name}')}",
        "status": status,
        "steps": arm.steps,
        "steps_of": arm.steps_of,
        "train_flops": counted["flops"],
        "train_flops_with_recompute": counted["flops_with_recompute"],
        "layer_tokens": counted["layer_tokens"],
        "forward_flops": costs.forward_cost(model, experiment.task, experiment.source.spec).model_flops,
        "parameters": parameters,
        "active_parameters": costs.active_parameters(model),
        "peak_bytes": max(peaks, default=None),
        "step_seconds": statistics.median(run["step_seconds"] for run in runs) if runs else None,
        "seconds": statistics.median(run["seconds"] for run in runs) if runs else None,
        "tokens_by_layer": [{"layer": step.name, "tokens": step.present} for step in blocks],
        "expert_load": None,
        "pictures": [],
        "runs": runs,
        "diverged": [{"seed": seed, "message": message} for seed, message in diverged.items()],
    }


def _run(arm: Arm, folder: Path, seed: int, split: str) -> dict[str, Any]:
    workdir = folder / arm.folder / f"seed_{seed}"
    records, said = read_metrics(workdir), read_run(workdir)
    final = [record for record in records if record["split"] == split and record["step"] == arm.steps]
    if not final:
        raise DataError(
            f"{workdir} has done its {arm.steps} steps, but metrics.jsonl has no record of split {split!r} at the end; "
            "remove the folder to train that run anew."
        )
    totals = ("step", "split", "flops", "tokens", "seconds", "data_seconds")
    metrics = {name: value for name, value in final[-1].items() if name not in totals}
    # The sessions of a run that was stopped; each tells of the programs that it used.
    sessions = [*said.get("history", []), said]
    planned = [size for session in sessions for size in session.get("peak_bytes", {}).values()]
    peaks = [size for size in planned if size is not None]
    return {
        "seed": seed,
        "workdir": str(workdir.relative_to(folder)),
        "metrics": metrics,
        "steps": arm.steps,
        "train_flops": final[-1]["flops"],
        "seconds": final[-1]["seconds"],
        "step_seconds": _step_seconds(records, final[-1]),
        "peak_bytes": max(peaks, default=None),
        "environment": said["environment"],
        "curve": [_point(record) for record in records],
    }


def _point(record: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"train_flops": record["flops"]}
    left_out = ("flops", "tokens", "data_seconds", "learning_rate", "grad_norm")
    return {**{name: value for name, value in record.items() if name not in left_out}, **renamed}


def _step_seconds(records: Sequence[Mapping[str, Any]], last: Mapping[str, Any]) -> float:
    """Seconds a step between training records: the median, so that what disturbed a few of them does not count.

    Of fewer than two such intervals it is that of the whole run.
    """
    train = [record for record in records if record["split"] == "train"]
    found = [
        (later["seconds"] - earlier["seconds"]) / (later["step"] - earlier["step"])
        for earlier, later in zip(train, train[1:], strict=False)
    ]
    return statistics.median(found) if len(found) > 1 else last["seconds"] / last["step"]


def _by_metric(
    entry: Mapping[str, Any], baseline: Mapping[str, Any], split: str, metric: str, *, higher: bool
) -> dict[str, Any]:
    """What the report's table of a metric holds: its mean at the end, the difference, and eta, see `reach`."""
    for run in entry["runs"]:
        if metric not in run["metrics"]:
            raise ConfigError(
                f"config.also has the metric {metric!r}, which a run of {entry['name']!r} does not have."
                f"{suggest(metric, run['metrics'])}"
            )
    etas = reach.factors(entry["runs"], baseline["runs"], split, metric, higher=higher)
    got = [eta for eta in etas if eta is not None]
    return {
        "split": split,
        "higher_is_better": higher,
        "quality": interval(_values(entry, metric)),
        "versus_baseline": None if entry is baseline else _versus(entry, baseline, metric),
        "eta": None if entry is baseline or len(got) < len(etas) else interval(got),
        "reached": len(got),
        "pairs": len(etas),
    }


def _values(entry: Mapping[str, Any], metric: str) -> list[float]:
    return [run["metrics"][metric] for run in entry["runs"]]


def interval(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean and 95 % interval by Student's t; an interval of None from a single value, None from none."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None}
    half = (
        stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    )
    return {"mean": mean, "low": float(mean - half), "high": float(mean + half)}


def _versus(entry: Mapping[str, Any], baseline: Mapping[str, Any], metric: str) -> dict[str, Any] | None:
    """The difference to the baseline over the seeds that both have: paired, as they saw the same data."""
    theirs = {run["seed"]: run["metrics"][metric] for run in baseline["runs"]}
    differences = [
        run["metrics"][metric] - theirs[run["seed"]] for run in entry["runs"] if run["seed"] in theirs
    ]
    found = interval(differences)
    if found is None:
        return None
    return {
        "difference": found["mean"],
        "low": found["low"],
        "high": found["high"],
        "pairs": len(differences),
    }


def _unequal(kind: str, amount: float, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the arms spend that have the steps of another instead of the budget."""
    notes = []
    for entry in entries:
        if entry["steps_of"] is None:
            continue
        spent = entry[{"flops": "train_flops"}.get(kind, kind)]
        much = "how much is known when it is trained"
        if spent is not None:
            off = f"{100 * abs(spent / amount - 1):.3g} % {'more' if spent >= amount else 'less'}"
            much = f"{pretty(spent)} {budget.UNITS[kind]}, {off} than the {pretty(amount)} of the budget"
        notes.append(f"{entry['name']} has the {entry['steps']:,} steps of {entry['steps_of']}: {much}.")
    return notes


def _missing(config: CompareConfig, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    for entry in entries:
        notes += [
            f"{entry['name']}, seed {run['seed']} diverged: {run['message']}" for run in entry["diverged"]
        ]
        missing = len(config.seeds) - len(entry["runs"]) - len(entry["diverged"])
        if missing:
            notes.append(f"{entry['name']}: {missing} of {len(config.seeds)} runs are not finished.")
    return notes


def _late(kind: str, amount: float, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a budget of seconds was not met."""
    if kind != "seconds":
        return []
    return [
        f"{entry['name']}: trained for {entry['seconds']:.1f} s, {entry['seconds'] / amount - 1:+.0%} of the budget of "
        f"{amount:.1f} s; a step was faster or slower than when it was timed beforehand."
        for entry in entries
        if entry["steps_of"] is None
        and entry["seconds"] is not None
        and abs(entry["seconds"] / amount - 1) > budget.FORECAST
    ]


def _unlike(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where runs were not made on the same device with the same versions."""
    differ = []
    for key in dict.fromkeys(key for each in environments for key in each):
        values = list(dict.fromkeys(str(each.get(key)) for each in environments))
        if len(values) > 1:
            differ.append(f"{key} ({', '.join(values)})")
    if not differ:
        return []
    return [f"The runs differ in {', '.join(differ)}: their times and memory are not comparable."]
