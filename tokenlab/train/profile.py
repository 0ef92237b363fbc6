"""Profiles: a trace of a few steps, which Perfetto and XProf open, and its most expensive operations as text.

    FOLDER/plugins/profile/<time>/perfetto_trace.json.gz   for https://ui.perfetto.dev
    FOLDER/plugins/profile/<time>/*.xplane.pb              for XProf (TensorBoard's profile page)
    FOLDER/summary.txt                                     the ten operations that took longest

A trace names instructions of the compiled program; the program says which named scope each came from. Blocks are added
up: block_00 to block_11 are one line, block_*.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tokenlab.core.errors import ConfigError
from tokenlab.train.records import write_atomic

SUMMARY = "summary.txt"
WARMUP = 2
"""Steps of a run before those that are traced."""
STEPS = 3
"""Steps that are traced."""
TOP = 10

# `%name = shape opcode(...), ..., metadata={op_name="..."}`; the shape may be a tuple.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (?:\([^=]*\)|\S+) ([\w\-]+)\(", re.MULTILINE)
_MODULE = re.compile(r"^HloModule ([\w.\-]+)", re.MULTILINE)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Their time is that of the instructions inside them, which are in the trace too.
_CONTAINERS = frozenset({"while", "conditional", "call"})
# What JAX adds to the path of scopes around control flow and calls.
_NO_SCOPE = re.compile(r"while|body|cond|closed_call|checkpoint|rematted_computation|branch_\d+_fun|.*->.*")
_OPS_LANE = "XLA Ops"


class Instruction(NamedTuple):
    """One instruction of a compiled program: its kind and where in the source it comes from ("" if unknown)."""

    opcode: str
    op_name: str


class Line(NamedTuple):
    """A line of the summary: what was done, in milliseconds and instructions a step."""

    operation: str
    milliseconds: float
    count: float


def record(folder: Path, compiled: jax.stages.Compiled, run: Callable[[int], None]) -> None:
    """Traces `STEPS` steps of a program that is warm, and writes the summary.

    Args:
      folder: for the trace; made when missing.
      compiled: the program.
      run: does so many steps and waits for them.
    """
    with trace(folder):
        run(STEPS)
    summarize(folder, compiled, STEPS)


@contextmanager
def trace(folder: Path) -> Iterator[None]:
    """Traces what the devices do in the block. Calls of Python functions are left out: they hide the rest."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
        yield


def summarize(folder: Path, compiled: jax.stages.Compiled, steps: int) -> None:
    """Writes `SUMMARY` of the newest trace in a folder."""
    newest = max(folder.glob("plugins/profile/*"), key=lambda path: path.stat().st_mtime)
    events: list[Mapping[str, Any]] = []
    for file in newest.glob("*.trace.json.gz"):
        with gzip.open(file) as opened:
            events += json.load(opened)["traceEvents"]
    hlo = compiled.as_text()
    lines = aggregate(events, instructions(hlo), steps, _MODULE.search(hlo)[1])
    write_atomic(folder / SUMMARY, render(lines, steps))


def instructions(hlo: str) -> dict[str, Instruction]:
    """Name -> instruction, over all computations of a program's text."""
    found = {}
    for line in hlo.splitlines():
        if parsed := _INSTRUCTION.match(line):
            source = _OP_NAME.search(line)
            found[parsed[1]] = Instruction(parsed[2], source[1] if source else "")
    return found


def scope(op_name: str) -> str:
    """The named scopes and the primitive of an operation, after what it is a part of.

    "jit(step)/transpose(jvp(block_03))/mlp/dot_general" is "backward block_*/mlp/dot_general". Forward, backward and
    recompute are parts of a gradient; what is outside one (the optimizer, inference) has no such word before it.
    """
    first = op_name.partition(";")[0]
    if "rematted_computation" in first:
        part = "recompute "
    elif "transpose(" in first:
        part = "backward "
    else:
        part = "forward " if "jvp(" in first else ""
    plain = re.sub(r"\bp?jit\([^()]*\)", "", first)
    plain = re.sub(r"[\w.]+\(", "", plain).replace(")", "")
    names: list[str] = []
    for name in plain.split("/"):
        name = re.sub(r"_\d\d+$", "_*", name)
        if name and not _NO_SCOPE.fullmatch(name) and names[-1:] != [name]:
            names.append(name)
    return part + "/".join(names)


