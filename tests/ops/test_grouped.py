"""tokenlab.ops.grouped: every implementation against a loop over groups, forward and backward."""

from __future__ import annotations

import importlib.util
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import megablox

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.cost.flops import count
from tokenlab.ops import exchange, grouped

HERE = ("blocks", "ragged", "dense")  # what runs on a CPU
close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
equal = np.testing.assert_array_equal

ROWS, GROUPS, WIDTH, OUT = 40, 4, 3, 5
SIZES = {
    "even": [10, 10, 10, 10],
    "uneven": [1, 17, 9, 13],
    "first empty": [0, 20, 3, 17],
    "middle empty": [15, 0, 0, 25],
    "last empty": [33, 6, 1, 0],
    "all in one": [0, 0, 40, 0],
    "rows beyond": [5, 0, 11, 2],
    "nothing": [0, 0, 0, 0],
}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


@pytest.fixture(scope="module")
def arrays():
    """x, w, cotangent, bias."""
    generator = np.random.default_rng(0)
    shapes = ((ROWS, WIDTH), (GROUPS, WIDTH, OUT), (ROWS, OUT), (GROUPS, OUT))
    return tuple(generator.normal(size=shape).astype(np.float32) for shape in shapes)


def members(sizes):
    """The rows of each group."""
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@cache
def compiled(implementation):
    """(x, w, sizes, cotangent) -> y and gradients."""

    def run(x, w, sizes, cotangent):
        y, pull = jax.vjp(
            lambda x, w: grouped.grouped_matmul(x, w, sizes, implementation=implementation), x, w
        )
        return y, *pull(cotangent)

    return jax.jit(run)


@each_size
@pytest.mark.parametrize("implementation", [*HERE, None])
def test_every_implementation_is_the_loop(arrays, sizes, implementation):
    x, w, cotangent, _ = arrays
    y, dx, dw = compiled(implementation)(x, w, jnp.array(sizes), cotangent)
    exact, exact_dx, exact_dw = np.zeros_like(cotangent), np.zeros_like(x), np.zeros_like(w)
    for group, rows in enumerate(members(sizes)):
        exact[rows] = x[rows] @ w[group]
        exact_dx[rows] = cotangent[rows] @ w[group].T
        exact_dw[group] = x[rows].T @ cotangent[rows]
    close(y, exact)
    close(dx, exact_dx)
    close(dw, exact_dw)
    beyond = slice(sum(sizes), None)
    equal(y[beyond], 0)
    equal(dx[beyond], 0)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 23])
