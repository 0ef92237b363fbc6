"""What a compiled program sends between devices each time it runs: loops as often as they run, by ring algorithms."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenlab.core.errors import ShardingError
from tokenlab.sharding.check import Collective, collectives

_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|async_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_ELEMENT = re.compile(r"%([\w.\-]+) = \S+ get-tuple-element\(.*index=(\d+)")
_ADD = re.compile(r"%([\w.\-]+) = [su]32\[\]\S* add\(")
_CHANNEL = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.\-]+) = .*\bchannel_id=(\d+)")
_BEGINS = 'custom_call_target="AsyncCollectiveStart"'
_SCATTERS = "all-reduce-scatter"  # begins the name of such a fusion
_COMPARE = re.compile(r"ROOT .* compare\(([^)]*)\), direction=LT")


@dataclass(frozen=True)
class Traffic:
    """One kind of collective of a program, all its occurrences together.

    Attributes:
      kind: "all-gather", "all-reduce", ...
      count: how often one runs each time the program does, loops included.
      bytes: that each device sends for them.
      largest: bytes of the largest result of one, on a device.
    """

    kind: str
    count: int
    bytes: int
    largest: int


def executed(compiled: Any) -> list[tuple[Collective, int]]:
    """Each collective of a program, and how often it runs each time the program does.

    The compiler for TPUs may spread one over several fusions, which begin it, go on with it beside their own work, and
    end it; each holds the instruction, under one channel. Those that begin it are counted. A fusion that sums and keeps
    a part is a reduce-scatter.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` gives, or HLO text.

    Raises:
      ShardingError: a loop that holds collectives runs as often as its data says, which cannot be counted.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    bodies = dict(_computations(text))
    times = _times(bodies)
    begun = {name for name, lines in bodies.items() if any(_BEGINS in line for line in lines)}
    apart = {channel for name in begun for channel in _channels(bodies[name]).values()}
    found = []
    for name, lines in bodies.items():
        channels = _channels(lines)
        for collective in collectives("\n".join(lines)):
            if name not in begun and channels.get(collective.name) in apart:
                continue  # goes on with what another fusion has begun
            if name.startswith(_SCATTERS) and collective.kind == "all-reduce":
                collective = _scattered(collective)
            if (
                name in times
            ):  # else nothing calls it: an operand's type could not be told from its own computation
                if times[name] is None:
                    raise ShardingError(
                        f"{collective} runs in a loop whose trips the compiled program does not fix."
                    )
                found.append((collective, times[name] or 0))
    return found


def sent(collective: Collective, devices: int) -> int:
    """Bytes that a device sends for one run of a collective on a ring of the g devices that take part together.

    An all-gather passes on all parts but one, (g - 1) / g of the result; a reduce-scatter as much of its operand; an
    all-reduce is one of each; an all-to-all keeps its own part; a permute sends its operand as it is. What a
    ragged all-to-all sends is known when it runs: here as much as there can be, spread evenly.

    Args:
      collective: of a compiled program.
      devices: in all, where it names no groups.
    """
    pairs = collective.kind in ("collective-permute", "collective-broadcast")
    group = devices if collective.groups is None else max(map(len, collective.groups))
    if pairs:
        return collective.bytes
    if group < 2:
        return 0
    whole = collective.bytes
    if collective.kind == "ragged-all-to-all" and collective.operand_shapes:
        # Rows there are in a buffer with room for more: no more than the smaller of what is sent from and to.
        rows, room = math.prod(collective.operand_shapes[0]), math.prod(collective.shapes[0])
        whole = whole * min(rows, room) // room
    if collective.kind == "reduce-scatter":
        whole *= group  # the operand: each device is left a part of it
    share = whole * (group - 1) // group
    return 2 * share if collective.kind == "all-reduce" else share


def traffic(compiled: Any, devices: int) -> list[Traffic]:
    """By kind, what a program's collectives send each time it runs, the most first; see `executed` and `sent`."""
    return summed(executed(compiled), devices)


def summed(found: Iterable[tuple[Collective, int]], devices: int) -> list[Traffic]:
    """By kind, what collectives send that run so often, the most first.

    Args:
      found: some of what `executed` gives.
      devices: of the program.
    """
    counts: Counter[str] = Counter()
    total: Counter[str] = Counter()
    largest: Counter[str] = Counter()
    for collective, times in found:
        counts[collective.kind] += times
        total[collective.kind] += times * sent(collective, devices)
        largest[collective.kind] = max(largest[collective.kind], collective.bytes)
    return [Traffic(kind, counts[kind], total[kind], largest[kind]) for kind, _ in total.most_common()]


def _scattered(summed: Collective) -> Collective:
    """A reduce-scatter that is written as an all-reduce and the part of it that this device keeps."""
    group = 1 if summed.groups is None else max(map(len, summed.groups))
    return dataclasses.replace(summed, kind="reduce-scatter", bytes=summed.bytes // group)


def _channels(lines: Iterable[str]) -> dict[str, str]:
    """Instruction -> its channel, of those that have one."""
    return {found[1]: found[2] for line in lines if (found := _CHANNEL.search(line))}


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each computation; that of the entry is called "ENTRY"."""
    name, lines = "", []
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            entry = line.startswith("ENTRY")
            name = "ENTRY" if entry else line.split("(")[0].split("{")[0].strip().lstrip("%").strip()
            lines = []
        elif line.startswith("}"):
            if name:
                yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _times(bodies: Mapping[str, list[str]]) -> dict[str, int | None]:
    """How often each computation runs; None where a loop without a known number of trips calls it."""
    calls: dict[str, list[tuple[str, int | None]]] = {}
    for name, lines in bodies.items():
        calls[name] = []
        for line in lines:
            called = _CALLED.findall(line)
            for listed in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in listed.split(",")]
            often = _trips(line, bodies) if re.search(r"\bwhile\(", line) else 1
            calls[name] += [(each, often) for each in called if each in bodies]
    times: dict[str, int | None] = {"ENTRY": 1}

    def walk(name: str, often: int | None) -> None:
        for called, trips in calls[name]:
            more = None if often is None or trips is None else often * trips
            before = times.get(called, 0)
            times[called] = None if more is None or before is None else before + more
            walk(called, more)

    walk("ENTRY", 1)
    return times


def _trips(loop: str, bodies: Mapping[str, list[str]]) -> int | None:
    """How often a `while` runs: as it says itself, or until its counter reaches the constant it is compared with.

    Loops count from 0: those of `lax.scan` by 1, and those in which the compiler for TPUs sends parts of an operand
    around a ring while it multiplies by 2, since it unrolls them once.
    """
    if said := _TRIPS.search(loop):
        return int(said[1])
    condition = _CONDITION.search(loop)
    lines = bodies.get(condition[1], []) if condition else []
    constants = _constants(lines)
    for line in lines:
        if compared := _COMPARE.search(line):
            counter, bound = (each.split()[-1].lstrip("%") for each in compared[1].split(","))
            if bound not in constants:
                return None
            return -(-constants[bound] // _stride(loop, _index(counter, lines), bodies))
    return None


def _constants(lines: Iterable[str]) -> dict[str, int]:
    return {found[1]: int(found[2]) for line in lines if (found := _CONSTANT.search(line))}


def _index(name: str, lines: Iterable[str]) -> int | None:
    """Which element of a loop's state an instruction is."""
    for line in lines:
        if (found := _ELEMENT.search(line)) and found[1] == name:
            return int(found[2])
    return None


def _stride(loop: str, counter: int | None, bodies: Mapping[str, list[str]]) -> int:
    """What a loop's body adds to its counter; 1 where it does not say it as a constant."""
    body = _BODY.search(loop)
    lines = bodies.get(body[1], []) if body else []
    after = next((_operands(line) for line in lines if " ROOT " in f" {line}" and " tuple(" in line), [])
    if counter is None or counter >= len(after):
        return 1
    constants = _constants(lines)
    for line in lines:
        if (found := _ADD.search(line)) and found[1] == after[counter]:
            steps = [constants[name] for name in _operands(line) if name in constants]
            return steps[0] if len(steps) == 1 and steps[0] > 0 else 1
    return 1


def _operands(line: str) -> list[str]:
    """Names of what an instruction takes."""
    inside = re.search(r"\b(?:tuple|add)\((.*?)\)(?:, \w+=|$)", re.sub(r"/\*.*?\*/", "", line))
    return re.findall(r"%([\w.\-]+)", inside[1]) if inside else []
