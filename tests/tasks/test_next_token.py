"""next_token: loss and metrics against numpy, what counts and what does not, tokens that were dropped on the way."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import decoders
from tokenlab.core.errors import ConfigError, NameLookupError
from tokenlab.tasks import build

B, N, V = 3, 6, 9
KEY = jax.random.key(0)


class Fixed:
    """A model with given logits, losses and metrics."""

    def __init__(self, logits, losses=None, metrics=None, places=None):
        self.output = SimpleNamespace(
            logits=logits, losses=losses or {}, aux=SimpleNamespace(metrics=metrics or {}), places=places
        )

    def apply(self, params, batch, *, train, rng):
        del params, batch, train, rng
        return self.output


def batch(seed=0, length=N):
    rng = np.random.default_rng(seed)
    return {
        "target": rng.integers(0, V, (B, length)).astype(np.int32),
        "weight": (rng.random((B, length)) < 0.7).astype(np.float32),
        "bytes": rng.integers(0, 4, (B, length)).astype(np.float32),
        "mask": np.array([1, 1, 0], np.float32),
    }


def logits(seed=1):
    return 3 * jax.random.normal(jax.random.key(seed), (B, N, V))


def loss(model, given, *, train=False, **settings):
    value, metrics = build({"name": "next_token", **settings}).loss(model, None, given, rng=KEY, train=train)
    return float(value), {name: (float(total), float(count)) for name, (total, count) in metrics.items()}


def by_hand(logits, given):
    """Of the targets that count: (losses in nats, bytes, whether the likeliest is right, log of the sum)."""
    found = []
    for b, i in np.ndindex(*given["target"].shape):
        if given["weight"][b, i] * given["mask"][b]:
            row = np.asarray(logits[b, i], np.float64)
            total = math.log(np.exp(row).sum())
            target = given["target"][b, i]
            found.append((total - row[target], given["bytes"][b, i], row.argmax() == target, total))
    return np.array(found, np.float64).T


def test_against_numpy():
    """A loop over the targets; those without weight and rows that only fill the batch do not count."""
    given = batch()
    value, metrics = loss(Fixed(logits()), given)
    nats, sizes, right, _ = by_hand(logits(), given)
    assert 0 < len(nats) < B * N
    assert value == pytest.approx(nats.mean(), rel=1e-5)
    assert metrics["loss"] == pytest.approx((nats.sum(), len(nats)), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx((nats.sum() / math.log(2), sizes.sum()), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((right.sum(), len(nats)))
    assert set(metrics) == {"loss", "bits_per_byte", "accuracy"}


def test_what_does_not_count_changes_nothing():
    given = batch()
    hidden = (given["weight"] * given["mask"][:, None] == 0)[..., None]
    assert loss(Fixed(jnp.where(hidden, 99 * logits(2), logits())), given) == loss(Fixed(logits()), given)


def test_without_any_target_the_loss_is_zero_and_weighs_nothing():
    value, metrics = loss(Fixed(logits()), {**batch(), "mask": np.zeros(B, np.float32)})
    assert value == 0 and all(pair == (0, 0) for pair in metrics.values())


def test_perplexity_is_derived_of_the_mean_loss():
    task = build({"name": "next_token"})
    assert task.derived({"loss": 1.25}) == {"perplexity": pytest.approx(math.exp(1.25))}
    assert math.isfinite(task.derived({"loss": 1e6})["perplexity"])
    assert (task.primary, task.better) == ("bits_per_byte", "min")


def test_z_loss_is_of_training_alone():
    given = batch()
    *_, total = by_hand(logits(), given)
    value, metrics = loss(Fixed(logits()), given, train=True, z_loss=0.1)
    plain, _ = loss(Fixed(logits()), given, train=True)
    assert metrics["z_loss"] == pytest.approx((0.1 * np.mean(total**2), 1), rel=1e-5)
    assert value - plain == pytest.approx(metrics["z_loss"][0], rel=1e-4)
    assert loss(Fixed(logits()), given, z_loss=0.1) == loss(Fixed(logits()), given)


def test_losses_of_the_model_are_added_once():
    given, losses = batch(), {"balance_loss": jnp.float32(0.25), "mod_loss": jnp.float32(0.5)}
    value, metrics = loss(Fixed(logits(), losses, {"mod_share": (jnp.float32(3), jnp.float32(4))}), given)
    plain, _ = loss(Fixed(logits()), given)
    assert value == pytest.approx(plain + 0.75)
    assert metrics["balance_loss"] == (0.25, 1) and metrics["mod_loss"] == (0.5, 1)
    assert metrics["mod_share"] == (3, 4)


def test_tokens_that_are_left_are_judged_by_their_own_targets():
    """Logits of 2, 3 and 5 of each row alone."""
    given, places = batch(), jnp.broadcast_to(jnp.array([1, 2, 5]), (B, 3))
    part = {name: leaf if leaf.ndim == 1 else leaf[:, [1, 2, 5]] for name, leaf in given.items()}
    left = logits()[:, [1, 2, 5]]
    assert loss(Fixed(left, places=places), given) == loss(Fixed(left), part)
    assert loss(Fixed(left, places=places), given)[0] == pytest.approx(
        by_hand(left, part)[0].mean(), rel=1e-5
    )


@pytest.mark.parametrize(
    "stack", ["block + keep(0.5, by=random) + block", "block + skip(keep=0.5, by=random)(block)"]
)
def test_a_decoder_that_drops_tokens_is_judged_by_those_that_are_left(stack):
    """Through the model: the loss is that of its logits at the places it names."""
    length = 12
    model = decoders.build(stack, length, train=True, outputs=V)
    state = decoders.weights(model)
    given = {**batch(length=length), "ids": decoders.ids(B, length) % V}
    task = build({"name": "next_token"})

    def both(state):
        output = model.apply(state, given, train=True, rng=KEY)
        return task.loss(model, state, given, rng=KEY, train=True)[0], output.logits, output.places

    value, found, places = jax.jit(both)(state)
    places = np.asarray(places)
    assert places.shape == (B, 6 if "keep(0.5" in stack else length)
    own = {n: leaf if leaf.ndim == 1 else np.take_along_axis(leaf, places, 1) for n, leaf in given.items()}
    assert float(value) == pytest.approx(by_hand(found, own)[0].mean(), rel=1e-5)


def test_settings_and_data_that_do_not_fit_are_refused():
    for z in (-0.1, float("nan")):
        with pytest.raises(ConfigError, match="config.task.z_loss must be at least 0"):
            build({"name": "next_token", "z_loss": z})
    images = SimpleNamespace(name="digits", spec={"image": (), "label": ()})
    with pytest.raises(ConfigError, match="next_token needs text; data 'digits' has image, label"):
        build({"name": "next_token"}).num_outputs(images)
    text = SimpleNamespace(name="plays", spec={"ids": (), "target": ()}, vocab_size=257)
    assert build({"name": "next_token"}).num_outputs(text) == 257
    with pytest.raises(NameLookupError, match="next_token"):
        build({"name": "next_tokens"})
