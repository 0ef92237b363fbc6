"""Statistics: they move by what a batch says, add up over its parts, are saved, restored, evaluated and left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from ml_collections.config_dict import ConfigDict

from tests.train.test_loop import Killed, before_step, die
from tests.train.test_step import CLASSES, Classify, Linear, copied, some_batch
from tokenlab import evaluate
from tokenlab.core.config import from_dataclass, override
from tokenlab.core.errors import CheckpointError, ConfigError, NonFiniteError
from tokenlab.data.sources import text as source
from tokenlab.layers import statistics
from tokenlab.layers.scores.importance import TokenImportance
from tokenlab.models.state import fit_state
from tokenlab.train import default_config, experiment, initialize, loop
from tokenlab.train import optimizer as optimizers
from tokenlab.train import state as states
from tokenlab.train import step as steps
from tokenlab.train.config import OptimizerConfig, ScheduleConfig

KNOWN = TokenImportance(CLASSES, allow=(0,), beta=0.5)


class Knowing(Linear):
    """The linear model, with the running loss of each class beside its weights."""

    statistics = {"importance": KNOWN}

    def init(self, key: Array) -> dict[str, Any]:
        return {**super().init(key), "statistics": {"importance": KNOWN.init()}}


class Telling(Classify):
    """Says what it learned of each class; `blind` says nothing."""

    def __init__(self, blind: bool = False, spoil: bool = False) -> None:
        super().__init__()
        self.blind, self.spoil = blind, spoil

    def loss(self, model: Any, params: Any, batch: Any, *, rng: Array, train: bool) -> Any:
        loss, metrics = super().loss(model, params, batch, rng=rng, train=train)
        assert "statistics" in params, "the task does not see the statistics"
        logits = batch["image"] @ params["head"]["kernel"] + params["head"]["bias"]
        each = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)[:, 0]
        if self.spoil:
            each = each * jnp.where(batch["label"] == 1, jnp.nan, 1.0)
        told = {} if self.blind else statistics.observed(model, batch["label"], each, batch["mask"])
        return loss, {**metrics, **told}


def setup(task: Telling | None = None, accumulate: int = 1, ema: float | None = None) -> tuple[Any, Any]:
    config = OptimizerConfig(
        name="adamw",
        schedule=ScheduleConfig("constant", 0),
        learning_rate=0.1,
        accumulate=accumulate,
        ema=ema,
    )
    built, model, task = optimizers.build(config, steps=100), Knowing(), task or Telling()
    names = steps.metric_names(model, task, jax.eval_shape(model.init, jax.random.key(0)), some_batch())
    return steps.make_train_step(model, task, built), states.create(model, built, names, seed=7)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_moves_them_by_the_whole_batch(accumulate: int) -> None:
    """By the mean loss of each class over all microbatches; not by the optimizer, and the pinned one not at all."""
    run, state = setup(accumulate=accumulate)
    assert "statistics" not in state.params and "importance" not in str(jax.tree.structure(state.optimizer))
    assert not any("statistics" in name for name in state.metrics)
    batch, before = some_batch(), copied(state.params)
    batch["mask"][:5] = 0
    state, _ = run(state, batch)
    logits = batch["image"] @ before["head"]["kernel"] + before["head"]["bias"]
    each = -np.asarray(jax.nn.log_softmax(logits))[np.arange(12), batch["label"]]
    expected = np.array([1e4, 10.0, 10.0])
    for c in (1, 2):
        there = (batch["label"] == c) & (batch["mask"] > 0)
        assert there.any()
        expected[c] = 5 + each[there].mean() / 2
    np.testing.assert_allclose(state.statistics["importance"], expected, rtol=1e-5)
    assert states.evaluation_params(state)["statistics"] is state.statistics


def test_a_model_without_has_none() -> None:
    built = optimizers.build(OptimizerConfig(), steps=10)
    state = states.create(Linear(), built, ("loss",), seed=0)
    assert state.statistics is None and states.evaluation_params(state) is state.params
    assert not any("statistics" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))


def test_the_average_of_parameters_is_evaluated_with_them() -> None:
    run, state = setup(ema=0.9)
    state, _ = run(state, some_batch())
    found = states.evaluation_params(state)
    assert found["head"] is state.ema["head"] and found["statistics"] is state.statistics


def test_a_task_that_says_nothing_of_them_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'importance', of which task Telling says nothing"):
        setup(Telling(blind=True))


def test_a_bad_loss_among_them_is_named_though_the_step_itself_is_good() -> None:
    run, state = setup(Telling(spoil=True))
    state, report = run(state, some_batch())
    assert np.isfinite(report.loss)
    names = states.leaf_names(some_batch(), state.params, state.statistics)
    with pytest.raises(NonFiniteError, match="^step 1: statistics/importance after the update is not finite"):
        states.check_health(jax.device_get(state.health), names)


def test_fitting_saved_ones_to_a_model() -> None:
    """Left out where they are not wanted, and told; begun anew in a run; missing they are an error in evaluation."""
    head = {"head": {"bias": np.zeros(3)}}
    whole = {**head, "statistics": {"importance": np.zeros(3)}}
    for starts in (True, False):
        leaves, notes = fit_state(whole, head, left_out=not starts)
        assert list(leaves) == ["head/bias"] and "holds statistics/importance" in notes[0]
    leaves, notes = fit_state(head, whole, left_out=False)
    assert list(leaves) == ["head/bias"] and "statistics/importance: it begins anew" in notes[0]
    with pytest.raises(CheckpointError, match="statistics/importance: .* does not have it"):
        fit_state(head, whole)
    with pytest.raises(CheckpointError, match=r"has it as \(3,\), the model needs it as \(4,\)"):
        fit_state(whole, {**head, "statistics": {"importance": np.zeros(4)}}, left_out=False)


# ------------------------------------------------------------------------------------------------ whole runs


STACK = "block + token_dropping(keep=7)(block) + block"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few words in many orders."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    draws = np.random.default_rng(0)
    lines = [" ".join(draws.choice(["one", "two", "three", "four"], 12)) for _ in range(120)]
    file.write_text("\n\n".join(lines))
    return str(file)


def config(text: str, **changes: Any) -> ConfigDict:
    """A tiny encoder, byte by byte: 256 [SEP], 257 padding, 258 [CLS], 259 [MASK]."""
    found = default_config(model="encoder_lm", task="masked_lm")
    found.data = from_dataclass(source.Config(name="text", files=text))
    found.update(steps=4, batch_size=8, log_every=1, eval_every=4, checkpoint_every=2)
    found.eval.batch_size = 8
    found.data.update(split_on="\n\n", length=16, encoder=True)
    found.model.update(size="nano", stack=STACK, always_kept=(256, 258, 259), first_dropped=(257,))
    return override(found, changes)


def records(workdir: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in lines]


def importances(workdir: Path) -> np.ndarray:
    return initialize.evaluation_params(workdir)[0]["statistics"]["importance"]


@pytest.fixture(scope="module")
def whole(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    loop.run(config(text), workdir)
    return workdir


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(
    text: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 4, die)
        loop.run(config(text), tmp_path)
    loop.run(config(text), tmp_path)
    assert records(tmp_path) == records(whole)
    for each in (
        initialize.evaluation_params(folder)[0]["statistics"]["importance"] for folder in (tmp_path,)
    ):
        first = initialize.evaluation_params(whole)[0]["statistics"]["importance"]
        np.testing.assert_array_equal(each, first)
        assert (first != TokenImportance(260, (256, 258, 259), (257,)).init()).any()
        np.testing.assert_array_equal(first[[256, 257, 258, 259]], [1e4, -1e4, 1e4, 1e4])


def test_it_is_evaluated_dense_unless_asked_otherwise(whole: Path) -> None:
    """What training knows of ids is then left out, and told; a stack that asks for it finds it."""
    trained = evaluate.load(whole)
    assert "statistics" not in trained.params and any(
        "statistics/importance" in note for note in trained.notes
    )
    dense = evaluate.load(whole, {"model.stack": "block*3"})
    jax.tree.map(np.testing.assert_array_equal, trained.params, dense.params)
    stack = STACK.replace("keep=7", "keep=7, train_only=False")
    dropping = evaluate.load(whole, {"model.stack": stack})
    assert dropping.notes == () and dropping.params["statistics"]["importance"].shape == (260,)


def test_what_starts_from_it(text: str, whole: Path) -> None:
    """A dense run leaves them out, and that is told; one that drops tokens goes on from where they were."""
    begun = {}
    for stack in ("block*3", STACK):
        built = experiment.build(config(text, **{"model.stack": stack, "init_from.path": str(whole)}))
        notes: list[str] = []
        loaded = initialize.load(built.config.init_from, built.model.abstract_state(), notes=notes)
        begun[stack] = built.init(loaded)
        told = [
            "holds statistics/importance, which the stack does not use: left out" in note for note in notes
        ]
        assert told == ([True] if stack == "block*3" else [])
    assert begun["block*3"].statistics is None
    np.testing.assert_array_equal(begun[STACK].statistics["importance"], importances(whole))
    kernels = [state.params["blocks"]["mlp"]["up"]["kernel"] for state in begun.values()]
    np.testing.assert_array_equal(*kernels)


def test_a_loss_that_is_not_finite_is_never_saved(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*args: Any) -> Any:
        total, count = observe(*args)
        return total + jnp.nan * (count > 0), count

    observe = TokenImportance.observe
    monkeypatch.setattr(TokenImportance, "observe", spoiled)
    with pytest.raises(NonFiniteError, match="step 1: statistics/importance"):
        loop.run(config(text, log_every=50), tmp_path)
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()]
