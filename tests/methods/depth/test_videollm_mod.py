"""VideoLLM-MoD: what each frame keeps, what comes out, what later frames cannot change, and layouts that do not fit."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import decoders
from tokenlab.core.errors import ShapeError, StackError, TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.layers import execute
from tokenlab.layers.context import Context
from tokenlab.methods.depth.videollm_mod import VideoMixtureOfDepths, keep_ratios

# Words, a frame of five, words, two frames, a word: T = 3 frames of V = 5 tokens, and 6 words.
FRAME = np.array([-1, -1] + [0] * 5 + [-1, -1, -1] + [1] * 5 + [2] * 5 + [-1])
N, T, V, B, D = len(FRAME), 3, 5, 2, 16
KEY = jax.random.key(0)
GATES = {"raw": lambda s: s, "sigmoid": lambda s: 1 / (1 + np.exp(-s)), "one": np.ones_like}
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def placed(x, frame=FRAME, valid=None):
    """Tokens at 0, 1, ... of their sequences, with their frames; none where `frame` is None."""
    place = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    extra = {} if frame is None else {"frame": jnp.broadcast_to(jnp.asarray(frame), x.shape[:2])}
    return Tokens(x, place, place[..., None].astype(jnp.float32), valid, extra=extra)


@cache
def routed(arguments="keep=2, frames=3, per_frame=5", body="block"):
    """(weights, jitted (weights, x, frame, valid, key) -> features) of `videollm_mod(arguments)(body)`."""
    model = decoders.build(f"videollm_mod({arguments})({body})", N, leaks=True)

    def run(state, x, frame=FRAME, valid=None, key=KEY):
        return execute.run(model.program, state, placed(x, frame, valid), Context(key, False))[0].x

    return decoders.weights(model), quick(run)


@cache
def dense(depth=1):
    """The same of a dense stack."""
    model = decoders.build(f"block*{depth}", N, leaks=True)

    def run(state, x, valid=None):
        return execute.run(model.program, state, placed(x, None, valid), Context(KEY, False))[0].x

    return quick(run)


def features(seed=0, batch=B):
    return jax.random.normal(jax.random.key(seed), (batch, N, D))


def router(state):
    return np.asarray(state["items"]["videollm_mod"]["router"][0], np.float64)


def kept_of(score, k, always="last"):
    """Which of a frame's scores are kept, one by one."""
    score = score.copy()
    if always == "last":
        score[-1] = np.inf
    return np.sort(np.argsort(-score, kind="stable")[:k])


def inside(score, k, always="last"):
    """All text and the kept tokens, ascending."""
    found = list(np.flatnonzero(FRAME < 0))
    for frame in range(T):
        places = np.flatnonzero(frame == FRAME)
        found += list(places[kept_of(score[places], k, always)])
    return np.sort(found)


