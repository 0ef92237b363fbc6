"""One training step with a small model of known gradients: accumulation, health, sums, averages, donation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tokenlab.core.errors import ConfigError, NonFiniteError
from tokenlab.train import optimizer as optimizers
from tokenlab.train import state as states
from tokenlab.train import step as steps
from tokenlab.train.config import OptimizerConfig, ScheduleConfig

ROWS, FEATURES, CLASSES = 12, 5, 3


class Linear:
    """logits = x W + b."""

    def init(self, key: Array) -> dict[str, Any]:
        return {"head": {"kernel": jax.random.normal(key, (FEATURES, CLASSES)), "bias": jnp.zeros(CLASSES)}}


class Classify:
    """Cross-entropy over the unmasked rows, with noise on the inputs where `noise` is set."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def loss(
        self, model: Linear, params: Any, batch: Mapping[str, Array], *, rng: Array, train: bool
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        inputs, mask = batch["image"], batch["mask"]
        if self.noise and train:
            inputs = inputs + self.noise * jax.random.normal(rng, inputs.shape)
        logits = inputs @ params["head"]["kernel"] + params["head"]["bias"]
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)[:, 0]
        weight = jnp.sum(mask)
        return jnp.sum(each * mask) / jnp.maximum(weight, 1), {"loss": (jnp.sum(each * mask), weight)}


def some_batch(seed: int = 0) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(seed)
    return {
        "image": draws.normal(size=(ROWS, FEATURES)).astype(np.float32),
        "label": draws.integers(0, CLASSES, ROWS).astype(np.int32),
        "mask": np.ones(ROWS, np.float32),
    }


def setup(
    task: Classify | None = None, **optimizer: Any
) -> tuple[Any, states.TrainState, optimizers.Optimizer]:
    """(step function, fresh state, optimizer)."""
    settings = {"name": "sgd", "schedule": ScheduleConfig("constant", 0), "learning_rate": 0.1, "clip": None}
    built = optimizers.build(OptimizerConfig(**{**settings, "weight_decay": 0.0, **optimizer}), steps=100)
    model, task = Linear(), task or Classify()
    names = steps.metric_names(model, task, jax.eval_shape(model.init, jax.random.key(0)), some_batch())
    state = states.create(model, built, names, seed=7)
    return steps.make_train_step(model, task, built), state, built


