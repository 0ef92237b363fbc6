"""tokenlab.ops.route: capacities, choices, places and losses against loops in NumPy."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.ops import route

FEW = settings(max_examples=12, deadline=None, derandomize=True, database=None)
close = partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5)
equal = np.testing.assert_array_equal

# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Compiled once for each; B, N, E.
SHAPES = ((2, 5, 3), (1, 7, 1), (2, 3, 5))


@st.composite
def problems(draw):
    """Gates with ties, some padding (never a whole example), and a number of choices up to E."""
    batch, n, experts = draw(st.sampled_from(SHAPES))
    k = draw(st.sampled_from(sorted({1, min(2, experts), experts})))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    gates = generator.integers(1, 5, (batch, n, experts)).astype(np.float32) / 8
    valid = generator.random((batch, n)) < draw(st.sampled_from([0.5, 1.0]))
    valid[:, generator.integers(n)] = True
    return gates, valid, k


def ranked(row):
    """Indices from the largest down, ties to the lower index."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def queue(expert, experts, priority):
    """Places of one group: choice by choice, within one by priority, then by position."""
    n, k = expert.shape
    places, used = np.zeros((n, k), int), [0] * (experts + 1)
    for choice in range(k):
        for token in ranked(priority):
            places[token, choice] = used[expert[token, choice]]
            used[expert[token, choice]] += 1
    return places


# Capacity


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "options", "expected"),
    [
        (16, 4, 1.0, {}, 4),
        (12, 4, 0.75, {}, 3),  # 2.25 goes up
        (12, 4, 0.5, {"choices": 2, "multiple_of": 4}, 4),
        (12, 4, 0.65, {"choices": 2}, 4),
        (10, 3, 1.0, {}, 4),  # E divides nothing
        (10, 7, 1.05, {"choices": 7}, 11),
        (100, 7, 0.07, {}, 1),  # 100 * 0.07 / 7 is a little more than 1 in binary
        (1, 8, 1.0, {}, 1),
        (11, 4, 1.0, {"rounding": "round"}, 3),
        (11, 4, 1.6, {"rounding": "round"}, 4),
        (10, 4, 1.0, {"rounding": "round"}, 2),  # 2.5: halves to even
        (14, 4, 1.0, {"rounding": "round"}, 4),  # 3.5
        (9, 4, 0.8, {"rounding": "round", "multiple_of": 4}, 4),
        (8, 4, 1.0, {"multiple_of": 2}, 2),
    ],
)
def test_capacity(tokens, experts, factor, options, expected):
    places = route.capacity(tokens, experts, factor, **options)
    assert places == expected
    assert type(places) is int


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((0, 4, 1.0), {}, "tokens must be at least 1; got 0"),
        ((8, 0, 1.0), {}, "experts must be at least 1; got 0"),
        ((8, 4, 1.0), {"choices": 0}, "choices must be at least 1; got 0"),
        ((8, 4, 0.0), {}, "above 0; got 0.0"),
        ((8, 4, -1.0), {}, "above 0"),
        ((8, 4, math.nan), {}, "above 0; got nan"),
        ((8, 4, math.inf), {}, "above 0; got inf"),
        ((8, 4, 1.0), {"rounding": "floor"}, "rounding 'floor' is unknown. Known: ceil, round"),
        ((8, 4, 1.0), {"multiple_of": 0}, "multiple_of must be at least 1"),
        ((8, 64, 1.0), {"rounding": "round"}, "rounds to 0: 8 tokens"),
    ],
)
def test_capacity_rejects(arguments, options, says):
    with pytest.raises(TokenLabError, match=says) as error:
        route.capacity(*arguments, **options)
    assert "\n" not in str(error.value)


# Soft


def test_unit_is_the_formula_and_takes_zeros():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    x[1] = 0
    close(quick(route.unit)(x), x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6))
    close(quick(partial(route.unit, axis=0))(x), x / np.sqrt((x**2).sum(0, keepdims=True) + 1e-6))
    assert np.isfinite(quick(jax.grad(lambda x: route.unit(x).sum()))(x)).all()


soft_weights = quick(route.soft_weights)


