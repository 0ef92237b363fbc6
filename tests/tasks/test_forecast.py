"""forecast: errors against numpy, rows that do not count, the naive forecasts; what does not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ConfigError
from tokenlab.tasks import build

B, T, S, C = 3, 8, 5, 2
RNG = np.random.default_rng(0)
SERIES, TARGET, SAID = (RNG.normal(0, 1, (B, n, C)).astype(np.float32) for n in (T, S, S))


def loss(said: Any = SAID, mask: Any = (1, 1, 0), train: bool = False, **settings: Any) -> tuple[float, Any]:
    output = SimpleNamespace(logits=jnp.asarray(said), losses={}, aux=SimpleNamespace(metrics={}))
    model = SimpleNamespace(apply=lambda *args, **how: output)
    batch = {"series": SERIES, "target": TARGET, "mask": jnp.array(mask, jnp.float32)}
    value, metrics = build({"name": "forecast", **settings}).loss(
        model, None, jax.tree.map(jnp.asarray, batch), rng=jax.random.key(0), train=train
    )
    return float(value), {name: float(total) / float(weight) for name, (total, weight) in metrics.items()}


def errors(said: np.ndarray) -> tuple[float, float]:
    off = (said - TARGET)[:2]
    return float((off**2).mean()), float(np.abs(off).mean())


def test_against_numpy() -> None:
    value, found = loss(season=3)
    assert value == pytest.approx(errors(SAID)[0], rel=1e-5)
    last = np.repeat(SERIES[:, -1:], S, axis=1)
    season = np.stack([SERIES[:, T - 3 + h % 3] for h in range(S)], axis=1)
    for name, said in (("", SAID), ("last_", last), ("season_", season)):
        assert (found[f"{name}mse"], found[f"{name}mae"]) == pytest.approx(errors(said), rel=1e-5)
    assert found["loss"] == found["mse"]


def test_naive_forecasts_belong_to_evaluation() -> None:
    assert set(loss(train=True, season=3)[1]) == {"loss", "mse", "mae"}
    assert set(loss()[1]) == {"loss", "mse", "mae", "last_mse", "last_mae"}


def test_what_does_not_fit() -> None:
    task = build({"name": "forecast", "season": 9})
    spec = {"series": ((T, C), "float32"), "target": ((S, C), "float32")}
    with pytest.raises(ConfigError, match="season is 9, and a series of the data has 8 steps"):
        task.num_outputs(SimpleNamespace(name="x", spec=spec))
    assert build({"name": "forecast"}).num_outputs(SimpleNamespace(name="x", spec=spec)) == S * C
    with pytest.raises(ConfigError, match="needs series and what follows them; data 'x' has series"):
        task.num_outputs(SimpleNamespace(name="x", spec={"series": ((T, C), "float32")}))
    with pytest.raises(ConfigError, match=r"the model gives \[3, 10\]"):
        loss(np.zeros((B, 10)))
    with pytest.raises(ConfigError, match="season must be at least 1"):
        build({"name": "forecast", "season": 0})