def copied(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def assert_close(a: Any, b: Any, rtol: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_step_is_the_gradient_by_hand() -> None:
    run, state, _ = setup()
    batch, before = some_batch(), copied(state.params)
    state, report = run(state, batch)
    logits = batch["image"] @ before["head"]["kernel"]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.eye(CLASSES)[batch["label"]]
    kernel = before["head"]["kernel"] - 0.1 * batch["image"].T @ (chances - truth) / ROWS
    bias = before["head"]["bias"] - 0.1 * (chances - truth).mean(0)
    np.testing.assert_allclose(state.params["head"]["kernel"], kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.params["head"]["bias"], bias, rtol=1e-5, atol=1e-6)
    loss = -np.log(chances[truth == 1]).mean()
    np.testing.assert_allclose(report.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(report.learning_rate, 0.1, rtol=1e-6)
    assert int(state.step) == 1
    total, weight = state.metrics["loss"]
    np.testing.assert_allclose([total / weight, weight], [loss, ROWS], rtol=1e-5)
    gradient = (
        np.concatenate([(before["head"]["kernel"] - kernel).ravel(), before["head"]["bias"] - bias]) / 0.1
    )
    np.testing.assert_allclose(state.metrics["grad_norm"][0], np.linalg.norm(gradient), rtol=1e-4)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulating_equals_the_whole_batch(microbatches: int) -> None:
    """Also where microbatches hold unequal numbers of real rows."""
    batch = some_batch()
    batch["mask"][[0, 4, 8, 1]] = 0
    run, state, _ = setup()
    whole, report = run(state, batch)
    run, state, _ = setup(accumulate=microbatches)
    parts, part_report = run(state, batch)
    assert_close(whole.params, parts.params)
    assert_close(whole.metrics, parts.metrics)
    np.testing.assert_allclose(report.loss, part_report.loss, rtol=1e-6)


@pytest.mark.parametrize("there", [0, 5])
def test_microbatches_without_weight_count_nothing(there: int) -> None:
    """Of a batch, or of some of its microbatches, not one row may count; the others are the mean as ever."""
    given = some_batch()
    given["mask"][:] = np.arange(ROWS) % 4 == 1  # microbatch 1 of 4 has all that counts
    given["mask"][there:] = 0
    found = {}
    for microbatches in (1, 4):
        step, state, _ = setup(accumulate=microbatches)
        before = copied(state.params)
        state, report = step(state, given)
        assert int(state.health.step) == -1
        found[microbatches] = float(report.loss), copied(state.params)
    assert_close(found[4], found[1])
    if not there:
        assert found[4][0] == 0
        assert_equal(found[4][1], before)


def test_microbatches_draw_different_numbers() -> None:
    class Draws(Classify):
        def loss(self, model: Linear, params: Any, batch: Any, *, rng: Array, train: bool) -> Any:
            loss, metrics = super().loss(model, params, batch, rng=rng, train=train)
            draw = jax.random.uniform(rng)
            return loss, {**metrics, "draw": (draw, jnp.float32(1)), "square": (draw**2, jnp.float32(1))}

    run, state, _ = setup(Draws(), accumulate=4)
    state, _ = run(state, some_batch())
    mean = state.metrics["draw"][0] / 4
    assert float(state.metrics["draw"][1]) == 4
    assert float(state.metrics["square"][0] / 4 - mean**2) > 1e-4


def test_steps_are_pure_functions_of_state_and_batch() -> None:
    """Two runs agree bit for bit, and each step draws anew."""
    finals = []
    for _ in range(2):
        run, state, _ = setup(Classify(noise=1.0), name="adamw")
        losses = []
        for _ in range(3):
            state, report = run(state, some_batch())
            losses.append(float(report.loss))
        finals.append(copied(state))
        assert len(set(losses)) == 3
    assert_equal(*finals)


def test_each_step_draws_from_a_key_of_its_own() -> None:
    class Draws(Classify):
        def loss(self, model: Linear, params: Any, batch: Any, *, rng: Array, train: bool) -> Any:
            loss, metrics = super().loss(model, params, batch, rng=rng, train=train)
            return loss, {**metrics, "draw": (jax.random.uniform(rng), jnp.float32(1))}

    run, state, _ = setup(Draws())
    sums = [0.0]
    for _ in range(3):
        state, _ = run(state, some_batch())
        sums.append(float(state.metrics["draw"][0]))
    draws = np.diff(sums)
    base = jax.random.split(jax.random.key(7, impl="threefry2x32"))[1]
    expected = [float(jax.random.uniform(jax.random.fold_in(base, step))) for step in range(3)]
    np.testing.assert_allclose(draws, expected, rtol=1e-5)


def test_the_state_that_goes_in_is_donated() -> None:
    run, state, _ = setup()
    run(state, some_batch())
    assert state.params["head"]["kernel"].is_deleted()


def test_metrics_add_up_over_steps() -> None:
    run, state, _ = setup()
    losses = []
    for seed in range(3):
        state, report = run(state, some_batch(seed))
        losses.append(float(report.loss))
    total, weight = state.metrics["loss"]
    np.testing.assert_allclose(total / weight, np.mean(losses), rtol=1e-6)
    assert float(weight) == 3 * ROWS
    assert float(state.metrics["grad_norm"][1]) == 3


def test_the_moving_average_follows_the_parameters() -> None:
    run, state, built = setup(ema=0.9)
    expected = copied(state.params)
    assert_equal(state.ema, expected)
    for step in range(15):
        state, _ = run(state, some_batch(step))
        decay = min(0.9, (1 + step) / (10 + step))
        for name, leaf in state.params["head"].items():
            expected["head"][name] = decay * expected["head"][name] + (1 - decay) * np.asarray(leaf)
    assert_close(state.ema, expected)
    assert states.evaluation_params(state) is state.ema
    _, plain, _ = setup()
    assert states.evaluation_params(plain) is plain.params


@pytest.mark.parametrize(
    ("leaf", "value", "name"),
    [("image", np.nan, "batch/image"), ("image", np.inf, "batch/image"), ("mask", np.nan, "batch/mask")],
)
def test_a_bad_input_is_named_with_its_step(leaf: str, value: float, name: str) -> None:
    run, state, _ = setup()
    for step in range(5):
        batch = some_batch(step)
        if step == 2:
            batch[leaf].flat[3] = value
        state, _ = run(state, batch)
    names = states.leaf_names(some_batch(), state.params)
    with pytest.raises(NonFiniteError, match=rf"^step 3: {name} is not finite"):
        states.check_health(jax.device_get(state.health), names)


def test_a_bad_loss_gradient_or_update_is_named() -> None:
    class Wrong(Classify):
        def __init__(self, where: str) -> None:
            super().__init__()
            self.where = where

        def loss(self, model: Linear, params: Any, batch: Any, *, rng: Array, train: bool) -> Any:
            loss, metrics = super().loss(model, params, batch, rng=rng, train=train)
            if self.where == "loss":
                loss = loss + jnp.log(jnp.sum(batch["mask"]) * 0 - 1.0)
            if self.where == "gradient":  # the derivative of sqrt at 0 is infinite, times 0 it is NaN
                loss = loss + jnp.sum(jnp.sqrt(params["head"]["bias"] * 0))
            return loss, metrics

    names = states.leaf_names(some_batch(), Linear().init(jax.random.key(0)))
    for where, words in (("loss", "loss is"), ("gradient", "gradient of head/bias is")):
        run, state, _ = setup(Wrong(where))
        state, _ = run(state, some_batch())
        with pytest.raises(NonFiniteError, match=f"^step 1: {words} not finite"):
            states.check_health(jax.device_get(state.health), names)
    run, state, _ = setup(learning_rate=3e38)
    huge = some_batch()
    huge["image"] *= 100
    state, _ = run(state, huge)
    with pytest.raises(NonFiniteError, match="^step 1: head/(bias|kernel) after the update is not finite"):
        states.check_health(jax.device_get(state.health), names)


def test_good_steps_stay_good() -> None:
    run, state, _ = setup()
    state, _ = run(state, some_batch())
    states.check_health(jax.device_get(state.health), states.leaf_names(some_batch(), state.params))


def test_a_task_without_loss_metric_or_scalar_is_an_error() -> None:
    class NoMetric(Classify):
        def loss(self, *args: Any, **kwargs: Any) -> Any:
            loss, metrics = super().loss(*args, **kwargs)
            return loss, {"nll": metrics["loss"]}

    class Half(Classify):
        def loss(self, *args: Any, **kwargs: Any) -> Any:
            loss, metrics = super().loss(*args, **kwargs)
            return loss.astype(jnp.bfloat16), metrics

    with pytest.raises(ConfigError, match="expected 'loss' among them"):
        setup(NoMetric())
    with pytest.raises(ConfigError, match="expected a float32 scalar"):
        setup(Half())


def test_evaluation_counts_unmasked_rows_and_repeats_exactly() -> None:
    run = steps.make_eval_step(Linear(), Classify())
    params, batch = Linear().init(jax.random.key(0)), some_batch()
    batch["mask"][5:] = 0
    first = copied(run(params, batch, jnp.int32(0)))
    batch["image"][5:] = 1e3
    assert float(first["loss"][1]) == 5
    assert_equal(first, copied(run(params, batch, jnp.int32(0))))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_only_the_named_parameters_move_and_count_in_the_norm(accumulate: int) -> None:
    step, state, _ = setup(only=("head/bias",), accumulate=accumulate)
    before = jax.tree.map(np.asarray, state.params)
    batch = some_batch()
    whole = steps.loss_and_gradients(Linear(), Classify(), before, batch, jax.random.key(0))[2]
    after, _ = step(state, batch)
    np.testing.assert_array_equal(after.params["head"]["kernel"], before["head"]["kernel"])
    assert not np.allclose(after.params["head"]["bias"], before["head"]["bias"])
    norm, count = after.metrics["grad_norm"]
    np.testing.assert_allclose(norm / count, np.linalg.norm(whole["head"]["bias"]), rtol=1e-5)
