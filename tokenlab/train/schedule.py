"""Learning-rate schedules by name, and piecewise-constant schedules of the numbers in a stack."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import optax

from tokenlab.core.errors import ConfigError, NameLookupError, suggest
from tokenlab.core.ramp import Number
from tokenlab.train import pieces as texts
from tokenlab.train.config import ScheduleConfig
from tokenlab.train.pieces import Every, Piece, steps_of

_TOLD = {"layer_tokens": "layer tokens", "effective_tokens": "effective tokens"}

SCHEDULES = ("constant", "linear", "cosine", "rsqrt", "wsd")


class Clock(Protocol):
    """What the learning rate follows in place of steps, see `tokenlab.train.token_clock`.

    Attributes:
        total: time at the end of the run, in dense steps.
    """

    total: float

    def __call__(self, step: Any) -> Any:
        """Time after so many train steps, in dense steps: f32 scalar."""
        ...


def length(config: ScheduleConfig, total: int, clock: Clock | None) -> int | float:
    """The time at which the schedule ends, in steps; with a token clock in dense steps.

    Raises:
        ConfigError: the configuration wants a clock that counts tokens and there is none, or the other way round.
    """
    if (clock is None) is not (config.clock == "steps"):
        raise ConfigError(
            f"config.optimizer.schedule.clock is {config.clock!r}, and the optimizer was built "
            f"{'without' if clock is None else 'with'} a clock of tokens; see tokenlab.train.token_clock.build."
        )
    if clock is None:
        return total
    if config.end is None:
        return clock.total
    return config.end if isinstance(config.end, int) else config.end * total


def build(config: ScheduleConfig, peak: float, total: int, clock: Clock | None = None) -> optax.Schedule:
    """The learning rate as a function of the number of steps already done.

    With W warm-up steps, T = `total`, t = step and u = (t - W) / (T - W), after the warm-up peak * t / W:

        constant  peak
        linear    peak * (1 - (1 - final) u)
        cosine    peak * (final + (1 - final) (1 + cos(pi u)) / 2)
        rsqrt     peak / sqrt(1 + (t - W) / timescale), times (T - t) / decay_steps in the last decay_steps
        wsd       peak until T - decay_steps, from there in a straight line to peak * final

    Args:
        config: name and arguments.
        peak: largest learning rate, > 0.
        total: steps of the run, >= 1; linear, cosine and wsd reach their end there.
        clock: where `config.clock` is not "steps"; t and T above are then its time (`length`), and numbers of steps are
            of dense steps.

    Returns:
        An optax schedule: i32 scalar (traced or not) -> f32 scalar.

    Raises:
        NameLookupError: no schedule has this name.
        ConfigError: an argument that this schedule does not read, or parts longer than the run.

    Source: cosine, Loshchilov and Hutter 2017 (SGDR), eq. 5 without restarts; rsqrt, Vaswani et al. 2017, eq. 3,
    whose curve is `timescale = warmup_steps`; wsd (warm-up, stable, decay), Hu et al. 2024 (MiniCPM), section 4.
    """
    where = "config.optimizer.schedule"
    if config.name not in SCHEDULES:
        hint = suggest(config.name, SCHEDULES)
        if config.name.startswith("warmup_"):
            hint = f" Every schedule warms up: use {config.name.removeprefix('warmup_')!r} with warmup_steps."
        raise NameLookupError(f"{where}.name is {config.name!r}, which is no schedule.{hint}")
    for key, owners in (
        ("decay_steps", ("wsd", "rsqrt")),
        ("timescale", ("rsqrt",)),
        ("final", ("linear", "cosine", "wsd")),
    ):
        if getattr(config, key) not in (None, 0.0) and config.name not in owners:
            value = getattr(config, key)
            raise ConfigError(
                f"{where}.{key} is {value!r}, but only {', '.join(owners)} reads it: leave it out."
            )
    warmup, end = steps_of(config.warmup_steps, total), length(config, total, clock)
    if warmup >= end:
        of = f"{total} steps" if clock is None else f"{end:g} dense steps' worth of tokens"
        raise ConfigError(f"{where}.warmup_steps is {warmup} of {of}: it must leave at least one step.")
    left = end - warmup
    if config.name == "constant":
        body = optax.constant_schedule(peak)
    elif config.name == "linear":
        body = optax.linear_schedule(peak, peak * config.final, left)
    elif config.name == "cosine":
        body = optax.cosine_decay_schedule(peak, left, alpha=config.final)
    elif config.name == "rsqrt":
        timescale = steps_of(config.warmup_steps if config.timescale is None else config.timescale, total)
        if timescale < 1:
            raise ConfigError(f"{where}.timescale is {timescale} steps for rsqrt: set it to at least 1.")
        decay = steps_of(config.decay_steps or 0, total)
        if decay > left:
            raise ConfigError(
                f"{where}.decay_steps is {decay} steps: expected 1 to {left:g}, the steps after the warm-up."
            )
        body = _rsqrt(peak, timescale, left, decay)
    else:
        decay = steps_of(0.2 if config.decay_steps is None else config.decay_steps, total)
        if not 1 <= decay <= left:
            raise ConfigError(
                f"{where}.decay_steps is {decay} steps: expected 1 to {left:g}, the steps after the warm-up."
            )
        falling = optax.linear_schedule(peak, peak * config.final, decay)
        body = optax.join_schedules([optax.constant_schedule(peak), falling], [left - decay])
    rate = body
    if warmup:
        rate = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup])
    return rate if clock is None else lambda step: rate(clock(step))


def _dense(config: ScheduleConfig, total: int, clock: Clock) -> str:
    return f"{length(config, total, clock):.6g} dense steps ({clock.total:.6g} in {total} steps)"


def _rsqrt(peak: float, timescale: int, left: int, decay: int) -> optax.Schedule:
    def schedule(step: Any) -> Any:
        # join_schedules evaluates the body before its start too, where the root's argument would be negative.
        rate = peak / jnp.sqrt(1.0 + jnp.maximum(step, 0) / timescale)
        return rate * jnp.clip((left - step) / decay, 0.0, 1.0) if decay else rate

    return schedule


def describe(config: ScheduleConfig, peak: float, total: int, clock: Clock | None = None) -> str:
    """One line for people: "cosine from 0.001 to 0 over 1000 steps, the first 50 of them warm-up"."""
    warmup = steps_of(config.warmup_steps, total)
    text = f"{config.name} from {peak:g}"
    if config.name in ("linear", "cosine", "wsd"):
        text += f" to {peak * config.final:g}"
    text += (
        f" over {total} steps"
        if clock is None
        else f" over the {_TOLD[config.clock]} of {_dense(config, total, clock)}"
    )
    if config.name == "wsd":
        text += f", falling in the last {steps_of(0.2 if config.decay_steps is None else config.decay_steps, total)}"
    if config.name == "rsqrt":
        scale = config.warmup_steps if config.timescale is None else config.timescale
        text += f", timescale {steps_of(scale, total)}"
        if config.decay_steps:
            text += f", falling to 0 in the last {steps_of(config.decay_steps, total)}"
    return text + (f", the first {warmup} of them warm-up" if warmup else "")


class Segment(NamedTuple):
    """A stretch of steps with the same pieces, and a set of values in it.

    Attributes:
        values: name -> number.
        first: the first step that has them.
        count: how many steps of the stretch have them.
    """

    values: dict[str, Number]
    first: int
    count: int


@dataclass(frozen=True)
class StackVars:
    """The numbers that names in a stack stand for, as a pure function of the step.

    What is asked of a whole run (`changes`, `counts`, `distinct`) costs as much as there are pieces, however long the
    run is: periodic pieces are counted, not walked through.

    Attributes:
        pieces: for each name its ((first step, number or `Every`), ...), the first steps ascending from 0.
    """

    pieces: tuple[tuple[str, tuple[Piece, ...]], ...]

    def at(self, step: int) -> dict[str, Number]:
        """The values that train step `step` (steps already done, >= 0) is built with."""
        rules = self.rules(step)
        return {name: rule.at(step) if isinstance(rule, Every) else rule for name, rule in rules.items()}

    def usual(self, step: int) -> dict[str, Number]:
        """`at(step)`, and of what is periodic the value of most steps: what stands after "else".

        Evaluation uses it, so that it does not depend on whether the step before it was a tenth one.
        """
        rules = self.rules(step)
        return {name: rule.other if isinstance(rule, Every) else rule for name, rule in rules.items()}

    def rules(self, step: int) -> dict[str, Number | Every]:
        """What holds at train step `step`: a number, or what alternates."""
        return {
            name: pieces[bisect.bisect_right(pieces, step, key=lambda piece: piece[0]) - 1][1]
            for name, pieces in self.pieces
        }

    def changes(self, total: int) -> list[int]:
        """The steps below `total` at which some name has another piece, with 0, ascending.

        Inside a periodic piece values change without another piece: see `alternations`.
        """
        starts = {0} | {start for _, pieces in self.pieces for start, _ in pieces}
        return sorted(start for start in starts if start < total)

    def alternations(self, start: int, stop: int) -> Iterator[int]:
        """The steps s, start < s < stop, at which values differ from those of step s - 1, ascending, one by one."""
        bounds = [*self.changes(stop), stop]
        for first, last in itertools.pairwise(bounds):
            periods = {rule.period for rule in self.rules(first).values() if isinstance(rule, Every)}
            if start < first:
                yield first
            near = max(first, start) + 1
            edges = [  # where it begins and where it is over, of each period
                range(near + (offset - near) % period, last, period)
                for period in periods
                for offset in (0, 1)
            ]
            for step, _ in itertools.groupby(heapq.merge(*edges)):
                yield step

    def segments(self, total: int) -> list[list[Segment]]:
        """For each of `changes(total)` the sets of values up to the next one, in order of first use."""
        bounds = [*self.changes(total), total]
        return [self._between(first, last) for first, last in itertools.pairwise(bounds)]

    def _between(self, first: int, last: int) -> list[Segment]:
        """The sets of values of steps first <= s < last, where all pieces are the same."""
        rules = self.rules(first)
        periods = sorted({rule.period for rule in rules.values() if isinstance(rule, Every)})
        groups = [
            group for size in range(len(periods) + 1) for group in itertools.combinations(periods, size)
        ]
        # Steps that the periods of a group divide, others allowed; then, largest groups first, only those of the group.
        counts = {group: multiples(math.lcm(*group), first, last) for group in groups}
        for group in reversed(groups):
            counts[group] -= sum(counts[other] for other in groups if set(other) > set(group))
        found = []
        for group in groups:
            if counts[group]:
                stride = math.lcm(*group)
                step = first + -first % stride
                while any(step % period == 0 for period in periods if period not in group):
                    step += stride
                found.append(Segment(self.at(step), step, counts[group]))
        return sorted(found, key=lambda segment: segment.first)

    def counts(self, total: int) -> list[Segment]:
        """Every set of values met in `total` steps, with the number of its steps, in order of first use."""
        found: list[Segment] = []
        for segment in itertools.chain.from_iterable(self.segments(total)):
            for place, other in enumerate(found):
                if _same(segment.values, other.values):
                    found[place] = other._replace(count=other.count + segment.count)
                    break
            else:
                found.append(segment)
        return found

    def distinct(self, total: int) -> list[dict[str, Number]]:
        """Every set of values met in `total` steps, in order of first use: one compiled step for each."""
        return [segment.values for segment in self.counts(total)]


def multiples(period: int, first: int, last: int) -> int:
    """How many multiples of `period` there are from `first` to below `last`."""
    return (last - 1) // period - (first - 1) // period


def _same(left: dict[str, Number], right: dict[str, Number]) -> bool:
    # 1 and 1.0 are equal in Python, but one is a count and the other a fraction.
    return all(left[name] == right[name] and type(left[name]) is type(right[name]) for name in left)


def values_key(values: Mapping[str, Number]) -> str:
    """A dictionary key for a set of values ("k=0.5, n=4"); a count 1 and a fraction 1.0 differ."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))


