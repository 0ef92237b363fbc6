"""The text of a schedule in `config.stack_vars`, read into pieces: what holds from which step on."""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

from tokenlab.core.errors import ConfigError, suggest
from tokenlab.core.ramp import SHAPES, Number, Ramp

_START = re.compile(r"(?P<step>\d+)|(?P<share>\d+(\.\d+)?)%")
_SHARE = re.compile(r"\d+(\.\d+)?%")
_RAMP = re.compile(r"(?P<shape>[a-z_]+)\s*\((?P<arguments>.*)\)", re.DOTALL)
_UNTIL = re.compile(r"\buntil\s*=\s*(?P<amount>[\d.]+%?)")
_COMMAS = re.compile(r",(?![^(]*\))")  # those outside parentheses
_EVERY = re.compile(r"every\b.*", re.DOTALL)
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


@functools.lru_cache(maxsize=4096)
def _read_text(name: str, value: str, total: int) -> tuple[Piece, ...]:
    where = f"config.stack_vars.{name} is {value!r}"
    given = [(*_first_step(start, total), body) for start, body in split(value, where)]
    kept: list[tuple[int, str]] = []
    for first, is_share, body in given:
        if is_share and kept and kept[-1][0] == first:
            kept.pop()  # the run is so short that the piece before has no step of its own
        kept.append((first, body))
    starts = [start for start, _ in kept]
    if starts[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        raise ConfigError(f"{where}: its steps must begin at 0 and ascend, got {starts}.")
    ends = [*starts[1:], max(total, starts[-1] + 1)]
    pieces = [_rule(body, first, end, total, where) for (first, body), end in zip(kept, ends, strict=True)]
    return tuple(itertools.chain.from_iterable(pieces))


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
    return _read_text(name, value, total)


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
        until = _UNTIL.search(body)
        if until and not until["amount"].endswith("%"):
            share = f"{100 * int(until['amount']) / total:.9f}%"
            body = body[: until.start("amount")] + share + body[until.end("amount") :]
        if start.endswith("%") or int(start) == 0:
            found.append(f"{start}:{body}")
        elif int(start) < total:
            found.append(f"{100 * int(start) / total:.9f}%:{body}")
    return ", ".join(found)


def split(text: str, where: str) -> list[tuple[str, str]]:
    """The parts of a schedule as (start, rule), both text; a rule without a start begins at 0."""
    found = []
    for part in _COMMAS.split(text):
        part = part.strip()
        if _EVERY.fullmatch(part) or _RAMP.fullmatch(part):
            found.append(("0", part))
            continue
        start, colon, body = (side.strip() for side in part.partition(":"))
        matched = _START.fullmatch(start)
        if not colon or not matched or (matched["share"] and float(matched["share"]) > 100):
            expected = (
                '"step:value" or "percentage:value", as in "0:1.0, 50%:0.5", "linear(64, 256, until=70%, values=4)" or '
                '"every 10: 1 else 0"'
            )
            raise ConfigError(f"{where}: {part!r} is not {expected}.")
        found.append((start, body))
    return found


def _first_step(start: str, total: int) -> tuple[int, bool]:
    if start.endswith("%"):
        return steps_of(float(start[:-1]) / 100, total), True
    return int(start), False


def _rule(text: str, first: int, end: int, total: int, where: str) -> list[Piece]:
    """The pieces of one rule that holds from step `first` to below `end`."""
    if _EVERY.fullmatch(text):
        return [(first, _every(text, where))]
    ramp = _RAMP.fullmatch(text)
    if not ramp:
        return [(first, _literal(text, where))]
    try:
        return list(_ramp(ramp["shape"], ramp["arguments"], first, end, total).pieces(end))
    except ConfigError as error:
        raise ConfigError(f"{where}: {text!r}: {error}") from None


def _ramp(shape: str, arguments: str, first: int, end: int, total: int) -> Ramp:
    if shape not in SHAPES:
        raise ConfigError(f"{shape!r} is no shape.{suggest(shape, SHAPES)}")
    parts = [part.strip() for part in arguments.split(",")]
    numbers = [part for part in parts if "=" not in part]
    if len(numbers) != 2 or parts[:2] != numbers:
        raise ConfigError(f"expected two numbers first, as in {shape}(64, 256, until=70%, values=4).")
    options: dict[str, int] = {}
    for part in parts[2:]:
        name, _, value = (side.strip() for side in part.partition("="))
        if name not in ("until", "multiple", "values") or name in options:
            what = "is given twice" if name in options else "is no argument"
            raise ConfigError(f"{name!r} {what}; it takes until, multiple and values.")
        if name == "until" and _SHARE.fullmatch(value):
            options[name] = max(steps_of(float(value[:-1]) / 100, total), first + 1)
        elif value.isdecimal():
            options[name] = int(value)
        else:
            expected = "a step or a percentage of the run" if name == "until" else "a whole number"
            raise ConfigError(f"{name} is {value!r}: expected {expected}.")
    low, high = (_literal(number, "") for number in numbers)
    if isinstance(low, float) and "values" not in options:
        raise ConfigError(
            "between fractions expected values=4, or another number: each is a program to compile."
        )
    until = options.pop("until", end)
    return Ramp(low, high, first, until, shape, **options)


def _every(text: str, where: str) -> Every:
    found = _PERIOD.fullmatch(text.removeprefix("every"))
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
    raise ConfigError(
        f"{where}: {text!r} is not a finite number." if where else f"{text!r} is not a finite number."
    )
