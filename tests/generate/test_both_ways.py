"""A model of text and pictures both ways, on untrained weights: whole pictures, text without codes, one trace."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
import pytest

from tests import decoders
from tokenlab.core.errors import DataError, TokenLabError
from tokenlab.core.modality import IMAGE
from tokenlab.data.image_text import ImageTextVocabulary
from tokenlab.data.text import ByteTokenizer
from tokenlab.generate import BothWays, Generator, Grammar
from tokenlab.ops.sample import Sampling

VOCABULARY = ImageTextVocabulary(ByteTokenizer(), codes=5, grid=(2, 3), codec="grey(5)")
V, BEGIN, FIRST = VOCABULARY.vocab_size, VOCABULARY.begin, VOCABULARY.first_code
N, P, NEW = 24, 10, 14
STACK = "block + block(ffn=moma(text=2, image=2, slack=2.0, room=4.0))"
PICTURE = VOCABULARY.pictures(np.array([[[0, 1, 2], [3, 4, 0]]]))[0]
PROMPTS = [np.append(VOCABULARY.encode("six"), BEGIN), PICTURE, VOCABULARY.encode("a"), PICTURE[:3]]


@cache
def model():
    return decoders.build(STACK, N, outputs=V, modal=True)


@cache
def state():
    return decoders.weights(model())


@cache
def generator(**settings):
    grammar = Grammar.of(VOCABULARY, pictures=settings.pop("pictures", True))
    return Generator(model(), state(), prompt=P, new=NEW, grammar=grammar, chunk=7, **settings)


@cache
def both():
    return BothWays(model(), state(), VOCABULARY)


def test_greedy_tokens_are_the_likeliest_that_may_follow_of_a_whole_forward_pass():
    """So each token's modality in the prompt and behind it is that of the vocabulary; without it they are others."""
    found = generator(sampling=Sampling(0.0))(PROMPTS)
    whole = np.zeros((len(PROMPTS), N), np.int32)
    for row, prompt in enumerate(PROMPTS):
        whole[row, : len(prompt)] = prompt
        whole[row, len(prompt) : len(prompt) + NEW] = found[row, : N - len(prompt)]
    apply = jax.jit(lambda s, i, m: model().apply(s, {"ids": i, "modality": m}).logits)
    modality = VOCABULARY.modality(whole)
    logits = np.asarray(apply(state(), whole, modality))
    others = np.asarray(apply(state(), whole, np.zeros_like(modality)))
    grammar, picked = Grammar.of(VOCABULARY), []
    for row, prompt in enumerate(PROMPTS):
        for at in range(len(prompt), min(N, len(prompt) + NEW)):
            left = np.array([grammar.after(whole[row, :at])])
            assert np.asarray(grammar.allow(left, logits[row, at - 1 : at]))[0].argmax() == whole[row, at]
            picked.append(
                np.asarray(grammar.allow(left, others[row, at - 1 : at]))[0].argmax() == whole[row, at]
            )
    assert not all(picked)


def test_prompts_of_any_length_are_continued_by_the_grammar_in_two_traces():
    own = generator(sampling=Sampling(1.5))
    for seed, turn in enumerate((0, 1, 2)):
        prompts = PROMPTS[turn:] + PROMPTS[:turn]
        for prompt, ids in zip(prompts, own(prompts, seed), strict=True):
            Grammar.of(VOCABULARY).after(
                np.concatenate([prompt, ids])
            )  # raises where it is not of the grammar
            if prompt[-1] == BEGIN:
                assert (VOCABULARY.modality(ids)[:6] == IMAGE).all() and ids[6] == VOCABULARY.end_image
    assert own.traces == {"prefill": 1, "steps": 1}


def test_pictures_of_captions_have_all_their_codes_and_differ():
    codes = both().pictures(["six", "four!"], 3, seed=1)
    assert codes.shape == (2, 3, 2, 3) and 0 <= codes.min() and codes.max() < VOCABULARY.codes
    assert len(np.unique(codes.reshape(6, -1), axis=0)) > 1
    np.testing.assert_array_equal(both().pictures(["six", "four!"], 3, seed=1), codes)


def test_what_finds_no_room_is_counted_and_nothing_else():
    """A full prompt and as many tokens as there is room for lose none; a layer that holds few of those that want in."""
    codes = np.zeros((2, 2, 3), int)
    roomy = decoders.build("block", N, outputs=V, modal=True)
    own = BothWays(roomy, decoders.weights(roomy), VOCABULARY)
    own.captions(codes, tokens=13)
    assert own.lost == 0
    tight = decoders.build("mod(keep=0.1, by=random, gate=one, room=1.0)(block)", N, outputs=V, modal=True)
    own = BothWays(tight, decoders.weights(tight), VOCABULARY)
    own.captions(np.zeros((9, 2, 3), int), tokens=13)
    assert own.lost > 0


def test_captions_of_pictures_are_text_alone():
    codes = np.random.default_rng(0).integers(0, 5, (3, 2, 3))
    said = both().captions(codes, tokens=4, sampling=Sampling(0.0))
    assert said == [
        VOCABULARY.decode(row[:4][row[:4] != VOCABULARY.end])
        for row in generator(sampling=Sampling(0.0), pictures=False, end=VOCABULARY.end)(
            list(VOCABULARY.pictures(codes))
        )
    ]


def test_other_weights_are_used_without_compiling_anew():
    """As after more steps of training."""
    own = BothWays(model(), state(), VOCABULARY)
    first = own.pictures(["six"], 2)
    other = decoders.weights(model(), seed=1)
    own.use(other)
    found = own.pictures(["six"], 2)
    assert (found != first).any()
    np.testing.assert_array_equal(found, BothWays(model(), other, VOCABULARY).pictures(["six"], 2))
    (made,) = own._generators.values()
    assert made.traces == {"prefill": 1, "steps": 1}


@pytest.mark.parametrize(
    ("captions", "samples", "says"),
    [
        ([], 1, "no caption is given"),
        ([""], 1, "the caption '' has 0 tokens; expected 1 to 17"),
        (["x" * 18], 1, "has 18 tokens; expected 1 to 17, since with its picture of 2 x 3 codes"),
        (["x"], 0, "samples is 0; expected a number of samples >= 1"),
    ],
)
def test_captions_that_do_not_fit_are_refused(captions, samples, says):
    with pytest.raises(TokenLabError, match=says):
        both().pictures(captions, samples)


def test_other_codes_are_refused():
    with pytest.raises(DataError, match=r"expected \[n, 2, 3\] from 0 to 4"):
        both().captions(np.full((1, 2, 3), 5))


def test_a_generator_needs_the_grammar_of_its_model():
    with pytest.raises(TokenLabError, match=r"no grammar is given; expected grammar=Grammar\.of"):
        Generator(model(), state(), prompt=P, new=NEW)
    other = ImageTextVocabulary(ByteTokenizer(), codes=6, grid=(2, 3), codec="grey(6)")
    with pytest.raises(TokenLabError, match="the grammar is of 265 ids and the model of 264"):
        Generator(model(), state(), prompt=P, new=NEW, grammar=Grammar.of(other))
    with pytest.raises(TokenLabError, match="prompt 1 has code 0 at place 0"):
        generator()([PROMPTS[0], np.array([FIRST])])
