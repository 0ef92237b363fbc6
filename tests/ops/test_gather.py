"""tokenlab.ops.gather: against loops, gradients, exactness of both implementations, no communication."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.ops.gather import gather, inverse, keep_mask, restore, scatter, scatter_add
from tokenlab.ops.select import top_k

FEW = settings(max_examples=10, deadline=None, derandomize=True, database=None)
IMPLEMENTATIONS = [None, "gather", "one_hot"]
B, N, K, D = 2, 6, 4, 3
COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(-start)?\("
)
seeds = st.integers(0, 2**32 - 1)


def draw(seed, distinct, *trailing, dtype=np.float32):
    """x [B, N, ...], indices [B, K], y [B, K, ...]; the floats include huge and tiny ones."""
    rng = np.random.default_rng(seed)
    x, y = (
        rng.standard_normal((B, n, *trailing)) * 10.0 ** rng.integers(-20, 20, (B, n, *trailing))
        for n in (N, K)
    )
    if not np.issubdtype(dtype, np.floating):
        x, y = (rng.integers(0, 2 if dtype is bool else 1000, a.shape) for a in (x, y))
    if distinct:
        indices = np.stack([rng.permutation(N)[:K] for _ in range(B)])
    else:
        indices = rng.integers(0, N, (B, K))
    return x.astype(dtype), indices.astype(np.int32), y.astype(dtype)


@FEW
@given(seeds)
def test_against_loops(seed):
    x, repeated, y = draw(seed, False, D)
    _, distinct, _ = draw(seed, True, D)
    weights = np.random.default_rng(seed).standard_normal((B, K)).astype(np.float32)
    taken = np.empty_like(y)
    replaced, added, restored = x.copy(), x.astype(np.float64), np.full_like(x, 7)
    place = np.full((B, N), -1)
    for b in range(B):
        for k in range(K):
            taken[b, k] = x[b, repeated[b, k]]
            replaced[b, distinct[b, k]] = y[b, k]
            restored[b, distinct[b, k]] = y[b, k]
            added[b, repeated[b, k]] += np.float64(weights[b, k]) * y[b, k]
            place[b, distinct[b, k]] = k
    for implementation in IMPLEMENTATIONS:
        np.testing.assert_array_equal(gather(x, repeated, implementation=implementation), taken)
        np.testing.assert_array_equal(scatter(x, distinct, y, implementation=implementation), replaced)
        np.testing.assert_array_equal(restore(y, distinct, N, 7, implementation=implementation), restored)
        sums = scatter_add(x, repeated, y, weights, implementation=implementation)
        biggest = np.abs(x).max() + np.abs(y).max() * np.abs(weights).max()
        np.testing.assert_allclose(sums, added, rtol=1e-6, atol=1e-6 * biggest)
    np.testing.assert_array_equal(inverse(distinct, N), place)
    np.testing.assert_array_equal(keep_mask(distinct, N), place >= 0)


@pytest.mark.parametrize("trailing", [(), (D,), (2, D)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, bool])
def test_any_rank_and_dtype(trailing, dtype):
    x, indices, y = draw(0, True, *trailing, dtype=dtype)
    for implementation in IMPLEMENTATIONS if dtype is not bool else [None, "gather"]:
        taken = gather(x, indices, implementation=implementation)
        assert taken.dtype == dtype
        np.testing.assert_array_equal(taken, np.stack([x[b, indices[b]] for b in range(B)]))
        back = scatter(x, indices, taken, implementation=implementation)
        np.testing.assert_array_equal(back, x)


def test_bfloat16_moves_exactly():
    x, indices, _ = draw(1, False, D)
    x = jnp.asarray(x, jnp.bfloat16)
    for implementation in IMPLEMENTATIONS:
        taken = gather(x, indices, implementation=implementation)
        assert taken.dtype == jnp.bfloat16
        np.testing.assert_array_equal(taken.astype(np.float32), gather(x.astype(np.float32), indices))
    sums = scatter_add(x, indices, taken, np.ones((B, K), np.float32))
    assert sums.dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients(implementation):
    rng = np.random.default_rng(0)
    x, y, cotangent = (rng.standard_normal((B, n, D)).astype(np.float32) for n in (N, K, N))
    indices = np.array([[0, 2, 2, 5], [1, 1, 1, 3]], np.int32)
    weights = rng.standard_normal((B, K)).astype(np.float32)

    def taken(x):
        return (gather(x, indices, implementation=implementation) * y).sum()

    expected = np.zeros_like(x)
    for b in range(B):
        for k in range(K):
            expected[b, indices[b, k]] += y[b, k]
    np.testing.assert_allclose(jax.grad(taken)(x), expected, atol=1e-6)

    def added(x, y, weights):
        return (scatter_add(x, indices, y, weights, implementation=implementation) * cotangent).sum()

    rows = np.stack([cotangent[b, indices[b]] for b in range(B)])
    dx, dy, dw = jax.grad(added, (0, 1, 2))(x, y, weights)
    np.testing.assert_allclose(dx, cotangent, atol=1e-6)
    np.testing.assert_allclose(dy, rows * weights[..., None], atol=1e-5)
    np.testing.assert_allclose(dw, (rows * y).sum(-1), atol=1e-5)

    distinct = np.array([[0, 2, 4, 5], [3, 1, 0, 2]], np.int32)

    def replaced(x, y, fill):
        kept = scatter(x, distinct, y, implementation=implementation)
        return ((kept + restore(y, distinct, N, fill, implementation=implementation)) * cotangent).sum()

    dx, dy, df = jax.grad(replaced, (0, 1, 2))(x, y, np.zeros(D, np.float32))
    absent = ~np.asarray(keep_mask(distinct, N))[..., None]
    np.testing.assert_allclose(dx, np.where(absent, cotangent, 0), atol=1e-6)
    np.testing.assert_allclose(dy, 2 * np.stack([cotangent[b, distinct[b]] for b in range(B)]), atol=1e-5)
    np.testing.assert_allclose(df, np.where(absent, cotangent, 0).sum((0, 1)), atol=1e-5)


def test_taking_everything_is_a_bit_exact_identity_that_is_executed():
    x, _, _ = draw(2, True, D)
    x[0, 0, 0], x[0, 1, 1], x[1, 2, 2] = -0.0, np.inf, np.nan

    def there_and_back(x):
        indices = top_k(x[..., 0], N)
        return gather(x, indices), scatter(x, indices, gather(x, indices))

    program = jax.jit(there_and_back).lower(x).compile()
    assert re.search(r"\bgather\(", program.as_text()), "the gather was optimised away"
    for y in program(x):
        assert np.asarray(y).tobytes() == x.tobytes()


def test_an_index_out_of_range_shows():
    x = np.ones((1, 3, 1), np.float32)
    out = np.array([[0, 3, -1]], np.int32)
    np.testing.assert_array_equal(gather(x, out)[0, :, 0], [1, np.nan, np.nan])
    np.testing.assert_array_equal(scatter(x, out[:, 1:], 5 * x[:, 1:]), x)
    np.testing.assert_array_equal(scatter_add(x, out[:, 1:], 5 * x[:, 1:]), x)


def test_no_collective_when_the_batch_is_sharded():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(x, scores, valid, cotangent):
        def forward(x, weights):
            indices = top_k(scores, 4, protected=1, valid=valid)
            short = jnp.tanh(gather(x, indices))
            return scatter_add(scatter(x, indices, short), indices, short, gather(weights, indices))

        y, backward = jax.vjp(forward, x, scores)
        return (
            y,
            backward(cotangent),
            restore(gather(x, top_k(scores, 5)), top_k(scores, 5, order="score"), 8),
        )

    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        x, cotangent = (
            jax.device_put(np.random.default_rng(i).standard_normal((16, 8, 4)), rows) for i in (0, 1)
        )
        scores = jax.device_put(np.random.default_rng(2).standard_normal((16, 8)), rows)
        valid = jax.device_put(np.ones((16, 8), bool), rows)
        program = jax.jit(step).lower(x, scores, valid, cotangent).compile()
        assert not COLLECTIVE.findall(program.as_text())
        leaves = jax.tree.leaves(program(x, scores, valid, cotangent))
        assert all(leaf.sharding.shard_shape(leaf.shape)[0] == 2 for leaf in leaves)
        # The search itself must be able to find something.
        assert COLLECTIVE.findall(jax.jit(lambda x: x.sum(0)).lower(x).compile().as_text())


x6, i4, y4 = np.zeros((2, 6, 3), np.float32), np.zeros((2, 4), np.int32), np.zeros((2, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: gather(x6, i4.astype(np.float32)), ShapeError, "float32"),
        (lambda: gather(x6, i4[0]), ShapeError, "[B, K]"),
        (lambda: gather(x6, i4[:1]), ShapeError, "do not fit"),
        (lambda: gather(np.zeros(3), i4), ShapeError, "do not fit"),
        (lambda: gather(x6, i4, implementation="onehot"), TokenLabError, "Did you mean 'one_hot'"),
        (lambda: gather(x6 > 0, i4, implementation="one_hot"), TokenLabError, "bools"),
        (lambda: scatter(x6, i4, y4[:, :3]), ShapeError, "y has shape"),
        (lambda: scatter(x6.astype(np.int32), i4, y4), ShapeError, "cast"),
        (lambda: scatter_add(x6, i4, y4 > 0), ShapeError, "cast"),
        (lambda: scatter_add(x6, i4, y4, y4), ShapeError, "weights"),
        (lambda: scatter_add(x6, i4, y4, i4), ShapeError, "weights"),
        (lambda: restore(y4, i4, 6, np.zeros(5)), ShapeError, "fill"),
    ],
)
def test_rejects(call, error, says):
    with pytest.raises(error) as raised:
        call()
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
