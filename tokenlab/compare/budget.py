"""From a budget to steps: as many as spend it, for every arm."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any

import jax
from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import override
from tokenlab.core.errors import ConfigError
from tokenlab.cost import Cost, pretty
from tokenlab.train import experiment as experiments
from tokenlab.train import schedule
from tokenlab.train.experiment import Experiment
from tokenlab.train.loop import AHEAD

TOLERANCE = 0.005
"""An arm's counted spending may differ from the budget by this share of it, so two arms agree within twice that."""

FORECAST = 0.05
"""The same for seconds. They are measured before training, so runs may take more or less than was reckoned with."""

ENOUGH = 10**9
"""Steps of a run so long that every piece of a schedule has some."""

NEARBY = 8
"""Steps on each side of the solver's result that are looked at too: where a schedule has several changes, each of them
is rounded to a step, so that spending does not quite rise with the steps."""

UNITS = {"steps": "steps", "flops": "FLOPs", "seconds": "s", "layer_tokens": "layer tokens"}

PROBE_ROUNDS = 5
PROBE_SECONDS = 1.5
PROBE_WARMUP = 3
"""A measured budget: every step is timed in as many rounds, in turn with the others, for so long each, behind some
steps in which the threads that make batches get going."""


def scalable(config: ConfigDict) -> ConfigDict:
    """The same run, with every length in steps as a share of `config.steps`: it scales when the steps change.

    Raises:
      ConfigError: a length of the learning rate's schedule is not below `config.steps`, so that it is no share.
    """
    changes: dict[str, Any] = {}
    for key in ("warmup_steps", "decay_steps", "timescale", "end"):
        value = config.optimizer.schedule[key]
        if isinstance(value, int) and value:
            if value >= config.steps:
                raise ConfigError(
                    f"config.optimizer.schedule.{key} is {value} of {config.steps} steps: a comparison takes it as a "
                    "share of the run, so expected less than config.steps."
                )
            changes[f"optimizer.schedule.{key}"] = value / config.steps
    found = override(config, changes)
    found.stack_vars = ConfigDict(schedule.in_shares(config.stack_vars.to_dict(), config.steps))
    return found


def complete(experiment: Experiment) -> Experiment:
    """The arm at so many steps that it meets every set of numbers of its stack; itself, where it does."""
    variables = schedule.stack_vars(experiment.config.stack_vars, ENOUGH)
    if all(schedule.values_key(values) in experiment.models for values in variables.distinct(ENOUGH)):
        return experiment
    longer = dataclasses.replace(experiment.config, steps=ENOUGH)
    return experiments.build(longer, source=experiment.source)


def pieces(experiment: Experiment) -> dict[str, int]:
    """Each set of numbers in the stack, by its key, and the first step that has it."""
    found = experiment.stack_vars.counts(experiment.config.steps)
    return {schedule.values_key(segment.values): segment.first for segment in found}


class Spending:
    """What a run of an arm spends, as a function of its steps.

    Args:
      experiment: the arm, of any number of steps.
      kind: of the budget, see `Budget`; or "flops_with_recompute", which counts what rematerialisation does again.
      step_seconds: measured, see `step_seconds`; for a budget of seconds.
      costs: counted costs of a step by the numbers in the stack. What is counted is added, so that others who are
        given the same mapping need not count it again; it must be of the same arm, whatever its steps.
    """

    def __init__(
        self,
        experiment: Experiment,
        kind: str,
        step_seconds: Mapping[str, float] | None = None,
        costs: MutableMapping[str, Cost] | None = None,
    ):
        self._experiment = experiment
        self._costs: MutableMapping[str, Cost] = {} if costs is None else costs
        self._per_step: Callable[[Experiment, str], float] = {
            "steps": lambda arm, key: 1,
            "flops": lambda arm, key: self._cost(arm, key).model_flops,
            "flops_with_recompute": lambda arm, key: self._cost(arm, key).flops,
            "seconds": lambda arm, key: step_seconds[key],
            "layer_tokens": lambda arm, key: arm.layer_tokens_per_step(pieces(arm)[key]),
        }[kind]
        self._rates: dict[str, float] = {}

    def __call__(self, steps: int) -> float:
        """Spent after `steps` steps of a run of as many."""
        variables = schedule.stack_vars(self._experiment.config.stack_vars, steps)
        return sum(
            self._rate(schedule.values_key(segment.values)) * segment.count
            for segment in variables.counts(steps)
        )

    def _cost(self, arm: Experiment, key: str) -> Cost:
        if key not in self._costs:
            self._costs[key] = arm.step_cost(pieces(arm)[key])
        return self._costs[key]

    def _rate(self, key: str) -> float:
        """Spent by one step with these numbers in the stack."""
        if key not in self._rates:
            if key not in self._experiment.models:  # the arm's own steps are too few for this piece
                self._experiment = complete(self._experiment)
            self._rates[key] = self._per_step(self._experiment, key)
        return self._rates[key]

    def steps(self, amount: float) -> int:
        """The number of steps whose spending is nearest to `amount`, at least 1."""
        low, high = 1, 2
        while self(high) < amount:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self(middle) < amount else (low, middle)
        near = range(max(1, low - NEARBY), high + NEARBY + 1)
        return min(near, key=lambda steps: abs(self(steps) - amount))

    def largest_rise(self) -> float:
        """The most by which spending rises from some number of steps to the next.

        Each change of a schedule then comes a step later or does not. With r_i spent by a step of piece i of p, that
        is at most r_p + sum_i max(0, r_i - r_(i+1)): the dearest piece's, where the pieces only rise or only fall. Of
        a piece whose values alternate, r is its dearest step's before the minus and its cheapest one's behind it.
        """
        variables = schedule.stack_vars(self._experiment.config.stack_vars, ENOUGH)
        rates = [
            [self._rate(schedule.values_key(segment.values)) for segment in segments]
            for segments in variables.segments(ENOUGH)
        ]
        falls = (max(0, max(piece) - min(later)) for piece, later in zip(rates, rates[1:], strict=False))
        return max(rates[-1]) + sum(falls)


