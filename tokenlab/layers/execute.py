"""Run a program: split the stacked weights, run blocks and items, fold equal ones into `lax.scan`.

Weights arrive stacked by kind, [n, ...]. Each step takes as many entries as it uses, in order; a loop takes them as
[times, ...] and hands one slice an iteration to its body. So the same state serves every way of running it. What is
shared is never cut: every block that uses it reads the one copy, and its gradient is the sum over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from tokenlab.core.errors import ConfigError, ShapeError, TokenLabError, suggest
from tokenlab.core.tokens import Tokens
from tokenlab.layers.attention import Reading
from tokenlab.layers.block import Depth
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.program import DEPTH, SHARED, BlockStep, ItemStep, Kind, Loop, Program, Step
from tokenlab.sharding.constrain import constrain, is_recording
from tokenlab.sharding.target import target_platform

Execution: TypeAlias = Literal["auto", "scan", "unroll"]
DropPathRates: TypeAlias = Literal["linear", "constant"]
Stacks: TypeAlias = Mapping[Kind, Any]

REMAT_POLICIES: Mapping[str, Callable[..., Any] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a rematerialised block keeps: "full" only its input, "dots" also the results of its weight products."""

UNROLL_ON_CPU = 16
"""`execution="auto"` unrolls programs of at most this many blocks on CPU, and scans everywhere else.

XLA:CPU runs a loop body without overlapping it with its neighbours and copies the sliced weights: unrolled was 20 %
faster a step at six blocks of width 64 (`experiments/cpu_step/run.py`), within 5 % of scanned for Ti/16 at 12 blocks;
`tokenlab benchmark` times both ways on your machine. Beyond, and on accelerators, compile time decides: 32 layers of
width 1,280 compiled for TPU in 65 s folded and 279 s unrolled.
"""


@dataclass(frozen=True)
class TracePoint:
    """The tokens after a reduction, recorded for pictures.

    Attributes:
      name: of the step, `keep_00`.
      item: kind of item, `keep`.
      inside: True when these are the tokens a wrapper's body sees, False when they are what goes on.
      tokens: as they were there.
    """

    name: str
    item: str
    inside: bool
    tokens: Tokens


def resolve_execution(execution: Execution, depth: int) -> Literal["scan", "unroll"]:
    """What "auto" means here: unrolled for up to 16 blocks on CPU, scanned otherwise. Raises ConfigError."""
    if execution == "auto":
        return "unroll" if target_platform() == "cpu" and depth <= UNROLL_ON_CPU else "scan"
    if execution not in ("scan", "unroll"):
        raise ConfigError(
            f"execution {execution!r} is unknown.{suggest(execution, ['auto', 'scan', 'unroll'])}"
        )
    return execution


def run(
    program: Program,
    state: Mapping[str, Mapping[str, Any]],
    tokens: Tokens,
    context: Context,
    *,
    drop_path: float = 0.0,
    drop_path_rates: DropPathRates = "linear",
    execution: Execution = "auto",
    remat: str = "none",
    trace: list[TracePoint] | None = None,
    loads: dict[str, Array] | None = None,
    entering: dict[int, Tokens | None] | None = None,
) -> tuple[Tokens, Aux]:
    """Run a program.

    Args:
      program: from `tokenlab.layers.build_program`.
      state: {"blocks": {kind: [n, ...]}, "items": {...}, "shared": {...}}, see `Program.init`.
      tokens: B sequences of `program.present` tokens.
      context: of this step.
      drop_path: rate of the last block.
      drop_path_rates: "linear" rises to it from 0 at the first block (Huang et al. 2016, arXiv 1603.09382, eq. 4),
        "constant" is the same for all.
      execution: "scan" folds equal steps into loops, "unroll" does not, "auto" see `resolve_execution`.
      remat: "none", "full" or "dots", see `REMAT_POLICIES`.
      trace: collects a `TracePoint` at every item; unrolls.
      loads: with `trace`, collects the load of the experts, [E], by the name of their block.
      entering: gets, for every number of a block among its keys, the tokens that come into it. Such a block stands
        outside all wrappers.

    Returns:
      tokens after the last step; losses and metrics.

    Raises:
      ShapeError: another number of tokens than the program was built for, or `entering` asks for what is no block
        outside all wrappers.
      ConfigError: an unknown `execution` or `remat`.
    """
    if tokens.count != program.present:
        raise ShapeError(f"stack: built for {program.present} tokens, got {tokens.count}.")
    if remat != "none" and remat not in REMAT_POLICIES:
        raise ConfigError(f"remat {remat!r} is unknown.{suggest(remat, ['none', *REMAT_POLICIES])}")
    folded = trace is None and resolve_execution(execution, program.depth) == "scan"
    entering = {} if entering is None else entering
    outside = {step.index for step in program.steps if isinstance(step, BlockStep)}
    if missing := sorted(set(entering) - outside):
        raise ShapeError(f"stack: block {missing[0]} is none of those outside wrappers, {sorted(outside)}.")
    steps = program.folded(entering) if folded else program.steps
    runner = _Runner(context, remat, trace, loads, state.get(SHARED, {}), entering, program)
    tokens, aux, _ = runner.steps(steps, stacks_of(program, state, drop_path, drop_path_rates), tokens)
    return tokens, aux


