"""The clock that counts layer tokens: equal to adding them up step by step, and the learning rate that follows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from tokenlab import models
from tokenlab.compare import budget
from tokenlab.core.config import override
from tokenlab.core.errors import ConfigError
from tokenlab.methods.dropping.random_ltd import layer_token_lr
from tokenlab.train import experiment, optimizer, schedule, token_clock
from tokenlab.train.config import OptimizerConfig, ScheduleConfig, default_config

STEPS, DENSE = 40, 5 * 3  # 4 patches and CLS in three blocks
KEPT = "0:linear(1, 4, until=60%, values=4), 75%:every 3: 2 else 4"


def config(**changes: Any):
    found = default_config()
    found.update(steps=STEPS, batch_size=8)
    found.model.update(size="nano/4", stack="block + skip(keep=k, by=random)(block) + block")
    found.stack_vars.k = KEPT
    found.optimizer.schedule.update(clock="layer_tokens")
    return override(found, changes)


@pytest.fixture(scope="module")
def built() -> experiment.Experiment:
    return experiment.build(config())


def added_up(built: experiment.Experiment, count) -> np.ndarray:
    """Tokens consumed before each step, one step after the other."""
    per_step = [count(1 + built.stack_vars.at(step)["k"]) for step in range(STEPS)]
    return np.concatenate([[0], np.cumsum(per_step)])


def test_the_clock_is_what_steps_add_up_to(built: experiment.Experiment) -> None:
    expected = added_up(built, lambda inside: inside + 10)
    clock = token_clock.build("layer_tokens", built.stack_vars, built.models, STEPS)
    found = jax.jit(jax.vmap(clock))(np.arange(STEPS + 1))
    np.testing.assert_allclose(found, expected / DENSE, rtol=1e-6)
    assert clock.total == pytest.approx(expected[-1] / DENSE)
    assert [built.layer_tokens(step) for step in range(STEPS + 1)] == (8 * expected).tolist()
    assert built.facts()["layer_tokens"] == 8 * expected[-1]
    assert built.facts()["layer_tokens_dense"] == 8 * STEPS * DENSE
    assert built.facts()["steps_by_stack_vars"] == {"k=1": 8, "k=2": 12, "k=3": 8, "k=4": 12}


def test_effective_tokens_are_rounded_down_in_each_step(built: experiment.Experiment) -> None:
    clock = token_clock.build("effective_tokens", built.stack_vars, built.models, STEPS)
    expected = added_up(built, lambda inside: (inside + 10) // 3)
    np.testing.assert_allclose(jax.vmap(clock)(np.arange(STEPS + 1)), expected / 5, rtol=1e-6)


def test_two_periods_beside_each_other() -> None:
    given = config()
    given.model.stack = "block + skip(keep=k)(block) + skip(keep=m)(block)"
    given.stack_vars = {"k": "every 4: 1 else 3", "m": "0:2, 7:every 6: 1 else 4"}
    variables = schedule.stack_vars(given.stack_vars, STEPS)
    spec = {"image": ((8, 8, 1), "float32")}
    made = {
        schedule.values_key(values): models.build(given.model, spec=spec, num_outputs=10, stack_vars=values)
        for values in variables.distinct(STEPS)
    }
    per_step = [7 + sum(variables.at(step).values()) for step in range(STEPS)]
    clock = token_clock.build("layer_tokens", variables, made, STEPS)
    expected = np.concatenate([[0], np.cumsum(per_step)]) / DENSE
    np.testing.assert_allclose(jax.vmap(clock)(np.arange(STEPS + 1)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "end"), [("cosine", None), ("linear", None), ("cosine", 0.7), ("linear", 30)]
)
def test_the_learning_rate_is_a_function_of_consumed_tokens(built, name, end) -> None:
    """Equal to `layer_token_lr`, which equals Megatron's (tests/golden), of the tokens consumed before the step."""
    clock = token_clock.build("layer_tokens", built.stack_vars, built.models, STEPS)
    own = ScheduleConfig(name, warmup_steps=0.1, final=0.05, clock="layer_tokens", end=end)
    consumed = added_up(built, lambda inside: inside + 10)
    shares = {None: consumed[-1], 0.7: 0.7 * STEPS * DENSE, 30: 30 * DENSE}
    expected = layer_token_lr(
        consumed, peak=0.2, floor=0.01, warmup_tokens=4 * DENSE, total_tokens=shares[end], decay=name
    )
    found = jax.vmap(schedule.build(own, 0.2, STEPS, clock))(np.arange(STEPS + 1))
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    text = schedule.describe(own, 0.2, STEPS, clock)
    assert f"over the layer tokens of {shares[end] / DENSE:.6g} dense steps" in text


@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_every_schedule_follows_the_clock(built, name) -> None:
    """Where all is kept, the clock tells steps."""
    dense = dataclasses.replace(built.stack_vars, pieces=(("k", ((0, 4),)),))
    clock = token_clock.build("layer_tokens", dense, built.models, STEPS)
    assert clock.total == pytest.approx(STEPS)
    own = ScheduleConfig(name, warmup_steps=4, timescale=5 if name == "rsqrt" else None)
    steps = np.arange(STEPS + 1)
    found = jax.vmap(schedule.build(dataclasses.replace(own, clock="layer_tokens"), 0.2, STEPS, clock))(steps)
    np.testing.assert_allclose(found, jax.vmap(schedule.build(own, 0.2, STEPS))(steps), rtol=1e-5, atol=1e-8)


def test_the_optimizer_of_a_run_follows_it(built) -> None:
    rates = [float(built.optimizer.schedule(step)) for step in (0, 10, STEPS)]
    assert rates[0] == 0.0 and rates[2] == pytest.approx(0.0, abs=1e-9)
    by_steps = optimizer.build(OptimizerConfig(), STEPS).schedule
    assert rates[1] > float(
        by_steps(10)
    )  # less was computed by then than in ten dense steps: earlier in the decay
    assert "layer tokens" in built.optimizer.description


def test_it_scales_with_the_run() -> None:
    given = config(**{"optimizer.schedule.warmup_steps": 4, "optimizer.schedule.end": 20})
    found = budget.scalable(given)
    assert found.optimizer.schedule.warmup_steps == pytest.approx(0.1)
    assert found.optimizer.schedule.end == pytest.approx(0.5)
    longer = experiment.build(override(found, {"steps": 400}))
    assert "over the layer tokens of 200 dense steps" in longer.optimizer.description
    assert "the first 40 of them warm-up" in longer.optimizer.description


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"optimizer.schedule.clock": "tokens"}, "clock"),
        ({"optimizer.schedule.clock": "steps", "optimizer.schedule.end": 0.5}, "end"),
        ({"optimizer.schedule.end": 1.5}, "share of the dense run"),
        ({"optimizer.schedule.end": 0}, "dense steps >= 1"),
        ({"optimizer.schedule.end": 0.1, "optimizer.schedule.warmup_steps": 0.1}, "worth of tokens"),
    ],
)
def test_wrong_clocks(changes: dict, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        experiment.build(config(**changes))


def test_a_clock_must_be_given_where_it_is_named() -> None:
    with pytest.raises(ConfigError, match="without a clock"):
        schedule.build(ScheduleConfig(clock="layer_tokens"), 0.1, 10)
    with pytest.raises(ConfigError, match="no stack"):
        token_clock.build("layer_tokens", schedule.stack_vars({}, 4), {"": _NoStack()}, 4)


class _NoStack:
    program = None
