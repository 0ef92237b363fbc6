"""Optimizers by name: options, weight decay of kernels only, clipping and the moving average."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokenlab.core.errors import ConfigError, NameLookupError
from tokenlab.sharding.rules import path_of
from tokenlab.train import optimizer as optimizers
from tokenlab.train.config import OptimizerConfig, ScheduleConfig

CONSTANT = ScheduleConfig("constant", warmup_steps=0)
RATE = 0.1


def config(**fields: object) -> OptimizerConfig:
    return OptimizerConfig(**{"schedule": CONSTANT, "learning_rate": RATE, "clip": None, **fields})


def some_params() -> dict:
    return {
        "blocks": {
            "attention": {
                "norm": {"scale": jnp.ones((2, 4)), "bias": jnp.ones((2, 4))},
                "query": {"kernel": jnp.ones((2, 4, 2, 2)), "bias": jnp.ones((2, 2, 2))},
                "layer_scale": jnp.ones((2, 4)),
            }
        },
        "embed": {"kernel": jnp.ones((8, 4)), "position": jnp.ones((5, 4)), "cls": jnp.ones((1, 4))},
        "items": {"keep": {"score": {"kernel": jnp.ones((3, 4)), "router": jnp.ones((3, 4, 2))}}},
        "head": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    }


def test_weight_decay_is_for_kernels_only() -> None:
    mask = optimizers.decay_mask(some_params())
    flat = {path_of(path): yes for path, yes in jax.tree_util.tree_leaves_with_path(mask)}
    # items/keep/score/kernel is a vector per item: its first axis counts the items.
    assert {path for path, yes in flat.items() if yes} == {
        "blocks/attention/query/kernel",
        "embed/kernel",
        "items/keep/score/router",
        "head/kernel",
    }


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adam", "adafactor", "novograd"])
def test_zero_gradients_decay_kernels_by_rate_times_decay(name: str) -> None:
    """With and without a decay of the factory's own, a step takes learning_rate * weight_decay away."""
    built = optimizers.build(config(name=name, weight_decay=0.5), steps=10)
    params = some_params()
    gradients = jax.tree.map(jnp.zeros_like, params)
    after, _ = built.update(gradients, built.init(params), params, jnp.float32(0))
    mask = optimizers.decay_mask(params)
    for leaf, yes in zip(jax.tree.leaves(after), jax.tree.leaves(mask), strict=True):
        np.testing.assert_allclose(leaf, 1 - RATE * 0.5 if yes else 1.0, rtol=1e-6)


