"""Measure stacks beside a dense one, and put what was counted next to what was timed."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokenlab.bench import timing
from tokenlab.bench.arm import Arm, Mode, Setting, Shelf, prepare_each
from tokenlab.bench.statistics import realised, time_ratio
from tokenlab.bench.table import FORMAT
from tokenlab.core import huge_pages
from tokenlab.core.errors import ConfigError, CostError
from tokenlab.cost import Peaks, lookup, measure_peaks, roofline
from tokenlab.train import profile
from tokenlab.train.records import environment

VERSIONS = ("tokenlab", "python", "jax", "jaxlib", "flax")


@dataclass(frozen=True)
class Case:
    """Something to measure: a name for tables, its stack in training and at inference, and other settings of its model.

    Attributes:
      model: keys of `config.model` in which it differs from the setting.
    """

    name: str
    train: str
    inference: str
    model: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, stack: str) -> Case:
        """The same stack in both."""
        return cls(name, stack, stack)

    def stack(self, mode: Mode) -> str:
        """The stack in that mode."""
        return self.train if mode == "train" else self.inference


def measure(
    setting: Setting,
    dense: Case,
    cases: Sequence[Case],
    *,
    modes: Sequence[Mode],
    rounds: int,
    note: Callable[[str], None] = lambda line: None,
    profiles: Path | None = None,
    measured_peaks: Callable[[str], Peaks] = measure_peaks,
) -> list[dict[str, Any]]:
    """Times the cases and the dense one in turn, in one process, each in all ways that it can be run.

    Of the ways of a case the one with the smaller median counts: the rounds that compare the cases also choose.

    Args:
      setting: what they share.
      dense: what they are compared with.
      cases: to compare.
      modes: "train", "inference" or both.
      rounds: timed rounds, at least 1; an interval means something from about 7 on.
      note: is told of progress, a line at a time.
      profiles: folder for a profile of each arm, made after the timing; None for none.
      measured_peaks: dtype -> what the device reaches; asked before and after the rounds of a mode, and the better
        is taken.

    Returns:
      A record an arm and mode, the dense one first; docs/benchmark.md says what the keys are.

    Raises:
      ConfigError: two cases of one name, or several processes.
      TokenLabError: a case that does not fit the setting.
    """
    names = [dense.name, *(case.name for case in cases)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"benchmark: two stacks are named {name!r}; give each its own name.")
    if jax.process_count() > 1:
        raise ConfigError(f"benchmark: expected one process, got {jax.process_count()}; run it on one host.")
    return [
        record
        for mode in modes
        for record in _measure(setting, [dense, *cases], mode, rounds, note, profiles, measured_peaks)
    ]


def setting_of(setting: Setting, case: Case) -> Setting:
    """The setting with what a case changes in the model."""
    return replace(setting, model={**setting.model, **case.model}) if case.model else setting


def _measure(
    setting: Setting,
    cases: Sequence[Case],
    mode: Mode,
    rounds: int,
    note: Callable[[str], None],
    profiles: Path | None,
    measured_peaks: Callable[[str], Peaks],
) -> list[dict[str, Any]]:
    """The records of one mode; the first case is the dense one. What it holds in memory is free when it returns."""
    shelf = Shelf()
    ways = {
        case.name: prepare_each(setting_of(setting, case), case.stack(mode), mode, shelf, note)
        for case in cases
    }
    runs = {(name, how): arm.run for name, arms in ways.items() for how, arm in arms.items()}
    dtype = setting.model.get("dtype", "float32")
    before = measured_peaks(dtype)
    note(f"{before.name}: {before.flops:.3g} FLOP/s in {dtype} products, {before.bandwidth:.3g} bytes/s")
    note(f"{mode}: timing {len(ways)} stacks, {len(runs)} programs, in {rounds} rounds")
    timed = timing.interleaved(runs, rounds)
    after = measured_peaks(dtype)
    peaks = Peaks(before.name, max(before.flops, after.flops), max(before.bandwidth, after.bandwidth))
    faster = {
        name: min(arms, key=lambda how, name=name: statistics.median(timed[name, how]))
        for name, arms in ways.items()
    }
    arms = {name: ways[name][how] for name, how in faster.items()}
    seconds = {name: timed[name, how] for name, how in faster.items()}
    records = [_record(setting, name, cases[0].name, arms, seconds, peaks) for name in arms]
    if profiles is not None:
        for name, arm in arms.items():
            folder = profiles / f"{mode} {name}".replace("/", "-").replace(" ", "_")
            profile.record(folder, arm.compiled, arm.run)
            note(f"profile: {folder / profile.SUMMARY}")
    return records


def _record(
    setting: Setting,
    name: str,
    baseline: str,
    arms: dict[str, Arm],
    seconds: dict[str, list[float]],
    peaks: Peaks,
) -> dict[str, Any]:
    arm, samples = arms[name], seconds[name]
    flops = arm.cost.model_flops
    flops_ratio = flops / arms[baseline].cost.model_flops
    saved = realised(samples, seconds[baseline], flops_ratio)
    step_seconds = statistics.median(samples)
    devices = setting.mesh.size
    # The CPU devices of a process are the same cores.
    chips = 1 if jax.default_backend() == "cpu" else devices
    bound = roofline(arm.cost, peaks, devices=chips)
    rate = flops / step_seconds
    facts = environment()
    return {
        "format": FORMAT,
        "name": name,
        "stack": arm.model.stack_text,
        "baseline": baseline,
        "mode": arm.mode,
        "execution": arm.execution,
        "flops": flops,
        "flops_ratio": flops_ratio,
        "time_ratio": time_ratio(samples, seconds[baseline]),
        "realised": None if saved is None else saved.value,
        "realised_low": None if saved is None else saved.low,
        "realised_high": None if saved is None else saved.high,
        "step_seconds": step_seconds,
        "step_seconds_quartiles": [float(q) for q in np.quantile(samples, (0.25, 0.75))],
        "tokens_per_second": setting.batch_size
        * arm.model.tokens_per_example
        * arm.model.sequences
        / step_seconds,
        "flops_per_second": rate,
        "mfu": rate / (chips * peaks.flops),
        "mfu_datasheet": _of_datasheet(rate / devices, setting.model.get("dtype", "float32")),
        "peak_flops_per_second": peaks.flops,
        "peak_bytes_per_second": peaks.bandwidth,
        "roofline_seconds": bound.seconds,
        "roofline_bound": bound.bound,
        "peak_bytes": arm.peak_bytes,
        "device_peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "compile_seconds": arm.compile_seconds,
        "platform": jax.default_backend(),
        "device": _device(),
        "devices": devices,
        "cores": facts["cores"],
        "huge_pages": os.environ.get(huge_pages.VARIABLE) == huge_pages.TUNABLE,
        "versions": {key: facts[key] for key in VERSIONS},
        "size": setting.model.get("size"),
        "dtype": setting.model.get("dtype", "float32"),
        "batch_size": setting.batch_size,
        "rounds": len(samples),
    }


def _of_datasheet(rate: float, dtype: str) -> float | None:
    """FLOP/s of one device over the datasheet's peak; None where no datasheet is known."""
    try:
        return rate / lookup(jax.devices()[0].device_kind).peaks(dtype).flops
    except CostError:
        return None


def _device() -> str:
    """What a reader knows the device by; of a CPU, jax only says that it is one."""
    kind = jax.devices()[0].device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if kind == "cpu" else []
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else kind
