"""An encoder on eight devices, split over data, fsdp and tensor: it hides the same tokens and trains as on one."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import encoders
from tokenlab import tasks
from tokenlab.sharding.check import assert_no_activation_collective
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import DEFAULT_RULES
from tokenlab.train import optimizer as optimizers
from tokenlab.train import state as states
from tokenlab.train.config import OptimizerConfig, ScheduleConfig
from tokenlab.train.step import make_train_step, metric_names

LENGTH, EACH, STEPS = 12, 11, 8
BATCH = 4 * EACH
SPLIT = (("data", 2), ("fsdp", 2), ("tensor", 2))
STACK = "block + keep(0.75, by=cls) + block"  # behind post-norm blocks all norms are alike


@functools.cache
def trained(axes):
    sizes = dict(axes)
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    model = encoders.build(STACK, LENGTH, vocab_multiple=2, train=True)
    task = tasks.build({"name": "masked_lm", "ratio": 0.3, "hide": "words"})
    config = OptimizerConfig(learning_rate=1e-3, schedule=ScheduleConfig(name="constant", warmup_steps=5))
    optimizer = optimizers.build(config, STEPS)
    given = [encoders.batch(BATCH, LENGTH, seed) for seed in range(STEPS)]
    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in given[0].items()}
    names = metric_names(model, task, model.abstract_state(), shapes)
    places = states.shardings(jax.eval_shape(lambda: states.create(model, optimizer, names, 0)), model, mesh)
    rows = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES["batch"]))
    losses = []
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: states.create(model, optimizer, names, 0), out_shardings=places)()
        step = make_train_step(model, task, optimizer, shardings=places, batch_sharding=rows)
        compiled = step.lower(state, jax.device_put(given[0], rows)).compile()
        for batch in given:
            state, report = compiled(state, jax.device_put(batch, rows))
            losses.append(float(report.loss))
    return np.array(losses), state.params, mesh, compiled


@pytest.mark.slow
def test_it_trains_as_on_one_device():
    losses, params, *_ = trained((("data", 1),))
    other_losses, other, *_ = trained(SPLIT)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5),
        other,
        params,
    )


@pytest.mark.slow
def test_it_moves_no_activations_across_the_batch_and_splits_the_vocabulary():
    _, params, mesh, compiled = trained(SPLIT)
    assert_no_activation_collective(compiled, BATCH, mesh, parameters=params)
    table, bias = params["embed"]["table"], params["head"]["bias"]
    assert table.shape == (38, 16) and table.sharding.shard_shape(table.shape) == (19, 8)
    assert bias.sharding.shard_shape(bias.shape) == (19,)
