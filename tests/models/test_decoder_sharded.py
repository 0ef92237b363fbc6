"""A decoder on eight devices, split over data, fsdp and tensor: it trains as on one, and moves what it must alone."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab import models, tasks
from tokenlab.sharding.check import assert_no_activation_collective, collectives
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import DEFAULT_RULES
from tokenlab.train import optimizer as optimizers
from tokenlab.train import state as states
from tokenlab.train.config import OptimizerConfig, ScheduleConfig
from tokenlab.train.step import make_train_step, metric_names

LENGTH, EACH, STEPS = 12, 11, 20
BATCH = 4 * EACH
SPLIT = {"data": 2, "fsdp": 2, "tensor": 2}
STACKS = ("block + mod(keep=0.5)(block) + block", pytest.param("block*2", marks=pytest.mark.slow))


def batches():
    draws = np.random.default_rng(0)
    for _ in range(STEPS):
        start = draws.integers(0, 30, (BATCH, 1))
        ids = ((start + np.arange(LENGTH + 1)) % 30).astype(np.int32)
        ones = np.ones((BATCH, LENGTH), np.float32)
        place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids[:, 1:].shape)
        yield {
            "ids": ids[:, :-1], "target": ids[:, 1:], "weight": ones, "bytes": ones,
            "segment": ones.astype(np.int32), "position": place, "mask": ones[:, 0],
        }  # fmt: skip


@functools.cache
def prepared(stack, axes):
    sizes = dict(axes)
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    spec = {"ids": ((LENGTH,), "int32")}
    settings = {"name": "decoder_lm", "size": "nano", "stack": stack, "vocab_multiple": 2}
    model = models.build(settings, spec=spec, num_outputs=31)
    task = tasks.build({"name": "next_token"})
    config = OptimizerConfig(learning_rate=1e-3, schedule=ScheduleConfig(name="constant", warmup_steps=5))
    optimizer = optimizers.build(config, STEPS)
    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in next(batches()).items()}
    names = metric_names(model, task, model.abstract_state(), shapes)
    places = states.shardings(jax.eval_shape(lambda: states.create(model, optimizer, names, 0)), model, mesh)
    rows = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES["batch"]))
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: states.create(model, optimizer, names, 0), out_shardings=places)()
        step = make_train_step(model, task, optimizer, shardings=places, batch_sharding=rows)
        compiled = step.lower(state, jax.device_put(next(batches()), rows)).compile()
    return mesh, compiled, state, rows


@functools.cache
def trained(stack, axes):
    mesh, compiled, state, rows = prepared(stack, axes)
    state, losses = jax.tree.map(lambda leaf: leaf.copy(), state), []
    with jax.set_mesh(mesh):
        for batch in batches():
            state, report = compiled(state, jax.device_put(batch, rows))
            losses.append(float(report.loss))
    return np.array(losses), jax.tree.map(np.asarray, state.params)


@pytest.mark.parametrize("stack", STACKS)
def test_it_trains_as_on_one_device(stack):
    losses, params = trained(stack, (("data", 1),))
    other_losses, other = trained(stack, tuple(SPLIT.items()))
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, params)


@pytest.mark.parametrize("stack", STACKS)
def test_it_moves_no_activations_across_the_batch_and_sums_over_tensor_alone(stack):
    mesh, compiled, state, _ = prepared(stack, tuple(SPLIT.items()))
    assert_no_activation_collective(compiled, BATCH, mesh, parameters=state.params)
    # Halves of heads, hidden units and vocabulary are summed over tensor. Gathered over it are rows of the split
    # embedding, and for the accuracy the likeliest token of each half of the vocabulary; no activation is.
    within = [each for each in collectives(compiled) if each.crosses(mesh, ("tensor",))]
    carrying = [e for e in within if any(n and n % EACH == 0 for shape in e.shapes for n in shape)]
    gathered = [e for e in carrying if e.kind not in ("all-reduce", "reduce-scatter")]
    assert len(carrying) > len(gathered), "nothing is summed: the program is not split"
    for each in gathered:
        best_of_each = all(shape[-1] == SPLIT["tensor"] for shape in each.shapes)
        assert "TokenEmbed" in each.source or best_of_each, str(each)


def test_embedding_and_head_are_split_over_the_vocabulary():
    _, _, state, _ = prepared(STACKS[0], tuple(SPLIT.items()))
    table, kernel = state.params["embed"]["table"], state.params["head"]["kernel"]
    assert table.shape == (32, 16) and table.sharding.shard_shape(table.shape) == (16, 8)
    assert kernel.sharding.shard_shape(kernel.shape) == (8, 16)
