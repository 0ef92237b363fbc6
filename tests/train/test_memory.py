"""What saves memory in a step, does, and changes no numbers: rematerialisation, and microbatches on a mesh."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from tokenlab import models, tasks
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import row_sharding
from tokenlab.train import optimizer as optimizers
from tokenlab.train import state as states
from tokenlab.train.config import OptimizerConfig, ScheduleConfig
from tokenlab.train.step import loss_and_gradients, make_train_step, metric_names

pytestmark = pytest.mark.slow  # compiles five programs
SPEC = {"image": ((8, 8, 1), "float32")}
B, DEPTH = 16, 6


def batch() -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    image = draws.normal(size=(B, 8, 8, 1)).astype(np.float32)
    label = (image.mean(axis=(1, 2, 3)) > 0).astype(np.int32)
    return {"image": image, "label": label, "mask": np.ones(B, np.float32)}


@cache
def gradients(remat: str) -> tuple[int, Any, Any]:
    """Temporary bytes of the compiled loss and gradients of a scanned model, and both."""
    settings = {"size": "nano/1", "stack": f"block*{DEPTH}", "execution": "scan", "remat": remat}
    model, task = models.build(settings, spec=SPEC, num_outputs=2), tasks.build({"name": "classify"})
    params = jax.jit(model.init)(jax.random.key(0))

    def run(params: Any, batch: Any) -> Any:
        loss, _, found = loss_and_gradients(model, task, params, batch, jax.random.key(1))
        return loss, found

    compiled = jax.jit(run).lower(params, batch()).compile()
    return compiled.memory_analysis().temp_size_in_bytes, *compiled(params, batch())


def test_the_less_is_kept_the_less_memory_a_step_takes() -> None:
    sizes = {remat: gradients(remat)[0] for remat in ("none", "dots", "full")}
    assert sizes["full"] < 0.9 * sizes["dots"] and sizes["dots"] < 0.9 * sizes["none"], sizes


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_computed_again_is_the_same(remat: str) -> None:
    _, loss, plain = gradients("none")
    _, again, found = gradients(remat)
    assert loss == again
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for mine, theirs in zip(jax.tree.leaves(plain), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6 * largest)


def trained(sizes: dict[str, int], accumulate: int) -> tuple[np.ndarray, Any]:
    """Losses and parameters of four steps on a mesh."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = make_mesh(sizes, devices)
    model = models.build({"size": "nano/4", "stack": "block"}, spec=SPEC, num_outputs=2)
    task = tasks.build({"name": "classify"})
    schedule = ScheduleConfig(name="constant", warmup_steps=0)
    optimizer = optimizers.build(OptimizerConfig(schedule=schedule, accumulate=accumulate, ema=0.9), 4)
    names = metric_names(model, task, model.abstract_state(), batch())
    places = states.shardings(jax.eval_shape(lambda: states.create(model, optimizer, names, 0)), model, mesh)
    losses = []
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: states.create(model, optimizer, names, 0), out_shardings=places)()
        rows = row_sharding(mesh)
        step = make_train_step(model, task, optimizer, shardings=places, batch_sharding=rows)
        for _ in range(4):
            state, report = step(state, jax.device_put(batch(), rows))
            losses.append(float(report.loss))
    return np.array(losses), jax.tree.map(np.asarray, (state.params, state.ema))


def test_microbatches_on_a_mesh_equal_the_whole_batch_on_one_device() -> None:
    losses, params = trained({"data": 1}, 1)
    assert losses[-1] < losses[0]
    sharded, others = trained({"data": 2, "fsdp": 2, "tensor": 2}, 4)
    np.testing.assert_allclose(sharded, losses, rtol=1e-5, atol=1e-5)
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(others), strict=True
    ):
        if "['key']['bias']" in jax.tree_util.keystr(path):
            continue  # adding a constant to all keys changes no softmax: its gradient is rounding, which Adam scales up
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))
