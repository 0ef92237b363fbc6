"""tokenlab.ops.merge: matching against loops, conservation, exact identities, gradients, no communication."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.ops.gather import gather
from tokenlab.ops.merge import (
    bipartite_soft_matching,
    fuse,
    make_plan,
    merge,
    merge_limit,
    merge_weighted,
    unmerge,
)
from tokenlab.ops.select import top_k

FEW = settings(max_examples=8, deadline=None, derandomize=True, database=None)
B, N, C, D = 2, 9, 4, 3
COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(-start)?\("
)
# (r, protected, order): few, because each compiles.
cases = st.sampled_from([(3, 0, "position"), (3, 0, "reference"), (4, 1, "position"), (2, 2, "reference")])
seeds = st.integers(0, 2**32 - 1)


# Compiled: op by op each primitive would be a program of its own.
matching = jax.jit(bipartite_soft_matching, static_argnames=("r", "protected", "order"))
weighted = jax.jit(merge_weighted)
undone = jax.jit(unmerge)


def draw(seed):
    rng = np.random.default_rng(seed)
    metric, x = rng.standard_normal((B, N, C)), rng.standard_normal((B, N, D))
    return metric.astype(np.float32), x.astype(np.float32), rng.integers(1, 5, (B, N)).astype(np.float32)


def by_hand(metric, r, protected, order, sources, destinations):
    """One example, as the paper has it: groups of inputs by output token, and (source, destination) pairs."""
    unit = metric.astype(np.float64) / np.linalg.norm(metric.astype(np.float64), axis=1, keepdims=True)
    best = {s: max((unit[s] @ unit[d], -place, d) for place, d in enumerate(destinations)) for s in sources}
    ranked = sorted(sources, key=lambda s: -best[s][0])
    pairs = [(s, best[s][2]) for s in ranked[:r]]
    unmerged = sorted(ranked[r:]) if protected else ranked[r:]
    kept = [*range(protected), *unmerged, *destinations]
    if order == "position":
        kept = sorted(kept)
    return pairs, kept


def check_plan(plan, metric, r, protected, order, sources, destinations):
    for b in range(metric.shape[0]):
        pairs, kept = by_hand(metric[b], r, protected, order, sources[b], destinations[b])
        np.testing.assert_array_equal(plan.source[b], [s for s, _ in pairs])
        np.testing.assert_array_equal(plan.destination[b], [d for _, d in pairs])
        np.testing.assert_array_equal(plan.kept[b], kept)
        carries = {t: kept.index(t) for t in kept} | {s: kept.index(d) for s, d in pairs}
        np.testing.assert_array_equal(plan.assignment[b], [carries[t] for t in range(metric.shape[1])])


@partial(jax.jit, static_argnums=(3, 4, 5))
def match_and_merge(metric, x, size, r, protected, order):
    plan = bipartite_soft_matching(metric, r, protected=protected, order=order)
    average, total = merge_weighted(plan, x, size)
    return plan, average, total, merge(plan, x, "amax"), unmerge(plan, average)


@FEW
@given(seeds, cases)
def test_matching_and_average_against_loops(seed, case):
    r, protected, order = case
    metric, x, size = draw(seed)
    plan, average, total, largest, back = match_and_merge(metric, x, size, *case)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(plan))
    unprotected = np.arange(protected, N)
    sets = [unprotected[unprotected % 2 == odd].tolist() for odd in (0, 1)]
    check_plan(plan, metric, r, protected, order, *([s] * B for s in sets))
    assignment = np.asarray(plan.assignment)
    for b in range(B):
        for m in range(N - r):
            group = assignment[b] == m
            weight = size[b, group].astype(np.float64)
            np.testing.assert_allclose(average[b, m], (weight @ x[b, group]) / weight.sum(), atol=1e-6)
            np.testing.assert_array_equal(total[b, m], weight.sum())
            np.testing.assert_array_equal(largest[b, m], x[b, group].max(0))
    average, total = np.asarray(average), np.asarray(total)
    # Conservation: the sizes, the weighted sum, and every input in exactly one output.
    np.testing.assert_array_equal(total.sum(1), size.sum(1))
    weighted = (average * total[..., None]).sum(1)
    np.testing.assert_allclose(weighted, (x * size[..., None]).sum(1), atol=1e-4)
    assert all(set(row) == set(range(N - r)) for row in assignment.tolist())
    # Protected tokens come through untouched.
    np.testing.assert_array_equal(average[:, :protected], x[:, :protected])
    # Undone, each input holds its group's value.
    for b in range(B):
        np.testing.assert_array_equal(back[b], average[b, assignment[b]])


@FEW
@given(seeds, st.booleans())
def test_partition_of_each_example(seed, static):
    metric, _, _ = draw(seed)
    rng = np.random.default_rng(seed)
    shuffled = np.stack([1 + rng.permutation(N - 1) for _ in range(B)])
    if static:
        shuffled = np.broadcast_to(shuffled[:1], shuffled.shape)
    sources, destinations = shuffled[:, :3], shuffled[:, 3:]
    partition = (
        (shuffled[0, :3], shuffled[0, 3:]) if static else (jnp.asarray(sources), jnp.asarray(destinations))
    )
    plan = bipartite_soft_matching(metric, 3, protected=1, order="reference", partition=partition)
    check_plan(plan, metric, 3, 1, "reference", sources.tolist(), destinations.tolist())


@pytest.mark.parametrize("order", ["position", "reference"])
def test_no_merge_is_a_bit_exact_identity(order):
    metric, x, size = draw(0)
    x[0, 0, 0] = -0.0
    size = size * np.float32(0.3)  # size * x / size would round

    def nothing(metric, x, size):
        plan = bipartite_soft_matching(metric, 0, protected=1, order=order)
        return merge_weighted(plan, x, size), unmerge(plan, x), merge(plan, x), merge(plan, x, "amax")

    program = jax.jit(nothing).lower(metric, x, size).compile()
    assert re.search(r"\bgather\(", program.as_text()), "the gather was optimised away"
    (average, total), *others = program(metric, x, size)
    assert np.asarray(total).tobytes() == size.tobytes()
    for y in (average, *others):
        assert np.asarray(y).tobytes() == x.tobytes()


def test_tokens_that_do_not_merge_are_bit_exact():
    metric, x, size = draw(1)
    size = size * np.float32(0.3)
    plan = matching(metric, 2)
    average, total = weighted(plan, x, size)
    for b in range(B):
        for m, token in enumerate(plan.kept[b]):
            if (plan.assignment[b] == m).sum() == 1:
                assert np.asarray(average[b, m]).tobytes() == x[b, token].tobytes()
                assert total[b, m] == size[b, token]


def test_scale_of_the_metric_and_duplicates():
    metric, x, size = draw(2)
    plan = matching(metric, 3)
    np.testing.assert_array_equal(matching(1e-12 * metric, 3).assignment, plan.assignment)
    # Exact duplicates merge first, keep their value, and unmerge to what they were.
    x[:, 1::2] = x[:, 0:-1:2]
    plan = matching(x, 4)
    average, _ = weighted(plan, x, np.ones_like(size))
    np.testing.assert_allclose(undone(plan, average), x, atol=1e-6)
    # A row of zeros has no direction: its similarity is 0, not NaN.
    metric = np.abs(metric)
    metric[:, 4:6] = 0
    plan = matching(metric, 4)
    assert 4 not in np.asarray(plan.source) and 5 not in np.asarray(plan.destination)


def test_following_tokens_through_two_merges():
    metric, x, size = draw(3)
    first = matching(metric, 3)
    x1, s1 = weighted(first, x, size)
    second = matching(x1, 2)
    x2, s2 = weighted(second, x1, s1)
    owner = np.asarray(gather(second.assignment, first.assignment))
    for b in range(B):
        for m in range(N - 5):
            group = owner[b] == m
            np.testing.assert_allclose(
                x2[b, m], size[b, group] @ x[b, group] / size[b, group].sum(), atol=1e-6
            )
            assert s2[b, m] == size[b, group].sum()


def test_padding():
    """Padding changes nothing about how the valid tokens merge, whatever stands in it."""
    metric, x, _ = draw(4)
    alone = matching(metric, 2, protected=1)
    garbage = np.full((B, 5, C), np.nan, np.float32)
    valid = np.arange(N + 5) < N
    valid = np.broadcast_to(valid, (B, N + 5))
    padded = matching(np.concatenate([metric, garbage], 1), 2, protected=1, valid=valid)
    np.testing.assert_array_equal(padded.source, alone.source)
    np.testing.assert_array_equal(padded.destination, alone.destination)
    # Asked for more than the valid ones can give: all valid sources first, then padding into padding.
    valid = np.arange(N) < 4
    valid = np.broadcast_to(valid, (B, N))
    plan = matching(metric, 4, valid=valid)
    assert set(np.asarray(plan.source)[:, :2].ravel()) == {0, 2}
    assert set(np.asarray(plan.destination)[:, :2].ravel()) <= {1, 3}
    assert (np.asarray(plan.destination)[:, 2:] >= 4).all()
    # Padding that must merge into a valid token weighs nothing there.
    valid = np.zeros((B, N), bool)
    valid[:, [0, 1, 3, 5, 7]] = True
    plan = matching(metric, 4, valid=valid)
    average, total = weighted(plan, x, valid.astype(np.float32))
    for b in range(B):
        group = {1, 3, 5, 7} - {int(plan.destination[b, 0])}
        for token in group:
            m = int(plan.assignment[b, token])
            np.testing.assert_array_equal(average[b, m], x[b, token])
            assert total[b, m] == 1
    # A group of size 0 keeps its kept token's value.
    average, total = weighted(plan, x, np.zeros((B, N), np.float32))
    np.testing.assert_array_equal(average, gather(x, plan.kept))
    np.testing.assert_array_equal(total, 0)


def test_own_plan_and_own_order():
    plan = make_plan(np.array([[3, 1]]), np.array([[0, 0]]), np.array([[4, 0, 2]]))
    np.testing.assert_array_equal(plan.assignment, [[1, 1, 2, 1, 0]])
    np.testing.assert_array_equal(merge(plan, np.array([[1, 2, 4, 8, 16]])), [[16, 11, 4]])
    np.testing.assert_array_equal(
        merge(plan, np.array([[1, 2, 4, 8, 16]]) == 8, "amax"), [[False, True, False]]
    )


def test_values_have_gradients_and_the_metric_has_none():
    metric, x, size = draw(5)
    cotangent = np.random.default_rng(0).standard_normal((B, N - 3, D)).astype(np.float32)

    def loss(metric, x, size):
        average, total = weighted(matching(metric, 3), x, size)
        return (average * cotangent).sum() + total.sum()

    dm, dx, ds = jax.jit(jax.grad(loss, (0, 1, 2)))(metric, x, size)
    np.testing.assert_array_equal(dm, 0)
    plan = matching(metric, 3)
    average, total = weighted(plan, x, size)
    back, share = undone(plan, cotangent), size / np.asarray(undone(plan, total))
    np.testing.assert_allclose(dx, back * share[..., None], atol=1e-6)
    centred = x - undone(plan, average)
    expected = 1 + (back * centred).sum(-1) / undone(plan, total)
    np.testing.assert_allclose(ds, expected, atol=1e-5)
    # Also where nothing has weight.
    _, dx, ds = jax.jit(jax.grad(loss, (0, 1, 2)))(metric, x, np.zeros_like(size))
    assert np.isfinite(dx).all() and np.isfinite(ds).all()


def test_bfloat16_averages_in_float32():
    metric, x, size = draw(6)
    half = jnp.asarray(x, jnp.bfloat16)
    plan = matching(jnp.asarray(metric, jnp.bfloat16), 3)
    average, total = weighted(plan, half, size)
    assert average.dtype == jnp.bfloat16 and total.dtype == jnp.float32
    exact, _ = weighted(plan, half.astype(jnp.float32), size)
    np.testing.assert_array_equal(average, exact.astype(jnp.bfloat16))


def test_fuse():
    _, x, scores = draw(7)
    keep = top_k(scores, 4, protected=1)
    fused = fuse(x, scores, keep)
    assert fused.shape == (B, 1, D)
    for b in range(B):
        dropped = [n for n in range(N) if n not in np.asarray(keep[b])]
        assert 0 not in dropped
        np.testing.assert_allclose(fused[b, 0], scores[b, dropped] @ x[b, dropped], rtol=1e-5)
    np.testing.assert_array_equal(fuse(x, scores, top_k(scores, N)), 0)
    dx, ds = jax.jit(jax.grad(lambda x, s: fuse(x, s, keep).sum(), (0, 1)))(x, scores)
    np.testing.assert_array_equal(dx != 0, np.broadcast_to(ds[..., None] != 0, dx.shape))
    np.testing.assert_array_equal((np.asarray(ds) != 0).sum(1), N - 5)
    assert fuse(jnp.asarray(x, jnp.bfloat16), scores, keep).dtype == jnp.bfloat16


def test_no_collective_when_the_batch_is_sharded():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(metric, x, size, draws, cotangent):
        order = jnp.argsort(draws, axis=1, stable=True)

        def forward(x, size):
            plan = bipartite_soft_matching(metric, 3, protected=1)
            average, total = merge_weighted(plan, x, size)
            random = bipartite_soft_matching(x, 2, partition=(order[:, :4], order[:, 4:]))
            fused = fuse(x, draws, top_k(draws, 3, protected=1))
            return unmerge(plan, average) + unmerge(random, merge(random, x)) + fused, total

        y, backward = jax.vjp(forward, x, size)
        return y, backward((cotangent, y[1]))

    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        rng = np.random.default_rng(0)
        shapes = ((16, 9, 4), (16, 9, 3), (16, 9), (16, 9), (16, 9, 3))
        arrays = [jax.device_put(rng.random(shape), rows) for shape in shapes]
        program = jax.jit(step).lower(*arrays).compile()
        assert not COLLECTIVE.findall(program.as_text())
        leaves = jax.tree.leaves(program(*arrays))
        assert all(leaf.sharding.shard_shape(leaf.shape)[0] == 2 for leaf in leaves)
        assert COLLECTIVE.findall(jax.jit(lambda x: x.sum(0)).lower(arrays[0]).compile().as_text())


@pytest.mark.parametrize(
    ("n", "protected", "most"), [(13, 0, 6), (13, 1, 6), (13, 2, 5), (2, 1, 0), (1, 1, 0), (4, 0, 2)]
)
def test_limit(n, protected, most):
    assert merge_limit(n, protected) == most
    metric = np.random.default_rng(0).standard_normal((1, n, 2)).astype(np.float32)
    plan = matching(metric, most, protected=protected)
    assert plan.kept.shape == (1, n - most)
    assert (np.asarray(plan.source) >= protected).all() and (np.asarray(plan.destination) >= protected).all()
    with pytest.raises(TokenLabError, match=f"0..{most}"):
        bipartite_soft_matching(metric, most + 1, protected=protected)


metric9 = np.zeros((2, 9, 4), np.float32)
even, odd = np.arange(0, 9, 2), np.arange(1, 9, 2)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"r": -1}, TokenLabError, "0..4"),
        ({"r": 2.0}, TokenLabError, "0..4"),
        ({"r": True}, TokenLabError, "0..4"),
        ({"protected": 10}, TokenLabError, "0..9"),
        ({"order": "positions"}, TokenLabError, "Did you mean 'position'"),
        ({"metric": metric9[0]}, ShapeError, "[B, N, C]"),
        ({"metric": metric9.astype(int)}, ShapeError, "floats"),
        ({"valid": np.ones((2, 8), bool)}, ShapeError, "valid"),
        ({"partition": even}, TokenLabError, "tuple"),
        ({"partition": (even, even)}, ShapeError, "holds 10 tokens"),
        ({"partition": (even, odd - 1)}, TokenLabError, "exactly once"),
        ({"partition": (even.astype(float), odd)}, ShapeError, "sources have dtype"),
        ({"partition": (np.tile(even, (3, 1)), odd)}, ShapeError, "sources have shape"),
        ({"partition": (odd, even), "r": 5}, TokenLabError, "0..4"),
        ({"partition": (np.arange(9), odd[:0]), "r": 1}, TokenLabError, "0..0"),
    ],
)
def test_matching_rejects(change, error, says):
    with pytest.raises(error) as raised:
        bipartite_soft_matching(**({"metric": metric9, "r": 2} | change))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda plan: merge(plan, metric9[:, :8]), ShapeError, "x has shape"),
        (lambda plan: merge(plan, metric9, "mean"), TokenLabError, "amax"),
        (lambda plan: merge(plan, metric9 > 0), ShapeError, "bool"),
        (lambda plan: merge_weighted(plan, metric9, np.ones((2, 9, 1))), ShapeError, "size has shape"),
        (lambda plan: merge_weighted(plan, metric9[:, :8], np.ones((2, 9))), ShapeError, "x has shape"),
        (lambda plan: unmerge(plan, metric9), ShapeError, "y has shape"),
        (lambda plan: make_plan(plan.source, plan.destination[:, :1], plan.kept), ShapeError, "one shape"),
        (lambda plan: make_plan(plan.source, plan.destination, plan.kept * 1.0), ShapeError, "dtype"),
        (lambda plan: fuse(metric9, np.ones((2, 8)), plan.kept), ShapeError, "scores"),
        (lambda plan: fuse(metric9, np.ones((2, 9)), np.ones((2, 3))), ShapeError, "indices"),
    ],
)
def test_applying_rejects(call, error, says):
    with pytest.raises(error) as raised:
        call(bipartite_soft_matching(metric9, 2))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