def test_blocks_take_any_number_of_rows(rows):
    """Rows that blocks do not divide, and more groups than rows."""
    x = np.random.default_rng(rows).normal(size=(rows, 2)).astype(np.float32)
    w = np.random.default_rng(0).normal(size=(30, 2, 2)).astype(np.float32)
    sizes = np.zeros(30, int)
    sizes[[3, 29]] = rows // 2, rows - rows // 2
    y = jax.jit(partial(grouped.grouped_matmul, implementation="blocks"))(x, w, sizes)
    close(y, np.concatenate([x[: rows // 2] @ w[3], x[rows // 2 :] @ w[29]]))


@pytest.mark.parametrize("implementation", HERE)
def test_the_dtype_is_that_of_the_rows(arrays, implementation):
    x, w, _, _ = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
    y = jax.jit(partial(grouped.grouped_matmul, implementation=implementation))(
        x, w, jnp.array([1, 17, 9, 13])
    )
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(
        compiled("dense")(*(np.asarray(a, np.float32) for a in (x, w)), jnp.array([1, 17, 9, 13]), arrays[2])[
            0
        ]
    )
    close(np.asarray(y, np.float32), exact, atol=3e-2, rtol=2e-2)


def made_to_run(implementation, monkeypatch):
    """The Pallas kernel is interpreted; the package is skipped where it is not installed."""
    if implementation == "tokamax":
        pytest.importorskip("tokamax", reason="the extra tokamax is not installed")
    if implementation == "megablox":
        monkeypatch.setattr(megablox, "gmm", partial(megablox.gmm, interpret=True))
        monkeypatch.setattr(grouped, "check_implementation", lambda name: name)


@pytest.mark.parametrize("implementation", grouped.IMPLEMENTATIONS)
def test_what_stands_behind_the_groups_reaches_nothing(implementation, arrays, monkeypatch):
    """NaN there, and in the gradient that comes back, as accelerators may leave it."""
    made_to_run(implementation, monkeypatch)
    x, w, cotangent, _ = (jnp.asarray(a) for a in arrays)
    sizes = jnp.array(SIZES["rows beyond"])
    exact = compiled("blocks")(x, w, sizes, cotangent)
    y, pull = jax.vjp(
        lambda x, w: grouped.grouped_matmul(x, w, sizes, implementation=implementation),
        x.at[18:].set(jnp.nan),
        w,
    )
    for found, wanted in zip((y, *pull(cotangent.at[18:].set(jnp.nan))), exact, strict=True):
        close(found, wanted)


@pytest.mark.parametrize("implementation", ["blocks", "ragged", "megablox", "tokamax"])
def test_every_row_counts_once_whatever_computes_it(implementation, arrays, monkeypatch):
    made_to_run(implementation, monkeypatch)
    x, w, _, _ = (jnp.asarray(a) for a in arrays)
    sizes = jnp.array(SIZES["uneven"])

    def total(x, w):
        return grouped.grouped_matmul(x, w, sizes, implementation=implementation).sum()

    assert count(total, x, w).flops == 2 * ROWS * WIDTH * OUT
    assert count(jax.value_and_grad(total, (0, 1)), x, w).flops == 6 * ROWS * WIDTH * OUT


def test_blocks_keep_their_size_between_eight_and_five_hundred():
    assert [grouped.block_rows(*case) for case in ((1, 1), (40, 4), (256, 8), (4096, 8), (10**6, 2))] == [
        8,
        8,
        16,
        256,
        512,
    ]


@each_size
def test_group_of(sizes):
    exact = np.full(ROWS, GROUPS)
    for group, rows in enumerate(members(sizes)):
        exact[rows] = group
    equal(grouped.group_of(jnp.array(sizes), ROWS), exact)


@pytest.fixture(scope="module")
def any_function():
    """(x, params, sizes, cotangent) -> y and gradients of a function with a bias, by blocks."""

    def fn(params, rows):
        return jnp.tanh(rows @ params["w"] + params["b"])

    def run(x, params, sizes, cotangent):
        y, pull = jax.vjp(lambda x, params: grouped.map_blocks(fn, params, x, sizes), x, params)
        return y, *pull(cotangent)

    return jax.jit(run)


@each_size
def test_map_blocks_is_the_loop(arrays, sizes, any_function):
    x, w, cotangent, b = arrays
    y, dx, params = any_function(x, {"w": w, "b": b}, jnp.array(sizes), cotangent)
    exact, exact_dx, exact_dw, exact_db = (
        np.zeros_like(cotangent),
        np.zeros_like(x),
        np.zeros_like(w),
        np.zeros_like(b),
    )
    for group, rows in enumerate(members(sizes)):
        exact[rows] = np.tanh(x[rows] @ w[group] + b[group])
        inner = cotangent[rows] * (1 - exact[rows] ** 2)
        exact_dx[rows] = inner @ w[group].T
        exact_dw[group], exact_db[group] = x[rows].T @ inner, inner.sum(0)
    close(y, exact)
    close(dx, exact_dx)
    close(params["w"], exact_dw)
    close(params["b"], exact_db)
    equal(y[sum(sizes) :], 0)


# What cannot run


def test_by_default_a_cpu_takes_blocks_and_pads_its_exchange():
    assert grouped.check_implementation(None) == "blocks"
    assert exchange.check_exchange(None) == "padded"
    for name in HERE:
        assert grouped.check_implementation(name) == name


@pytest.mark.parametrize("run", ["check", "matmul"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("megablox", "runs on TPU, this is cpu; leave it out, or take 'ragged'"),
        ("block", "implementation 'block' is unknown. Did you mean 'blocks'"),
        ("cuda", "implementation 'cuda' is unknown. Known: blocks"),
    ],
)
def test_implementations_that_cannot_run(name, says, run):
    with pytest.raises(TokenLabError, match=says) as error:
        if run == "check":
            grouped.check_implementation(name)
        else:
            grouped.grouped_matmul(jnp.ones((2, 1)), jnp.ones((1, 1, 1)), jnp.array([2]), implementation=name)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is not None, reason="tokamax is installed")
def test_a_package_that_is_not_installed():
    with pytest.raises(TokenLabError, match="needs the package tokamax, which is not installed"):
        grouped.check_implementation("tokamax")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ragged", "ragged-all-to-all, which XLA:CPU does not have; take 'padded'"),
        ("raged", "exchange 'raged' is unknown. Did you mean 'ragged'"),
    ],
)
def test_exchanges_that_cannot_run(name, says):
    with pytest.raises(TokenLabError, match=says):
        exchange.check_exchange(name)


@pytest.mark.parametrize(
    ("x", "w", "sizes"),
    [
        ((4, 3), (2, 3, 5), (3,)),
        ((4, 2), (2, 3, 5), (2,)),
        ((4, 3, 1), (2, 3, 5), (2,)),
        ((4, 3), (3, 5), (2,)),
    ],
)
def test_shapes_that_do_not_fit(x, w, sizes):
    with pytest.raises(ShapeError, match=r"x \[M, D\], w \[E, D, F\], sizes \[E\]; got"):
        grouped.grouped_matmul(jnp.ones(x), jnp.ones(w), jnp.ones(sizes, jnp.int32))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ([3, 2], r"sum to at most the 4 rows; got \[3, 2\]"),
        ([-1, 2], r"at least 0 .*; got \[-1, 2\]"),
        ([1.0, 2.0], "whole numbers; got float32"),
    ],
)
def test_sizes_that_are_no_groups_of_the_rows(sizes, says):
    x, w = jnp.ones((4, 3)), jnp.ones((2, 3, 5))
    with pytest.raises(ShapeError, match=says):
        grouped.grouped_matmul(x, w, jnp.array(sizes))


def test_rows_and_matrices_have_one_dtype():
    with pytest.raises(ShapeError, match="x is bfloat16 and w float32; cast one"):
        grouped.grouped_matmul(jnp.ones((4, 3), jnp.bfloat16), jnp.ones((2, 3, 5)), jnp.array([2, 2]))
