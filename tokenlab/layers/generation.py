"""Run a program in generation: prompts first, then token by token, with what every block must remember.

The weights and memories of a layer are taken out of their stacks by index, never by cutting the stacks: a stack cut by
segment would be copied for every token. "scan" keeps the stacks and loops over the layers, "unroll" holds every layer
by itself, which small models on CPU run faster (`tokenlab.layers.execute.UNROLL_ON_CPU`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from tokenlab.core.errors import ShapeError, StackError
from tokenlab.core.tokens import Tokens
from tokenlab.layers.block import Depth
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.execute import Execution, Inside, resolve_execution, stacks_of
from tokenlab.layers.program import (
    DEPTH,
    BlockStep,
    ItemStep,
    Kind,
    Loop,
    Program,
    Step,
    memory_kind,
    total_uses,
)
from tokenlab.ops.cache import KVCache, Stacked
from tokenlab.sharding.constrain import constrain

Layers: TypeAlias = Mapping[str, Any]
"""Kind of weights ("blocks/attention") -> them layer by layer: a stack [n, ...], or a tuple of n."""
Memories: TypeAlias = dict[str, Any]
"""Rows ("memory/00000128") -> the `KVCache`s of the layers that have so many: a stack [n, ...], or a tuple of n."""
Places: TypeAlias = Mapping[Kind, Array | int]


def prepare(
    program: Program, state: Mapping[str, Mapping[str, Any]], execution: Execution = "auto"
) -> Layers:
    """Weights as `run` reads them, made once before the first token.

    Args:
      program: built with `rows`.
      state: {"blocks": {kind: [n, ...]}, "items": {...}}.
      execution: "scan", "unroll" or "auto".
    """
    stacks = {_name(kind): stack for kind, stack in stacks_of(program, state).items()}
    if resolve_execution(execution, program.depth) == "scan":
        return stacks
    return {name: _apart(stack) for name, stack in stacks.items()}


def empty(program: Program, batch: int, heads: int, width: int, dtype: Any, layers: Layers) -> Memories:
    """Memories without a token in them.

    Args:
      program: built with `rows`.
      batch: B.
      heads, width: G key heads of width Dh.
      dtype: of keys and values.
      layers: from `prepare`; memories are laid out as weights are.
    """
    counts: dict[str, int] = {}
    caches: dict[str, KVCache] = {}
    for step in program.flat():
        if isinstance(step, BlockStep):
            name = _name(memory_kind(step.rows))
            counts[name] = counts.get(name, 0) + 1
            caches[name] = KVCache.empty(batch, step.rows, heads, width, dtype)
    apart = isinstance(layers[_name(DEPTH)], tuple)
    return {
        name: (cache,) * counts[name]
        if apart
        else jax.tree.map(lambda leaf, n=counts[name]: jnp.broadcast_to(leaf, (n, *leaf.shape)), cache)
        for name, cache in caches.items()
    }


def run(
    program: Program, layers: Layers, memories: Memories, tokens: Tokens, context: Context
) -> tuple[Tokens, Memories]:
    """One pass over prompts (`context.mode` "prefill"), or over the tokens that follow them ("step").

    Args:
      program: built with `rows`; prompts have `program.present` tokens an example, padding at the end not `valid`.
      layers: from `prepare`.
      memories: from `empty`, or the run before.
      tokens: [B, N, ...] with `valid`; in "step" N is 1.
      context: of this pass.

    Returns:
      Tokens after the last step, the new memories.

    Raises:
      ShapeError: another number of tokens than the mode takes.
      StackError: a wrapper whose body has no block of its own to count what is inside.
    """
    wanted = program.present if context.mode == "prefill" else 1
    if tokens.count != wanted:
        raise ShapeError(
            f"generation: a {context.mode} takes {wanted} tokens an example, got {tokens.count}."
        )
    apart = isinstance(layers[_name(DEPTH)], tuple)
    steps = program.steps if apart else program.folded()
    tokens, memories, _ = _Walk(layers, context).steps(steps, {}, tokens, memories)
    return tokens, memories


def lost(memories: Memories) -> Array:
    """Tokens that a full memory turned away, [B] int32: the most that any layer did."""
    caches = [c for value in memories.values() for c in (value if isinstance(value, tuple) else (value,))]
    return jnp.max(
        jnp.stack([cache.lost.reshape(-1, cache.lost.shape[-1]).max(axis=0) for cache in caches]), axis=0
    )


@dataclass(frozen=True)
class _Walk:
    """Goes through the steps; `places` says which entry of each stack is next."""

    layers: Layers
    context: Context

    def steps(
        self, steps: tuple[Step, ...], places: Places, tokens: Tokens, memories: Memories
    ) -> tuple[Tokens, Memories, Mapping[str, Array]]:
        places, readings = dict(places), {}
        for step in steps:
            match step:
                case BlockStep():
                    tokens, memories, readings = self.block(step, places, tokens, memories)
                case ItemStep():
                    tokens, memories = self.item(step, places, tokens, memories, readings)
                case Loop():
                    (tokens, memories), readings = self.loop(step, places, tokens, memories), {}
            for kind, count in step.uses().items():
                places[kind] = places.get(kind, 0) + count
        return tokens, memories, readings

    def block(
        self, step: BlockStep, places: Places, tokens: Tokens, memories: Memories
    ) -> tuple[Tokens, Memories, Mapping[str, Array]]:
        params = {slot: self.take(kind, places) for slot, kind in step.kinds}
        depth = Depth(**self.take(DEPTH, places))
        kind = memory_kind(step.rows)
        name, at = _name(kind), places.get(kind, 0)
        with jax.named_scope(step.name):
            held = memories[name]
            own = held[at] if isinstance(held, tuple) else Stacked(held, at)
            tokens, memory, readings = step.block.remember(
                params, tokens, self.context, depth, own, dict(step.reads)
            )
            held = _put(held, at, memory) if isinstance(held, tuple) else memory.stack
            memories = {**memories, name: held}
            if step.between:
                tokens, memories = self.item(step.between, places, tokens, memories, readings)
            tokens, _ = step.block.feed(params, tokens, self.context, depth)
        return tokens, memories, readings

    def item(
        self,
        step: ItemStep,
        places: Places,
        tokens: Tokens,
        memories: Memories,
        readings: Mapping[str, Array],
    ) -> tuple[Tokens, Memories]:
        inner = {**places, step.kind: places.get(step.kind, 0) + 1}
        if not step.active:
            tokens, memories, _ = self.steps(step.body, inner, tokens, memories)
            return tokens, memories
        own = self.take(step.kind, places)
        after = memories

        def body(part: Tokens) -> tuple[Tokens, Aux]:
            nonlocal after
            part, after = self.inside(step, inner, part, after)
            return part, Aux()

        def refused(count: Array) -> None:
            nonlocal after
            after = self.refused(step, inner, after, count)

        wrapped = None
        if step.body:
            count = step.inside if self.context.mode == "prefill" else 1
            wrapped = Inside(body, count, lambda: self.room(step, inner, memories), refused)
        with jax.named_scope(step.name):
            key = self.context.key("/".join(step.kind), own["ordinal"])
            tokens, _ = step.item(own["params"], tokens, self.context, readings, key, wrapped)
        return tokens.replace(x=constrain(tokens.x, "batch", None, None)), after

    def inside(
        self, step: ItemStep, places: Places, tokens: Tokens, memories: Memories
    ) -> tuple[Tokens, Memories]:
        """The body; of a step in which no example has a valid token, nothing is computed."""
        if self.context.mode == "prefill":
            if tokens.count != step.inside:
                raise ShapeError(f"{step.name}: its body takes {step.inside} tokens, got {tokens.count}.")
            tokens, memories, _ = self.steps(step.body, places, tokens, memories)
            return tokens, memories
        # Only what the body touches goes through the branch, as a branch may copy what passes through it.
        shares = {
            kind: (places.get(kind, 0), count)
            for kind, count in total_uses(step.body).items()
            if _name(kind) in memories
        }
        own = {_name(kind): _part(memories[_name(kind)], *share) for kind, share in shares.items()}
        local = {**places, **dict.fromkeys(shares, 0)}

        def compute(tokens: Tokens, own: Memories) -> tuple[Tokens, Memories]:
            tokens, own, _ = self.steps(step.body, local, tokens, own)
            return tokens, own

        tokens, own = lax.cond(jnp.any(tokens.valid), compute, lambda tokens, own: (tokens, own), tokens, own)
        back = {
            _name(kind): _back(memories[_name(kind)], share[0], own[_name(kind)])
            for kind, share in shares.items()
        }
        return tokens, {**memories, **back}

    def room(self, step: ItemStep, places: Places, memories: Memories) -> Array:
        """Whether the body has a row left, [B] bool."""
        kind, before = _holder(step)
        return _take(memories[_name(kind)], places.get(kind, 0) + before).has_room()

    def refused(self, step: ItemStep, places: Places, memories: Memories, count: Array) -> Memories:
        """Tokens without room are noted in the memory that had none."""
        kind, before = _holder(step)
        name, at = _name(kind), places.get(kind, 0) + before
        memory = _take(memories[name], at)
        memory = memory.replace(lost=memory.lost + count.astype(jnp.int32))
        return {**memories, name: _put(memories[name], at, memory)}

    def loop(self, step: Loop, places: Places, tokens: Tokens, memories: Memories) -> tuple[Tokens, Memories]:
        once = total_uses(step.body)

        def body(carry: tuple[Tokens, Memories], turn: Array) -> tuple[tuple[Tokens, Memories], None]:
            tokens, memories = carry
            here = {kind: places.get(kind, 0) + turn * count for kind, count in once.items()}
            tokens, memories, _ = self.steps(step.body, here, tokens, memories)
            return (tokens, memories), None

        (tokens, memories), _ = lax.scan(body, (tokens, memories), jnp.arange(step.times))
        return tokens, memories

    def take(self, kind: Kind, places: Places) -> Any:
        return _take(self.layers[_name(kind)], places.get(kind, 0))


def _holder(step: ItemStep) -> tuple[Kind, int]:
    """Of a wrapper's body, the memory of the first block that every token inside passes.

    Blocks in a wrapper inside do not count: fewer tokens pass them, and that wrapper looks after their room.

    Returns:
      Its kind, and how many memories of that kind the body has before it.

    Raises:
      StackError: the body has no such block.
    """

    def first(steps: tuple[Step, ...]) -> tuple[Kind, int] | None:
        before: dict[Kind, int] = {}
        for each in steps:
            if isinstance(each, BlockStep):
                kind = memory_kind(each.rows)
                return kind, before.get(kind, 0)
            through = isinstance(each, Loop) or not each.active
            if through and (found := first(each.body)):
                return found[0], before.get(found[0], 0) + found[1]
            for kind, count in each.uses().items():
                before[kind] = before.get(kind, 0) + count
        return None

    if (found := first(step.body)) is None:
        raise StackError(
            f"{step.name} cannot run token by token: no block of its body is passed by all tokens inside, so nothing "
            "remembers how many they are. Put a block beside what it wraps."
        )
    return found


def _name(kind: Kind) -> str:
    return "/".join(part for part in kind if part)


def _apart(stack: Any) -> tuple[Any, ...]:
    count = next((leaf.shape[0] for leaf in jax.tree.leaves(stack)), 0)
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(count))


def _take(stack: Any, at: Array | int) -> Any:
    if isinstance(stack, tuple):
        return stack[at]
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, at, keepdims=False), stack)


def _put(stack: Any, at: Array | int, entry: Any) -> Any:
    if isinstance(stack, tuple):
        return (*stack[:at], entry, *stack[at + 1 :])
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, at, 0), stack, entry)


def _part(stack: Any, at: Array | int, count: int) -> Any:
    if isinstance(stack, tuple):
        return stack[at : at + count]
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, at, count), stack)


def _back(stack: Any, at: Array | int, part: Any) -> Any:
    if isinstance(stack, tuple):
        return (*stack[:at], *part, *stack[at + len(part) :])
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_slice_in_dim(leaf, new, at, 0), stack, part)
