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

from tokenlab.compare import budget
from tokenlab.compare.arms import Arm
from tokenlab.compare.config import CompareConfig
from tokenlab.core.errors import DataError
from tokenlab.layers.program import BlockStep
from tokenlab.train import costs, manifest
from tokenlab.train.records import environment, read_metrics, read_run

FORMAT = 1
CONFIDENCE = 0.95


def finished(folder: Path, steps: int) -> bool:
    """Whether a run has done all its steps and saved the last."""
    return (folder / "checkpoints").is_dir() and steps in manifest.committed_steps(folder / "checkpoints")


def collect(config: CompareConfig, arms: Sequence[Arm], folder: Path, command: str) -> dict[str, Any]:
    """Everything that the report shows, as JSON values; runs that are not finished are left out and said to be missing.

    Args:
      config: the comparison.
      arms: its arms.
      folder: of the comparison.
      command: that makes it, to which one is added for each arm.
    """
    task = arms[0].experiment.task
    split = arms[0].experiment.config.eval.final_split or arms[0].experiment.config.eval.split
    kind = config.budget.kind
    entries = [_arm(config, arm, folder, split, command) for arm in arms]
    metric = {"name": task.primary, "split": split, "higher_is_better": task.better == "max"}
    baseline = next(entry for entry in entries if entry["name"] == config.baseline)
    for entry in entries:
        entry["quality"] = interval(_values(entry, task.primary))
        entry["versus_baseline"] = None if entry is baseline else _versus(entry, baseline, task.primary)
    return {
        "format": FORMAT,
        "title": config.title or "A comparison",
        "baseline": config.baseline,
        "metric": metric,
        "budget": {"kind": kind, "amount": _amount(config, entries), "tolerance": budget.TOLERANCE},
        "device": jax.devices()[0].device_kind,
        "versions": environment(),
        "seeds": list(config.seeds),
        "arms": entries,
        "notes": _notes(config, entries),
    }


def _arm(config: CompareConfig, arm: Arm, folder: Path, split: str, command: str) -> dict[str, Any]:
    experiment = arm.experiment
    model = experiment.eval_model(arm.steps)
    runs = [
        _run(arm, folder, seed, split)
        for seed in config.seeds
        if finished(folder / arm.folder / f"seed_{seed}", arm.steps)
    ]
    done = len(runs)
    status = "finished" if done == len(config.seeds) else "partial" if done else "waiting"
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(experiment.abstract_state.params))
    kinds = ("flops", "flops_with_recompute", "layer_tokens")
    counted = {kind: budget.Spending(experiment, kind)(arm.steps) for kind in kinds}
    blocks = [step for step in model.program.flat() if isinstance(step, BlockStep)]
    timed = [run["step_seconds"] for run in runs if run["step_seconds"] is not None]
    return {
        "name": arm.name,
        "stack": experiment.model.stack_text,
        "eval_stack": model.stack_text,
        "hash": arm.hash,
        "overrides": dict(arm.changes),
        "config": json.loads(arm.config.to_json_best_effort()),
        "command": f"{command} {shlex.quote(f'--arm={arm.name}')}",
        "status": status,
        "steps": arm.steps,
        "train_flops": counted["flops"],
        "train_flops_with_recompute": counted["flops_with_recompute"],
        "layer_tokens": counted["layer_tokens"],
        "forward_flops": costs.forward_cost(model, experiment.task, experiment.source.spec).model_flops,
        "parameters": parameters,
        "active_parameters": parameters,
        "peak_bytes": runs[0]["peak_bytes"] if runs else None,
        "step_seconds": statistics.median(timed) if timed else None,
        "seconds": statistics.median(run["seconds"] for run in runs) if runs else None,
        "tokens_by_layer": [{"layer": step.name, "tokens": step.present} for step in blocks],
        "expert_load": None,
        "pictures": [],
        "runs": runs,
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
    peaks = [size for size in said.get("peak_bytes", {}).values() if size is not None]
    return {
        "seed": seed,
        "workdir": str(workdir.relative_to(folder)),
        "metrics": metrics,
        "steps": arm.steps,
        "train_flops": final[-1]["flops"],
        "seconds": final[-1]["seconds"],
        "step_seconds": _step_seconds(records),
        "peak_bytes": max(peaks) if peaks else None,
        "curve": [_point(record) for record in records],
    }


def _point(record: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {"train_flops": record["flops"]}
    left_out = ("flops", "tokens", "data_seconds", "learning_rate", "grad_norm")
    return {**{name: value for name, value in record.items() if name not in left_out}, **renamed}


def _step_seconds(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds a step between training records: the median, so that what disturbed a few of them does not count."""
    train = [record for record in records if record["split"] == "train"]
    found = [
        (later["seconds"] - earlier["seconds"]) / (later["step"] - earlier["step"])
        for earlier, later in zip(train, train[1:], strict=False)
    ]
    return statistics.median(found) if found else None


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


def _amount(config: CompareConfig, entries: Sequence[Mapping[str, Any]]) -> float | None:
    if config.budget.amount is not None:
        return config.budget.amount
    baseline = next(entry for entry in entries if entry["name"] == config.baseline)
    key = {"steps": "steps", "flops": "train_flops", "layer_tokens": "layer_tokens", "seconds": "seconds"}
    return baseline[key[config.budget.kind]]


def _notes(config: CompareConfig, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    for entry in entries:
        missing = len(config.seeds) - len(entry["runs"])
        if missing:
            notes.append(f"{entry['name']}: {missing} of {len(config.seeds)} runs are not finished.")
    if config.budget.kind == "seconds":
        amount = _amount(config, entries)
        for entry in entries:
            if entry["seconds"] is not None and abs(entry["seconds"] / amount - 1) > 0.05:
                off = f"{entry['seconds'] / amount - 1:+.0%}"
                notes.append(
                    f"{entry['name']}: trained for {entry['seconds']:.1f} s, {off} of the budget of {amount:.1f} s; "
                    "a step was faster or slower than when it was timed beforehand."
                )
    return notes
