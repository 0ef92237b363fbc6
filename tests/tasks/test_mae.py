"""mae: the loss against numpy, of what is hidden alone, in normalised pixels or not; pictures; what does not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import data
from tokenlab.core.errors import ConfigError
from tokenlab.tasks import build

B, N, P = 3, 4, 8  # 2 x 2 patches of 2 x 2 pixels of 2 channels
PLACES = np.array([[0], [3], [1]], np.int32)
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (B, 4, 4, 2)).astype(np.float32)
LOGITS = RNG.normal(0, 1, (B, N, P)).astype(np.float32)


class Fixed:
    """A model with given predictions, losses and metrics."""

    patch, grid = 2, (2, 2)

    def __init__(self, logits: Any = LOGITS, places: Any = PLACES, losses: Any = None):
        aux = SimpleNamespace(metrics={})
        self.output = SimpleNamespace(logits=jnp.asarray(logits), places=places, losses=losses or {}, aux=aux)

    def apply(self, params: Any, batch: Any, *, train: bool, rng: Any) -> Any:
        del params, batch, train, rng
        return self.output


def loss(model: Any, image: Any = IMAGE, mask: Any = (1, 1, 0), **settings: Any) -> tuple[Any, Any]:
    batch = {"image": jnp.asarray(image), "mask": jnp.array(mask, jnp.float32)}
    return build({"name": "mae", **settings}).loss(model, None, batch, rng=KEY, train=True)


def patches(image: np.ndarray) -> np.ndarray:
    rows = [image[:, i : i + 2, j : j + 2].reshape(B, P) for i in (0, 2) for j in (0, 2)]
    return np.stack(rows, axis=1).astype(np.float64)


@pytest.mark.parametrize("normalize", [True, False])
def test_against_numpy(normalize: bool) -> None:
    wanted = patches(IMAGE)
    if normalize:
        wanted = (wanted - wanted.mean(-1, keepdims=True)) / np.sqrt(
            wanted.var(-1, ddof=1, keepdims=True) + 1e-6
        )
    each = ((LOGITS - wanted) ** 2).mean(-1)
    hidden = np.ones((B, N), bool)
    hidden[np.arange(B)[:, None], PLACES] = False
    value, metrics = loss(Fixed(), normalize=normalize)
    assert float(value) == pytest.approx(each[:2][hidden[:2]].mean(), rel=1e-5)
    assert [float(part) for part in metrics["loss"]] == pytest.approx([each[:2][hidden[:2]].sum(), 6])


def test_patches_that_were_seen_teach_nothing() -> None:
    """No gradient, neither of what is predicted there nor of the pixels that stand there."""

    def of(logits: Any, image: Any) -> Any:
        return loss(Fixed(logits), image, mask=(1, 1, 1))[0]

    of_logits, of_image = jax.grad(of, argnums=(0, 1))(jnp.asarray(LOGITS), jnp.asarray(IMAGE))
    for gradient in (np.asarray(of_logits), patches(np.asarray(of_image))):
        seen = np.take_along_axis(gradient, PLACES[..., None], axis=1)
        assert (seen == 0).all() and np.count_nonzero(gradient) == B * (N - 1) * P


def test_with_all_patches_seen_the_loss_is_zero() -> None:
    value, metrics = loss(Fixed(places=np.broadcast_to(np.arange(N, dtype=np.int32), (B, N))))
    assert float(value) == 0 and [float(part) for part in metrics["loss"]] == [0, 0]
    assert float(loss(Fixed(), mask=(0, 0, 0))[0]) == 0


def test_a_flat_patch_is_no_division_by_zero() -> None:
    value, _ = loss(Fixed(), np.full_like(IMAGE, 0.5))
    assert np.isfinite(float(value))


def test_losses_of_the_model_are_added_once() -> None:
    plain = float(loss(Fixed())[0])
    value, metrics = loss(Fixed(losses={"balance": jnp.float32(0.5)}))
    assert float(value) == pytest.approx(plain + 0.5) and float(metrics["balance"][0]) == 0.5


@pytest.mark.parametrize("normalize", [True, False])
def test_pictures(normalize: bool) -> None:
    """What was seen is the picture's own; a perfect prediction gives the whole picture back."""
    task = build({"name": "mae", "normalize": normalize, "value_range": (0.0, 1.0)})
    wanted, _, _ = task.target(jnp.asarray(IMAGE), 2)
    model = Fixed(wanted)
    seen, again = task.pictures(model, model.output, jnp.asarray(IMAGE))
    np.testing.assert_allclose(again, IMAGE, atol=1e-5)
    np.testing.assert_allclose(seen[0, :2, :2], IMAGE[0, :2, :2], atol=1e-5)
    assert (np.asarray(seen)[0, 2:] == 0.5).all()


def test_data_and_models_that_do_not_fit() -> None:
    task = build({"name": "mae"})
    assert task.num_outputs(data.build({"name": "digits"})) == 64
    with pytest.raises(ConfigError, match="mae needs pictures; data 'text' has ids"):
        task.num_outputs(SimpleNamespace(name="text", spec={"ids": ((4,), "int32")}))
    with pytest.raises(ConfigError, match="expected a masked autoencoder"):
        loss(Fixed(np.zeros((B, 10)), None))
    with pytest.raises(ConfigError, match="low < high"):
        build({"name": "mae", "value_range": (1.0, 0.0)})
