"""Which tokens a model has to guess (masked language modelling), and what it sees in their place.

Everything is of one row and of static shape: with a key a row, a row is hidden alike in every batch and on every mesh.
Words are numbered within a row from 1 on, in their order; 0 marks what is never hidden (padding, special tokens).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Hidden(NamedTuple):
    """What is hidden of a row.

    Attributes:
      hidden: [N] bool.
      draw: [N] float32 in [0, 1), which decides what is seen in the place of each; one number for a whole span.
    """

    hidden: Array
    draw: Array


def budget(word: Array, ratio: float, most: int) -> Array:
    """How many tokens of a row are hidden, [] int32: `ratio` of those that may be, at least 1, at most `most`.

    word: [N] int32. A row in which nothing may be hidden has 0.
    """
    count = jnp.sum(word > 0).astype(jnp.int32)
    wanted = jnp.clip(jnp.round(ratio * count).astype(jnp.int32), 1, most)
    return jnp.minimum(wanted, count)


def hide_tokens(key: Array, word: Array, amount: Array) -> Hidden:
    """Single tokens, each as likely as the others: exactly `amount` of them.

    Args:
      key: of this row.
      word: [N] int32.
      amount: [] int32, at most as many as may be hidden.

    Source: Devlin et al. 2019, arXiv 1810.04805, 3.1.
    """
    order, what = jax.random.split(key)
    score = jnp.where(word > 0, jax.random.uniform(order, word.shape), 2.0)
    sequence = jnp.argsort(score)
    rank = jnp.zeros(word.shape, jnp.int32).at[sequence].set(jnp.arange(word.shape[0], dtype=jnp.int32))
    return Hidden(rank < amount, jax.random.uniform(what, word.shape))


def hide_words(key: Array, word: Array, amount: Array) -> Hidden:
    """Whole words in random order; one that no longer fits into `amount` tokens is passed over.

    Arguments as of `hide_tokens`. What is seen in the place of each token is drawn token by token.

    Source: whole word masking, github.com/google-research/bert, 2019.
    """
    order, what = jax.random.split(key)
    size = _sizes(word)
    sequence = jnp.argsort(jnp.where(size > 0, jax.random.uniform(order, size.shape), 2.0))

    def step(used: Array, own: Array) -> tuple[Array, Array]:
        taken = (own > 0) & (used + own <= amount)
        return used + jnp.where(taken, own, 0), taken

    _, taken = jax.lax.scan(step, jnp.int32(0), size[sequence])
    of_word = jnp.zeros(size.shape, bool).at[sequence].set(taken)
    return Hidden(of_word[word] & (word > 0), jax.random.uniform(what, word.shape))


def hide_spans(key: Array, word: Array, amount: Array, *, p: float, longest: int, attempts: int) -> Hidden:
    """Spans of whole words, of a length from `span_lengths`, anywhere in the row, until `amount` tokens are hidden.

    A span that would cover what is hidden already is passed over; one that no longer fits is cut between words. None
    goes on behind a token that is never hidden, such as the separator of two documents or texts.

    Args:
      key, word, amount: as of `hide_tokens`.
      p, longest: of `span_lengths`.
      attempts: spans that are tried, >= 1.

    Source: Joshi et al. 2020, SpanBERT, arXiv 1907.10529, 3.1: what is seen in its place is decided for a whole span.
    """
    starts, lengths, what = jax.random.split(key, 3)
    begin = 1 + (jax.random.uniform(starts, (attempts,)) * jnp.max(word)).astype(jnp.int32)
    length = span_lengths(lengths, (attempts,), p=p, longest=longest)
    ends = jnp.cumsum(_sizes(word))  # [N + 1]: tokens of the words up to each
    text = jnp.cumsum(word == 0)  # which run of words without a gap each token is of

    def step(
        carry: tuple[Array, Array], span: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        draw, used = carry
        first, count, number = span
        inside = (word >= first) & (word < first + count)
        inside &= text == jnp.max(jnp.where(word == first, text, 0))
        fits = ends[word] - ends[first - 1] <= amount - used
        new = inside & fits & ~jnp.any((draw >= 0) & inside)
        return (jnp.where(new, number, draw), used + jnp.sum(new).astype(jnp.int32)), None

    blank = (jnp.full(word.shape, -1.0, jnp.float32), jnp.int32(0))
    (draw, _), _ = jax.lax.scan(step, blank, (begin, length, jax.random.uniform(what, (attempts,))))
    return Hidden(draw >= 0, draw)


def span_lengths(key: Array, shape: tuple[int, ...], *, p: float, longest: int) -> Array:
    """Lengths in words, int32 in [1, longest]: l with a probability in proportion to p (1 - p)^(l - 1), p in (0, 1]."""
    # The inverse of the distribution that is cut off at `longest` and normed.
    below = 1 - (1 - p) ** jnp.arange(1, longest, dtype=jnp.float32)
    total = 1 - (1 - p) ** longest
    drawn = jax.random.uniform(key, (*shape, 1)) * total
    return 1 + jnp.sum(drawn >= below, axis=-1).astype(jnp.int32)


def seen(
    key: Array,
    ids: Array,
    found: Hidden,
    mask_id: Array,
    rows: int,
    *,
    mask: float,
    random: float,
    special: Array | None = None,
) -> Array:
    """What a model sees, [N] int32: in the place of a hidden token `mask_id`, a random id, or the token itself.

    The random id is any of the vocabulary that stands for text, that of the token itself too, as in BERT. BERT also
    draws special tokens, few of 30,522; of the 260 ids of bytes they are one in 65.

    Args:
      key: of this row.
      ids: [N] int32.
      found: what is hidden.
      mask_id: [] int32.
      rows: V; ids are in [0, V).
      mask, random: probabilities of the first and the second; the rest stays.
      special: [S] int32, distinct ids that stand for no text, S < V; None for `mask_id` alone.
    """
    left_out = jnp.sort(jnp.ravel(mask_id if special is None else special))
    other = jax.random.randint(key, ids.shape, 0, rows - left_out.shape[0], jnp.int32)
    for one in left_out:  # ascending, so that what remains is numbered from 0 without gaps
        other += other >= one
    instead = jnp.where(found.draw < mask, mask_id, jnp.where(found.draw < mask + random, other, ids))
    return jnp.where(found.hidden, instead, ids)


def places_of(hidden: Array, most: int) -> tuple[Array, Array]:
    """The first `most` places where [N] bool is True: int32 [K] ascending, 0 where there are fewer; which are, bool."""
    length = hidden.shape[0]
    found = jnp.sort(jnp.where(hidden, jnp.arange(length, dtype=jnp.int32), length))[:most]
    there = found < length
    return jnp.where(there, found, 0), there


def _sizes(word: Array) -> Array:
    """Tokens of each word, int32 [N + 1]; those that are in none (word 0) do not count."""
    return jnp.zeros((word.shape[0] + 1,), jnp.int32).at[word].add((word > 0).astype(jnp.int32))
