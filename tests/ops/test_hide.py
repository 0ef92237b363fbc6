"""What is hidden of a row: how much, of which tokens, in which pieces, and what is seen instead."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.ops import hide

N, ROWS, V, MASK = 64, 400, 50, 49
WAYS = {
    "tokens": hide.hide_tokens,
    "words": hide.hide_words,
    "spans": partial(hide.hide_spans, p=0.2, longest=10, attempts=40),
}
KEYS = jax.random.split(jax.random.key(0), ROWS)


def words(seed=0):
    """[ROWS, N]: words of one to four tokens between special tokens, padding behind."""
    draws = np.random.default_rng(seed)
    found = np.cumsum(draws.random((ROWS, N)) < 0.5, axis=1) + 1
    found -= found[:, 1:2] - 1
    found[:, 0] = 0
    found[:, 20] = 0  # a special token; no word goes on behind it
    found[:, 21:] += (found[:, 21:] == found[:, 19:20]).any(axis=1, keepdims=True)
    return np.where(np.arange(N) < draws.integers(N // 2, N + 1, (ROWS, 1)), found, 0).astype(np.int32)


WORD = words()


@pytest.fixture(scope="module")
def found():
    """way -> what is hidden of each row, and how many tokens may be."""

    def run(keys, word):
        amount = jax.vmap(lambda w: hide.budget(w, 0.3, 15))(word)
        made = {name: jax.vmap(way)(keys, word, amount) for name, way in WAYS.items()}
        return made, amount

    made, amount = jax.jit(run)(KEYS, WORD)
    return jax.tree.map(np.asarray, made), np.asarray(amount)


def test_the_budget_is_the_ratio_rounded_at_least_one_and_at_most_what_there_is():
    def amount(tokens, ratio, most=10):
        return int(hide.budget(jnp.arange(20) < tokens, ratio, most))

    assert [amount(n, 0.15) for n in (0, 1, 3, 10, 11, 20)] == [0, 1, 1, 2, 2, 3]
    assert amount(20, 0.9) == 10 and amount(2, 0.9) == 2


@pytest.mark.parametrize("way", WAYS)
def test_only_what_may_be_hidden_is_and_never_more_than_the_budget(found, way):
    hidden, amount = found[0][way].hidden, found[1]
    assert not (hidden & (WORD == 0)).any()
    assert (hidden.sum(1) <= amount).all()
    if way == "tokens":
        assert (hidden.sum(1) == amount).all()
    else:  # a rest that no word fits into
        assert hidden.sum() > 0.97 * amount.sum()


@pytest.mark.parametrize("way", ["words", "spans"])
def test_whole_words_are_hidden_or_none_of_them(found, way):
    for hidden, word in zip(found[0][way].hidden, WORD, strict=True):
        for number in np.unique(word[word > 0]):
            assert len(set(hidden[word == number])) == 1
    assert not all(
        len(set(hidden[word == number])) == 1
        for hidden, word in zip(found[0]["tokens"].hidden, WORD, strict=True)
        for number in np.unique(word[word > 0])
    )


@pytest.mark.parametrize("way", WAYS)
def test_every_place_is_hidden_about_as_often(found, way):
    """Of the places 5 to 19, which every row has; spans reach the first word of a row less often."""
    rate = found[0][way].hidden[:, 5:20].mean(0)
    expected = (found[1] / (WORD > 0).sum(1)).mean()
    np.testing.assert_allclose(rate.mean(), expected, rtol=0.08)
    assert abs(rate - expected).max() < 5 * (expected * (1 - expected) / ROWS) ** 0.5


def test_spans_are_longer_than_chance_and_are_seen_alike(found):
    def runs(hidden):
        return hidden.sum() / (np.diff(np.pad(hidden, ((0, 0), (1, 0))).astype(int), axis=1) == 1).sum()

    assert runs(found[0]["spans"].hidden) > 2 * runs(found[0]["tokens"].hidden)
    spans, pieces, words = found[0]["spans"], 0, 0
    for hidden, draw, word in zip(spans.hidden[:50], spans.draw[:50], WORD[:50], strict=True):
        for number in np.unique(word[hidden]):
            assert len(set(draw[hidden & (word == number)])) == 1
        pieces += len(np.unique(draw[hidden]))
        words += len(np.unique(word[hidden]))
    assert words > 1.5 * pieces


def test_lengths_of_spans_are_geometric_and_cut_off():
    drawn = np.asarray(hide.span_lengths(jax.random.key(1), (20_000,), p=0.2, longest=10))
    wanted = 0.2 * 0.8 ** np.arange(10)
    wanted /= wanted.sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=11)[1:] / drawn.size, wanted, atol=0.012)
    np.testing.assert_allclose(drawn.mean(), 3.8, atol=0.06)  # SpanBERT, section 3.1
    assert (np.asarray(hide.span_lengths(jax.random.key(1), (9,), p=1.0, longest=10)) == 1).all()


def test_what_is_seen_is_the_mask_any_text_or_the_token_itself(found):
    special = jnp.array([MASK, 0, 7, 8], jnp.int32)  # in any order
    text = np.setdiff1d(np.arange(V), special)
    ids = np.random.default_rng(3).choice(text, WORD.shape).astype(np.int32)
    one = found[0]["tokens"]

    def row(key, ids, hidden, draw):
        given = hide.Hidden(hidden, draw)
        return hide.seen(key, ids, given, MASK, V, mask=0.5, random=0.4, special=special)

    seen = np.asarray(jax.jit(jax.vmap(row))(KEYS, ids, one.hidden, one.draw))
    assert (seen[~one.hidden] == ids[~one.hidden]).all()
    at = one.hidden
    masked, same = seen[at] == MASK, seen[at] == ids[at]
    deviation = (0.5 * 0.5 / at.sum()) ** 0.5
    assert abs(masked.mean() - 0.5) < 4 * deviation
    assert abs(same.mean() - 0.1 - 0.4 / len(text)) < 4 * deviation
    others = seen[at][~masked & ~same]
    np.testing.assert_array_equal(np.unique(others), text)
    counts = np.bincount(others, minlength=V)[text]
    assert counts.max() < 2 * counts.mean() and counts.min() > counts.mean() / 2


def test_spans_end_before_what_is_never_hidden(found):
    """Place 20 is a separator: the draw of a span tells whether words on both sides are of one."""
    spans = found[0]["spans"]
    beside = spans.hidden[:, 19] & spans.hidden[:, 21]
    assert beside.sum() > 5 and not (spans.draw[:, 19] == spans.draw[:, 21])[beside].any()


def test_places_are_ascending_and_filled_up():
    hidden = jnp.array([False, True, False, True, True, False])
    for most, places, there in ((2, [1, 3], [1, 1]), (5, [1, 3, 4, 0, 0], [1, 1, 1, 0, 0])):
        found, real = hide.places_of(hidden, most)
        assert found.tolist() == places and real.tolist() == there
