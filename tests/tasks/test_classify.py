from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ConfigError
from tokenlab.tasks import build, examples_of
from tokenlab.tasks.classify import ClassifyConfig


class Pixels:
    """A model whose logits are an image's pixels, and which keeps the images it saw."""

    def apply(self, params, batch, *, train, rng):
        self.seen = batch["image"]
        logits = batch["image"].reshape(batch["image"].shape[0], -1) * params
        return SimpleNamespace(logits=logits, losses={}, aux=SimpleNamespace(metrics={}))


def batch(size: int = 8) -> dict[str, jax.Array]:
    return {
        "image": jax.random.normal(jax.random.key(1), (size, 3, 3, 1)),
        "label": jnp.arange(size, dtype=jnp.int32) % 9,
        "mask": jnp.ones(size),
    }


def run(settings: dict[str, float], *, train: bool = True, seed: int = 0):
    model = Pixels()
    task = build({"name": "classify", **settings})
    loss, metrics = task.loss(model, jnp.float32(1), batch(), rng=jax.random.key(seed), train=train)
    return model.seen, float(loss), metrics


@pytest.mark.parametrize("settings", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
def test_mixing_changes_images_and_targets_in_training_only(settings: dict[str, float]) -> None:
    images = np.asarray(batch()["image"])
    seen, loss, _ = run(settings)
    assert not np.array_equal(seen, images)
    np.testing.assert_array_equal(seen, run(settings)[0])  # the same step, the same images
    assert not np.array_equal(seen, run(settings, seed=1)[0])
    seen, plain, _ = run(settings, train=False)
    np.testing.assert_array_equal(seen, images)
    assert plain == run({}, train=False)[1]


def test_the_loss_is_of_the_mixed_targets() -> None:
    seen, loss, _ = run({"mixup": 0.5})
    images, label = np.asarray(batch()["image"], np.float64), np.asarray(batch()["label"])
    logits = np.asarray(seen, np.float64).reshape(8, 9)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    total = 0.0
    for i in range(8):
        share = float(((seen[i] - images[i - 1]) / (images[i] - images[i - 1])).mean())
        total -= share * log_p[i, label[i]] + (1 - share) * log_p[i, label[i - 1]]
    assert loss == pytest.approx(float(total) / 8, abs=1e-4)


def test_top5_ties_count_their_share() -> None:
    task = build({"name": "classify"})
    flat = {**batch(), "image": jnp.zeros((8, 3, 3, 1))}
    _, metrics = task.loss(Pixels(), jnp.float32(1), flat, rng=jax.random.key(0), train=False)
    total, weight = metrics["top5_accuracy"]
    assert float(total / weight) == pytest.approx(5 / 9)
    assert "top5_accuracy" not in run({}, train=True)[2]


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_bad_settings(name: str) -> None:
    with pytest.raises(ConfigError, match=f"config.task.{name} must be at least 0; got -1"):
        ClassifyConfig(**{name: -1})


def test_the_sigmoid_loss_is_the_sum_of_binary_ones() -> None:
    _, loss, _ = run({"loss": "sigmoid"}, train=False)
    logits = np.asarray(batch()["image"], np.float64).reshape(8, -1)
    target = np.eye(9)[np.asarray(batch()["label"])]
    each = np.log1p(np.exp(-logits)) * target + np.log1p(np.exp(logits)) * (1 - target)
    np.testing.assert_allclose(loss, each.sum(axis=1).mean(), rtol=1e-5)


def test_examples_are_called_by_what_the_data_have() -> None:
    """As progress and results say it: images/s of pictures alone."""
    names = {"image": "images", "ids": "texts", "series": "windows", "sound": "examples"}
    for key, name in names.items():
        source = SimpleNamespace(spec={key: ((3,), "float32"), "label": ((), "int32")})
        assert examples_of(build({"name": "classify"}), source) == name
        assert examples_of(build({"name": "next_token"}), source) == "sequences"