def test_soft_weights_sum_to_one_over_tokens_and_over_slots():
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 5, 3, 2))
    dispatch, combine = map(np.asarray, soft_weights(logits))
    close(dispatch.sum(1), 1.0)
    close(combine.sum((2, 3)), 1.0)
    exact = np.exp(np.asarray(logits, np.float64))
    close(dispatch, exact / exact.sum(1, keepdims=True))
    close(combine, exact / exact.sum((2, 3), keepdims=True))


def test_soft_weights_leave_padding_out():
    logits = jax.random.normal(jax.random.key(0), (3, 5, 2, 2))
    valid = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    dispatch, combine = map(np.asarray, soft_weights(logits, valid))
    alone = soft_weights(np.asarray(logits)[1:2, [0, 2]])
    close(dispatch[1, [0, 2]], np.asarray(alone[0])[0])
    close(combine[1, [0, 2]], np.asarray(alone[1])[0])
    for weights in (dispatch, combine):
        equal(weights[~valid], 0)
        assert np.isfinite(weights).all()

    def total(logits):
        dispatch, combine = route.soft_weights(logits, valid)
        return (dispatch**2).sum() + (combine**2).sum()

    gradient = np.asarray(quick(jax.grad(total))(logits))
    assert np.isfinite(gradient).all() and np.abs(gradient[0]).min() > 0
    equal(gradient[~valid], 0)


# Choices and places

choose = quick(route.choose, static_argnums=1)
place = quick(route.place)


def test_ties_go_to_the_lower_expert():
    expert, weight = choose(jnp.array([[0.25, 0.5, 0.5, 0.25]]), 3)
    equal(expert, [[1, 2, 0]])
    equal(weight, [[0.5, 0.5, 0.25]])


def test_a_bias_ranks_and_does_not_weigh():
    gates = jnp.array([[0.5, 0.25, 0.125]])
    expert, weight = choose(gates, 2, rank_by=gates + jnp.array([0.0, 0.0, 1.0]))
    equal(expert, [[2, 0]])
    equal(weight, [[0.125, 0.5]])
    # The gradient reaches the gates that were chosen, and the bias not at all.
    biased = jax.grad(lambda bias, gates: route.choose(gates, 2, rank_by=gates + bias)[1].sum(), (0, 1))
    bias, gradient = quick(biased)(jnp.zeros(3), gates)
    equal(bias, 0)
    equal(gradient, [[1, 1, 0]])


@pytest.mark.parametrize("k", [0, -1, 4, True, 2.0])
def test_the_number_of_choices_is_checked(k):
    with pytest.raises(TokenLabError, match=r"of 3 experts; k must be a whole number in 1..3"):
        route.choose(jnp.ones((1, 3)), k)
    with pytest.raises(TokenLabError, match="whole number"):
        route.tokens_choice(jnp.ones((1, 2, 3)), k)


tokens_choice = quick(route.tokens_choice, static_argnums=1, static_argnames="batch_priority")
experts_choice = quick(route.experts_choice, static_argnums=1)


@FEW
@given(problem=problems(), batch_priority=st.booleans())
def test_tokens_choice_is_the_loop(problem, batch_priority):
    gates, valid, k = problem
    chosen = tokens_choice(gates, k, batch_priority=batch_priority, valid=valid)
    chosen = jax.tree.map(np.asarray, chosen)
    batch, n, experts = gates.shape
    for b in range(batch):
        expert = np.array([ranked(gates[b, t])[:k] if valid[b, t] else [experts] * k for t in range(n)])
        equal(chosen.expert[b], expert)
        weight = [[gates[b, t, e] if e < experts else 0.0 for e in expert[t]] for t in range(n)]
        equal(chosen.weight[b], np.asarray(weight, np.float32))
        priority = gates[b].max(-1) if batch_priority else np.zeros(n)
        there = expert < experts
        equal(chosen.place[b][there], queue(expert, experts, priority)[there])


@FEW
@given(problem=problems(), share=st.sampled_from([0.2, 0.6, 1.0]))
def test_experts_choice_is_the_loop(problem, share):
    gates, valid, _ = problem
    batch, n, experts = gates.shape
    places = max(1, round(share * n))
    taken = jax.tree.map(np.asarray, experts_choice(gates, places, valid=valid))
    assert taken.token.shape == (batch, experts, places)
    for b in range(batch):
        for e in range(experts):
            best = ranked(np.where(valid[b], gates[b, :, e], -1.0))[:places]
            equal(taken.token[b, e], best)
            equal(taken.weight[b, e], [gates[b, t, e] if valid[b, t] else 0.0 for t in best])


