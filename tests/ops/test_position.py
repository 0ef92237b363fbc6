"""tokenlab.ops.position: rotary embedding, the fixed table, resampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.ops.gather import gather
from tokenlab.ops.position import resample_grid, rope, sincos_2d

B, N, H, DH = 2, 5, 3, 8


def draw(seed=0):
    return np.random.default_rng(seed).standard_normal((B, N, H, DH)).astype(np.float32)


@pytest.mark.parametrize("axes", [1, 2])
def test_rope_turns_complex_pairs(axes):
    x, theta = draw(), 100.0
    coords = np.random.default_rng(1).integers(-5, 50, (B, N, axes))
    width, half = DH // axes, DH // axes // 2
    expected = np.empty(x.shape)
    for b, n, h, a, i in np.ndindex(B, N, H, axes, half):
        first, second = a * width + i, a * width + i + half
        turn = np.exp(1j * coords[b, n, a] * theta ** (-2 * i / width))
        turned = (x[b, n, h, first] + 1j * x[b, n, h, second]) * turn
        expected[b, n, h, first], expected[b, n, h, second] = turned.real, turned.imag
    np.testing.assert_allclose(rope(x, coords, theta), expected, atol=1e-5)
    if axes == 1:
        np.testing.assert_array_equal(rope(x, coords[..., 0], theta), rope(x, coords, theta))


def test_rope_depends_on_differences_only():
    q, k = draw(0), draw(1)
    coords = np.random.default_rng(2).random((B, N, 2)).astype(np.float32) * 10
    product = jnp.einsum("bnhd,bmhd->bhnm", rope(q, coords), rope(k, coords))
    moved = jnp.einsum("bnhd,bmhd->bhnm", rope(q, coords + 3), rope(k, coords + 3))
    np.testing.assert_allclose(moved, product, atol=1e-4)
    np.testing.assert_array_equal(rope(q, np.zeros((B, N))), q)
    np.testing.assert_allclose(
        jnp.linalg.norm(rope(q, coords), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5
    )


def test_rope_follows_the_tokens_when_they_are_dropped():
    x, coords = draw(), np.broadcast_to(np.arange(N), (B, N))
    indices = np.array([[4, 0, 2], [1, 3, 0]], np.int32)
    np.testing.assert_array_equal(
        rope(gather(x, indices), gather(coords, indices)), gather(rope(x, coords), indices)
    )


def test_rope_in_bfloat16_turns_in_float32():
    x, coords = jnp.asarray(draw(), jnp.bfloat16), np.full((B, N), 4097)  # 4097 is no bfloat16 number
    turned = rope(x, coords)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, rope(x.astype(jnp.float32), coords).astype(jnp.bfloat16))


def test_sincos_2d():
    table = np.asarray(sincos_2d(3, 4, 16))
    assert table.shape == (12, 16) and table.dtype == np.float32
    frequency = [1.0, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3), 1e-4]
    for row in range(3):
        for col in range(4):
            expected = [f(c * w) for c in (col, row) for f in (np.sin, np.cos) for w in frequency]
            np.testing.assert_allclose(table[row * 4 + col], expected, atol=1e-6)
    assert len(np.unique(table.round(6), axis=0)) == 12


def keys_weights(old, new):
    """Bicubic interpolation by the book: [new, old] weights of Keys' kernel (a = -0.5), widened when shrinking."""
    stretch = max(old / new, 1.0)
    weights = np.zeros((new, old))
    for i in range(new):
        for j in range(old):
            t = abs((i + 0.5) * old / new - 0.5 - j) / stretch
            weights[i, j] = (
                (1.5 * t - 2.5) * t * t + 1 if t < 1 else max(2 - t, 0) and ((-0.5 * t + 2.5) * t - 4) * t + 2
            )
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((4, 6), (8, 3)), ((6, 5), (2, 5))])
def test_resample_grid_by_hand(old, new):
    table = np.random.default_rng(0).standard_normal((old[0] * old[1], 3)).astype(np.float32)
    rows, cols = (keys_weights(a, b) for a, b in zip(old, new, strict=True))
    expected = np.einsum("ij,kl,jld->ikd", rows, cols, table.reshape(*old, 3)).reshape(-1, 3)
    found = resample_grid(table, old, new)
    assert found.shape == (new[0] * new[1], 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    constant = np.ones_like(table)
    np.testing.assert_allclose(resample_grid(constant, old, new), 1, atol=1e-6)


def test_resample_grid_of_equal_grids_is_the_table_itself():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((12, 3)), jnp.bfloat16)
    assert resample_grid(table, (3, 4), (3, 4)) is table
    assert resample_grid(table, (3, 4), (4, 3)).dtype == jnp.bfloat16
    gradient = jax.grad(lambda t: resample_grid(t, (3, 4), (6, 8)).sum())(table.astype(jnp.float32))
    np.testing.assert_allclose(gradient.sum(), 6 * 8 * 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: rope(draw()[0], np.zeros((B, N))), ShapeError, "[B, N, H, Dh]"),
        (lambda: rope(draw(), np.zeros((B, N + 1))), ShapeError, "do not fit"),
        (lambda: rope(draw(), np.zeros((B, N, 3))), ShapeError, "a multiple of 6"),
        (lambda: rope(draw(), np.zeros((B, N, 0))), ShapeError, "axes"),
        (lambda: rope(draw(), np.zeros((B, N)), theta=0.0), TokenLabError, "theta"),
        (lambda: sincos_2d(2, 2, 10), ShapeError, "multiple of 4"),
        (lambda: sincos_2d(2, 2, 4), ShapeError, "at least 8"),
        (lambda: sincos_2d(0, 2, 8), ShapeError, "0 x 2"),
        (lambda: resample_grid(np.zeros((13, 2)), (3, 4), (4, 4)), ShapeError, "special tokens"),
        (lambda: resample_grid(np.zeros((12, 2)), (3, 4), (0, 4)), ShapeError, "at least 1"),
        (lambda: resample_grid(np.zeros((1, 12, 2)), (3, 4), (4, 4)), ShapeError, "needs [12, D]"),
    ],
)
def test_rejects(call, error, says):
    with pytest.raises(error) as raised:
        call()
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
