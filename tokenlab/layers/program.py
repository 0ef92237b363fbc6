"""Programs: which block and item of a stack runs when, on how many tokens, with which weights.

`tokenlab.layers.build_program` makes them of a parsed stack, before anything is traced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.stack import Stack
from tokenlab.layers.attention import Reading
from tokenlab.layers.block import Block
from tokenlab.layers.context import name_seed
from tokenlab.layers.item import Item

MAX_PERIOD = 16  # the longest repeating pattern of steps that is looked for when folding into loops

Kind: TypeAlias = tuple[str, str]
"""Where in the state a stack of weights is: ("blocks", "attention"), ("items", "keep"). What learns nothing is in
("free", name), which has no weights and so no part in the numbering of those that have. What is in ("shared", name) is
not stacked: one copy serves every block that uses it."""

SHARED = "shared"


@dataclass(frozen=True)
class BlockStep:
    """Run one block.

    Attributes:
      index: k, its number in the expression.
      block: its modules.
      kinds: slot -> where its weights are.
      present: tokens that come in.
      reads: what the next item wants of its attention.
      between: an item between its halves.
      rows: tokens of a whole sequence that it must have room to remember in generation; 0 elsewhere.
      apart: J, leading tokens that do not go through its feed-forward layer but through `block.special`.
      seen: how many tokens it attends to, where they are others than those that come in; 0 elsewhere.
      left: how many tokens an item around it leaves to its feed-forward half, where it acts between the two; else 0.
    """

    index: int
    block: Block
    kinds: tuple[tuple[str, Kind], ...]
    present: int
    reads: tuple[tuple[str, Reading], ...] = ()
    between: ItemStep | None = None
    rows: int = 0
    apart: int = 0
    seen: int = 0
    left: int = 0

    @property
    def after(self) -> int:
        """Tokens that come out."""
        return self.between.after if self.between else self.left or self.present

    @property
    def fed(self) -> int:
        """Tokens that go through the feed-forward layer."""
        return self.after - self.apart

    @property
    def name(self) -> str:
        """`block_07`."""
        return f"block_{self.index:02d}"

    def signature(self) -> Any:
        """Equal for steps that differ only in which weights they use."""
        between = self.between.signature() if self.between else None
        counts = self.present, self.rows, self.seen, self.left
        return ("block", self.block, self.kinds, counts, self.reads, between)

    def uses(self) -> dict[Kind, int]:
        """How many entries of each stack of weights it takes."""
        used = {kind: 1 for _, kind in self.kinds if kind[0] != SHARED} | {DEPTH: 1}
        if self.rows:
            used[memory_kind(self.rows)] = 1
        return _add(used, self.between.uses() if self.between else {})


@dataclass(frozen=True)
class ItemStep:
    """Run one item.

    Attributes:
      item: what it does.
      kind: where its weights are: ("items", name), or ("free", name) without any.
      number: which of the items of its name it is, for display.
      present, after: tokens that come in and go out.
      inside: tokens that a body sees.
      active: False for a `train_only` item at evaluation: it is skipped over, its body runs on all tokens.
      body: steps inside, for wrappers.
    """

    item: Item
    kind: Kind
    number: int
    present: int
    after: int
    inside: int
    active: bool = True
    body: tuple[Step, ...] = ()

    @property
    def name(self) -> str:
        """`keep_00`."""
        return f"{self.kind[1]}_{self.number:02d}"

    def signature(self) -> Any:
        """Equal for steps that differ only in which weights they use."""
        return (
            "item",
            self.item,
            self.kind,
            self.present,
            self.inside,
            self.active,
            tuple(s.signature() for s in self.body),
        )

    def uses(self) -> dict[Kind, int]:
        """How many entries of each stack of weights it takes."""
        return _add({self.kind: 1}, total_uses(self.body))


@dataclass(frozen=True)
class Loop:
    """Run equal steps `times` times, each time with the next weights."""

    body: tuple[Step, ...]
    times: int

    def signature(self) -> Any:
        """Of the body and how often."""
        return ("loop", self.times, tuple(step.signature() for step in self.body))

    def uses(self) -> dict[Kind, int]:
        """How many entries of each stack of weights it takes, all times together."""
        return {kind: count * self.times for kind, count in total_uses(self.body).items()}


Step: TypeAlias = BlockStep | ItemStep | Loop
DEPTH: Kind = ("depth", "")


def memory_kind(rows: int) -> Kind:
    """Where blocks that remember up to `rows` tokens have their memories."""
    return ("memory", f"{rows:08d}")


@dataclass(frozen=True)
class Occurrence:
    """One entry of a stack of weights: how to make it, and the seed it depends on alone.

    Attributes:
      index: number of the block, or ordinal of the item.
      init: key -> parameters.
      axes: logical axes by path.
      maker: the module or item; equal makers make equal shapes.
    """

    index: int
    init: Callable[[Array], Any] = field(compare=False)
    axes: Mapping[str, tuple[str | None, ...]] = field(compare=False)
    maker: Any


@dataclass(frozen=True)
class Program:
    """What a stack does.

    Attributes:
      stack: the expression.
      steps: in order, unrolled.
      kinds: where weights are stacked -> their occurrences in order; of shared ones, each block that uses them.
      depth: L, the number of blocks.
      present, after: tokens that come in and go out.
    """

    stack: Stack
    steps: tuple[Step, ...]
    kinds: Mapping[Kind, tuple[Occurrence, ...]]
    depth: int
    present: int
    after: int

    @cached_property
    def memory(self) -> dict[str, Any]:
        """What those who run it keep with it, by name; no part of what it is, nor of what is pickled or copied."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "memory"}

    def folded(self, apart: Collection[int] = ()) -> tuple[Step, ...]:
        """The steps with equal neighbours folded into loops, for `lax.scan`; blocks numbered in `apart` stand alone."""
        found: tuple[Step, ...] = ()
        waiting: tuple[Step, ...] = ()
        for step in self.steps:
            if isinstance(step, BlockStep) and step.index in apart:
                found, waiting = (*found, *fold(waiting), step), ()
            else:
                waiting = (*waiting, step)
        return (*found, *fold(waiting))

    def flat(self) -> list[BlockStep | ItemStep]:
        """Every block and item in the order of execution, bodies and items between halves included."""

        def walk(steps: tuple[Step, ...]) -> list[BlockStep | ItemStep]:
            found: list[BlockStep | ItemStep] = []
            for step in steps:
                found.append(step)
                if isinstance(step, BlockStep) and step.between:
                    found.append(step.between)
                if isinstance(step, ItemStep):
                    found.extend(walk(step.body))
            return found

        return walk(self.steps)

    @property
    def merges(self) -> bool:
        """True when some active item makes tokens that stand for several."""
        return any(isinstance(s, ItemStep) and s.active and s.item.merges for s in self.flat())

    def init(self, key: Array) -> dict[str, dict[str, Any]]:
        """Weights {"blocks": {kind: stacked}, "items": {kind: stacked}, "shared": {kind: one copy}}, each where any.

        Entry k depends on key, kind and k alone, a shared copy on key and kind.
        """
        state: dict[str, dict[str, Any]] = {"blocks": {}, "items": {}, SHARED: {}, "free": {}}
        for (group, name), occurrences in self.kinds.items():
            base = jax.random.fold_in(key, name_seed(f"{group}/{name}"))
            if group == SHARED:
                state[group][name] = occurrences[0].init(base)
                continue
            keys = [jax.random.fold_in(base, occurrence.index) for occurrence in occurrences]
            first = occurrences[0]
            if all(occurrence.maker == first.maker for occurrence in occurrences):
                made = jax.vmap(first.init)(jnp.stack(keys))
            else:
                each = [occurrence.init(key) for occurrence, key in zip(occurrences, keys, strict=True)]
                made = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            if jax.tree.leaves(made):
                state[group][name] = made
        return {group: kinds for group, kinds in state.items() if kinds}

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of all weights by path, without the leading stacked axis."""
        return {
            f"{group}/{name}/{path}": axes
            for (group, name), occurrences in self.kinds.items()
            for path, axes in occurrences[0].axes.items()
        }


def steps_of(model: Any) -> list[BlockStep | ItemStep]:
    """Every block and item of a model's stack, see `Program.flat`; none of a model without a stack."""
    return [] if model.program is None else model.program.flat()