@pytest.mark.parametrize("places", [0, 6, -1])
def test_an_expert_takes_tokens_that_exist(places):
    with pytest.raises(TokenLabError, match=rf"takes {places} tokens, of 5 there are; expected 1..5"):
        route.experts_choice(jnp.ones((1, 5, 2)), places)


def test_all_first_choices_queue_before_second_ones():
    expert = jnp.array([[[0, 1], [1, 0], [0, 1]]])
    equal(place(expert), [[[0, 1], [0, 2], [1, 2]]])
    equal(place(expert, priority=jnp.array([[1.0, 2.0, 3.0]])), [[[1, 2], [0, 2], [0, 1]]])


# Losses


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@quick
def losses(clean, noisy, expert, valid):
    """All of them, of the same tokens; two choices, and noise of 0.3."""
    gates = jax.nn.softmax(noisy)
    return {
        "importance": route.importance_loss(jax.nn.softmax(clean), valid),
        "load": route.load_loss(clean, noisy, 2, 0.3, valid),
        "gshard": route.gshard_loss(gates, expert, valid),
        "balance": route.balance_loss(gates, expert, valid),
        "z": route.z_loss(noisy, valid),
        "entropy": route.entropy(gates, valid),
        "shares": route.load(expert, 4),
    }


def squared_variation(x):
    return x.var() / x.mean() ** 2


@pytest.fixture(scope="module")
def routed():
    """Clean logits, noisy logits, std, valid, experts chosen (E for padding): B 3, N 6, E 4, K 2."""
    generator = np.random.default_rng(3)
    clean, noise = generator.normal(size=(2, 3, 6, 4))
    valid = generator.random((3, 6)) < 0.7
    noisy = clean + 0.3 * noise
    expert = np.argsort(-noisy, -1)[..., :2]
    return clean, noisy, 0.3, valid, np.where(valid[..., None], expert, 4)


@pytest.mark.parametrize("padded", [False, True])
def test_losses_are_their_equations(routed, padded):
    clean, noisy, std, valid, expert = routed
    if not padded:
        valid, expert = np.ones_like(valid), np.argsort(-noisy, -1)[..., :2]
    groups = [np.flatnonzero(row) for row in valid]
    gates = softmax(noisy)
    loads, gshard = [], []
    for b, rows in enumerate(groups):
        chances = []
        for t in rows:
            threshold = np.sort(noisy[b, t])[-2]
            chances.append(1 - stats.norm.cdf((threshold - clean[b, t]) / std))
        loads.append(squared_variation(np.mean(chances, 0)))
        first = np.bincount(expert[b, rows, 0], minlength=4) / len(rows)
        gshard.append(4**2 * np.mean(first * gates[b, rows].mean(0)))
    share = np.bincount(expert[valid].reshape(-1), minlength=4) / (2 * valid.sum())
    exact = {
        "importance": np.mean(
            [squared_variation(softmax(clean[b, rows]).sum(0)) for b, rows in enumerate(groups)]
        ),
        "load": np.mean(loads),
        "gshard": np.mean(gshard),
        "balance": 4 * (share * gates[valid].mean(0)).sum(),
        "z": (np.log(np.exp(noisy).sum(-1))[valid] ** 2).mean(),
        "entropy": -(gates * np.log(gates)).sum(-1)[valid].mean(),
        "shares": share,
    }
    given = jnp.float32(clean), jnp.float32(noisy), jnp.int32(expert), valid if padded else None
    for name, found in losses(*given).items():
        close(found, exact[name], rtol=1e-4, err_msg=name)


balance_loss = quick(route.balance_loss)


def test_load_leaves_out_what_was_dropped(routed):
    expert = jnp.array([[[0, 1], [0, 2], [3, 3]]])
    kept = jnp.array([[[True, False], [True, True], [True, True]]])
    close(route.load(expert, 3, kept), [2 / 3, 0, 1 / 3])  # 3 is padding
    equal(route.load(jnp.full((1, 2, 1), 3), 3), 0)


