"""From a parsed stack to a program: blocks and items numbered, tokens counted, weights found their places.

Everything here is decided before tracing, in plain Python. Blocks are numbered in the order of the expression, whatever
wraps them; each occurrence of an item has an ordinal among its kind. Weights are looked up by these numbers alone, so a
checkpoint of `block*12` serves every stack of 12 blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import TokenLabError, suggest
from tokenlab.core.stack import Call, Node, Repeat, Sequence, Span, Stack
from tokenlab.layers.attention import Attention, Reading
from tokenlab.layers.bind import Resolver, build_ffn, build_item, build_special
from tokenlab.layers.block import Block
from tokenlab.layers.ffn import FFNDefaults
from tokenlab.layers.item import Item
from tokenlab.layers.program import BlockStep, ItemStep, Kind, Occurrence, Program, Step


def build_program(
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


@dataclass(frozen=True)
class Making:
    """How one entry of a stack of weights is made: key -> parameters. Equal ones make equal shapes.

    Attributes:
      maker: the module or item.
      shape: of one example of what a module reads: (tokens, D), or of joined tokens (J * D,); of an item (D,).
      coordinates: A, axes of rotary positions.
    """

    maker: nn.Module | Item
    shape: tuple[int, ...]
    coordinates: int

    def __call__(self, key: Array) -> Any:
        """Fresh parameters."""
        maker = self.maker
        if isinstance(maker, Item):
            return maker.init(key, self.shape[-1])
        x, present = jnp.zeros((1, *self.shape)), self.shape[0]
        wants_coords = getattr(maker, "rope_theta", None) is not None
        facts = {"coords": jnp.zeros((1, present, self.coordinates))} if wants_coords else {}
        if isinstance(maker, Attention) and maker.causal:
            facts["position"] = jnp.zeros((1, present), jnp.int32)
        return maker.init({"params": key, "ffn": key}, x, **facts).get("params", {})


@functools.lru_cache(maxsize=4096)
def shapes_of(making: Making) -> tuple[Any, tuple[Any, ...]]:
    """The structure of the parameters, and shape and dtype of each. Traced once a process, as many stacks are built."""
    shapes = jax.eval_shape(making, jax.eval_shape(lambda: jax.random.key(0)))
    return jax.tree.structure(shapes), tuple((s.shape, s.dtype) for s in jax.tree.leaves(shapes))


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
        self.bound: dict[int, Any] = {}  # by the call, so that what is repeated is looked up once

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
            made = self.bind(build_ffn, ffn, self.ffn_defaults)
            block = replace(block, ffn=made, ffn_name=ffn.name)
        if special := chosen.get("special"):
            self.check_special(special)
            made = self.bind(build_special, special, self.ffn_defaults)
            block = replace(block, special=made, special_name=special.name)
        apart = self.protected if block.special else 0
        index, self.blocks = self.blocks, self.blocks + 1
        between = None
        if call_between := chosen.get("between"):
            item = self.bind(build_item, call_between)
            if item.wraps:
                self.stack.fail(
                    call_between.span, f"{call_between.name} wraps a body and cannot stand between halves."
                )
            between = self.finish_item(call_between, item, present, rows)
        seen = between.after if between else present
        kinds = []
        for slot, module in block.modules().items():
            group, name = block.kind_of(slot)
            # Weights may depend on how many tokens there are in a feed-forward layer alone (soft_moe).
            alone = slot != "ffn" or getattr(module, "tokenwise", False)
            shape = (1 if alone else seen - apart, self.width)
            if slot == "special_scale":  # weighs what is added to each token, all else sees them joined
                shape = (apart, self.width)
            elif slot.startswith("special"):
                shape = (apart * self.width,)
            making = Making(module, shape, self.coordinates)
            kinds.append((slot, self.add(group, name, index, making)))
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
        item = self.bind(build_item, call)
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
        kind = self.add("items", call.name, None, Making(item, (self.width,), self.coordinates))
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

    def bind(self, how: Callable[..., Any], call: Call, *given: Any) -> Any:
        """What a call stands for; `how` is one of `tokenlab.layers.bind`."""
        if id(call) not in self.bound:
            self.bound[id(call)] = how(self.stack, call, self.resolver, *given)
        return self.bound[id(call)]

    def add(self, group: str, name: str, index: int | None, making: Making) -> Kind:
        """Enter an occurrence under `name`, or under `name_2`, ... when its weights have another shape."""
        shapes = shapes_of(making)
        if group == "items" and not shapes[1]:
            group = "free"
        number = 1
        while (
            self.shapes.setdefault(kind := (group, name if number == 1 else f"{name}_{number}"), shapes)
            != shapes
        ):
            number += 1
        found = self.kinds.setdefault(kind, [])
        place = len(found) if index is None else index
        found.append(Occurrence(place, making, making.maker.axes(), making.maker))
        return kind


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