def solve(name: str, spending: Spending, kind: str, amount: float) -> int:
    """The steps of an arm.

    Raises:
      ConfigError: no number of steps spends the budget within TOLERANCE, or FORECAST where it is of seconds.
    """
    steps = spending.steps(amount)
    spent = spending(steps)
    tolerance, unit = FORECAST if kind == "seconds" else TOLERANCE, UNITS[kind]
    if abs(spent - amount) > tolerance * amount:
        # Some number of steps is at most half a rise away from any amount.
        least = spending.largest_rise() * (math.ceil(0.5 / tolerance) + 1)
        count = "1 step spends" if steps == 1 else f"{steps} steps spend"
        raise ConfigError(
            f"arm {name!r} cannot spend the budget of {pretty(amount)} {unit}: {count} {pretty(spent)}, more than "
            f"{100 * tolerance:g} % off; expected config.budget.amount of at least {_rounded_up(least)} {unit}."
        )
    return steps


def _rounded_up(value: float) -> str:
    """Four digits that are not below the value."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit) * unit:.4g}"


def step_seconds(arms: Mapping[str, Experiment]) -> dict[str, dict[str, float]]:
    """Measured seconds of a train step, data included, of all arms in turn: the median of interleaved rounds.

    Returns:
      Arm -> key of the numbers in its stack -> seconds; one entry, of the key "", where a stack has none.
    """
    probes = {
        (name, key): probe for name, arm in arms.items() for key, probe in _probes(complete(arm)).items()
    }
    seconds: dict[tuple[str, str], list[float]] = {which: [] for which in probes}
    for probe in probes.values():
        probe(0.0)  # compiles, and warms up
    for _ in range(PROBE_ROUNDS):
        for which, probe in probes.items():
            seconds[which].append(probe(PROBE_SECONDS))
    found: dict[str, dict[str, float]] = {name: {} for name in arms}
    for (name, key), samples in seconds.items():
        found[name][key] = statistics.median(samples)
    return found


def _probes(experiment: Experiment) -> dict[str, Callable[[float], float]]:
    """For each piece a function that trains for some seconds, at least two steps, and says how long a step took."""
    held: dict[str, Any] = {"state": None, "step": 0}

    def run(at: int, at_least: float) -> float:
        state = experiment.init() if held["state"] is None else held["state"]
        losses: list[Any] = []
        with experiment.batches(held["step"] % experiment.config.steps) as batches:
            batch = next(batches)
            compiled = experiment.compiled_step(at, state, batch)

            def step() -> None:
                nonlocal state, batch
                state, report = compiled.run(state, batch)
                batch = next(batches, batch)
                losses.append(report.loss)

            for _ in range(PROBE_WARMUP):
                step()
            jax.block_until_ready(losses)
            losses.clear()
            start = time.perf_counter()
            while len(losses) < 2 or time.perf_counter() - start < at_least:
                step()
                if len(losses) > AHEAD:  # as in training, the host runs so many steps ahead
                    losses[-1 - AHEAD].block_until_ready()
            jax.block_until_ready(losses)
            elapsed = time.perf_counter() - start
        held.update(state=state, step=held["step"] + PROBE_WARMUP + len(losses))
        return elapsed / len(losses)

    return {key: partial(run, at) for key, at in pieces(experiment).items()}