def read_last(
    program: Program,
    state: Mapping[str, Mapping[str, Any]],
    tokens: Tokens,
    context: Context,
    readings: Mapping[str, Reading],
) -> dict[str, Array]:
    """What the attention of the last block says, by name of the reading; arguments as `run`.

    Raises:
      ShapeError: the stack does not end with a block.
    """
    *before, last = program.steps
    if not isinstance(last, BlockStep):
        raise ShapeError(f"stack: ends with {last.name}; only a block at its end can be read.")
    steps = (*before, replace(last, reads=tuple(readings.items())))
    runner = _Runner(context, "none", None, None, state.get(SHARED, {}), {}, program)
    return runner.steps(steps, stacks_of(program, state), tokens)[2]


def stacks_of(
    program: Program,
    state: Mapping[str, Mapping[str, Any]],
    drop_path: float = 0.0,
    drop_path_rates: DropPathRates = "linear",
) -> dict[Kind, Any]:
    """Stacked weights by kind, with the numbers that steps need of themselves: block index and rate, item ordinals."""
    depth = program.depth
    rising = drop_path_rates == "linear" and depth > 1
    rates = jnp.linspace(0.0, drop_path, depth) if rising else jnp.full((depth,), drop_path)
    stacks: dict[Kind, Any] = {DEPTH: {"index": jnp.arange(depth), "rate": rates.astype(jnp.float32)}}
    for (group, name), occurrences in program.kinds.items():
        if group == SHARED:
            continue
        params = state.get(group, {}).get(name, {})
        stacks[group, name] = (
            params if group == "blocks" else {"params": params, "ordinal": jnp.arange(len(occurrences))}
        )
    return stacks


@dataclass(frozen=True)
class Inside:
    """The body of a wrapper, see `tokenlab.layers.item.Body`.

    Attributes:
      run: on `count` tokens.
      count: a Python int.
      room: in a step of generation, whether one more token can be remembered.
      refused: in generation, notes tokens without room.
    """

    run: Callable[..., tuple[Tokens, Aux]]
    count: int
    room: Callable[[], Array] | None = None
    refused: Callable[[Array], None] | None = None

    def __call__(self, tokens: Tokens, seen: Tokens | None = None) -> tuple[Tokens, Aux]:
        """See `tokenlab.layers.item.Body`."""
        return self.run(tokens) if seen is None else self.run(tokens, seen)

    def has_room(self) -> Array:
        """See `tokenlab.layers.item.Body`."""
        if self.room is None:
            raise TokenLabError("has_room() is known in a step of generation only.")
        return self.room()

    def turn_away(self, count: Array) -> None:
        """See `tokenlab.layers.item.Body`."""
        if self.refused is not None:
            self.refused(count)


