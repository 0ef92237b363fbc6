from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.ops import mix


def numbered(batch: int, side: int = 16) -> jax.Array:
    """Image i is i everywhere, so that a pixel shows where it is from."""
    return jnp.broadcast_to(jnp.arange(batch, dtype=jnp.float32)[:, None, None, None], (batch, side, side, 1))


def targets(batch: int) -> jax.Array:
    return jnp.eye(batch)


@pytest.mark.parametrize("alpha", [0.4, 1.0, 4.0])
def test_shares_are_beta(alpha: float) -> None:
    drawn = np.asarray(mix._beta(jax.random.key(0), 20_000, alpha))
    # Kolmogorov-Smirnov: 0.0136 is exceeded by chance once in a thousand.
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).statistic < 0.0136


def test_mixup_is_the_equation() -> None:
    images = jax.random.normal(jax.random.key(1), (6, 4, 4, 3))
    mixed, share = mix.mixup(jax.random.key(0), images, 1.0)
    for i in range(6):
        wanted = share[i] * images[i] + (1 - share[i]) * images[i - 1]
        np.testing.assert_allclose(mixed[i], wanted, atol=1e-6)
    labels = mix.mix_targets(targets(6), share)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    for i in range(6):
        assert labels[i, i] == pytest.approx(float(share[i]), abs=1e-6)
        assert labels[i, i - 1] == pytest.approx(1 - float(share[i]), abs=1e-6)


def test_cutmix_cuts_one_rectangle_of_its_share() -> None:
    images = numbered(64)
    mixed, share = mix.cutmix(jax.random.key(0), images, 1.0)
    pixels = np.asarray(mixed[..., 0])
    for i in range(64):
        foreign = pixels[i] == (i - 1) % 64
        assert (foreign | (pixels[i] == i)).all()
        assert float(share[i]) == pytest.approx(1 - foreign.mean(), abs=1e-6)
        if foreign.any():
            rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
            assert foreign[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    # A mean share of 1/2 were it not for what is cut off at the border.
    assert 0.5 < float(share.mean()) < 0.75
    assert len(np.unique(np.asarray(share))) > 20


@pytest.mark.parametrize("way", [mix.mixup, mix.cutmix])
def test_a_row_without_weight_is_mixed_into_none(way: object) -> None:
    images = numbered(6).at[2].set(jnp.nan)
    valid = jnp.ones(6).at[2].set(0.0)
    mixed, share = way(jax.random.key(0), jnp.where(jnp.isnan(images), 99.0, images), 1.0, valid)
    np.testing.assert_array_equal(mixed[3], images[3])
    assert share[3] == 1


@pytest.mark.parametrize("way", [mix.mixup, mix.cutmix])
def test_compiles_without_loops_and_keeps_dtypes(way: object) -> None:
    images = numbered(4).astype(jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda key, x: way(key, x, 0.4))(jax.random.key(0), images))
    assert "while" not in text
    mixed, share = jax.jit(lambda key, x: way(key, x, 0.4))(jax.random.key(0), images)
    assert mixed.dtype == jnp.bfloat16 and share.dtype == jnp.float32


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"expected \[B, H, W, C\]"):
        mix.mixup(jax.random.key(0), jnp.zeros((4, 8, 8)), 1.0)
    with pytest.raises(
        ShapeError, match="images are uint8; expected floats to mix: end config.data.transform with"
    ):
        mix.mixup(jax.random.key(0), numbered(2).astype(jnp.uint8), 1.0)
    with pytest.raises(TokenLabError, match="alpha is 0; expected a number above 0"):
        mix.cutmix(jax.random.key(0), numbered(2), 0)
