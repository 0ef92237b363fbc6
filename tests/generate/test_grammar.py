"""The grammar of pictures: what may follow, what stands for what, and prompts that are not of it."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tokenlab.core.errors import TokenLabError
from tokenlab.data.image_text import ImageTextVocabulary
from tokenlab.data.text import ByteTokenizer
from tokenlab.generate.grammar import OUTSIDE, Grammar
from tokenlab.ops.sample import Sampling, sample

VOCABULARY = ImageTextVocabulary(ByteTokenizer(), codes=5, grid=(2, 3), codec="grey(5)")
GRAMMAR = Grammar.of(VOCABULARY)
V, BEGIN, END, FIRST = VOCABULARY.vocab_size, VOCABULARY.begin, VOCABULARY.end_image, VOCABULARY.first_code


def drawn(grammar: Grammar, how: Sampling, rows: int = 6, steps: int = 90) -> np.ndarray:
    """Ids [rows, steps] from random logits that like delimiters and codes; step by step, in one compiled scan."""

    def one(left: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jax.random.normal(key, (rows, V)) + 9.0 * (jnp.arange(V) >= BEGIN)
        ids = sample(grammar.allow(left, logits), key, how)
        return grammar.advance(left, ids), ids

    keys = jax.random.split(jax.random.key(0), steps)
    return np.asarray(jax.jit(lambda: lax.scan(one, jnp.full((rows,), OUTSIDE), keys)[1])()).T


@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(0.0), Sampling(1.0, top_k=40), Sampling(2.0, top_p=0.9)]
)
def test_every_picture_is_begin_all_its_codes_and_end(how: Sampling) -> None:
    for row in drawn(GRAMMAR, how):
        begins = np.flatnonzero(row == BEGIN)
        assert len(begins) > 3
        inside = np.zeros(len(row), bool)
        for at in begins:
            picture = row[at + 1 : at + 7]
            assert (picture >= FIRST).all() and (row[at + 7 : at + 8] == END).all()
            inside[at + 1 : at + 8] = True
        assert (row[~inside] <= BEGIN).all()
        assert (np.diff(begins) >= 8).all()


def test_text_alone_has_neither_pictures_nor_codes() -> None:
    assert (drawn(replace(GRAMMAR, pictures=False), Sampling()) < BEGIN).all()


def test_a_picture_that_was_begun_is_finished_where_no_other_may_begin() -> None:
    grammar = replace(GRAMMAR, pictures=False)
    may = np.isfinite(np.asarray(grammar.allow(jnp.array([3, 0, OUTSIDE]), jnp.zeros((3, V)))))
    np.testing.assert_array_equal(np.flatnonzero(may[0]), np.arange(FIRST, V))
    np.testing.assert_array_equal(np.flatnonzero(may[1]), [END])
    np.testing.assert_array_equal(np.flatnonzero(may[2]), np.arange(BEGIN))


def test_what_may_follow_keeps_its_logit() -> None:
    logits = jax.random.normal(jax.random.key(1), (2, V))
    found = np.asarray(GRAMMAR.allow(jnp.array([OUTSIDE, 2]), logits))
    np.testing.assert_array_equal(found[0, : BEGIN + 1], np.asarray(logits)[0, : BEGIN + 1])
    np.testing.assert_array_equal(found[1, FIRST:], np.asarray(logits)[1, FIRST:])
    assert np.isneginf(found[0, BEGIN + 1 :]).all() and np.isneginf(found[1, :FIRST]).all()


def test_modality_is_the_vocabularys() -> None:
    ids = np.arange(V)
    found = GRAMMAR.modality(jnp.asarray(ids))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, VOCABULARY.modality(ids))


def test_the_state_behind_a_prompt_is_that_of_its_ids_one_by_one() -> None:
    (picture,) = VOCABULARY.pictures(np.arange(6).reshape(1, 2, 3) % 5)
    whole = np.concatenate([VOCABULARY.encode("ab"), picture, VOCABULARY.encode("c")])
    left = jnp.array([OUTSIDE])
    for stop, value in enumerate(whole, 1):
        left = GRAMMAR.advance(left, jnp.array([value]))
        assert GRAMMAR.after(whole[:stop]) == int(left[0])
    assert [GRAMMAR.after(whole[:n]) for n in (2, 3, 4, 9, 10, 11)] == [OUTSIDE, 6, 5, 0, OUTSIDE, OUTSIDE]


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([65, FIRST + 1], "p has code 1 at place 1; expected text, or the beginning"),
        ([END], "p has the end of a picture at place 0; expected text"),
        (
            [BEGIN, FIRST, 65],
            "p has id 65 of text at place 2; expected a code, 5 of the picture being still to come",
        ),
        ([BEGIN, BEGIN], "p has the beginning of a picture at place 1; expected a code, 6"),
        ([BEGIN, *[FIRST] * 7], "p has code 0 at place 7; expected the end of the picture"),
    ],
)
def test_a_prompt_that_is_none_is_refused(ids: list[int], says: str) -> None:
    with pytest.raises(TokenLabError, match=says):
        GRAMMAR.after(np.array(ids), "p")
