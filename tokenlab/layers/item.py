"""What stands between and around blocks: the contracts of stack items and of the scores they rank tokens by.

A method is a frozen dataclass here: its fields are the arguments it takes in the stack, in order. The stack gives it
`Tokens` and gets `Tokens` back; how many come back is a Python int known before anything is traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

import jax
from jax import Array

from tokenlab.core.errors import TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.layers.attention import Reading
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.statistics import Statistic, Vocabulary
from tokenlab.ops import select
from tokenlab.ops.gather import gather

Amount: TypeAlias = int | float
"""An int is a count, a float a fraction of the unprotected tokens present; so 1 and 1.0 differ."""

Params: TypeAlias = Mapping[str, Any]
Axes: TypeAlias = Mapping[str, tuple[str | None, ...]]


class Body(Protocol):
    """The stack inside a wrapper.

    Attributes:
      count: tokens it is run on, a Python int.
    """

    count: int

    def __call__(self, tokens: Tokens, seen: Tokens | None = None) -> tuple[Tokens, Aux]:
        """Run it on `count` tokens an example; where the item `bridges`, its first block attends to `seen`.

        In generation only valid tokens are remembered, and a step without any valid token is skipped.
        """
        ...

    def has_room(self) -> Array:
        """In a step of generation: whether the body can remember one more token, [B] bool."""
        ...

    def turn_away(self, count: Array) -> None:
        """In generation: note that `count` [B] int32 tokens wanted in and found no room. Call it before the body."""
        ...


def join_readings(wanted: dict[str, Reading], more: Mapping[str, Reading]) -> None:
    """Add `more` to `wanted`. Raises TokenLabError when one name stands for two different readings."""
    for name, reading in more.items():
        if wanted.setdefault(name, reading) is not reading:
            raise TokenLabError(
                f"the reading {name!r} stands for two functions, {wanted[name].__qualname__} and "
                f"{reading.__qualname__}; give one of them another name."
            )


class Score:
    """Ranks tokens: `by=NAME` or `by=NAME(arguments)` in an item.

    Subclasses are frozen dataclasses whose fields are their arguments.

    Class attributes:
      reads: what it wants of the attention of the block just before, by name; given back in `readings`.
      stochastic: draws from `context`, so equal inputs may rank differently from step to step.
      causal: ranks a token without regard to those after it, and to what it is compared with.
      needs_cls: reads the first token, so the model must have a CLS token.
      needs_ids: ranks tokens by their ids in a vocabulary, so the model's tokens must have such.
    """

    reads: ClassVar[Mapping[str, Reading]] = {}
    stochastic: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    needs_cls: ClassVar[bool] = False
    needs_ids: ClassVar[bool] = False

    def init(self, key: Array, width: int) -> Params:
        """Parameters for tokens of `width` D; {} when there is nothing to learn."""
        del key, width
        return {}

    def axes(self) -> Axes:
        """Logical axes of the parameters by path."""
        return {}

    def statistics(self, vocabulary: Vocabulary) -> Mapping[str, Statistic]:
        """By name, what it wants to know of each token's id: then in `tokens.extra` under that name, [B, N]."""
        del vocabulary
        return {}

    def __call__(self, params: Params, tokens: Tokens, readings: Mapping[str, Array], key: Array) -> Array:
        """Scores [B, N], float32; the larger, the sooner a token is kept. Protected tokens' scores are not read."""
        raise TypeError(f"{type(self).__name__} does not define __call__.")