def aggregate(
    events: Iterable[Mapping[str, Any]],
    program: Mapping[str, Instruction],
    steps: int,
    module: str | None = None,
) -> list[Line]:
    """Adds up the time of the instructions by scope, longest first.

    Args:
      events: of a trace in Chrome's format, times in microseconds.
      program: see `instructions`.
      steps: that were traced.
      module: name of the program. Events that say they are of another, such as an evaluation between the steps, are
        left out: instructions of two programs may have one name.

    Returns:
      A line an operation. An instruction that says nothing of its source is under its kind, such as "(copy)".
    """
    events = list(events)
    # A device may show an instruction in several lanes (its stream, and a lane made of it); one of them counts.
    made = {
        (event["pid"], event.get("tid"))
        for event in events
        if event.get("name") == "thread_name" and event.get("args", {}).get("name") == _OPS_LANE
    }
    devices = {pid for pid, _ in made}
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        arguments = event.get("args", {})
        name = arguments.get("hlo_op", event.get("name"))
        if module is not None and arguments.get("hlo_module", module) != module:
            continue
        if event.get("ph") != "X" or name not in program or program[name].opcode in _CONTAINERS:
            continue
        if event["pid"] in devices and (event["pid"], event["tid"]) not in made:
            continue
        instruction = program[name]
        key = scope(instruction.op_name) or f"({instruction.opcode})"
        times[key] += event["dur"]
        counts[key] += 1
    return [Line(key, time / 1e3 / steps, counts[key] / steps) for key, time in times.most_common()]


def render(lines: list[Line], steps: int) -> str:
    """The summary as text."""
    if not lines:
        return "No instruction of the compiled program is in the trace.\n"
    total = sum(line.milliseconds for line in lines)
    text = [
        f"The {min(TOP, len(lines))} operations that took longest, of {len(lines)}; means of {steps} steps.",
        f"All operations together: {total:.2f} ms a step (those that ran side by side are added up).",
        "",
        f"{'ms/step':>9}  {'share':>6}  {'each step':>9}  operation",
    ]
    for line in lines[:TOP]:
        share = line.milliseconds / total
        text.append(f"{line.milliseconds:9.2f}  {share:6.1%}  {line.count:9.4g}  {line.operation}")
    return "\n".join(text) + "\n"


def window(start: int, stop: int, changes: Iterable[int]) -> range:
    """The first steps of a run to trace: `STEPS` of one program, after `WARMUP` of it.

    Args:
      start, stop: steps done already, and of the whole run.
      changes: steps at which another program takes over, ascending; no more of them are asked for than it takes.

    Raises:
      ConfigError: there are not enough.
    """
    inside = (change for change in changes if start < change < stop)
    for first, end in itertools.pairwise(itertools.chain([start], inside, [stop])):
        if end - first >= WARMUP + STEPS:
            return range(first + WARMUP, first + WARMUP + STEPS)
    raise ConfigError(
        f"--profile traces {STEPS} steps after {WARMUP} of the same program, and the run has {stop - start} steps "
        "left; give it more steps, or leave --profile away."
    )


class Profiler:
    """Traces some steps of a training run; a context manager, as a trace that was begun must be ended.

    Args:
      folder: for the trace, or None to do nothing.
      pause: a context manager around what is no training (`Stopwatch.paused`).
    """

    def __init__(self, folder: Path | None, pause: Callable[[], Any]) -> None:
        self.folder = folder
        self._pause = pause
        self._steps = range(0)
        self._open = ExitStack()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def plan(self, start: int, stop: int, changes: Iterable[int]) -> None:
        """Chooses the steps; see `window`."""
        if self.folder is not None:
            self._steps = window(start, stop, changes)

    def before(self, step: int, pending: Iterable[jax.Array]) -> None:
        """Begins the trace where `step` steps are done and this is the time; waits for what is `pending`."""
        if self._steps and step == self._steps.start:
            with self._pause():
                jax.block_until_ready(list(pending))
                self._open.enter_context(trace(self.folder))

    def after(self, step: int, compiled: Any, pending: Iterable[jax.Array]) -> str | None:
        """Ends the trace where `step` steps are done and this is the time; returns a note for people."""
        if not self._steps or step != self._steps.stop:
            return None
        jax.block_until_ready(list(pending))
        with self._pause():
            self._open.close()
            summarize(self.folder, compiled, STEPS)
        return f"profile of steps {self._steps.start + 1} to {step}: {self.folder / SUMMARY}"
