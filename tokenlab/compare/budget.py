"""From a budget to steps: as many as spend it, for every arm."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import override
from tokenlab.core.errors import ConfigError
from tokenlab.cost import pretty
from tokenlab.layers.program import BlockStep
from tokenlab.train import schedule
from tokenlab.train.experiment import Experiment

TOLERANCE = 0.01
"""An arm's counted spending may differ from the budget by this share of it."""

UNITS = {"steps": "steps", "flops": "FLOPs", "seconds": "s", "layer_tokens": "layer tokens"}

PROBE_ROUNDS = 7
PROBE_SECONDS = 0.5
"""A measured budget: every arm is timed in as many rounds, in turn with the others, for so long each."""


def scalable(config: ConfigDict) -> ConfigDict:
    """The same run, with every length in steps as a share of `config.steps`: it scales when the steps change."""
    changes: dict[str, Any] = {}
    for key in ("warmup_steps", "decay_steps", "timescale"):
        value = config.optimizer.schedule[key]
        if isinstance(value, int) and value:
            # A share of 1 and more is no share: such a length is left for the run to refuse.
            changes[f"optimizer.schedule.{key}"] = value / config.steps if value < config.steps else value
    found = override(config, changes)
    found.stack_vars = ConfigDict(schedule.in_shares(config.stack_vars.to_dict(), config.steps))
    return found


class Spending:
    """What a run of an arm spends, as a function of its steps.

    Args:
      experiment: the arm, of any number of steps.
      kind: of the budget, see `Budget`; or "flops_with_recompute", which counts what rematerialisation does again.
      step_seconds: measured, for a budget of seconds.
    """

    def __init__(self, experiment: Experiment, kind: str, step_seconds: float | None = None):
        self._stack_vars = experiment.config.stack_vars
        starts = experiment.stack_vars.changes(experiment.config.steps)
        per_step: Callable[[int], float] = {
            "steps": lambda at: 1,
            "flops": lambda at: experiment.step_cost(at).model_flops,
            "flops_with_recompute": lambda at: experiment.step_cost(at).flops,
            "seconds": lambda at: step_seconds,
            "layer_tokens": lambda at: layer_tokens(experiment, at),
        }[kind]
        self._rates = {experiment.values(at): per_step(at) for at in starts}

    def __call__(self, steps: int) -> float:
        """Spent after `steps` steps of a run of as many."""
        variables = schedule.stack_vars(self._stack_vars, steps)
        starts = [*variables.changes(steps), steps]
        return sum(
            self._rates[schedule.values_key(variables.at(first))] * (last - first)
            for first, last in zip(starts, starts[1:], strict=False)
        )

    def steps(self, amount: float) -> int:
        """The number of steps whose spending is nearest to `amount`, at least 1."""
        low, high = 1, 2
        while self(high) < amount:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self(middle) < amount else (low, middle)
        return min((low, high), key=lambda steps: abs(self(steps) - amount))


def layer_tokens(experiment: Experiment, at: int) -> int:
    """Tokens that enter blocks in train step `at`, summed over blocks and examples."""
    steps = experiment.models[experiment.values(at)].program.flat()
    present = sum(step.present for step in steps if isinstance(step, BlockStep))
    return present * experiment.config.batch_size


def solve(name: str, spending: Spending, kind: str, amount: float) -> int:
    """The steps of an arm.

    Raises:
      ConfigError: no number of steps spends the budget within TOLERANCE (of a measured budget: not even one step does).
    """
    steps = spending.steps(amount)
    spent = spending(steps)
    unit = UNITS[kind]
    if kind == "seconds" and spent <= 2 * amount:
        return steps
    if abs(spent - amount) > TOLERANCE * amount:
        least = spending(round(0.5 / TOLERANCE))
        count = "1 step spends" if steps == 1 else f"{steps} steps spend"
        raise ConfigError(
            f"arm {name!r} cannot spend the budget of {pretty(amount)} {unit}: {count} {pretty(spent)}, more than "
            f"{TOLERANCE:.0%} off; expected config.budget.amount of at least {pretty(least)} {unit}."
        )
    return steps


def step_seconds(experiments: Mapping[str, Experiment]) -> dict[str, float]:
    """Measured seconds of a train step, data included, of all arms in turn: the median of interleaved rounds."""
    probes = {name: _probe(experiment) for name, experiment in experiments.items()}
    seconds: dict[str, list[float]] = {name: [] for name in experiments}
    for probe in probes.values():
        probe(0.0)  # compiles, and warms up
    for _ in range(PROBE_ROUNDS):
        for name, probe in probes.items():
            seconds[name].append(probe(PROBE_SECONDS))
    return {name: statistics.median(found) for name, found in seconds.items()}


def _probe(experiment: Experiment) -> Callable[[float], float]:
    """A function that trains for some seconds, at least two steps, and says how long a step took."""
    held: dict[str, Any] = {"state": None, "step": 0}

    def run(at_least: float) -> float:
        state = experiment.init() if held["state"] is None else held["state"]
        with experiment.batches(held["step"] % experiment.config.steps) as batches:
            batch = next(batches)
            compiled = experiment.compiled_step(0, state, batch)
            start, count = time.perf_counter(), 0
            while count < 2 or time.perf_counter() - start < at_least:
                state, report = compiled.run(state, batch)
                jax.block_until_ready(report.loss)
                batch, count = next(batches, batch), count + 1
            elapsed = time.perf_counter() - start
        held.update(state=state, step=held["step"] + count)
        return elapsed / count

    return run
