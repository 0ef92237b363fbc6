"""tokenlab.ops.dispatch: the three forms against one loop in NumPy, and what the indexed form never builds."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.ops import route
from tokenlab.ops.dispatch import Bank, Indexed, Sorted, Weighted
from tokenlab.ops.grouped import grouped_matmul
from tokenlab.ops.route import Chosen, Taken

FEW = settings(max_examples=12, deadline=None, derandomize=True, database=None)
close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
equal = np.testing.assert_array_equal

# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

WIDTH = 3
# Compiled once for each: B, N, E, K, C.
SHAPES = ((2, 5, 3, 2, 2), (1, 7, 2, 1, 3), (2, 3, 5, 5, 3), (3, 4, 1, 1, 5))


def bank(weights):
    """Experts x -> x W_e, [E, D, D]."""
    return Bank(
        weights,
        lambda w, buffers: jnp.einsum("ebcd,edf->ebcf", buffers, w),
        lambda w, rows, sizes: grouped_matmul(rows, w, sizes),
    )


@quick
def compute(plan, weights, x):
    """[B, N, D]."""
    return plan.run(bank(weights), x)


def arrays(batch, n, experts):
    generator = np.random.default_rng(n)
    shapes = ((batch, n, WIDTH), (experts, WIDTH, WIDTH), (batch, n, WIDTH))
    return tuple(generator.normal(size=shape).astype(np.float32) for shape in shapes)


def queued(expert, weight, experts):
    """Choices with their places, those of padding (expert E) included."""
    return Chosen(expert, route.place(expert), jnp.where(expert < experts, weight, 0.0))


@cache
def forms(experts, places):
    """(expert, weight, x, weights, cotangent) -> of each form: y and gradients by choice weights, x and experts."""

    def plans(expert, weight):
        chosen = queued(expert, weight, experts)
        indexed = Indexed.of_choices(chosen, experts, places)
        kept = jnp.where(chosen.place < places, chosen.expert, experts)
        return {
            "indexed": indexed,
            "weighted": indexed.weights(),
            "sorted": Sorted(kept, chosen.weight, experts),
        }

    def run(expert, weight, x, weights, cotangent):
        def one(name):
            y, pull = jax.vjp(
                lambda weight, x, weights: plans(expert, weight)[name].run(bank(weights), x),
                weight,
                x,
                weights,
            )
            return y, *pull(cotangent)

        return {name: one(name) for name in ("indexed", "weighted", "sorted")}

    return quick(run)


def loop(expert, weight, x, weights, cotangent, places):
    """The same, choice by choice: all first choices of an example before its second ones."""
    y, dweight, dx, dweights = (np.zeros_like(a) for a in (x, weight, x, weights))
    batch, n, k = expert.shape
    for b in range(batch):
        used = np.zeros(len(weights), int)
        for choice in range(k):
            for t in range(n):
                e = expert[b, t, choice]
                if e == len(weights):
                    continue
                used[e] += 1
                if used[e] > places:
                    continue
                result = x[b, t] @ weights[e]
                y[b, t] += weight[b, t, choice] * result
                dweight[b, t, choice] = result @ cotangent[b, t]
                dx[b, t] += weight[b, t, choice] * weights[e] @ cotangent[b, t]
                dweights[e] += weight[b, t, choice] * np.outer(x[b, t], cotangent[b, t])
    return y, dweight, dx, dweights


def check(shape, expert, weight):
    batch, n, experts, _, places = shape
    expert, weight = np.asarray(expert, np.int32), np.asarray(weight, np.float32)
    given = (expert, weight, *arrays(batch, n, experts))
    exact = loop(*given, places)
    for name, found in forms(experts, places)(*given).items():
        for part, a, b in zip(("y", "weight", "x", "experts"), found, exact, strict=True):
            close(a, b, err_msg=f"{name}: {part}")


@FEW
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1), padding=st.sampled_from([0.0, 0.4]))
def test_three_forms_are_the_loop(shape, seed, padding):
    batch, n, experts, k, _ = shape
    generator = np.random.default_rng(seed)
    expert = np.argsort(generator.random((batch, n, experts)), -1)[..., :k]
    expert[generator.random((batch, n)) < padding] = experts
    check(shape, expert, generator.random((batch, n, k)))


@pytest.mark.parametrize("only", [0, 2])
def test_all_tokens_to_one_expert(only):
    """The others get nothing, and with two places three of five tokens are dropped."""
    shape = (2, 5, 3, 2, 2)
    expert = np.stack([np.full((2, 5), only), np.full((2, 5), 3)], -1)  # one choice each
    check(shape, expert, np.random.default_rng(0).random((2, 5, 2)))


def test_padding_alone():
    check((2, 5, 3, 2, 2), np.full((2, 5, 2), 3), np.ones((2, 5, 2)))


def test_tokens_dropped_everywhere_are_exact_zeros():
    expert = jnp.zeros((1, 4, 1), jnp.int32)
    x, weights, _ = arrays(1, 4, 2)
    plan = Indexed.of_choices(queued(expert, jnp.ones((1, 4, 1)), 2), 2, 3)
    for form in (plan, plan.weights()):
        y = compute(form, weights, x)
        equal(y[0, 3], 0)
        close(y[0, :3], x[0, :3] @ weights[0])


def test_experts_that_took_tokens():
    token = jnp.array([[[3, 0], [3, 1], [3, 2]]])
    weight = jnp.array([[[0.5, 1.0], [0.25, 0.0], [2.0, 1.0]]])
    x, weights, _ = arrays(1, 4, 3)
    exact = np.zeros_like(x)
    for e in range(3):
        for c in range(2):
            exact[0, token[0, e, c]] += weight[0, e, c] * (x[0, token[0, e, c]] @ weights[e])
    plan = Indexed.of_taken(Taken(token, weight), 4)
    for form in (plan, plan.weights()):
        close(compute(form, weights, x), exact)


def test_weighted_is_two_mixtures():
    x, weights, _ = arrays(2, 5, 3)
    into, back = np.random.default_rng(1).random((2, 2, 5, 3, 2), np.float32)
    y = compute(Weighted(into, back), weights, x)
    slots = np.einsum("bnec,bnd->becd", into, x)
    close(y, np.einsum("bnec,becd->bnd", back, np.einsum("becd,edf->becf", slots, weights)))


def test_identity_experts_with_weights_that_sum_to_one_give_back_the_tokens():
    expert = jnp.array([[[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]]] * 2)
    weight = jnp.full((2, 5, 2), 0.5)
    x, _, _ = arrays(2, 5, 3)
    same = np.tile(np.eye(WIDTH, dtype=np.float32), (3, 1, 1))
    plan = Indexed.of_choices(queued(expert, weight, 3), 3, 5)
    for form in (plan, plan.weights(), Sorted(expert, weight, 3)):
        equal(compute(form, same, x), x)


def test_rows_are_sorted_by_expert_and_tokens_within_one():
    expert = jnp.array([[[1, 0], [3, 3]], [[0, 1], [1, 2]]])  # 3 is padding
    order, sizes = Sorted(expert, jnp.ones((2, 2, 2)), 3).order()
    equal(order, [1, 4, 0, 5, 6, 7, 2, 3])
    equal(sizes, [2, 3, 1])
    rows, again = Sorted(expert, jnp.ones((2, 2, 2)), 3).dispatch(jnp.arange(4.0).reshape(2, 2, 1))
    equal(rows[:, 0], [0, 2, 0, 2, 3, 3, 1, 1])
    equal(again, sizes)


def test_what_stands_behind_the_groups_is_never_used():
    """Accelerators leave it undefined; padding sorts there, and its weight of 0 would not undo a NaN."""
    expert = jnp.array([[[0, 2], [3, 3], [2, 1], [0, 1], [3, 3]]])
    weight = jnp.where(expert < 3, jax.random.uniform(jax.random.key(0), (1, 5, 2)), 0.0)
    x, weights, _ = (jnp.asarray(a) for a in arrays(1, 5, 3))

    def groups(w, rows, sizes):
        there = jnp.arange(len(rows)) < sizes.sum()
        return jnp.where(there[:, None], grouped_matmul(rows, w, sizes), jnp.nan)

    plan = Sorted(expert, weight, 3)
    y = quick(lambda x: plan.run(Bank(weights, None, groups), x))(x)
    close(y, compute(plan, weights, x))
    equal(y[0, jnp.array([1, 4])], 0)


@pytest.mark.parametrize("form", ["indexed", "weighted", "sorted"])
def test_transport_rounds_what_travels_and_nothing_else(form):
    expert = jnp.array([[[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]]])
    weight = jax.random.uniform(jax.random.key(0), (1, 5, 2))
    x, weights, _ = (jnp.asarray(a) for a in arrays(1, 5, 3))

    def plan(transport):
        if form == "sorted":
            return Sorted(expert, weight, 3, transport)
        indexed = Indexed.of_choices(queued(expert, weight, 3), 3, 5, transport)
        return indexed if form == "indexed" else indexed.weights()

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    @quick
    def run(x):
        if form == "sorted":  # on one device, what goes in and out is rounded all the same
            rows, sizes = plan(None).dispatch(rounded(x))
            by_hand = plan(None).combine(rounded(grouped_matmul(rows, weights, sizes)))
        else:
            buffers = plan(None).dispatch(rounded(x))
            by_hand = plan(None).combine(rounded(bank(weights).buffers(weights, buffers)))
        return by_hand, *(plan(transport).run(bank(weights), x) for transport in ("bfloat16", None))

    by_hand, y, exact = run(x)
    close(y, by_hand, atol=1e-6)
    assert y.dtype == jnp.float32
    assert 1e-4 < np.abs(y - exact).max() < 0.1


def test_boost_changes_the_gradient_of_experts_alone():
    expert = jnp.array([[[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]]])
    weight = jax.random.uniform(jax.random.key(0), (1, 5, 2))
    x, weights, cotangent = (jnp.asarray(a) for a in arrays(1, 5, 3))

    @quick
    def run(boost):
        y, pull = jax.vjp(
            lambda weight, x, weights: Sorted(expert, weight, 3, boost=boost).run(bank(weights), x),
            weight,
            x,
            weights,
        )
        return y, *pull(cotangent)

    plain, tripled = run(None), run(jnp.full((1, 5, 2), 3.0))
    equal(tripled[0], plain[0])
    equal(tripled[1], plain[1])
    close(tripled[2], 3 * plain[2])
    close(tripled[3], 3 * plain[3])


def test_a_plan_is_for_its_number_of_tokens():
    plan = Indexed.of_taken(Taken(jnp.zeros((1, 2, 2), jnp.int32), jnp.ones((1, 2, 2))), 4)
    with pytest.raises(ShapeError, match="made for 4 tokens, got 5"):
        plan.dispatch(jnp.ones((1, 5, 3)))
    plan = Sorted(jnp.zeros((1, 4, 1), jnp.int32), jnp.ones((1, 4, 1)), 2)
    with pytest.raises(ShapeError, match=r"made for tokens \(1, 4\), got \(1, 5\)"):
        plan.dispatch(jnp.ones((1, 5, 3)))


@pytest.mark.parametrize("form", ["indexed", "sorted"])
@pytest.mark.parametrize("bad", [-1, 3])
def test_experts_that_do_not_exist(form, bad):
    expert, ones = jnp.array([[[0], [bad], [2]]]), jnp.ones((1, 3, 1))
    with pytest.raises(TokenLabError, match=rf"experts are 0\.\.1, or 2 for padding; got {min(bad, 0)}\.\."):
        if form == "indexed":
            Indexed.of_choices(Chosen(expert, jnp.zeros((1, 3, 1), jnp.int32), ones), 2, 3)
        else:
            Sorted(expert, ones, 2).dispatch(jnp.ones((1, 3, WIDTH)))


# Memory


def largest(jaxpr):
    """Elements of the largest array that a program, or one inside it, makes."""
    found = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            found += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(found, default=0)


@pytest.mark.parametrize("chooser", ["tokens", "experts"])
def test_the_indexed_form_never_builds_n_by_e_by_c(chooser):
    """Routing, forward and backward; the weighted form does build it, so the walk would find it."""
    experts, width = 8, 4

    def made(n, form):
        places = n // experts

        def total(gates, x, weights):
            if chooser == "tokens":
                plan = Indexed.of_choices(route.tokens_choice(gates, 1), experts, places)
            else:
                plan = Indexed.of_taken(route.experts_choice(gates, places), n)
            return (plan if form == "indexed" else plan.weights()).run(bank(weights), x).sum()

        shapes = ((1, n, experts), (1, n, width), (experts, width, width))
        given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return largest(jax.make_jaxpr(jax.value_and_grad(total, (0, 1, 2)))(*given).jaxpr)

    for n in (64, 128, 256):
        assert made(n, "indexed") <= n * experts  # the gates themselves
        assert made(n, "weighted") == n * n