def test_the_balance_loss_is_one_when_either_side_is_even():
    generator = np.random.default_rng(0)
    probs = jnp.float32(softmax(generator.normal(size=(2, 6, 3))))
    spread = jnp.arange(12).reshape(2, 6, 1) % 3
    close(balance_loss(probs, spread), 1.0)
    close(balance_loss(jnp.full((2, 6, 3), 1 / 3), jnp.zeros((2, 6, 1), jnp.int32)), 1.0)
    skewed = jnp.tile(jnp.array([0.8, 0.1, 0.1]), (2, 6, 1))
    close(balance_loss(skewed, jnp.zeros((2, 6, 1), jnp.int32)), 2.4)


def test_the_balance_loss_is_over_the_whole_batch(routed):
    """Moving tokens between examples changes nothing; a mean over examples would change."""
    _, noisy, _, _, _ = routed
    gates = jnp.float32(softmax(noisy))
    expert = jnp.int32(np.argsort(-noisy, -1)[..., :2])
    whole = balance_loss(gates, expert)
    close(whole, balance_loss(gates.reshape(1, 18, 4), expert.reshape(1, 18, 2)))
    assert abs(whole - np.mean([balance_loss(gates[i : i + 1], expert[i : i + 1]) for i in range(3)])) > 1e-4


def test_balance_counts_carry_no_gradient_and_the_threshold_does(routed):
    clean, noisy, std, _, _ = routed
    clean, noisy = jnp.float32(clean), jnp.float32(noisy)
    # With f held fixed the balance loss is linear in the probabilities: its gradient is E f / tokens.
    expert = jnp.int32(np.argsort(-noisy, -1)[..., :2])
    gradient = quick(jax.grad(route.balance_loss))(jax.nn.softmax(noisy), expert)
    close(gradient, np.broadcast_to(4 * route.load(expert, 4) / 18, (3, 6, 4)))
    gradient = np.asarray(quick(jax.grad(lambda noisy: route.load_loss(clean, noisy, 2, std)))(noisy))
    second = np.zeros_like(gradient, bool)
    np.put_along_axis(second, np.asarray(expert)[..., 1:], True, -1)
    assert np.abs(gradient[second]).max() > 0
    equal(gradient[~second], 0)


def test_losses_of_no_tokens_are_zero():
    gates, nobody = jnp.full((1, 2, 3), 1 / 3), jnp.zeros((1, 2), bool)
    padding = jnp.full((1, 2, 1), 3)
    found = quick(
        lambda: (
            route.importance_loss(gates, nobody),
            route.gshard_loss(gates, padding, nobody),
            route.balance_loss(gates, padding, nobody),
            route.z_loss(gates, nobody),
        )
    )()
    equal(found, 0)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
def test_the_load_loss_needs_noise(std):
    logits = jnp.zeros((1, 2, 3))
    with pytest.raises(TokenLabError, match="needs router noise"):
        route.load_loss(logits, logits, 1, std)


# Tokens


@pytest.mark.parametrize(
    ("x", "valid", "says"),
    [
        (jnp.zeros((2, 3)), None, r"tokens \[B, N, D\].*float32\[2, 3\]"),
        (jnp.zeros((1, 2, 3, 4)), None, r"\[1, 2, 3, 4\]"),
        (jnp.zeros((0, 3, 4)), None, r"at least one token; got float32\[0, 3, 4\]"),
        (jnp.zeros((2, 0, 4)), None, r"at least one token; got float32\[2, 0, 4\]"),
        (jnp.zeros((2, 3, 4), jnp.int32), None, "floating dtype; got int32"),
        (jnp.zeros((2, 3, 4)), jnp.ones((2, 4), bool), r"valid is bool\[2, 4\]; expected bool\[2, 3\]"),
        (jnp.zeros((2, 3, 4)), jnp.ones((2, 3)), "valid is float32"),
        (jnp.zeros((2, 3, 4)), jnp.array([[True] * 3, [False] * 3]), "example 1 is padding alone"),
    ],
)
def test_tokens_that_do_not_fit(x, valid, says):
    with pytest.raises(ShapeError, match=says) as error:
        route.check_tokens(x, valid)
    assert "\n" not in str(error.value)


def test_tokens_that_fit():
    x = jnp.zeros((2, 3, 4), jnp.bfloat16)
    route.check_tokens(x, None)
    route.check_tokens(x, jnp.array([[True, False, False]] * 2))
    jax.jit(lambda x, valid: route.check_tokens(x, valid))(
        x, jnp.zeros((2, 3), bool)
    )  # not seen while compiling