@pytest.mark.parametrize("always", ["last", "none"])
@pytest.mark.parametrize("gate", GATES)
def test_a_routed_block_equals_a_loop_in_numpy(gate, always):
    """Frame by frame: the k largest scores enter with all text, at their own positions; text weighs one."""
    state, run = routed(f"keep=2, frames=3, per_frame=5, gate={gate}, always={always}")
    x = features()
    found = run(state, x)
    for row in range(B):
        wide = np.asarray(x[row], np.float64)
        score = wide @ router(state)
        chosen = inside(score, 2, always)
        weight = np.where(FRAME < 0, 1.0, GATES[gate](score))[chosen]
        expected = wide.copy()
        expected[chosen] += weight[:, None] * (decoders.block(state, 0, wide[chosen], chosen) - wide[chosen])
        np.testing.assert_allclose(found[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frame", [FRAME, None], ids=["with text", "frames alone"])
def test_with_everything_kept_it_is_the_dense_block_bit_for_bit(frame):
    arguments = "keep=1.0, frames=3, gate=one" + (", per_frame=5" if frame is not None else "")
    state, run = routed(arguments)
    np.testing.assert_array_equal(run(state, features(), frame), dense()(state, features()))


def test_text_alone_passes_as_through_the_dense_block():
    """Where every frame is padding, whatever is kept of frames; sums over fewer places round another way."""
    state, run = routed()
    text = jnp.broadcast_to(FRAME < 0, (B, N))
    found, expected = run(state, features(), FRAME, text), dense()(state, features(), text)
    np.testing.assert_allclose(found[:, FRAME < 0], expected[:, FRAME < 0], atol=2e-6, rtol=1e-5)


def test_tokens_that_are_not_kept_come_out_as_they_went_in():
    state, run = routed(body="block*2")
    x = features()
    changed = np.any(np.asarray(run(state, x) != x), axis=-1)
    for row in range(B):
        np.testing.assert_array_equal(
            np.flatnonzero(changed[row]), inside(np.asarray(x[row]) @ router(state), 2)
        )


@pytest.mark.parametrize("frame", range(T))
def test_frames_to_come_change_nothing(frame):
    """What stands before the end of a frame comes out the same to the last bit, whatever follows."""
    state, run = routed("keep=2, frames=3, per_frame=5", "block*2")
    end = np.flatnonzero(frame == FRAME)[-1] + 1
    x = features()
    other = x.at[:, end:].set(10 * features(1)[:, end:])
    np.testing.assert_array_equal(run(state, x)[:, :end], run(state, other)[:, :end])


def test_gradients_reach_the_router_and_no_skipped_token_gets_more_than_its_own():
    state, run = routed("keep=2, frames=3, per_frame=5, gate=sigmoid")
    x, cotangent = features(), features(2)
    plain = run.__wrapped__
    weights, tokens = quick(jax.grad(lambda s, x: jnp.sum(plain(s, x) * cotangent), (0, 1)))(state, x)
    assert np.abs(weights["items"]["videollm_mod"]["router"]).max() > 1e-3
    for row in range(B):
        out = np.setdiff1d(np.arange(N), inside(np.asarray(x[row]) @ router(state), 2))
        assert len(out) == T * (V - 2)
        np.testing.assert_array_equal(tokens[row, out], cotangent[row, out])


@pytest.mark.parametrize("by", ["learned", "random", "uniform"])
@pytest.mark.parametrize("always", ["last", "first", "both", "none"])
def test_each_frame_keeps_k(by, always):
    item = VideoMixtureOfDepths(3, T, V, by=by, always=always)
    tokens = placed(features(3, 8))
    score = jnp.asarray(np.random.default_rng(0).standard_normal((8, N)), jnp.float32)
    kept = np.asarray(item.kept(score, tokens, item.frame(tokens), KEY))
    assert not kept[:, FRAME < 0].any()
    for frame in range(T):
        own = kept[:, frame == FRAME]
        assert (own.sum(1) == 3).all()
        assert own[:, 0].all() or always in ("last", "none")
        assert own[:, -1].all() or always in ("first", "none")
        if by == "random":
            assert len({tuple(row) for row in own}) > 1
    if by == "uniform":
        assert len({tuple(row) for row in kept}) == 1


@pytest.mark.parametrize("present, expected", [(5, 2), (4, 2), (3, 1), (1, 1), (0, 0)])
def test_a_frame_with_padding_keeps_in_proportion(present, expected):
    item = VideoMixtureOfDepths(0.4, T, V)
    valid = np.ones((B, N), bool)
    valid[:, np.flatnonzero(FRAME == 1)[present:]] = False
    tokens = placed(features(), valid=jnp.asarray(valid))
    kept = np.asarray(item.kept(item.score({}, tokens), tokens, item.frame(tokens), KEY))
    assert (kept[:, FRAME == 1].sum(1) == expected).all() and (kept[:, FRAME == 2].sum(1) == 2).all()
    assert not kept[~valid].any()


def test_scores_that_are_not_numbers_are_kept_last():
    item = VideoMixtureOfDepths(2, T, V, always="none")
    score = jnp.broadcast_to(jnp.arange(N, dtype=jnp.float32), (B, N))
    score = score.at[:, np.flatnonzero(FRAME == 1)[-2:]].set(jnp.nan)
    tokens = placed(features())
    kept = np.asarray(item.kept(score, tokens, item.frame(tokens), KEY))
    np.testing.assert_array_equal(np.flatnonzero(kept[0, FRAME == 1]), [1, 2])


def test_a_layout_that_does_not_fit_is_seen():
    """More text than N - T V: that row comes out as NaN, and no other."""
    state, run = routed()
    frame = np.stack([FRAME, np.where(FRAME == 2, -1, FRAME)])
    found = run(state, features(), frame)
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


def test_what_is_counted():
    """The body is run on the text and k of each frame."""
    item = VideoMixtureOfDepths(0.4, T, V)
    assert item.inside(N, 0) == 6 + T * 2
    assert VideoMixtureOfDepths(0.25, 4).inside(17, 1) == 1 + 4
    model = decoders.build("block + videollm_mod(keep=0.4, frames=3, per_frame=5)(block)", N, leaks=True)
    assert [step.present for step in model.program.flat()] == [N, N, 12]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("keep=0.0, frames=3, per_frame=5", "fraction"),
        ("keep=1.5, frames=3, per_frame=5", "fraction"),
        ("keep=6, frames=3, per_frame=5", "count 6"),
        ("keep=0.2, frames=3, per_frame=5, always=both", "always=both"),
        ("keep=0.01, frames=3, per_frame=5", "rounds to none"),
        ("keep=0.5, frames=0", "frames is 0"),
        ("keep=0.5, frames=3, per_frame=0", "per_frame is 0"),
        ("keep=0.5, frames=4", "21 tokens are not 4 frames"),
        ("keep=0.5, frames=5, per_frame=5", "5 frames of 5 tokens are 25"),
    ],
)
def test_wrong_arguments(arguments, named):
    with pytest.raises((StackError, TokenLabError), match=named):
        decoders.build(f"block + videollm_mod({arguments})(block)", N, leaks=True)


def test_wrong_inputs():
    item = VideoMixtureOfDepths(2, T, V)
    x = features()
    for frame in (FRAME.astype(np.float32), FRAME[:-1]):
        tokens = placed(x).replace(extra={"frame": jnp.broadcast_to(frame, (B, len(frame)))})
        with pytest.raises(ShapeError, match="expected an int for each token"):
            item.frame(tokens)
    for wrong in ({"layers": 1}, {"layers": 4, "shape": "square"}):
        with pytest.raises(TokenLabError, match="keep_ratios"):
            keep_ratios(**wrong)


def test_a_language_model_refuses_it():
    """Inside a frame it looks ahead, so on text alone it would leak."""
    with pytest.raises(StackError, match="leaks"):
        decoders.build("block + videollm_mod(keep=0.5, frames=3)(block)", N)
