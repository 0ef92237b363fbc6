"""importance: the running masked-language-model loss of a token's id (Hou et al., ACL 2022, arXiv 2203.13240).

I [V] holds a number for every id of the vocabulary, the same on every device: `initial` at first, then a moving average
of the losses of the positions at which the id was to be predicted. A token is as important as its id:

    s[b, n] = I[id[b, n]]                        looked up by the input, so [MASK] has an importance of its own
    I[y] <- beta I[y] + (1 - beta) mean loss     for every label y of the batch, after each step     (section 3.2)

Ids that are always kept have the importance 1e4 and those dropped first -1e4, again after every update.

The reference writes I for one position after the other, so that of several with one label the last counts. Here their
mean does, which does not depend on their order. There is no gradient through I.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.layers.item import Params, Score
from tokenlab.layers.statistics import Pair, Statistic, Vocabulary

NAME = "importance"

PINNED = 1e4
"""The importance of what is always kept; what is dropped first has its negative."""


@dataclass(frozen=True)
class TokenImportance:
    """How I begins, is looked up and moves: `TokenImportance(V, allow=(101, 102, 103), deny=(0,))`.

    Attributes:
      vocabulary: V.
      allow: ids that are always kept.
      deny: ids that are dropped first.
      initial: value of all others at first; finite.
      beta: how much of the old value stays, in (0, 1).

    Raises:
      TokenLabError: an id outside 0..V-1 or in both lists, or a number out of range.
    """

    vocabulary: int
    allow: tuple[int, ...] = ()
    deny: tuple[int, ...] = ()
    initial: float = 10.0
    beta: float = 0.995

    def __post_init__(self) -> None:
        if self.vocabulary < 1:
            raise TokenLabError(f"importance: the vocabulary has {self.vocabulary} ids; expected 1 or more.")
        check_numbers(self.initial, self.beta)
        for what, ids in (("always kept", self.allow), ("dropped first", self.deny)):
            for each in ids:
                if not 0 <= each < self.vocabulary:
                    raise TokenLabError(
                        f"importance: id {each} is to be {what}; expected ids in 0..{self.vocabulary - 1}."
                    )
        if both := sorted(set(self.allow) & set(self.deny)):
            raise TokenLabError(
                f"importance: id {both[0]} is to be always kept and dropped first; take it out of one."
            )

    def init(self) -> Array:
        """I before the first step: [V], float32."""
        return self.pinned(jnp.full((self.vocabulary,), self.initial, jnp.float32))

    def pinned(self, value: Array) -> Array:
        """I with what is always kept at 1e4 and what is dropped first at -1e4."""
        for ids, pin in ((self.allow, PINNED), (self.deny, -PINNED)):
            if ids:
                value = value.at[jnp.array(ids, jnp.int32)].set(pin)
        return value

    def lookup(self, value: Array, ids: Array) -> Array:
        """I [V] of each id: float32 of the shape of ids, without gradient; NaN, which ranks last, outside 0..V-1."""
        value = jax.lax.stop_gradient(value)
        return value.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def observe(self, ids: Array, losses: Array, weights: Array | None = None) -> Pair:
        """The sum of the losses of each label, and how many it has: [V] float32 each, without gradient.

        Args:
          ids: labels, int; those outside 0..V-1 are left out.
          losses: of each, of the same shape.
          weights: 0 where a label does not count; None counts all, padded slots too, as the reference does.

        Raises: ShapeError for other shapes.
        """
        if losses.shape != ids.shape or (weights is not None and weights.shape != ids.shape):
            shapes = [list(x.shape) for x in (ids, losses, weights) if x is not None]
            raise ShapeError(f"importance: ids, losses and weights have shapes {shapes}; expected one shape.")
        losses = jax.lax.stop_gradient(losses).astype(jnp.float32).ravel()
        weight = jnp.ones_like(losses) if weights is None else weights.astype(jnp.float32).ravel()
        pair = jnp.stack([jnp.where(weight > 0, losses * weight, 0.0), weight], axis=-1)
        ids = jnp.where((ids < 0) | (ids >= self.vocabulary), self.vocabulary, ids).ravel()
        total = jnp.zeros((self.vocabulary, 2), jnp.float32).at[ids].add(pair, mode="drop")
        return total[:, 0], total[:, 1]

    def updated(self, value: Array, observed: Pair, *, pin: bool = True) -> Array:
        """I after a step that said `observed`; ids it says nothing of stay as they are.

        Args:
          value: I [V].
          observed: from `observe`, or sums of several.
          pin: as the class says; False lets what is pinned drift, as the reference does.
        """
        total, count = observed
        seen = count > 0
        mean = total / jnp.where(seen, count, 1.0)
        value = jnp.where(seen, self.beta * value + (1 - self.beta) * mean, value)
        return self.pinned(value) if pin else value

    def update(
        self, value: Array, ids: Array, losses: Array, weights: Array | None = None, *, pin: bool = True
    ) -> Array:
        """`observe` and `updated` in one."""
        return self.updated(value, self.observe(ids, losses, weights), pin=pin)


def check_numbers(initial: float, beta: float) -> None:
    """Raise TokenLabError unless I can begin at `initial` and move by `beta`."""
    if not 0 < beta < 1:
        raise TokenLabError(f"importance: beta must lie in (0, 1); got {beta}.")
    if not math.isfinite(initial) or not -PINNED < initial < PINNED:
        raise TokenLabError(
            f"importance: initial must lie between -{PINNED:g} and {PINNED:g}; got {initial}."
        )


@dataclass(frozen=True)
class Importance(Score):
    """`skip(keep=0.5, by=importance(beta=0.95))(block*6)`, in a model whose tokens have ids.

    Attributes:
      beta: how much of the old value stays, in (0, 1).
      initial: value of every id that is not pinned at first.
    """

    beta: float = 0.995
    initial: float = 10.0

    needs_ids: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self.initial, self.beta)

    def statistics(self, vocabulary: Vocabulary) -> Mapping[str, Statistic]:
        """I of this vocabulary."""
        pins = vocabulary.always_kept, vocabulary.first_dropped
        return {NAME: TokenImportance(vocabulary.size, *pins, self.initial, self.beta)}

    def __call__(self, params: Params, tokens: Tokens, readings: Mapping[str, Array], key: Array) -> Array:
        """[B, N], float32; the model has looked it up, see `tokenlab.models.trunk.Trunk.run`."""
        del params, readings, key
        return tokens.extra[NAME]


score = Importance
