"""Sharded over eight devices every part trains as on one, and moves no activations across the batch.

"Equal" means: fp32, learning rate 1e-3 at most with warm-up, 1e-5 over 20 steps, and for stacks that choose tokens the
chosen ones first. One stack with everything in it runs in the quick tests, each part for itself in the slow ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import parts
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab import tasks
from tokenlab.sharding.check import assert_no_activation_collective, collectives
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import DEFAULT_RULES
from tokenlab.train import optimizer as optimizers
from tokenlab.train import state as states
from tokenlab.train.config import OptimizerConfig, ScheduleConfig
from tokenlab.train.step import make_train_step, metric_names

EACH = 11  # examples a device: a prime that divides no dimension of a parameter
STEPS = 20
TOGETHER = "block + keep(0.75, by=cls) + skip(keep=0.5, by=norm)(block) + block + merge(2) + block"
FOUND = list(
    {(part.role, part.name): part for part in reversed(parts.find())}.values()
)  # the first stack of each


def batches(count):
    """Batches of 88 fixed images with labels that depend on them."""
    keys = jax.random.split(jax.random.key(4), count)
    for key in keys:
        image = np.asarray(jax.random.normal(key, (8 * EACH, 8, 8, 1)))
        label = (image.sum(axis=(1, 2, 3)) > 0).astype(np.int32) + 2 * (image[:, 0, 0, 0] > 0)
        yield {"image": image, "label": label.astype(np.int32), "mask": np.ones(8 * EACH, np.float32)}


def prepare(stack, sizes):
    """Model, compiled step, first state and batch placement on a mesh of the given sizes."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = make_mesh(sizes, devices)
    model, task = parts.build(stack), tasks.build({"name": "classify"})
    config = OptimizerConfig(learning_rate=1e-3, schedule=ScheduleConfig(name="constant", warmup_steps=5))
    optimizer = optimizers.build(config, STEPS)
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in next(batches(1)).items()}
    names = metric_names(model, task, model.abstract_state(), shapes)
    abstract = jax.eval_shape(lambda: states.create(model, optimizer, names, 0))
    places = states.shardings(abstract, model, mesh)
    rows = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES["batch"]))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: states.create(model, optimizer, names, 0), out_shardings=places)()
        step = make_train_step(model, task, optimizer, shardings=places, batch_sharding=rows)
        compiled = step.lower(state, jax.device_put(next(batches(1)), rows)).compile()
    return mesh, model, compiled, state, rows


def train(prepared):
    """Losses and parameters after 20 steps, and the positions of the tokens that were chosen at the start."""
    mesh, model, compiled, state, rows = prepared
    losses = []
    with jax.set_mesh(mesh):
        first = jax.device_put(next(batches(1)), rows)

        def chosen(params, batch):
            trace = model.apply(params, batch, train=True, rng=jax.random.key(9), record=True).trace
            return {f"{point.name}/{point.inside}": point.tokens.position for point in trace}

        positions = jax.jit(chosen)(state.params, first)
        for batch in batches(STEPS):
            state, report = compiled(state, jax.device_put(batch, rows))
            losses.append(float(report.loss))
    return np.array(losses), jax.tree.map(np.asarray, state.params), jax.tree.map(np.asarray, positions)


def check_equal(stack, sharded):
    losses, params, chosen = train(prepare(stack, {"data": 1}))
    sharded_losses, sharded_params, sharded_chosen = train(sharded)
    jax.tree.map(np.testing.assert_array_equal, sharded_chosen, chosen)
    assert losses[-1] != losses[0], "nothing was learned, so nothing was compared"
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5, atol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if "['key']['bias']" in jax.tree_util.keystr(path):
            continue  # adding a constant to all keys changes no softmax: its gradient is rounding, which Adam scales up
        other = leaf_at(sharded_params, path)
        np.testing.assert_allclose(other, leaf, atol=1e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def leaf_at(tree, path):
    for entry in path:
        tree = tree[entry.key]
    return tree


def check_moves(sharded):
    mesh, _, compiled, state, _ = sharded
    assert_no_activation_collective(compiled, 8 * EACH, mesh, parameters=state.params)
    kinds = {collective.kind for collective in collectives(compiled)}
    assert (
        "all-reduce" in kinds or "reduce-scatter" in kinds
    )  # gradients are summed: the check reads a sharded program


def test_all_together():
    """Equal to one device, and no activations move."""
    sharded = prepare(TOGETHER, {"data": 4, "fsdp": 2})
    check_moves(sharded)
    check_equal(TOGETHER, sharded)


@pytest.mark.slow
def test_all_together_moves_no_activations_where_parameters_are_whole():
    check_moves(prepare(TOGETHER, {"data": 8}))


@pytest.mark.slow
@pytest.mark.parametrize("part", FOUND, ids=str)
def test_each_part(part):
    """Equal to one device, and no activations move."""
    sharded = prepare(part.stack, {"data": 2, "fsdp": 4})
    check_moves(sharded)
    check_equal(part.stack, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["block*2", TOGETHER])
def test_tensor_parallel_equals_one_device(stack):
    check_equal(stack, prepare(stack, {"data": 4, "tensor": 2}))


def test_state_is_split():
    """Under fsdp the large leaves are really in parts."""
    _, _, _, state, _ = prepare("block*2", {"data": 4, "fsdp": 2})
    kernel = state.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 32)
    assert jnp.shape(kernel) == (2, 16, 32)
