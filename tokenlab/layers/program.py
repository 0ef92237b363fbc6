"""From a parsed stack to a program: which block and item runs when, on how many tokens, with which weights.

Everything here is decided before tracing, in plain Python. Blocks are numbered in the order of the expression, whatever
wraps them; each occurrence of an item has an ordinal among its kind. Weights are looked up by these numbers alone, so a
checkpoint of `block*12` serves every stack of 12 blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import TokenLabError, suggest
from tokenlab.core.stack import Call, Node, Repeat, Sequence, Span, Stack
from tokenlab.layers.attention import Attention, Reading
from tokenlab.layers.bind import Resolver, build_ffn, build_item, build_special
from tokenlab.layers.block import Block
from tokenlab.layers.context import name_seed
from tokenlab.layers.ffn import FFNDefaults
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


def build(
    stack: Stack,
    resolver: Resolver,
    *,
    block: Block,
    ffn_defaults: FFNDefaults,
    width: int,
    tokens: int,
    protected: int,
    has_cls: bool,
    coordinates: int,
    train: bool,
    rows: int | None = None,
) -> Program:
    """Work a stack out.

    Args:
      stack: the parsed expression.
      resolver: finds items, scores and feed-forward layers.
      block: the model's own block; `block(ffn=...)` replaces its feed-forward layer.
      ffn_defaults: what feed-forward layers take from the model.
      width: D.
      tokens: N, protected ones included.
      protected: how many leading tokens are never dropped or merged.
      has_cls: the first token is a CLS token.
      coordinates: A, axes of rotary positions.
      train: False takes `train_only` items out.
      rows: for generation, tokens of the longest whole sequence, of which `tokens` are the prompt; None elsewhere.

    Returns:
      A `Program` with unrolled steps; `folded()` has loops.

    Raises:
      StackError: an unknown name or argument, a count that cannot be kept or merged, a reading without a block just
        before it, a body that changes the number of tokens of a wrapper, no block at all, an item that cannot generate,
        special tokens fed apart where there are none.
    """
    builder = _Builder(stack, resolver, block, ffn_defaults, width, protected, has_cls, coordinates, train)
    steps, after = builder.level([stack.root], tokens, rows)
    if not builder.blocks:
        stack.fail(Span(0, len(stack.text)), "holds no block; a stack needs at least one.")
    kinds = {kind: tuple(found) for kind, found in builder.kinds.items()}
    return Program(stack, tuple(steps), kinds, builder.blocks, tokens, after)


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


class _Builder:
    """Walks the tree once, numbering blocks and items and counting tokens."""

    def __init__(
        self,
        stack: Stack,
        resolver: Resolver,
        block: Block,
        ffn_defaults: FFNDefaults,
        width: int,
        protected: int,
        has_cls: bool,
        coordinates: int,
        train: bool,
    ):
        self.stack, self.resolver = stack, resolver
        self.block, self.ffn_defaults = block, ffn_defaults
        self.width, self.protected, self.has_cls = width, protected, has_cls
        self.coordinates, self.train = coordinates, train
        self.no_cls = "this model has none"
        self.within = ""  # the active wrapper whose body is being built
        self.blocks = 0
        self.numbers: dict[str, int] = {}  # items by name so far
        self.kinds: dict[Kind, list[Occurrence]] = {}
        self.shapes: dict[Kind, Any] = {}
        self.made: dict[Any, Any] = {}  # maker -> shapes, so that a deep stack is not traced block by block

    def level(self, nodes: list[Node], present: int, rows: int | None) -> tuple[list[Step], int]:
        """Steps of a sequence of nodes at one level of nesting, and the tokens after them."""
        found: list[Step] = []
        for call in _calls(nodes):
            if call.name == "block":
                found.append(self.block_step(call, present, rows))
            else:
                found.append(self.item_step(call, present, rows, found))
            if rows is not None:
                rows -= present - found[-1].after
            present = found[-1].after
        return found, present

    def block_step(self, call: Call, present: int, rows: int | None) -> BlockStep:
        if call.body is not None:
            self.stack.fail(
                call.span,
                "block takes no body; its arguments are attention=..., ffn=..., special=..., between=....",
            )
        known = {"attention", "ffn", "special", "between"}
        if call.args:
            self.stack.fail(call.span, "block's arguments need a name: block(ffn=...) or block(between=...).")
        chosen: dict[str, Call] = {}
        for name, value in call.kwargs:
            if name not in known:
                self.stack.fail(call.span, f"block has no argument {name!r}.{suggest(name, known)}")
            if not isinstance(value, Call):
                self.stack.fail(call.span, f"block: {name} must be a name such as mlp; got {value!r}.")
            chosen[name] = value
        block = self.block
        if attention := chosen.get("attention"):
            if str(attention) != "by_modality":
                self.stack.fail(
                    call.span, f"block: attention must be by_modality, or left out; got {attention}."
                )
            block = block.untied()
        if ffn := chosen.get("ffn"):
            made = build_ffn(self.stack, ffn, self.resolver, self.ffn_defaults)
            block = replace(block, ffn=made, ffn_name=ffn.name)
        if special := chosen.get("special"):
            self.check_special(special)
            made = build_special(self.stack, special, self.resolver, self.ffn_defaults)
            block = replace(block, special=made, special_name=special.name)
        apart = self.protected if block.special else 0
        index, self.blocks = self.blocks, self.blocks + 1
        between = None
        if call_between := chosen.get("between"):
            item = build_item(self.stack, call_between, self.resolver)
            if item.wraps:
                self.stack.fail(
                    call_between.span, f"{call_between.name} wraps a body and cannot stand between halves."
                )
            between = self.finish_item(call_between, item, present, rows)
        seen = between.after if between else present
        kinds = []
        for slot, module in block.modules().items():
            group, name = block.kind_of(slot)
            tokens = seen - apart if slot.startswith("ffn") else present
            shape = (tokens, self.width)
            if slot.startswith(
                "special"
            ):  # its scale weighs what is added to each token, all else sees them joined
                shape = (apart, self.width) if slot == "special_scale" else (apart * self.width,)
            kinds.append((slot, self.add(group, name, index, module, self.module_init(module, shape))))
        return BlockStep(index, block, tuple(kinds), present, between=between, rows=rows or 0, apart=apart)

    def check_special(self, call: Call) -> None:
        """Special tokens can be fed apart where there are any, and where they may see all others."""
        if self.block.attention.causal:
            self.stack.fail(
                call.span,
                f"special={call.name} feeds the tokens in front that gather the whole sequence; in a language model "
                "there are none: take it out.",
            )
        if self.protected < 1:
            self.stack.fail(
                call.span,
                f"special={call.name} feeds special tokens, and this model has none; give it registers "
                "(config.model.registers) or a CLS token.",
            )

    def item_step(self, call: Call, present: int, rows: int | None, before: list[Step]) -> ItemStep:
        item = build_item(self.stack, call, self.resolver)
        active = self.train or not item.train_only
        if active and not item.halves and (wanted := item.readings()):
            self.read(call, before, wanted)
        return self.finish_item(call, item, present, rows)

    def read(self, call: Call, before: list[Step], wanted: Mapping[str, Reading]) -> None:
        """Ask the block just before for what the item wants to know of its attention."""
        at = len(before) - 1
        while at >= 0 and isinstance(before[at], ItemStep) and not before[at].active and not before[at].body:
            at -= 1  # items that are taken out at evaluation are looked through
        if at < 0 or not isinstance(before[at], BlockStep) or before[at].between:
            self.stack.fail(
                call.span,
                f"{call.name} reads the attention of a block just before it, at the same level and over the same "
                f"tokens; put a block there, or rank by what needs none, such as by=norm.",
            )
        before[at] = replace(before[at], reads=tuple(wanted.items()))

    def finish_item(self, call: Call, item: Item, present: int, rows: int | None) -> ItemStep:
        active = self.train or not item.train_only
        if active and rows is not None and not item.generates:
            self.stack.fail(
                call.span,
                f"{call.name} cannot run token by token, as generation does; take it out of the stack to generate "
                "with, or make it train_only.",
            )
        if not self.has_cls and any(part.needs_cls for part in (item, *item.scores())):
            self.stack.fail(call.span, f"{call.name} reads the CLS token, and {self.no_cls}.")
        # Entered before its body, so that items are numbered in the order they are written.
        kind = self.add("items", call.name, None, item, lambda key: item.init(key, self.width))
        number = self.numbers[call.name] = self.numbers.get(call.name, -1) + 1
        try:
            inside, remembered = present, rows
            if active and rows is None:
                find = item.inside if self.train else item.inside_evaluated
                inside = find(present, self.protected)
            elif active:
                inside = item.inside_prompt(present, self.protected, rows)
                remembered = item.remembered(rows)
            after = item.count(present, self.protected) if active else present
        except TokenLabError as error:
            self.stack.fail(call.span, str(error))
        if active and self.within and after == present and item.reorders(present, self.protected):
            self.stack.fail(
                call.span,
                f"{call.name} gives as many tokens as it takes, {present}, in other places, and {self.within} around "
                f"it puts what its body gives back by place: move {call.name} out of {self.within}, or let it keep "
                "all tokens there.",
            )
        body: list[Step] = []
        if call.body is not None:
            outside = self.protected, self.has_cls, self.within
            if active:
                self.within = call.name
                self.protected = item.inside_protected(self.protected)
                if self.has_cls and not self.protected:
                    self.has_cls, self.no_cls = (
                        False,
                        f"inside {call.name} it is dropped like any other token",
                    )
            body, out = self.level([call.body], inside, remembered)
            self.protected, self.has_cls, self.within = outside
            if out != inside:
                self.stack.fail(
                    call.span,
                    f"the body of {call.name} takes {inside} tokens and gives {out}; it must give back as many, "
                    "since they return to their places.",
                )
            if active and item.bridges:
                body = self.bridge(call, body, present)
            if active and item.halves:
                body = self.halve(call, item, body, present)
        return ItemStep(item, kind, number, present, after, inside, active, tuple(body))

    def bridge(self, call: Call, body: list[Step], present: int) -> list[Step]:
        """The body of an item that bridges: its first block attends to the `present` tokens outside."""
        first = body[0]
        if not isinstance(first, BlockStep) or first.between or first.reads:
            self.stack.fail(
                call.span,
                f"the first block of {call.name} attends to all tokens, so its body must begin with a plain block that "
                "nothing reads the attention of.",
            )
        return [replace(first, seen=present), *body[1:]]

    def halve(self, call: Call, item: Item, body: list[Step], present: int) -> list[Step]:
        """The body of an item that halves: its first block attends before the item, on the `present` tokens outside."""
        first = body[0]
        if not isinstance(first, BlockStep) or first.between or first.reads:
            self.stack.fail(
                call.span,
                f"{call.name} acts between attention and feed-forward of the first block of its body, so that body "
                "must begin with a plain block whose attention nothing else reads.",
            )
        reads = tuple(item.readings().items())
        return [replace(first, present=present, left=first.present, reads=reads), *body[1:]]

    def add(self, group: str, name: str, index: int | None, maker: Any, init: Callable[[Array], Any]) -> Kind:
        """Enter an occurrence under `name`, or under `name_2`, ... when its weights have another shape."""
        if (maker, name) not in self.made:
            shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
            self.made[maker, name] = (
                jax.tree.structure(shapes),
                tuple((s.shape, s.dtype) for s in jax.tree.leaves(shapes)),
            )
        shapes = self.made[maker, name]
        if group == "items" and not shapes[1]:
            group = "free"
        number = 1
        while (
            self.shapes.setdefault(kind := (group, name if number == 1 else f"{name}_{number}"), shapes)
            != shapes
        ):
            number += 1
        found = self.kinds.setdefault(kind, [])
        found.append(Occurrence(len(found) if index is None else index, init, maker.axes(), maker))
        return kind

    def module_init(self, module: nn.Module, shape: tuple[int, ...]) -> Callable[[Array], Any]:
        """Key -> parameters for one example of this shape: (tokens, D), or of joined tokens (J * D,)."""

        def init(key: Array) -> Any:
            x, present = jnp.zeros((1, *shape)), shape[0]
            wants_coords = getattr(module, "rope_theta", None) is not None
            facts = {"coords": jnp.zeros((1, present, self.coordinates))} if wants_coords else {}
            if isinstance(module, Attention) and module.causal:
                facts["position"] = jnp.zeros((1, present), jnp.int32)
            return module.init({"params": key, "ffn": key}, x, **facts).get("params", {})

        return init


def _calls(nodes: list[Node]) -> list[Call]:
    """Sequences and repetitions opened up: the calls of one level in order."""
    found: list[Call] = []
    for node in nodes:
        match node:
            case Call():
                found.append(node)
            case Sequence(parts=parts):
                found.extend(_calls(list(parts)))
            case Repeat(body=body, times=times):
                found.extend(_calls([body]) * times)
    return found
