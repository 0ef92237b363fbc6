"""The generator: greedy tokens are those of whole forward passes, ends stop, prompts do not meet, two traces do."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
import pytest

from tests import decoders
from tokenlab.core.errors import StackError, TokenLabError
from tokenlab.generate import Generator
from tokenlab.ops.sample import Sampling

P, NEW, V = 8, 11, decoders.VOCABULARY
STACK = "block + mod(keep=0.5)(block)"
GREEDY = Sampling(0.0)
PROMPTS = [np.asarray(decoders.ids(1, n, seed=n)[0]) for n in (8, 1, 5)]


@cache
def model():
    return decoders.build(STACK, P + NEW)


@cache
def state():
    return decoders.weights(model())


@cache
def generator(**settings):
    return Generator(model(), state(), prompt=P, new=NEW, **{"chunk": 4, **settings})


@cache
def greedy():
    """What follows the three prompts together, [3, NEW]."""
    return generator(sampling=GREEDY)(PROMPTS)


def test_greedy_tokens_are_the_likeliest_of_a_whole_forward_pass():
    """Token by token: the argmax of the logits over prompt and what was generated before."""
    whole = np.zeros((len(PROMPTS), P + NEW), np.int32)
    for row, prompt in enumerate(PROMPTS):
        whole[row, : len(prompt) + NEW] = np.concatenate([prompt, greedy()[row]])
    logits = np.asarray(jax.jit(lambda s, i: model().apply(s, {"ids": i}).logits)(state(), whole))
    for row, prompt in enumerate(PROMPTS):
        expected = logits[row, len(prompt) - 1 : len(prompt) + NEW - 1].argmax(-1)
        np.testing.assert_array_equal(greedy()[row], expected)
    assert len(np.unique(greedy())) > 3  # not one token again and again


def test_several_prompts_equal_each_alone():
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(generator(sampling=GREEDY)([prompt])[0], greedy()[row])


def test_two_traces_serve_every_prompt_of_a_batch_size():
    own = Generator(model(), state(), prompt=P, new=NEW, chunk=4)
    for length in (3, 8, 1):
        assert own([PROMPTS[0][:length]] * 2, seed=length).shape == (2, NEW)
    assert own.traces == {"prefill": 1, "steps": 1}
    own([PROMPTS[1]])
    assert own.traces == {"prefill": 2, "steps": 2}


@pytest.mark.parametrize("chunk", [1, 4, 99])
def test_it_comes_in_chunks_and_is_the_same_whatever_they_are(chunk):
    parts = list(generator(sampling=GREEDY, chunk=chunk).stream(PROMPTS))
    size = min(chunk, NEW)
    assert [part.shape[1] for part in parts] == [min(size, NEW - at) for at in range(0, NEW, size)]
    assert all(part.dtype == np.int32 for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), greedy())


def test_the_end_of_a_document_stops_a_row_and_of_all_rows_the_whole():
    """Behind its first end a row has ends alone; what comes before is as it was."""
    row = greedy()[0]
    at = next(i for i in range(1, NEW) if row[i] not in row[:i])
    end = int(row[at])
    ending = generator(sampling=GREEDY, end=end)
    found = ending(PROMPTS)
    for each, plain in zip(found, greedy(), strict=True):
        ends = np.flatnonzero(plain == end)
        stop = ends[0] if len(ends) else NEW
        np.testing.assert_array_equal(each[:stop], plain[:stop])
        np.testing.assert_array_equal(each[stop:], end)
    alone = ending([PROMPTS[0]])
    assert alone.shape[1] == min(NEW, -(-(at + 1) // 4) * 4)  # no chunk behind that of the end
    np.testing.assert_array_equal(alone[0, : at + 1], row[: at + 1])


def test_the_seed_decides_and_rows_draw_for_themselves():
    hot = generator(sampling=Sampling(3.0))
    first, again, other = (hot([PROMPTS[0]] * 3, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first[0] != first[1]).any()
    assert first.min() >= 0 and first.max() < V


def test_every_step_draws_anew_and_by_the_seed():
    """With equal logits everywhere the tokens are the draws themselves."""
    flat = {**state(), "head": jax.tree.map(np.zeros_like, state()["head"])}
    own = Generator(model(), flat, prompt=P, new=NEW, chunk=4)
    one, two = (own([PROMPTS[1]] * 8, seed=seed) for seed in (0, 1))
    assert (one != two).any(axis=0).all()
    assert len({tuple(column) for column in one.T}) == NEW


def test_what_may_be_drawn_is_heeded():
    np.testing.assert_array_equal(generator(sampling=Sampling(2.0, top_k=1))(PROMPTS), greedy())


def test_ids_that_only_fill_the_table_are_never_drawn():
    padded = decoders.build("block", P + NEW, vocab_multiple=64)
    found = Generator(padded, decoders.weights(padded), prompt=P, new=NEW, sampling=Sampling(9.0))(PROMPTS)
    assert found.max() < V


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([], "no prompt is given; expected one or more"),
        ([[1, 2], []], "prompt 1 has 0 tokens; expected 1 to 8"),
        ([[1] * 9], "prompt 0 has 9 tokens; expected 1 to 8, the longest this was built for"),
        ([[1], [V]], f"prompt 1 has ids from {V} to {V}; expected 0 to {V - 1}"),
        ([[-1, 3]], "prompt 0 has ids from -1 to 3"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(prompts, says):
    with pytest.raises(TokenLabError) as raised:
        generator(sampling=GREEDY)([np.array(each, np.int32) for each in prompts])
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("prompt", [np.array([1.7, 2.2]), np.array([np.nan]), np.ones((1, 3), int), "to be"])
def test_what_is_no_row_of_ids_is_refused(prompt):
    with pytest.raises(TokenLabError, match=r"prompt 0 is .*; expected ids, int \[T\]"):
        generator(sampling=GREEDY)([prompt])


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True])
def test_seeds_that_make_no_sense_are_refused(seed):
    with pytest.raises(TokenLabError, match="seed is .*; expected a whole number from 0 to 4294967295"):
        generator(sampling=GREEDY)(PROMPTS, seed=seed)


def test_tokens_that_found_no_room_are_counted():
    for keep, some in (("1", True), ("1.0", False)):
        full = decoders.build(f"block + mod(keep={keep}, room=1.0)(block)", P + NEW)
        each = Generator(full, state(), prompt=P, new=NEW)
        each(PROMPTS)
        assert (each.lost > 0) == some


def test_what_a_chunk_computes_beyond_the_last_token_is_not_counted():
    """A prompt that fills its room, and chunks that do not divide what may follow."""
    dense = decoders.build("block*2", P + NEW)
    each = Generator(dense, decoders.weights(dense), prompt=P, new=NEW, chunk=NEW - 1)
    assert each([decoders.ids(1, P)[0]]).shape == (1, NEW)
    assert each.lost == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"chunk": 0}, "chunk is 0; expected a number of tokens >= 1"),
        ({"chunk": True}, "chunk is True"),
        ({"new": 0}, "new is 0; expected a number of tokens >= 1"),
        ({"prompt": 0}, "prompt is 0; expected a number of tokens >= 1"),
        ({"new": 2**24}, "expected at most 16777216 together"),
    ],
)
def test_counts_that_make_no_sense_are_refused(given, says):
    with pytest.raises(TokenLabError) as raised:
        Generator(model(), state(), **{"prompt": P, "new": NEW, **given})
    assert says in str(raised.value)


def test_a_stack_that_cannot_run_token_by_token_is_refused():
    look = decoders.build("block + skip(keep=0.5, by=random)(block)", P + NEW)
    with pytest.raises(StackError, match="skip cannot run token by token"):
        Generator(look, state(), prompt=P, new=NEW)
