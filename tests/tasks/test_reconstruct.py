"""reconstruct: loss and metrics against numpy, rows that do not count, PSNR; data and models that do not fit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import data
from tokenlab.core.errors import ConfigError
from tokenlab.tasks import build
from tokenlab.tasks.reconstruct import psnr

SHAPE = (3, 4, 4, 2)
KEY = jax.random.key(0)


class Fixed:
    """A model with given pictures, losses and metrics."""

    def __init__(self, logits: Any, losses: Any = None, metrics: Any = None):
        self.output = SimpleNamespace(
            logits=logits, losses=losses or {}, aux=SimpleNamespace(metrics=metrics or {})
        )

    def apply(self, params: Any, batch: Any, *, train: bool, rng: Any) -> Any:
        del params, batch, train, rng
        return self.output


def drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, SHAPE).astype(np.float32)


def loss(model: Any, mask: Any = (1, 1, 0), **settings: Any) -> tuple[float, dict[str, Any]]:
    batch = {"image": jnp.asarray(drawn(0)), "mask": jnp.array(mask, jnp.float32)}
    value, metrics = build({"name": "reconstruct", **settings}).loss(model, None, batch, rng=KEY, train=False)
    return float(value), {name: tuple(map(float, pair)) for name, pair in metrics.items()}


def test_against_numpy() -> None:
    off = (drawn(1) - drawn(0))[:2].astype(np.float64)
    square, absolute = (off**2).mean((1, 2, 3)), np.abs(off).mean((1, 2, 3))
    value, metrics = loss(Fixed(jnp.asarray(drawn(1))))
    assert value == pytest.approx(square.mean(), rel=1e-5)
    assert metrics == {name: pytest.approx((square.sum(), 2), rel=1e-5) for name in ("loss", "mse")}
    value, metrics = loss(Fixed(jnp.asarray(drawn(1))), l1=0.5)
    assert value == pytest.approx((square + 0.5 * absolute).mean(), rel=1e-5)
    assert metrics["mae"] == pytest.approx((absolute.sum(), 2), rel=1e-5)
    assert metrics["loss"] == pytest.approx(((square + 0.5 * absolute).sum(), 2), rel=1e-5)


def test_losses_and_metrics_of_the_model_are_added_once() -> None:
    pictures = jnp.asarray(drawn(1))
    plain, _ = loss(Fixed(pictures))
    own = {"codebook_loss": jnp.float32(0.25)}
    value, metrics = loss(Fixed(pictures, own, {"used": (jnp.float32(3), jnp.float32(4))}))
    assert value == pytest.approx(plain + 0.25)
    assert metrics["codebook_loss"] == (0.25, 1) and metrics["used"] == (3, 4)


def test_without_a_row_that_counts_the_loss_is_zero() -> None:
    value, metrics = loss(Fixed(jnp.asarray(drawn(1))), (0, 0, 0), l1=1.0)
    assert value == 0 and all(pair == (0, 0) for pair in metrics.values())


def test_psnr_is_derived_of_the_mean_error_in_the_range_of_the_data() -> None:
    task = build({"name": "reconstruct"})
    assert task.derived({"mse": 0.04}) == {"psnr": pytest.approx(20.0)}
    bytes_ = build({"name": "reconstruct", "value_range": (0.0, 255.0)})
    assert bytes_.derived({"mse": 65025 / 1000}) == {"psnr": pytest.approx(30.0)}
    assert math.isfinite(psnr(0.0, (-1.0, 1.0)))
    assert (task.primary, task.better, task.examples) == ("mse", "min", "images")


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="config.task.l1 must be at least 0; got -1"):
        build({"name": "reconstruct", "l1": -1.0})
    for wrong in ((1.0, -1.0), (0.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ConfigError, match="value_range must be two numbers"):
            build({"name": "reconstruct", "value_range": wrong})


def test_data_and_models_that_do_not_fit_are_refused() -> None:
    task = build({"name": "reconstruct"})
    assert task.num_outputs(data.build({"name": "digits"})) == 64
    with pytest.raises(ConfigError, match="reconstruct needs pictures; data 'plays' has ids"):
        task.num_outputs(SimpleNamespace(name="plays", spec={"ids": ()}))
    arrays = {"train": {"image": np.zeros((4, 8, 8, 1), np.uint8)}}
    source = data.ArraySource("grey", arrays, None)
    bright = data.DataConfig(transform="value_range(0, 1)", eval_transform="value_range(0, 1)")
    with pytest.raises(ConfigError, match=r"value_range is \(-1.0, 1.0\), and .* value_range\(0.0, 1.0\)"):
        task.num_outputs(data.Dataset(source, bright))
    right = build({"name": "reconstruct", "value_range": (0.0, 1.0)})
    assert right.num_outputs(data.Dataset(source, bright)) == 64
    with pytest.raises(ConfigError, match=r"gives \[3, 10\] for pictures \[3, 4, 4, 2\]"):
        loss(Fixed(jnp.zeros((3, 10))))