@dataclass(frozen=True)
class Item:
    """A step of the stack that is not a block: `keep(0.5)`, or around blocks: `skip(keep=0.5)(block*2)`.

    Subclasses are frozen dataclasses whose fields are their arguments, typed `Amount`, `int`, `float`, `bool`,
    `Score` (each optionally `| None`). Every item also takes `train_only=True`, with a name: it is then taken out at
    evaluation, and a wrapper's body runs on all tokens.

    Class attributes:
      wraps: takes a body, `name(arguments)(body)`.
      reads: what it wants of the attention of the block just before; a score's wishes are added by the item.
      bridges: the first block of its body attends to all tokens that came to the item, not only to those inside.
      merges: makes tokens that stand for several, so that `Tokens.size` must exist from the start.
      needs_cls: reads the first token, so the model must have a CLS token (scores say so for themselves).
      generates: runs on prompts and on the tokens that follow them one by one (`context.mode`).
      sifts: outside training a wrapper's tokens decide one by one who is valid inside, so that what ranks those against
        each other there looks ahead.
      identity: a stack in which the item keeps everything and so must equal the same stack without it, bit for bit;
        None when the method has no such setting.
      examples: stacks the contract tests run. At least one, for models of 16 patches, a CLS token and width 16.
    """

    wraps: ClassVar[bool] = False
    bridges: ClassVar[bool] = False
    reads: ClassVar[Mapping[str, Reading]] = {}
    merges: ClassVar[bool] = False
    needs_cls: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    sifts: ClassVar[bool] = False
    identity: ClassVar[str | None] = None
    examples: ClassVar[tuple[str, ...]] = ()

    train_only: bool = field(default=False, kw_only=True)

    @property
    def halves(self) -> bool:
        """Whether a wrapper acts between the halves of its body's first block, as EViT does within a block.

        That block's attention half then runs on all tokens that come, and is what the item reads; the item gets what it
        gives, and the body begins with the other half.
        """
        return False

    @property
    def expects(self) -> tuple[str, ...]:
        """Metrics that the task returns in training when it does what the item's arguments ask of it."""
        return ()

    @property
    def causal(self) -> bool:
        """What becomes of a token does not depend on those after it: here, when all scores are causal."""
        return bool(self.scores()) and all(score.causal for score in self.scores())

    def scores(self) -> tuple[Score, ...]:
        """The scores this item ranks by."""
        return tuple(value for value in vars(self).values() if isinstance(value, Score))

    def readings(self) -> Mapping[str, Reading]:
        """All that must be read of the block just before."""
        wanted = dict(self.reads)
        for score in self.scores():
            join_readings(wanted, score.reads)
        return wanted

    def init(self, key: Array, width: int) -> Params:
        """Parameters for tokens of `width` D: those of its score under "score"; {} when nothing is learned."""
        for score in self.scores():
            if params := score.init(key, width):
                return {"score": params}
        return {}

    def axes(self) -> Axes:
        """Logical axes of the parameters by path."""
        return {f"score/{path}": axes for score in self.scores() for path, axes in score.axes().items()}

    def count(self, present: int, protected: int) -> int:
        """Tokens after the item when `present` (of which `protected`) come in; raises TokenLabError if it cannot be."""
        del protected
        return present

    def reorders(self, present: int, protected: int) -> bool:
        """Whether a place may hold another token behind it, where as many come out as came in.

        Such an item cannot stand in a body, whose tokens return to the places that they were taken from.
        """
        del present, protected
        return False

    def inside(self, present: int, protected: int) -> int:
        """Tokens a wrapper's body sees."""
        return self.count(present, protected)

    def inside_protected(self, protected: int) -> int:
        """Of `protected` tokens that are never dropped, how many a wrapper's body has at its head; all or none."""
        return protected

    def inside_evaluated(self, present: int, protected: int) -> int:
        """The same in a model that is built for evaluation."""
        return self.inside(present, protected)

    def inside_prompt(self, present: int, protected: int, rows: int) -> int:
        """The same of a prompt of `present` tokens, with which `rows` may become the whole sequence."""
        del rows
        return self.inside(present, protected)

    def remembered(self, rows: int) -> int:
        """Of `rows` tokens a whole sequence may have here, how many a wrapper's body must have room to remember."""
        return rows

    def __call__(
        self,
        params: Params,
        tokens: Tokens,
        context: Context,
        readings: Mapping[str, Array],
        key: Array,
        body: Body | None,
    ) -> tuple[Tokens, Aux]:
        """Apply the item.

        Args:
          params: its own, from `init`.
          tokens: [B, N, ...].
          context: of this step.
          readings: what `readings()` asked for, of the block just before, or of the body's first (`halves`).
          key: random key of this occurrence at this step.
          body: for wrappers, the stack inside.
        """
        raise TypeError(f"{type(self).__name__} does not define __call__.")


def replicated(item: Item) -> Axes:
    """Axes of parameters too small to be split: for an item's `axes`."""
    shapes = jax.eval_shape(lambda: item.init(jax.random.key(0), 2))
    return {name: (None,) * leaf.ndim for name, leaf in shapes.items()}


def choose(
    by: Score,
    params: Params,
    tokens: Tokens,
    readings: Mapping[str, Array],
    key: Array,
    wanted: int,
) -> tuple[Array, Array | None]:
    """The `wanted` best-scored unprotected tokens, behind the protected ones.

    Returns:
      indices [B, protected + wanted], ascending; the scores of those tokens when the score is learned, to gate what
      becomes of them (`tokenlab.ops.gate.straight_through`), else None.
    """
    scores = by(params.get("score", {}), tokens, readings, key)
    indices = select.top_k(scores, wanted, protected=tokens.protected, valid=tokens.valid)
    return indices, gather(scores, indices) if params else None


def kept(amount: Amount, present: int, protected: int, what: str) -> int:
    """Unprotected tokens that `amount` keeps of those present; see `tokenlab.ops.select.count`."""
    return select.count(amount, present - protected, what=what)
