"""Arms do what a run does, and wait for it."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.bench.conftest import ROWS
from tokenlab.bench import arm as arms
from tokenlab.bench.arm import Shelf, prepare, prepare_each
from tokenlab.train import costs, state, step


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture(scope="module")
def dense(setting, shelf):
    return prepare(setting, "block*2", "train", "unroll", shelf)


def test_a_train_step_is_the_one_of_the_training_loop(setting) -> None:
    made = prepare(setting, "block + keep(0.5) + block", "train", "unroll", Shelf())
    names = step.metric_names(made.model, setting.task, made.model.abstract_state(), setting.batch)
    begun = jax.jit(lambda: state.create(made.model, setting.optimizer, names, 0))()
    _, report = jax.jit(
        lambda s: step.train_step(made.model, setting.task, setting.optimizer, s, setting.batch)
    )(begun)
    np.testing.assert_allclose(made.once(), report.loss, rtol=1e-6)
    made.run(2)
    assert float(made.once()) < float(report.loss)  # it goes on from there


def test_counted_flops_are_those_of_the_cost_table(setting, dense, shelf) -> None:
    per_example = costs.train_cost(dense.model, setting.task, setting.spec).model_flops
    assert dense.cost.model_flops == ROWS * per_example
    forward = prepare(setting, "block*2", "inference", "unroll", Shelf())
    assert forward.cost.flops == ROWS * costs.forward_cost(forward.model, setting.task, setting.spec).flops


def test_stacks_with_the_same_weights_share_them(setting, dense, shelf, monkeypatch) -> None:
    other = prepare(setting, "block + keep(0.5) + block", "train", "unroll", shelf)
    slots = list(shelf._slots.values())
    assert len(slots) == 1
    before = int(slots[0].value.step)
    dense.run(2)
    other.run(3)
    assert int(slots[0].value.step) == before + 5
    monkeypatch.setattr(
        arms, "_compile", lambda *_: (None, 0.0)
    )  # the weights are made, the step is not needed
    prepare(setting, "block + keep(0.5, by=learned) + block", "train", "unroll", shelf)
    assert len(shelf._slots) == 2  # it has a weight of its own


def test_inference_gives_the_logits_each_time_and_leaves_train_only_items_out(setting) -> None:
    made = prepare(setting, "block + keep(0.5, train_only=True) + block", "inference", "unroll", Shelf())
    params = jax.jit(made.model.init)(jax.random.key(0))
    assert made.model.program.after == 17
    expected = jax.jit(made.model.apply)(params, setting.batch).logits
    for _ in range(2):
        np.testing.assert_allclose(made.once(), expected, rtol=1e-5, atol=1e-6)


def test_memory_and_compile_time(dense, shelf) -> None:
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(next(iter(shelf._slots.values())).value))
    assert held < dense.peak_bytes < 100 * held
    assert dense.compile_seconds > 0


def test_compile_times_are_without_the_cache_which_is_on_again_after(
    setting, compiled_anew, monkeypatch
) -> None:
    seen = []
    original = jax.stages.Lowered.compile

    def compile(self, *args, **kwargs):
        seen.append(jax.config.jax_enable_compilation_cache)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    before = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    prepare(setting, "block", "inference", "unroll", Shelf())
    assert before[0] and seen == [False]
    assert (jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir) == before


def test_each_way_is_prepared_and_told(setting) -> None:
    both = dataclasses.replace(setting, model={"size": "nano/2"})
    notes: list[str] = []
    found = prepare_each(both, "block*2", "inference", Shelf(), notes.append)
    assert [arm.execution for arm in found.values()] == list(found) == ["scan", "unroll"]
    np.testing.assert_allclose(found["scan"].once(), found["unroll"].once(), rtol=1e-5, atol=1e-6)
    assert len(notes) == 2 and "block*2 (inference, scan): compiled in" in notes[0]


@pytest.mark.slow
def test_rows_over_several_devices(setting) -> None:
    from tokenlab.sharding.mesh import make_mesh

    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    batch = jax.device_put(dict(setting.batch), arms.batch_sharding(mesh))
    split = dataclasses.replace(setting, mesh=mesh, batch=batch)
    one = prepare(setting, "block", "train", "unroll", Shelf())
    four = prepare(split, "block", "train", "unroll", Shelf())
    np.testing.assert_allclose(four.once(), one.once(), rtol=1e-5)
    assert four.cost.flops == one.cost.flops
    assert four.peak_bytes < one.peak_bytes  # of one device
    logits = prepare(split, "block", "inference", "unroll", Shelf()).once()
    assert {shard.data.shape[0] for shard in logits.addressable_shards} == {1}
