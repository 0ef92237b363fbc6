"""The real ViT in an experiment: sharded against one device, other stacks for evaluation, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import override
from tokenlab.core.errors import ConfigError, StackError, TokenLabError
from tokenlab.train import experiment, loop, state
from tokenlab.train import step as steps
from tokenlab.train.config import default_config
from tokenlab.train.experiment import Experiment
from tokenlab.train.records import read_metrics

STACK = "keep(k, by=random) + block"


def config(**changes: Any) -> ConfigDict:
    found = default_config()
    found.update(steps=10, batch_size=16, log_every=4, eval_every=5, checkpoint_every=3)
    found.model.update(size="nano/4", stack=STACK)
    found.stack_vars.k = 0.5
    found.eval.batch_size = 64
    found.mesh.update(data=2, fsdp=2, tensor=2)
    return override(found, changes)


@pytest.fixture(scope="module")
def built() -> Experiment:
    return experiment.build(config(**{"optimizer.ema": 0.9, "optimizer.accumulate": 2}))


def test_sharded_steps_equal_those_of_one_device(built: Experiment) -> None:
    """Over data, fsdp and tensor axes; with accumulation, averaging and a random choice of tokens."""
    sharded = built.init()
    kernel = sharded.params["blocks"]["mlp"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and not kernel.sharding.is_fully_replicated
    moments = [leaf for leaf in jax.tree.leaves(sharded.optimizer) if leaf.shape == kernel.shape]
    assert moments and all(leaf.sharding == kernel.sharding for leaf in moments)
    one = jax.jit(lambda: state.create(built.model, built.optimizer, built.metric_names, built.config.seed))()
    alone = steps.make_train_step(built.model, built.task, built.optimizer)
    with jax.set_mesh(built.mesh):
        together = built.train_step(0).lower(sharded, built.put(built.stream.batch(0))).compile()
    for number in range(4):
        batch = built.stream.batch(number)
        one, expected = alone(one, batch)
        sharded, report = together(sharded, built.put(batch))
        np.testing.assert_allclose(report.loss, expected.loss, rtol=1e-5)
    leaves = zip(
        jax.tree.leaves((sharded.params, sharded.ema)), jax.tree.leaves((one.params, one.ema)), strict=True
    )
    for mine, theirs in leaves:
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 1, 2**32 - 1])
def test_a_seed_gives_the_same_state_as_a_number_and_on_the_device(built: Experiment, seed: int) -> None:
    parts = (built.model, built.optimizer, built.metric_names)
    number = jax.jit(lambda: state.create(*parts, seed))()
    array = jax.jit(lambda seed: state.create(*parts, seed))(np.uint32(seed))
    jax.tree.map(np.testing.assert_array_equal, number, array)


def test_another_seed_shares_what_is_compiled(built: Experiment) -> None:
    other = built.with_seed(5)
    assert other.config.seed == 5 and built.config.seed == 0
    assert not np.array_equal(other.stream.indices(0), built.stream.indices(0))
    first, second = built.init(), other.init()
    assert not np.array_equal(first.key, second.key)
    batch = built.put(built.stream.batch(0))
    compiled = built.compiled_step(0, first, batch)
    assert other.compiled_step(0, second, batch) is compiled
    assert compiled.flops == built.step_cost(0).model_flops
    state_bytes = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(first))
    assert compiled.peak_bytes > state_bytes


def test_counted_flops_do_not_depend_on_accumulation_or_mesh(built: Experiment) -> None:
    plain = experiment.build(config(**{"mesh.fsdp": 1, "mesh.tensor": 1, "mesh.data": 8}))
    assert built.step_cost(0).model_flops == plain.step_cost(0).model_flops > 0


def test_facts_are_those_of_the_model(built: Experiment) -> None:
    facts = built.facts()
    assert facts["stack"] == facts["eval_stack"] == "keep(0.5, by=random) + block"
    assert facts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(built.model.abstract_state()))
    assert facts["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}


@pytest.mark.slow
def test_a_run_of_the_real_model_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded, with random choices of tokens, dense in evaluation."""
    settings = config(**{"eval.stack": "block", "model.drop_path": 0.1})
    loop.run(settings, tmp_path / "whole")
    put, asked = Experiment.put, []

    def stop(self: Experiment, batch: Any) -> Any:
        asked.append(len(batch["mask"]))
        if asked.count(16) == 8:
            raise KeyboardInterrupt
        return put(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Experiment, "put", stop)
        loop.run(settings, tmp_path / "parts")
    loop.run(settings, tmp_path / "parts")
    whole, parts = (
        [{**r, "seconds": 0, "data_seconds": 0} for r in read_metrics(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert parts == whole
    assert [record["split"] for record in whole].count("validation") == 2


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"eval.stack": "block*3"}, ConfigError, ["config.eval.stack needs blocks/", "as many blocks"]),
        (
            {"eval.stack": "keep(0.5, by=learned) + block"},
            ConfigError,
            ["items/keep", "does not have it"],
        ),
        ({"eval.stack": "keep(0.5, by=clss) + block"}, TokenLabError, ["clss", "cls"]),
        ({"stack_vars.k": "0:0.5, 5:1.5"}, TokenLabError, ["1.5"]),
        ({"stack_vars.m": 1}, TokenLabError, ["m"]),
        (
            {"stack_vars.k": "linear(0, 4, values=2)"},
            StackError,
            ["with k=0 of config.stack_vars", "the count 0; a count must lie in 1..4"],
        ),
        ({"stack_vars.k": "linear(3, 16, multiple=8)"}, ConfigError, ["config.stack_vars.k", "down to 0"]),
        ({"model.size": "nano/3"}, TokenLabError, ["patch 3"]),
        ({"model.sizee": "nano/4"}, ConfigError, ["sizee", "size"]),
        ({"model.name": "vitt"}, TokenLabError, ["vitt", "vit"]),
        ({"mesh.tensor": 4, "mesh.data": 1}, TokenLabError, ["heads", "tensor=4"]),
    ],
)
def test_what_does_not_fit_is_said_when_the_experiment_is_built(
    changes: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        experiment.build(config(**changes))
    for word in words:
        assert word in str(caught.value)


def test_evaluation_with_other_numbers_for_the_stack(built: Experiment) -> None:
    """The numbers of the last step done hold for the evaluation after it."""
    changing = experiment.build(config(**{"stack_vars.k": "0:1.0, 4:0.25"}))
    assert [changing.eval_model(at).stack_text for at in (0, 4, 5)] == [
        "keep(1.0, by=random) + block",
        "keep(1.0, by=random) + block",
        "keep(0.25, by=random) + block",
    ]
    assert changing.train_step(0) is changing.train_step(3)
    assert changing.train_step(0) is not changing.train_step(4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"batch_size": 24},
            "batch_size is 24, and .*multiple of 16, whole groups for each of the 8 devices",
        ),
        (
            {"batch_size": 32, "optimizer.accumulate": 4},
            r"batch_size / config.optimizer.accumulate is 8, and",
        ),
        ({"eval.batch_size": 24}, "eval.batch_size is 24, and moma .* sequences=2 examples together"),
    ],
)
def test_examples_that_are_ranked_together_fill_the_devices(changes: dict[str, Any], says: str) -> None:
    """Said when the run is built, by name, and not by a constraint inside the layer."""
    stack = "block(ffn=moma(mixed=2, sequences=2, decide=topk))"
    common = {"model.size": "nano/4", "model.stack": stack, "batch_size": 32, "eval.batch_size": 32}
    with pytest.raises(ConfigError, match=says):
        experiment.build(override(default_config(), {**common, "mesh.data": 8, **changes}))


def test_one_example_of_those_that_are_ranked_together_is_counted_by_itself() -> None:
    """The table is of one example, and a step of a batch computes as much for each."""

    def facts(sequences: int) -> dict[str, Any]:
        stack = f"skip(keep=0.5)(block(ffn=moma(mixed=2, sequences={sequences}))) + block"
        changes = {"model.size": "nano/4", "model.stack": stack, "batch_size": 32, "eval.batch_size": 32}
        return experiment.build(override(default_config(), changes)).facts()["cost_table"]

    assert facts(2) == facts(1)
