"""mixed_next_token: losses of text and of pictures against numpy, their weights, and dropped tokens."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks.test_next_token import KEY, B, Fixed, N, V, by_hand, logits
from tests.tasks.test_next_token import batch as of_text
from tokenlab.core.errors import ConfigError
from tokenlab.tasks import build


def batch(seed=0):
    given = of_text(seed)
    modality = np.random.default_rng(seed + 9).integers(0, 2, (B, N)).astype(np.int32)
    return {**given, "target_modality": modality, "bytes": given["bytes"] * (modality == 0)}


def of(given, modality):
    """The batch, in which targets of the other modality do not count."""
    return {**given, "weight": given["weight"] * (given["target_modality"] == modality)}


def loss(model, given, *, train=False, **settings):
    task = build({"name": "mixed_next_token", **settings})
    value, metrics = task.loss(model, None, given, rng=KEY, train=train)
    return float(value), {name: (float(total), float(count)) for name, (total, count) in metrics.items()}


def test_against_numpy():
    given = batch()
    value, metrics = loss(Fixed(logits()), given)
    nats, sizes, *_ = by_hand(logits(), given)
    assert value == pytest.approx(nats.mean(), rel=1e-5)
    assert metrics["loss"] == pytest.approx((nats.sum(), len(nats)), rel=1e-5)
    for modality, name in enumerate(("text", "image")):
        own, _, right, _ = by_hand(logits(), of(given, modality))
        assert 0 < len(own) < len(nats)
        assert metrics[f"loss_{name}"] == pytest.approx((own.sum(), len(own)), rel=1e-5)
        assert metrics[f"accuracy_{name}"] == pytest.approx((right.sum(), len(own)))
    text, *_ = by_hand(logits(), of(given, 0))
    assert metrics["bits_per_byte"] == pytest.approx((text.sum() / math.log(2), sizes.sum()), rel=1e-5)
    assert len(metrics) == 6


def test_without_pictures_it_is_next_token():
    given = {**batch(), "target_modality": np.zeros((B, N), np.int32)}
    mixed, metrics = loss(Fixed(logits()), given, z_loss=0.1, train=True)
    plain, own = build({"name": "next_token", "z_loss": 0.1}).loss(
        Fixed(logits()), None, given, rng=KEY, train=True
    )
    assert mixed == pytest.approx(float(plain), rel=1e-6)
    for name in ("loss", "bits_per_byte", "z_loss"):
        assert metrics[name] == pytest.approx(tuple(map(float, own[name])), rel=1e-6)
    assert metrics["loss_image"] == metrics["accuracy_image"] == (0, 0)


@pytest.mark.parametrize(("text", "image"), [(1.0, 0.0), (0.0, 1.0), (0.25, 3.0), (1e-4, 1e-4)])
def test_weights_are_of_training_alone(text, image):
    given, weights = batch(), {"text_weight": text, "image_weight": image}
    value, metrics = loss(Fixed(logits()), given, train=True, **weights)
    sums = [by_hand(logits(), of(given, modality))[0] for modality in (0, 1)]
    total = text * sums[0].sum() + image * sums[1].sum()
    assert value == pytest.approx(total / (text * len(sums[0]) + image * len(sums[1])), rel=1e-5)
    assert metrics == loss(Fixed(logits()), given)[1]
    assert loss(Fixed(logits()), given, **weights) == loss(Fixed(logits()), given)


def test_a_weight_of_zero_gives_no_gradient():
    given = batch()
    task = build({"name": "mixed_next_token", "image_weight": 0.0})
    gradient = jax.grad(lambda x: task.loss(Fixed(x), None, given, rng=KEY, train=True)[0])(logits())
    moved = np.abs(np.asarray(gradient)).sum(-1) > 0
    counts = (given["weight"] * given["mask"][:, None] > 0) & (given["target_modality"] == 0)
    np.testing.assert_array_equal(moved, counts)


def test_without_any_target_the_loss_is_zero_and_weighs_nothing():
    value, metrics = loss(Fixed(logits()), {**batch(), "mask": np.zeros(B, np.float32)}, train=True)
    assert value == 0 and all(pair == (0, 0) for pair in metrics.values())


def test_losses_of_the_model_are_added_once():
    given, losses = batch(), {"router_loss": jnp.float32(0.5)}
    value, metrics = loss(Fixed(logits(), losses, {"share": (jnp.float32(3), jnp.float32(4))}), given)
    assert value == pytest.approx(loss(Fixed(logits()), given)[0] + 0.5)
    assert metrics["router_loss"] == (0.5, 1) and metrics["share"] == (3, 4)


def test_tokens_that_are_left_are_judged_by_their_own_targets():
    given, places = batch(), jnp.broadcast_to(jnp.array([1, 2, 5]), (B, 3))
    part = {name: leaf if leaf.ndim == 1 else leaf[:, [1, 2, 5]] for name, leaf in given.items()}
    left = logits()[:, [1, 2, 5]]
    assert loss(Fixed(left, places=places), given) == loss(Fixed(left), part)


def test_settings_and_data_that_do_not_fit_are_refused():
    for name in ("text_weight", "image_weight"):
        for value in (-1.0, float("inf"), float("nan")):
            with pytest.raises(ConfigError, match=f"config.task.{name} must be a number >= 0"):
                build({"name": "mixed_next_token", name: value})
    with pytest.raises(ConfigError, match="text_weight and config.task.image_weight are both 0"):
        build({"name": "mixed_next_token", "text_weight": 0.0, "image_weight": 0.0})
    task = build({"name": "mixed_next_token"})
    assert (task.primary, task.better) == ("loss", "min")
    text = SimpleNamespace(name="plays", spec={"ids": (), "target": ()}, vocab_size=257)
    with pytest.raises(ConfigError, match="needs rows of pictures and text; data 'plays' has ids, target"):
        task.num_outputs(text)
    both = SimpleNamespace(name="both", spec={"ids": (), "target_modality": ()}, vocab_size=V)
    assert task.num_outputs(both) == V