def fold(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Fold runs of equal steps (or of equal patterns of up to 16 steps) into loops, the longest run first.

    A step that the next item reads from differs from its neighbours in that, and so stays outside the loop: the last
    block before `keep(by=cls)` is peeled off.
    """
    steps = tuple(
        replace(step, body=fold(step.body)) if isinstance(step, ItemStep) and step.body else step
        for step in steps
    )
    signatures = [step.signature() for step in steps]
    found: list[Step] = []
    at = 0
    while at < len(steps):
        best = (1, 1)  # period, times
        for period in range(1, min(MAX_PERIOD, (len(steps) - at) // 2) + 1):
            pattern = signatures[at : at + period]
            if _reads_before_block(steps[at : at + period]) or _is_read(steps[at + period - 1]):
                continue  # iterations would depend on each other through a reading
            times = 1
            while signatures[at + times * period : at + (times + 1) * period] == pattern:
                times += 1
            if times > 1 and period * times > best[0] * best[1]:
                best = (period, times)
        period, times = best
        if times > 1:
            found.append(Loop(fold(steps[at : at + period]) if period > 1 else steps[at : at + 1], times))
        else:
            found.append(steps[at])
        at += period * times
    return tuple(found)


def _is_read(step: Step) -> bool:
    return isinstance(step, BlockStep) and bool(step.reads)


def _reads_before_block(steps: tuple[Step, ...]) -> bool:
    first = steps[0]
    reads = isinstance(first, ItemStep) and first.active and bool(first.item.readings())
    return reads and not first.item.halves


def total_uses(steps: tuple[Step, ...]) -> dict[Kind, int]:
    """How many entries of each stack of weights the steps take together."""
    return _add(*(step.uses() for step in steps))


def _add(*counts: dict[Kind, int]) -> dict[Kind, int]:
    total: dict[Kind, int] = {}
    for one in counts:
        for kind, count in one.items():
            total[kind] = total.get(kind, 0) + count
    return total
