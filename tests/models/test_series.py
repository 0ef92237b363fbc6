"""series: a ViT on patches of a series; channels alone or together; scaled and scaled back; what does not fit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from tokenlab import models, tasks
from tokenlab.core.errors import ConfigError, ShapeError
from tokenlab.models.series import Series
from tokenlab.sharding import rules
from tokenlab.sharding.mesh import make_mesh
from tokenlab.train import costs

B, T, C, S, CLASSES = 4, 16, 3, 6, 5
KEY = jax.random.key(0)
SPECS = {
    "steps": {"series": ((T, C), "float32"), "target": ((S, C), "float32")},
    "classes": {"series": ((T, C), "float32"), "label": ((), "int32")},
}
each = pytest.mark.parametrize(
    ("output", "channels"), [(o, c) for o in SPECS for c in ("independent", "joint")]
)


def build(output: str = "steps", outputs: int | None = None, spec: Any = None, **settings: Any) -> Series:
    outputs = outputs or {"steps": S * C, "classes": CLASSES}[output]
    settings = {"name": "series", "size": "nano/4", "output": output, **settings}
    return models.build(settings, spec=spec or SPECS[output], num_outputs=outputs)


def series(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2, 3, (B, T, C)).astype(np.float32)


@functools.cache
def drawn(output: str, channels: str) -> tuple[Series, Any, Any]:
    """A model, weights of which none is zero, and the model compiled."""
    model = build(output, channels=channels)
    generator = np.random.default_rng(1)
    state = jax.tree.map(
        lambda leaf: generator.normal(0, 0.3, leaf.shape).astype(np.float32), model.abstract_state()
    )
    return model, state, jax.jit(lambda state, x: model.apply(state, {"series": x}))


@each
def test_shapes(output: str, channels: str) -> None:
    model, state, apply = drawn(output, channels)
    found = apply(state, series())
    assert found.logits.shape == ((B, S, C) if output == "steps" else (B, CLASSES))
    assert found.features.shape == (B, 16) and model.tokens_per_example == 5
    assert found.tokens.shape == ((B * C if channels == "independent" else B), 5, 16)
    assert (
        model.layer_tokens == model.dense_layer_tokens == found.tokens.shape[0] // B * 5 * model.program.depth
    )
    rules.shardings(model.abstract_state(), model.logical_axes(), make_mesh())


def test_patches_are_steps_in_their_order() -> None:
    numbers = np.arange(B * T * C, dtype=np.float32).reshape(B, T, C)
    alone = np.asarray(build(channels="independent").patches(numbers))
    assert alone.shape == (B * C, 1, 4, 4)
    np.testing.assert_array_equal(alone[1 * C + 2, 0, 3], numbers[1, 12:16, 2])
    joint = np.asarray(build(channels="joint").patches(numbers))
    assert joint.shape == (B, 1, 4, 4 * C)
    np.testing.assert_array_equal(joint[1, 0, 3], numbers[1, 12:16].reshape(-1))


@pytest.mark.parametrize("channels", ["independent", "joint"])
def test_units_go_in_and_come_out(channels: str) -> None:
    """A series in other units, each channel its own, is predicted in those units; classes do not see them."""
    factor, shift = np.array([2.0, 0.5, 10.0], np.float32), np.array([3.0, -7.0, 0.0], np.float32)
    _, state, apply = drawn("steps", channels)
    plain, other = (np.asarray(apply(state, x).logits) for x in (series(), series() * factor + shift))
    np.testing.assert_allclose(other, plain * factor + shift, rtol=2e-3, atol=2e-3)
    _, state, apply = drawn("classes", channels)
    plain, other = (np.asarray(apply(state, x).logits) for x in (series(), series() * factor + shift))
    np.testing.assert_allclose(other, plain, rtol=1e-3, atol=1e-3)


def test_channels_alone_do_not_meet_and_together_they_do() -> None:
    changed = series()
    changed[:, :, 1] = np.roll(changed[:, :, 1], 5, axis=1)
    for channels, apart in (("independent", True), ("joint", False)):
        _, state, apply = drawn("steps", channels)
        before, after = (np.asarray(apply(state, x).logits) for x in (series(), changed))
        assert (before[..., 1] != after[..., 1]).any()
        assert np.array_equal(before[..., [0, 2]], after[..., [0, 2]]) == apart


def test_before_training_it_says_the_mean_of_the_window() -> None:
    model = build()
    state = jax.tree.map(np.asarray, jax.jit(model.init)(KEY))
    found = drawn("steps", "independent")[2](state, series())
    np.testing.assert_allclose(
        found.logits, np.broadcast_to(series().mean(1, keepdims=True), (B, S, C)), atol=1e-5
    )


def test_without_scaling_a_constant_is_seen() -> None:
    model = build(instance_norm=False)
    _, state, scaled = drawn("steps", "independent")
    free = jax.jit(lambda state, x: model.apply(state, {"series": x}))
    shifted = [np.asarray(free(state, series() + shift).logits) for shift in (0, 1)]
    assert np.abs(shifted[1] - shifted[0] - 1).max() > 0.01
    assert np.isfinite(np.asarray(scaled(state, np.ones_like(series())).logits)).all()


def test_any_stack_on_the_same_weights() -> None:
    _, state, _ = drawn("steps", "independent")
    wide = build(stack="block(special=jumbo)*2", registers=2, head="special")
    assert wide.abstract_state()["head"]["classifier"]["kernel"].shape == (3 * 16, S)
    for stack in ("block + keep(0.5, by=cls) + block", "block + merge(1) + block"):
        model = build(stack=stack)
        found = jax.jit(lambda state, x, model=model: model.apply(state, {"series": x}).logits)(
            state, series()
        )
        assert found.shape == (B, S, C) and np.isfinite(np.asarray(found)).all()
    task = tasks.build({"name": "forecast"})
    dense, kept = (
        costs.forward_cost(build(stack=stack), task, SPECS["steps"]).flops
        for stack in ("block*2", "block + keep(1, by=cls) + block")
    )
    assert kept < dense


def test_independent_channels_cost_as_many_sequences() -> None:
    task = tasks.build({"name": "forecast"})

    def block(n: int) -> int:
        return 8 * n * 16**2 + 4 * n * n * 16 + 4 * n * 16 * 32

    alone = costs.forward_cost(build(), task, SPECS["steps"]).flops
    assert alone == C * (2 * 4 * 4 * 16 + 2 * block(5) + 2 * 16 * S)
    joint = costs.forward_cost(build(channels="joint"), task, SPECS["steps"]).flops
    assert joint == 2 * 4 * 4 * C * 16 + 2 * block(5) + 2 * 16 * S * C


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"patch": 5}, ShapeError, "patches of 5 steps do not divide a series of 16"),
        (
            {"spec": {"image": ((8, 8, 1), "float32")}},
            ConfigError,
            "series reads 'series'; the data has image",
        ),
        ({"spec": SPECS["classes"]}, ConfigError, "output is 'steps', and the task asks for no steps"),
        ({"outputs": 7}, ConfigError, "output is 'steps', and the task asks for no steps"),
        (
            {"output": "classes", "spec": SPECS["steps"], "outputs": S * C},
            ConfigError,
            "output is 'classes', and the task asks for the steps",
        ),
    ],
    ids=str,
)
def test_settings_and_data_that_do_not_fit(settings: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        build(**settings)


def test_series_of_another_length() -> None:
    with pytest.raises(ShapeError, match=r"built for series \[16, 3\], got \[8, 3\]"):
        build().apply({}, {"series": np.zeros((1, 8, C), np.float32)})
