"""Mixing images with each other, and their targets with them: mixup and cutmix, on the device.

Each example meets the one before it in the batch; batches are shuffled, so that is a random one, and under a sharded
batch only one row a device changes hands.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.core.errors import ShapeError, TokenLabError

QUANTILES = 4096


def mixup(
    key: jax.Array, images: jax.Array, alpha: float, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """lambda x_i + (1 - lambda) x_j, with lambda ~ Beta(alpha, alpha), an own one an example.

    Args:
      key: typed random key.
      images: [B, H, W, C] float.
      alpha: > 0; 0.2 mixes little, 1 evenly.
      valid: [B], 0 for a row that must not be mixed into another; None for all ones.

    Returns:
      Images as they came in, and the share [B] float32 of each that is its own: for `mix_targets`.

    Raises: ShapeError for images that are not [B, H, W, C], TokenLabError for alpha <= 0.

    Source: Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018 (arXiv 1710.09412), eq. 1 and 2.
    """
    _check(images, alpha)
    share = _beta(key, images.shape[0], alpha)
    share = _whole_where_invalid(share, valid)
    mixed = images * share[:, None, None, None].astype(images.dtype)
    mixed += _other(images) * (1 - share)[:, None, None, None].astype(images.dtype)
    return mixed, share


def cutmix(
    key: jax.Array, images: jax.Array, alpha: float, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """A rectangle of every image comes from another; its share is the area that stayed.

    The rectangle has sides sqrt(1 - lambda) of the image's, lambda ~ Beta(alpha, alpha), and a centre anywhere; what is
    beyond the border is cut off, and the share follows what is left.

    Arguments, results and errors as of `mixup`.

    Source: Yun et al., "CutMix", ICCV 2019 (arXiv 1905.04899), eq. 1 and 2.
    """
    _check(images, alpha)
    batch, rows, columns = images.shape[:3]
    area, place = jax.random.split(key)
    side = jnp.sqrt(1 - _beta(area, batch, alpha))
    centre = jax.random.uniform(place, (2, batch))

    def inside(size: int, middle: jax.Array) -> jax.Array:
        half = jnp.floor(side * size / 2)
        at = jnp.arange(size, dtype=jnp.float32)
        distance = at - jnp.floor(middle * size)[:, None]
        return (distance >= -half[:, None]) & (distance < half[:, None])

    cut = inside(rows, centre[0])[:, :, None] & inside(columns, centre[1])[:, None, :]
    if valid is not None:
        cut &= (_other(valid) > 0)[:, None, None]
    share = 1 - jnp.mean(cut.astype(jnp.float32), axis=(1, 2))
    return jnp.where(cut[..., None], _other(images), images), share


def _other(array: jax.Array) -> jax.Array:
    return jnp.roll(array, 1, axis=0)


def mix_targets(targets: jax.Array, share: jax.Array) -> jax.Array:
    """Targets [B, classes] mixed as the images were: share [B] of each is its own, the rest of the one before it."""
    share = share[:, None].astype(targets.dtype)
    return targets * share + _other(targets) * (1 - share)


def _whole_where_invalid(share: jax.Array, valid: jax.Array | None) -> jax.Array:
    return share if valid is None else jnp.where(_other(valid) > 0, share, 1.0)


def _beta(key: jax.Array, batch: int, alpha: float) -> jax.Array:
    """[batch] draws of Beta(alpha, alpha), by its quantiles: rejection would loop an unknown number of times."""
    table = jnp.asarray(_quantiles(float(alpha)))
    place = jax.random.uniform(key, (batch,)) * (QUANTILES - 1)
    low = jnp.floor(place).astype(jnp.int32)
    low = jnp.minimum(low, QUANTILES - 2)
    return table[low] + (place - low) * (table[low + 1] - table[low])


@functools.cache
def _quantiles(alpha: float) -> np.ndarray:
    from scipy import special  # a third of a second, for runs that mix alone

    return special.betaincinv(alpha, alpha, np.linspace(0, 1, QUANTILES)).astype(np.float32)


def _check(images: jax.Array, alpha: float) -> None:
    if images.ndim != 4:
        raise ShapeError(f"images have shape {images.shape}; expected [B, H, W, C].")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ShapeError(
            f"images are {images.dtype}; expected floats to mix: end config.data.transform with value_range(-1, 1)."
        )
    if not alpha > 0:
        raise TokenLabError(f"alpha is {alpha!r}; expected a number above 0.")
