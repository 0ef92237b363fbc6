"""Learning-rate schedules by name, and piecewise-constant schedules of the numbers in a stack."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax

from tokenlab.core.errors import ConfigError, NameLookupError, suggest
from tokenlab.train.config import ScheduleConfig

_START = re.compile(r"(?P<step>\d+)|(?P<share>\d+(\.\d+)?)%")

SCHEDULES = ("constant", "linear", "cosine", "rsqrt", "wsd")


def steps_of(amount: int | float, total: int) -> int:
    """An int as it is, a float in [0, 1) as that fraction of `total` steps, rounded to nearest (ties up)."""
    return amount if isinstance(amount, int) else math.floor(amount * total + 0.5)


def build(config: ScheduleConfig, peak: float, total: int) -> optax.Schedule:
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
    warmup = steps_of(config.warmup_steps, total)
    if warmup >= total:
        raise ConfigError(
            f"{where}.warmup_steps is {warmup} of {total} steps: it must leave at least one step."
        )
    left = total - warmup
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
                f"{where}.decay_steps is {decay} steps: expected 1 to {left}, the steps after the warm-up."
            )
        body = _rsqrt(peak, timescale, left, decay)
    else:
        decay = steps_of(0.2 if config.decay_steps is None else config.decay_steps, total)
        if not 1 <= decay <= left:
            raise ConfigError(
                f"{where}.decay_steps is {decay} steps: expected 1 to {left}, the steps after the warm-up."
            )
        falling = optax.linear_schedule(peak, peak * config.final, decay)
        body = optax.join_schedules([optax.constant_schedule(peak), falling], [left - decay])
    if warmup == 0:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup])


def _rsqrt(peak: float, timescale: int, left: int, decay: int) -> optax.Schedule:
    def schedule(step: Any) -> Any:
        # join_schedules evaluates the body before its start too, where the root's argument would be negative.
        rate = peak / jnp.sqrt(1.0 + jnp.maximum(step, 0) / timescale)
        return rate * jnp.clip((left - step) / decay, 0.0, 1.0) if decay else rate

    return schedule


def describe(config: ScheduleConfig, peak: float, total: int) -> str:
    """One line for people: "cosine from 0.001 to 0 over 1000 steps, the first 50 of them warm-up"."""
    warmup = steps_of(config.warmup_steps, total)
    text = f"{config.name} from {peak:g}"
    if config.name in ("linear", "cosine", "wsd"):
        text += f" to {peak * config.final:g}"
    text += f" over {total} steps"
    if config.name == "wsd":
        text += f", falling in the last {steps_of(0.2 if config.decay_steps is None else config.decay_steps, total)}"
    if config.name == "rsqrt":
        scale = config.warmup_steps if config.timescale is None else config.timescale
        text += f", timescale {steps_of(scale, total)}"
        if config.decay_steps:
            text += f", falling to 0 in the last {steps_of(config.decay_steps, total)}"
    return text + (f", the first {warmup} of them warm-up" if warmup else "")


@dataclass(frozen=True)
class StackVars:
    """The numbers that names in a stack stand for, as a pure function of the step.

    Attributes:
        pieces: for each name its ((first step, value), ...), the first steps ascending from 0.
    """

    pieces: tuple[tuple[str, tuple[tuple[int, int | float], ...]], ...]

    def at(self, step: int) -> dict[str, int | float]:
        """The values that train step `step` (steps already done, >= 0) is built with."""
        return {name: [value for start, value in pieces if start <= step][-1] for name, pieces in self.pieces}

    def changes(self, total: int) -> list[int]:
        """The steps below `total` at which some value changes, with 0, ascending."""
        starts = {0} | {start for _, pieces in self.pieces for start, _ in pieces}
        return sorted(start for start in starts if start < total)

    def distinct(self, total: int) -> list[dict[str, int | float]]:
        """Every set of values met in `total` steps, in order of first use: one compiled step for each."""
        found: list[dict[str, int | float]] = []
        for step in self.changes(total):
            values = self.at(step)
            if not any(_same(values, other) for other in found):
                found.append(values)
        return found


def _same(left: dict[str, int | float], right: dict[str, int | float]) -> bool:
    # 1 and 1.0 are equal in Python, but one is a count and the other a fraction.
    return all(left[name] == right[name] and type(left[name]) is type(right[name]) for name in left)


def values_key(values: Mapping[str, int | float]) -> str:
    """A dictionary key for a set of values ("k=0.5, n=4"); a count 1 and a fraction 1.0 differ."""
    return ", ".join(f"{name}={value!r}" for name, value in sorted(values.items()))


def stack_vars(config: Mapping[str, Any], total: int) -> StackVars:
    """Reads `config.stack_vars`: each value a number, or a schedule such as "0:1.0, 1000:0.5" or "0:1.0, 50%:0.5".

    In a schedule each `step:value` holds from that step on, `percentage:value` from that share of the run, rounded
    as in `steps_of`; the first step is 0 and steps ascend. A value that is an int is a count and a float a fraction,
    as in the stack itself.

    Args:
        config: name -> number or schedule.
        total: steps of the run.

    Raises:
        ConfigError: a value that is neither, naming the entry.
    """
    return StackVars(tuple((name, _pieces(name, value, total)) for name, value in config.items()))


def _pieces(name: str, value: Any, total: int) -> tuple[tuple[int, int | float], ...]:
    where = f"config.stack_vars.{name} is {value!r}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ((0, value),)
    if not isinstance(value, str):
        raise ConfigError(f'{where}: expected a number or a schedule such as "0:1.0, 1000:0.5".')
    pieces: list[tuple[int, int | float]] = []
    for part in value.split(","):
        start, colon, number = part.partition(":")
        found = _START.fullmatch(start.strip())
        if not colon or not found or (found["share"] and float(found["share"]) > 100):
            expected = '"step:value" or "percentage:value", as in "0:1.0, 50%:0.5"'
            raise ConfigError(f"{where}: {part.strip()!r} is not {expected}.")
        first = steps_of(float(found["share"]) / 100, total) if found["share"] else int(found["step"])
        if found["share"] and pieces and pieces[-1][0] == first:
            pieces.pop()  # the run is so short that the piece before has no step of its own
        pieces.append((first, _literal(number.strip(), where)))
    starts = [start for start, _ in pieces]
    if starts[0] != 0 or any(later <= earlier for earlier, later in zip(starts, starts[1:], strict=False)):
        raise ConfigError(f"{where}: its steps must begin at 0 and ascend, got {starts}.")
    return tuple(pieces)


def in_shares(config: Mapping[str, Any], total: int) -> dict[str, Any]:
    """`config.stack_vars` with every change at a share of the run instead of a step, so that it scales with the run.

    What is a share already stays as it is; a change at a step that the run does not reach is left out.

    Raises:
        ConfigError: as `stack_vars`.
    """
    found = {}
    for name, value in config.items():
        _pieces(name, value, total)  # checks it
        found[name] = _in_shares(value, total) if isinstance(value, str) else value
    return found


def _in_shares(pieces: str, total: int) -> str:
    found = []
    for piece in pieces.split(","):
        start, _, number = (part.strip() for part in piece.partition(":"))
        if start.endswith("%") or int(start) == 0:
            found.append(f"{start}:{number}")
        elif int(start) < total:
            found.append(f"{100 * int(start) / total:.9f}%:{number}")
    return ", ".join(found)


def _literal(text: str, where: str) -> int | float:
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    raise ConfigError(f"{where}: {text!r} is not a finite number.")