def test_without_decay_the_update_is_that_of_optax() -> None:
    built = optimizers.build(
        config(name="adamw", weight_decay=0.0, options={"b1": 0.8, "b2": 0.95}), steps=10
    )
    params = some_params()
    gradients = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    reference = optax.adam(RATE, b1=0.8, b2=0.95)
    updates, _ = reference.update(gradients, reference.init(params), params)
    expected = optax.apply_updates(params, updates)
    after, _ = built.update(gradients, built.init(params), params, jnp.float32(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, expected)


def test_clipping_scales_to_the_norm_and_leaves_small_gradients_alone() -> None:
    built = optimizers.build(config(name="sgd", weight_decay=0.0, clip=2.0), steps=10)
    params = {"head": {"kernel": jnp.zeros((3, 4))}}
    gradients = {"head": {"kernel": jnp.full((3, 4), 10.0)}}
    norm = optax.tree.norm(gradients)
    after, _ = built.update(gradients, built.init(params), params, norm)
    np.testing.assert_allclose(optax.tree.norm(after), RATE * 2.0, rtol=1e-6)
    small = {"head": {"kernel": jnp.full((3, 4), 0.123)}}
    after, _ = built.update(small, built.init(params), params, optax.tree.norm(small))
    free = optimizers.build(config(name="sgd", weight_decay=0.0, clip=None), steps=10)
    expected, _ = free.update(small, free.init(params), params, optax.tree.norm(small))
    np.testing.assert_array_equal(after["head"]["kernel"], expected["head"]["kernel"])


def test_the_learning_rate_follows_the_schedule() -> None:
    schedule = ScheduleConfig("linear", warmup_steps=0)
    built = optimizers.build(config(name="sgd", weight_decay=0.0, schedule=schedule), steps=4)
    params = {"head": {"kernel": jnp.zeros((2, 2))}}
    gradients = {"head": {"kernel": jnp.ones((2, 2))}}
    state, moved = built.init(params), []
    for _ in range(4):
        after, state = built.update(gradients, state, params, jnp.float32(1))
        moved.append(float(-after["head"]["kernel"][0, 0]))
    np.testing.assert_allclose(moved, RATE * np.array([1.0, 0.75, 0.5, 0.25]), rtol=1e-6)


def test_moving_average_by_hand() -> None:
    built = optimizers.build(config(ema=0.9), steps=10)
    ema, expected = {"kernel": jnp.float32(1.0)}, 1.0
    for step in range(200):
        value = 2.0 + step
        ema = built.average(ema, {"kernel": jnp.float32(value)}, jnp.int32(step))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    np.testing.assert_allclose(ema["kernel"], expected, rtol=1e-5)


def test_every_listed_optimizer_makes_a_finite_step() -> None:
    assert {"adamw", "lamb", "lion", "sgd", "adafactor", "lars", "rmsprop"} <= set(optimizers.names())
    params = {"blocks": {"mlp": {"kernel": jnp.ones((2, 3, 4))}}, "head": {"bias": jnp.ones(3)}}
    for name in optimizers.names():
        built = optimizers.build(config(name=name), steps=10)
        after, _ = built.update(params, built.init(params), params, jnp.float32(1))
        for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
            assert np.isfinite(new).all() and not np.array_equal(old, new), name


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (dict(name="adamv"), NameLookupError, ["'adamv'", "Did you mean 'adam"]),
        (dict(name="lbfgs"), NameLookupError, ["'lbfgs'", "more than a gradient"]),
        (dict(name="chain"), NameLookupError, ["'chain'"]),
        (dict(options={"nestorov": True}), ConfigError, ["Did you mean 'nesterov'?"]),
        (dict(options={"beta1": 0.9}), ConfigError, ["'beta1'", "optax.adamw", "Known: b1, b2"]),
        (dict(options={"weight_decay": 0.1}), ConfigError, ["weight_decay", "config.optimizer"]),
        (dict(options={"mu_dtype": "float12"}), ConfigError, ["optax.adamw", "float12"]),
        (dict(learning_rate=0.0), ConfigError, ["learning_rate", "> 0"]),
        (dict(weight_decay=-1.0), ConfigError, ["weight_decay"]),
        (dict(clip=0.0), ConfigError, ["clip", "None"]),
        (dict(accumulate=0), ConfigError, ["accumulate"]),
        (dict(ema=1.0), ConfigError, ["ema"]),
    ],
)
def test_wrong_optimizers(fields: dict, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        optimizers.build(config(**fields), steps=10)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_description_names_all_that_is_done() -> None:
    text = optimizers.build(config(name="lion", clip=1.0, accumulate=2, ema=0.99), steps=10).description
    assert (
        text
        == "lion; constant from 0.1 over 10 steps; weight decay 0.05; clipped at 1; 2 microbatches; moving average 0.99"
    )


def test_a_parameter_may_have_a_decay_of_its_own() -> None:
    params = {
        "blocks": {"mlp": {"kernel": jnp.ones((2, 3, 4)), "scale": jnp.ones((2, 3))}},
        "head": jnp.ones((3, 5)),
    }
    nothing = jax.tree.map(jnp.zeros_like, params)
    others = {"head": 2.0, "blocks/mlp/scale": 0.5}
    for name in ("adamw", "sgd"):
        built = optimizers.build(config(name=name, weight_decay=0.25, decays=others), steps=10)
        after, _ = built.update(nothing, built.init(params), params, jnp.float32(0))
        np.testing.assert_allclose(after["blocks"]["mlp"]["kernel"], 1 - 0.1 * 0.25, rtol=1e-6)
        np.testing.assert_allclose(after["blocks"]["mlp"]["scale"], 1 - 0.1 * 0.5, rtol=1e-6)
        np.testing.assert_allclose(after["head"], 1 - 0.1 * 2, rtol=1e-6)
    assert "weight decay 0.25; 2 of head; 0.5 of blocks/mlp/scale" in built.description
    wrong = optimizers.build(config(decays={"blocks/mpl": 0.1}), steps=10)
    with pytest.raises(ConfigError, match="'blocks/mpl', which is no parameter. Did you mean 'blocks/mlp'"):
        wrong.init(params)


def test_decays_of_their_own_change_nothing_for_others() -> None:
    """With the same decay said both ways AdamW takes the same steps."""
    params = {"head": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4)}}
    gradients = jax.tree.map(jnp.sin, params)
    steps = []
    for fields in (dict(weight_decay=0.3), dict(weight_decay=0.0, decays={"head/kernel": 0.3})):
        built = optimizers.build(config(**fields), steps=10)
        now, state = params, built.init(params)
        for _ in range(3):
            now, state = built.update(gradients, state, now, jnp.float32(1))
        steps.append(now["head"]["kernel"])
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adam", "lion"])
def test_only_what_is_named_is_trained_and_remembered(name: str) -> None:
    """The rest stays bit for bit, weight decay or not, and the optimizer holds no moments of it."""
    built = optimizers.build(config(name=name, weight_decay=0.5, only=("items/*/router", "head/*")), steps=10)
    params = some_params()
    gradients = jax.tree.map(jnp.ones_like, params)
    state = built.init(params)
    after, state = built.update(gradients, state, params, jnp.float32(1))
    changed = {
        path_of(path)
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(params), strict=True
        )
        if not np.array_equal(new, old)
    }
    assert changed == {"items/keep/score/router", "head/kernel", "head/bias"}
    shapes = {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert shapes == {(3, 4, 2), (4, 3), (3,)}
    assert "only items/*/router, head/*" in built.description


@pytest.mark.parametrize("pattern", ["heads/*", "hea[de]/*", "hea?/*"])
def test_a_pattern_that_fits_nothing_is_told(pattern: str) -> None:
    """Nothing but * is special."""
    built = optimizers.build(config(only=(pattern,)), steps=10)
    told = f"config.optimizer.only has {pattern!r}, which fits no parameter"
    with pytest.raises(ConfigError, match=re.escape(told)):
        built.init(some_params())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_decay_of_what_is_not_trained_is_told(name: str) -> None:
    """It is a parameter, so it is not told to be none; one that is in part trained is right."""

    def built(**decays: float) -> optimizers.Optimizer:
        only = ("items/*/router", "head/*")
        return optimizers.build(config(name=name, only=only, decays=decays), steps=10)

    with pytest.raises(
        ConfigError, match="'embed', which is not trained: no pattern of config.optimizer.only"
    ):
        built(embed=0.1).init(some_params())
    with pytest.raises(ConfigError, match="'hea', which is no parameter. Did you mean 'head'"):
        built(hea=0.1).init(some_params())
    params = some_params()
    optimizer = built(items=1.0)
    nothing = jax.tree.map(jnp.zeros_like, params)
    after, _ = optimizer.update(nothing, optimizer.init(params), params, jnp.float32(0))
    np.testing.assert_allclose(after["items"]["keep"]["score"]["router"], 1 - RATE, rtol=1e-6)


def test_layers_below_learn_more_slowly() -> None:
    """Updates of a step of SGD, and of AdamW with its decay: those of a run without, times a factor a layer."""
    params = some_params()
    gradients = jax.tree.map(jnp.ones_like, params)

    def step(**fields: object) -> dict:
        built = optimizers.build(config(**fields), steps=10)
        updated, _ = built.update(gradients, built.init(params), params, jnp.float32(1))
        return jax.tree.map(lambda new, old: np.asarray(new - old), updated, params)

    for name in ("sgd", "adamw"):
        plain = step(name=name, weight_decay=0.5)
        found = step(name=name, weight_decay=0.5, layer_decay=0.5)
        for first, second, factor in (("embed", "kernel", 1 / 8), ("head", "kernel", 1.0)):
            np.testing.assert_allclose(found[first][second], plain[first][second] * factor, rtol=1e-5)
        kernel, whole = (tree["blocks"]["attention"]["query"]["kernel"] for tree in (found, plain))
        np.testing.assert_allclose(kernel[0], whole[0] / 4, rtol=1e-5)
        np.testing.assert_allclose(kernel[1], whole[1] / 2, rtol=1e-5)
        np.testing.assert_array_equal(
            found["items"]["keep"]["score"]["kernel"], plain["items"]["keep"]["score"]["kernel"]
        )
    only = step(name="sgd", weight_decay=0.0, layer_decay=0.5, only=("blocks/*",))
    assert not only["embed"]["kernel"].any() and only["blocks"]["attention"]["query"]["kernel"].any()
    assert "0.5 a layer" in optimizers.build(config(layer_decay=0.5), steps=10).description


def test_layers_that_nobody_can_tell_apart() -> None:
    params = some_params()
    params["blocks"]["mlp_2"] = {"kernel": jnp.ones((1, 4, 4))}
    built = optimizers.build(config(layer_decay=0.75), steps=10)
    with pytest.raises(
        ConfigError, match="blocks/mlp_2 is of 1 of 2 blocks; expected blocks that are all alike"
    ):
        built.init(params)
    with pytest.raises(ConfigError, match="this model has no blocks"):
        built.init({"head": params["head"]})
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match="optimizer.layer_decay is .*: expected a factor in"):
            config(layer_decay=wrong)
