"""The text of a schedule in `config.stack_vars`, read into pieces: what holds from which step on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from tokenlab.core.errors import ConfigError

Number = int | float

_START = re.compile(r"(?P<step>\d+)|(?P<share>\d+(\.\d+)?)%")
_EVERY = re.compile(r"every\b(?P<rest>.*)", re.DOTALL)
_PERIOD = re.compile(r"\s*(?P<period>\d+)\s*:(?P<value>.*?)\belse\b(?P<other>.*)", re.DOTALL)


@dataclass(frozen=True)
class Every:
    """`every 10: 1 else 0`: one value at every step whose number the period divides, step 0 included, else another.

    Attributes:
        period: steps, >= 2.
        value: at steps 0, period, 2 period, ... of the run, wherever the piece begins.
        other: at all steps between.
    """

    period: int
    value: Number
    other: Number

    def at(self, step: int) -> Number:
        """The value of train step `step` (steps already done)."""
        return self.other if step % self.period else self.value


Piece = tuple[int, Number | Every]
"""First step, and what holds from there to the next piece."""


def steps_of(amount: int | float, total: int) -> int:
    """An int as it is, a float in [0, 1) as that fraction of `total` steps, rounded to nearest (ties up)."""
    return amount if isinstance(amount, int) else math.floor(amount * total + 0.5)


def read(name: str, value: Any, total: int) -> tuple[Piece, ...]:
    """The pieces of one entry of `config.stack_vars`, in a run of `total` steps; first steps ascend from 0.

    Raises:
        ConfigError: what is wrong, naming the entry and the part.
    """
    where = f"config.stack_vars.{name} is {value!r}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return ((0, value),)
    if not isinstance(value, str):
        raise ConfigError(f'{where}: expected a number or a schedule such as "0:1.0, 1000:0.5".')
    pieces: list[Piece] = []
    for start, body in split(value, where):
        first, is_share = _first_step(start, total)
        if is_share and pieces and pieces[-1][0] == first:
            pieces.pop()  # the run is so short that the piece before has no step of its own
        pieces.append((first, _rule(body, where)))
    starts = [start for start, _ in pieces]
    if starts[0] != 0 or any(later <= earlier for earlier, later in zip(starts, starts[1:], strict=False)):
        raise ConfigError(f"{where}: its steps must begin at 0 and ascend, got {starts}.")
    return tuple(pieces)


def in_shares(name: str, value: Any, total: int) -> Any:
    """One entry with every change at a share of the run instead of a step; see `tokenlab.train.schedule.in_shares`.

    Raises:
        ConfigError: as `read`.
    """
    read(name, value, total)  # checks it
    if not isinstance(value, str):
        return value
    found = []
    for start, body in split(value, name):
        if start.endswith("%") or int(start) == 0:
            found.append(f"{start}:{body}")
        elif int(start) < total:
            found.append(f"{100 * int(start) / total:.9f}%:{body}")
    return ", ".join(found)


def split(text: str, where: str) -> list[tuple[str, str]]:
    """The parts of a schedule as (start, rule), both text; a rule without a start begins at 0."""
    found = []
    for part in text.split(","):
        part = part.strip()
        if _EVERY.fullmatch(part):
            found.append(("0", part))
            continue
        start, colon, body = (side.strip() for side in part.partition(":"))
        matched = _START.fullmatch(start)
        if not colon or not matched or (matched["share"] and float(matched["share"]) > 100):
            expected = '"step:value" or "percentage:value", as in "0:1.0, 50%:0.5", or "every 10: 1 else 0"'
            raise ConfigError(f"{where}: {part!r} is not {expected}.")
        found.append((start, body))
    return found


def _first_step(start: str, total: int) -> tuple[int, bool]:
    if start.endswith("%"):
        return steps_of(float(start[:-1]) / 100, total), True
    return int(start), False


def _rule(text: str, where: str) -> Number | Every:
    every = _EVERY.fullmatch(text)
    if not every:
        return _literal(text, where)
    found = _PERIOD.fullmatch(every["rest"])
    if not found:
        raise ConfigError(
            f'{where}: {text!r} is not "every STEPS: VALUE else VALUE", as in "every 10: 1 else 0".'
        )
    if int(found["period"]) < 2:
        raise ConfigError(f"{where}: {text!r} has a period of {found['period']}: expected at least 2 steps.")
    return Every(
        int(found["period"]),
        _literal(found["value"].strip(), where),
        _literal(found["other"].strip(), where),
    )


def _literal(text: str, where: str) -> Number:
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if math.isfinite(number):
            return number
    raise ConfigError(f"{where}: {text!r} is not a finite number.")
