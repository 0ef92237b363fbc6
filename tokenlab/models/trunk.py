"""What every model over a stack has in common: its weights, how a stack's text becomes a program, and running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import StackError, TokenLabError
from tokenlab.core.stack import Stack, parse
from tokenlab.core.tokens import Tokens
from tokenlab.layers import execute
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.program import BlockStep, ItemStep, Program
from tokenlab.layers.statistics import STATISTICS, Statistic, Vocabulary

Execution = Literal["auto", "scan", "unroll"]
Remat = Literal["none", "full", "dots"]


class Ran(NamedTuple):
    """What running a stack gives.

    Attributes:
      tokens: behind the last block.
      aux: losses and metrics of what the stack holds.
      trace: the tokens at every reduction, where they were recorded.
      loads: the load of experts by block, where it was recorded.
      entering: what comes into blocks, [B, N, D] by their number, where it was asked for.
    """

    tokens: Tokens
    aux: Aux
    trace: tuple[execute.TracePoint, ...]
    loads: dict[str, Array]
    entering: dict[int, Array]


class Trunk:
    """The base of models: an embedding, a stack, a head.

    A subclass has the attributes `settings` (with `stack`, `dtype`, `execution`, `remat`), `stack_vars`, `train`, the
    properties `embed` and `head`, modules that say their `axes()`, and the methods below that raise here.
    """

    settings: Any
    stack_vars: Mapping[str, int | float]
    train: bool
    embed: Any
    head: Any
    vocabulary: Vocabulary | None = None
    """Of models whose tokens carry their ids as `extra["ids"]` [B, N] into the stack."""
    sequences: int = 1
    """As how many sequences an example goes through the stack."""

    # ------------------------------------------------------------------------------------------ what a model defines

    def make_program(self) -> Program:
        """The stack, worked out for the examples the model was built for."""
        raise TypeError(f"{type(self).__name__} does not define make_program.")

    def init_embed(self, key: Array) -> dict[str, Any]:
        """Fresh weights of the embedding."""
        raise TypeError(f"{type(self).__name__} does not define init_embed.")

    def init_head(self, key: Array, embed: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh weights of the head; `embed` are those of the embedding."""
        raise TypeError(f"{type(self).__name__} does not define init_head.")

    # ------------------------------------------------------------------------------------------ the stack

    @cached_property
    def program(self) -> Program:
        """The stack, worked out for the examples the model was built for."""
        found = self.make_program()
        self._statistics_of(found)  # so that a score which does not fit the model is said at once
        return found

    @cached_property
    def statistics(self) -> Mapping[str, Statistic]:
        """What the stack's scores want to know of the ids of tokens, by name; see `tokenlab.layers.statistics`."""
        return self._statistics_of(self.program)

    def _statistics_of(self, program: Program) -> dict[str, Statistic]:
        found: dict[str, Statistic] = {}
        for step in program.flat():
            if not isinstance(step, ItemStep) or not step.active:
                continue
            for score in step.item.scores():
                if score.needs_ids and self.vocabulary is None:
                    raise StackError(
                        f"stack: {step.kind[1]} ranks tokens by their ids in a vocabulary, and those of this model "
                        f"have none: {program.stack.text!r}. Rank by another score, such as by=norm."
                    )
                try:
                    wanted = score.statistics(self.vocabulary) if self.vocabulary else {}
                except TokenLabError as error:
                    raise StackError(f"stack: {error} ({program.stack.text!r})") from error
                for name, statistic in wanted.items():
                    if found.setdefault(name, statistic) != statistic:
                        raise StackError(
                            f"stack: {name} is wanted in two ways, which one model cannot have: "
                            f"{program.stack.text!r}. Give it the same arguments everywhere."
                        )
        return found

    @property
    def by_modality(self) -> bool:
        """Whether a block of the stack must be told what tokens stand for."""
        return any(isinstance(step, BlockStep) and step.block.by_modality for step in self.program.flat())

    @property
    def layer_tokens(self) -> int:
        """Tokens of one example that enter blocks in one run of the model, summed over blocks."""
        blocks = (step for step in self.program.flat() if isinstance(step, BlockStep))
        return self.sequences * sum(step.present for step in blocks)

    @property
    def dense_layer_tokens(self) -> int:
        """The same of a stack of as many blocks in which every token stays."""
        return self.sequences * self.program.present * self.program.depth

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return jnp.dtype(self.settings.dtype)

    @property
    def stack_text(self) -> str:
        """The stack in canonical spelling, its variables replaced by numbers."""
        return str(self.program.stack)

    def rebuilt(self, *, train: bool) -> Self:
        """The same model, of the same weights, with (True) or without (False) the `train_only` items of its stack."""
        return dataclasses.replace(self, train=train)

    def parsed(self, depth: int) -> Stack:
        """The settings' stack, or `depth` blocks. Raises StackError for a variable that it does not use."""
        text = self.settings.stack if self.settings.stack is not None else f"block*{depth}"
        stack = parse(text, self.stack_vars)
        unused = sorted(set(self.stack_vars) - stack.used)
        if unused:
            raise StackError(
                f"stack_vars.{unused[0]} is not used in the stack {stack.text!r}; take it out, or use it there."
            )
        return stack

    def run(
        self,
        state: Mapping[str, Any],
        tokens: Tokens,
        context: Context,
        *,
        record: bool = False,
        execution: Execution | None = None,
        remat: Remat | None = None,
        entering: Collection[int] = (),
    ) -> Ran:
        """Run the stack on what was embedded.

        Args:
          state: weights, see `init`.
          tokens: [B, N, ...].
          context: of this step.
          record: collect the tokens at every reduction, and the load of experts (unrolls the stack).
          execution, remat: in place of the settings'.
          entering: numbers of blocks outside all wrappers of which to return what comes into them.
        """
        # Every leaf the stack will need exists before its first scan.
        shape = tokens.position.shape
        if self.program.merges:
            tokens = tokens.replace(size=jnp.ones(shape, jnp.float32))
        if self.statistics:
            held = state[STATISTICS]
            known = {name: s.lookup(held[name], tokens.extra["ids"]) for name, s in self.statistics.items()}
            tokens = tokens.replace(extra={**tokens.extra, **known})
        if record:
            tokens = tokens.replace(owner=jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape))
        trace: list[execute.TracePoint] = []
        loads: dict[str, Array] = {}
        states: dict[int, Tokens | None] = dict.fromkeys(entering)
        tokens, aux = execute.run(
            self.program,
            state,
            tokens,
            context,
            drop_path=getattr(self.settings, "drop_path", 0.0),
            drop_path_rates=getattr(self.settings, "drop_path_rates", "linear"),
            execution=execution or self.settings.execution,
            remat=remat or self.settings.remat,
            trace=trace if record else None,
            loads=loads,
            entering=states,
        )
        return Ran(tokens, aux, tuple(trace), loads, {index: held.x for index, held in states.items()})

    # ------------------------------------------------------------------------------------------ weights

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh weights: {"embed": ..., "blocks": {kind: [n, ...]}, "items": ..., "shared": ..., "head": ...},
        float32.

        A model with statistics has them beside those, under "statistics".

        Block k and item j get keys that depend on `key` and their number alone, so two stacks of as many blocks start
        from the same weights.
        """
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(("embed", "stack", "head"))}
        embed = self.init_embed(keys["embed"])
        head = self.init_head(keys["head"], embed)
        state = {"embed": embed, **self.program.init(keys["stack"]), "head": head}
        if self.statistics:
            state[STATISTICS] = {name: statistic.init() for name, statistic in self.statistics.items()}
        return state

    def abstract_state(self) -> dict[str, Any]:
        """Shapes and dtypes of the weights, without making them."""
        return jax.tree.map(lambda leaf: leaf, self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, Any]:
        """Asked for many times before a run begins, and each time every module would be traced."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Parameter path -> logical axes of its trailing dimensions, for `tokenlab.sharding.rules`."""
        embed = {f"embed/{path}": axes for path, axes in self.embed.axes().items()}
        head = {f"head/{path}": axes for path, axes in self.head.axes().items()}
        statistics = {
            f"{STATISTICS}/{name}": (None,) * jax.eval_shape(statistic.init).ndim
            for name, statistic in self.statistics.items()
        }
        return {**embed, **self.program.axes(), **head, **statistics}