class _Runner:
    """Holds what does not change from step to step."""

    def __init__(
        self,
        context: Context,
        remat: str,
        trace: list[TracePoint] | None,
        loads: dict[str, Array] | None,
        shared: Mapping[str, Any],
        entering: dict[int, Tokens | None],
        program: Program,
    ):
        self.context, self.remat, self.trace, self.loads = context, remat, trace, loads
        self.shared, self.entering, self.once = shared, entering, _once(program)

    def steps(
        self, steps: tuple[Step, ...], stacks: Stacks, tokens: Tokens, seen: Tokens | None = None
    ) -> tuple[Tokens, Aux, dict[str, Array]]:
        """Run steps one after the other; also returns what was read of the last block. A first block sees `seen`."""
        return self.each(steps, _split(stacks, [step.uses() for step in steps]), tokens, seen)

    def each(
        self, steps: tuple[Step, ...], shares: list[dict[Kind, Any]], tokens: Tokens, seen: Tokens | None
    ) -> tuple[Tokens, Aux, dict[str, Array]]:
        """The same, with the weights of each step."""
        aux, readings = Aux(), dict[str, Array]()
        for step, own in zip(steps, shares, strict=True):
            match step:
                case BlockStep() if step.left:  # its attention half has run before the item around it
                    (tokens, more), readings = self.feed(step, own, tokens), {}
                case BlockStep():
                    if step.index in self.entering:
                        self.entering[step.index] = tokens
                    tokens, more, readings = self.block(step, own, tokens, seen if step.seen else None)
                case ItemStep():
                    tokens, more = self.item(step, own, tokens, readings)
                case Loop():
                    (tokens, more), readings = self.loop(step, own, tokens), {}
            aux += more
        return tokens, aux, readings

    def block(
        self, step: BlockStep, stacks: Stacks, tokens: Tokens, seen: Tokens | None = None
    ) -> tuple[Tokens, Aux, dict[str, Array]]:
        """One block; under remat what lies inside is computed again in the backward pass."""
        if step.seen != (0 if seen is None else seen.count):
            given = "none" if seen is None else str(seen.count)
            raise ShapeError(f"{step.name}: built to see {step.seen} tokens outside its body, got {given}.")

        shared = {kind[1]: self.shared[kind[1]] for _, kind in step.kinds if kind[0] == SHARED}
        # Only a trace is remembered: without one, whoever looks at numbers is to see them.
        traced = isinstance(stacks[DEPTH]["index"], jax.core.Tracer)
        observed = is_recording() or (self.trace is not None and step.between is not None)
        once = traced and not observed
        compute = partial(self.once, _Alike(step)) if once else partial(self.compute, step)
        with jax.named_scope(step.name):
            tokens, aux, readings = self.again(compute)(dict(stacks), shared, tokens, self.context, seen)
        return tokens, self.loaded(step, aux), readings

    def compute(
        self,
        step: BlockStep,
        stacks: Stacks,
        shared: Mapping[str, Any],
        tokens: Tokens,
        context: Context,
        seen: Tokens | None,
    ) -> tuple[Tokens, Aux, dict[str, Array]]:
        """What a block computes of its weights and its tokens alone."""
        params, place = _weights(step, stacks, shared)
        wanted = dict(step.reads)
        if step.between:
            wanted |= step.between.item.readings() if step.between.active else {}
        tokens, readings = step.block.attend(params, tokens, context, place, wanted, seen)
        aux = Aux()
        if step.between:
            own = {kind: stacks[kind] for kind in step.between.uses()}
            tokens, aux = self.item(step.between, own, tokens, readings, context)
        tokens, more = step.block.feed(params, tokens, context, place)
        aux = (aux + more).replace(load=more.load)
        return tokens, aux, {name: readings[name] for name, _ in step.reads}

    def attend(self, step: BlockStep, stacks: Stacks, tokens: Tokens) -> tuple[Tokens, dict[str, Array]]:
        """The attention half of a block alone, and what is read of it."""

        def compute(
            stacks: Stacks, shared: Mapping[str, Any], tokens: Tokens, context: Context
        ) -> tuple[Tokens, dict[str, Array]]:
            params, place = _weights(step, stacks, shared)
            return step.block.attend(params, tokens, context, place, dict(step.reads))

        with jax.named_scope(step.name):
            return self.again(compute)(stacks, self.shared, tokens, self.context)

    def feed(self, step: BlockStep, stacks: Stacks, tokens: Tokens) -> tuple[Tokens, Aux]:
        """The feed-forward half of a block alone."""

        def compute(
            stacks: Stacks, shared: Mapping[str, Any], tokens: Tokens, context: Context
        ) -> tuple[Tokens, Aux]:
            params, place = _weights(step, stacks, shared)
            return step.block.feed(params, tokens, context, place)

        with jax.named_scope(step.name):
            tokens, aux = self.again(compute)(stacks, self.shared, tokens, self.context)
        return tokens, self.loaded(step, aux)

    def again(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """`compute`, under remat computed again in the backward pass."""
        if self.remat == "none":
            return compute
        return jax.checkpoint(compute, policy=REMAT_POLICIES[self.remat], prevent_cse=True)

    def loaded(self, step: BlockStep, aux: Aux) -> Aux:
        """Without the load of experts, which is of this block alone and is recorded for it."""
        if self.trace is not None and self.loads is not None and aux.load is not None:
            self.loads[step.name] = aux.load
        return aux.replace(load=None)

    def item(
        self,
        step: ItemStep,
        stacks: Stacks,
        tokens: Tokens,
        readings: Mapping[str, Array],
        context: Context | None = None,
    ) -> tuple[Tokens, Aux]:
        """One item; its body, if it wraps one, runs on the tokens it hands in."""
        context = context or self.context
        first, *inner = _split(stacks, [{step.kind: 1}, *(each.uses() for each in step.body)])
        own = _single(first[step.kind])

        def run(part: Tokens, seen: Tokens | None = None) -> tuple[Tokens, Aux]:
            if part.count != step.inside:
                raise ShapeError(
                    f"{step.name}: its body was built for {step.inside} tokens, got {part.count}."
                )
            if step.active:
                self.record(step, part, inside=True)
            done, aux, _ = self.each(step.body, inner, part, seen)
            return done, aux

        if not step.active:
            return run(tokens) if step.body else (tokens, Aux())
        with jax.named_scope(step.name):
            key = context.key("/".join(step.kind), own["ordinal"])
            wrapped = Inside(run, step.inside) if step.body else None
            if step.item.halves:
                tokens, readings = self.attend(step.body[0], inner[0], tokens)
            tokens, aux = step.item(own["params"], tokens, context, readings, key, wrapped)
        if tokens.count != step.after:
            raise ShapeError(f"{step.name}: said it gives {step.after} tokens and gave {tokens.count}.")
        tokens = tokens.replace(x=constrain(tokens.x, "batch", "sequence", None))
        self.record(step, tokens, inside=False)
        return tokens, aux

    def loop(self, step: Loop, stacks: Stacks, tokens: Tokens) -> tuple[Tokens, Aux]:
        """Equal steps as one `lax.scan` over their weights."""
        sliced = jax.tree.map(lambda leaf: leaf.reshape(step.times, -1, *leaf.shape[1:]), dict(stacks))

        def once(tokens: Tokens, own: Stacks) -> tuple[Tokens, Aux]:
            tokens, aux, _ = self.steps(step.body, own, tokens)
            return tokens, aux

        tokens, aux = lax.scan(once, tokens, sliced)
        return tokens, aux.summed()

    def record(self, step: ItemStep, tokens: Tokens, *, inside: bool) -> None:
        if self.trace is not None:
            self.trace.append(TracePoint(step.name, step.kind[1], inside, tokens))


class _Alike:
    """A step as a key: equal for blocks that differ in their weights alone (and whose items have the same names)."""

    def __init__(self, step: BlockStep):
        self.step = step
        self._said = (step.signature(), step.between.name if step.between else None)
        self._hash = hash((step.kinds, step.present, self._said[1]))  # items need not be hashable

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alike) and self._said == other._said

    def __hash__(self) -> int:
        return self._hash