def stack_vars(config: Mapping[str, Any], total: int) -> StackVars:
    """Reads `config.stack_vars`: each value a number, or a schedule such as "0:1.0, 1000:0.5" or "0:1.0, 50%:0.5".

    In a schedule each `step:value` holds from that step on, `percentage:value` from that share of the run, rounded
    as in `steps_of`; the first step is 0 and steps ascend. A value that is an int is a count and a float a fraction,
    as in the stack itself.

    In the place of a value may stand "every 10: 1 else 0": 1 at the steps that 10 divides, of the run and not of the
    piece, 0 at the others. Or a ramp (`tokenlab.core.ramp.Ramp`): "linear(64, 256, until=70%, values=4)" goes from 64
    where the piece begins to 256 at 70 % of the run (left out: where the piece ends) in four values, evenly spaced, and
    "linear(128, 2048, until=200000, multiple=16)" in multiples of 16; "cosine(...)" likewise. A schedule of one of
    these alone needs no "0:" before it.

    Args:
        config: name -> number or schedule.
        total: steps of the run.

    Raises:
        ConfigError: a value that is neither, naming the entry.
    """
    return StackVars(tuple((name, texts.read(name, value, total)) for name, value in config.items()))


def in_shares(config: Mapping[str, Any], total: int) -> dict[str, Any]:
    """`config.stack_vars` with every change at a share of the run instead of a step, so that it scales with the run.

    What is a share already stays as it is, and so does a period, which is no length of the run; a change at a step that
    the run does not reach is left out.

    Raises:
        ConfigError: as `stack_vars`.
    """
    return {name: texts.in_shares(name, value, total) for name, value in config.items()}