def _once(program: Program) -> Callable[..., tuple[Tokens, Aux, dict[str, Array]]]:
    """`_Runner.compute`, traced once for all blocks of this very program that are alike, however often it is run.

    Python's part of compiling is a block's; jax remembers the trace and writes it into the program again. It is kept
    with the program, so that a model that is built anew is traced anew, as whoever edits a method expects.
    """

    def compute(
        alike: _Alike,
        stacks: Stacks,
        shared: Mapping[str, Any],
        tokens: Tokens,
        context: Context,
        seen: Tokens | None,
    ) -> tuple[Tokens, Aux, dict[str, Array]]:
        runner = _Runner(context, "none", None, None, shared, {}, program)
        return runner.compute(alike.step, stacks, shared, tokens, context, seen)

    return program.memory.setdefault("once", jax.jit(compute, static_argnums=0, inline=True))


def _weights(step: BlockStep, stacks: Stacks, shared: Mapping[str, Any]) -> tuple[dict[str, Any], Depth]:
    """A block's parameters by slot, and its place."""
    params = {
        slot: shared[kind[1]] if kind[0] == SHARED else _single(stacks[kind]) for slot, kind in step.kinds
    }
    return params, Depth(**_single(stacks[DEPTH]))


def _split(stacks: Stacks, uses: list[dict[Kind, int]]) -> list[dict[Kind, Any]]:
    """Hand every step its share of each stack.

    One `lax.split` a leaf: its transpose is one concatenation, where taking entry k by indexing would add up as many
    arrays of the full stack's size in the backward pass.
    """
    shares: list[dict[Kind, Any]] = [{} for _ in uses]
    for kind in {kind: None for use in uses for kind in use}:
        takers = [i for i, use in enumerate(uses) if use.get(kind)]
        sizes = [uses[i][kind] for i in takers]
        leaves, structure = jax.tree.flatten(stacks[kind])
        for leaf in leaves:
            if leaf.shape[0] != sum(sizes):
                group = "/".join(part for part in kind if part)
                raise ShapeError(
                    f"stack: needs {sum(sizes)} entries of {group}, the weights hold {leaf.shape[0]}."
                )
        pieces = [lax.split(leaf, sizes, axis=0) if len(sizes) > 1 else [leaf] for leaf in leaves]
        for place, i in enumerate(takers):
            shares[i][kind] = jax.tree.unflatten(structure, [piece[place] for piece in pieces])
    return shares


def _single(stack: Any) -> Any:
    """The one entry of a stack of one."""
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[1:]), stack)
