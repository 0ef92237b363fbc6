"""Whole runs with a small model: resuming, signals, bad values, checks before writing, schedules in the stack."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from ml_collections.config_dict import ConfigDict

from tokenlab import models
from tokenlab.core.config import override
from tokenlab.core.errors import ConfigError, NonFiniteError, TokenLabError
from tokenlab.layers.program import BlockStep
from tokenlab.train import experiment, initialize, loop
from tokenlab.train.config import default_config
from tokenlab.train.experiment import Experiment


@dataclasses.dataclass(frozen=True, eq=False)
class Small:
    """A linear classifier on the part of the pixels that `keep` says, with noise on them in training."""

    keep: float
    train: bool
    tokens_per_example = 64
    stack_text = "block"
    program = types.SimpleNamespace(flat=list, after=64)
    layer_tokens = dense_layer_tokens = 0

    def init(self, key: Array) -> dict[str, Any]:
        kernel = 0.01 * jax.random.normal(key, (64, 10))
        return {"embed": {}, "head": {"kernel": kernel, "bias": jnp.zeros(10)}}

    def abstract_state(self) -> dict[str, Any]:
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        return {"head/kernel": ("embed", None), "head/bias": (None,)}

    def apply(self, params: Any, batch: Any, *, train: bool, rng: Array, execution: str = "scan") -> Any:
        kept = round(64 * self.keep)
        pixels = batch["image"].reshape(-1, 64)[:, :kept]
        if train:
            pixels = pixels + 0.1 * jax.random.normal(rng, pixels.shape)
        logits = pixels @ params["head"]["kernel"][:kept] + params["head"]["bias"]
        return types.SimpleNamespace(logits=logits, losses={}, aux=types.SimpleNamespace(metrics={}))


def build_small(settings: Any, *, stack_vars: Mapping[str, float], train: bool, **facts: Any) -> Small:
    return Small(stack_vars.get("k", 1.0), train)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "build", build_small)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run of `config()` that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", build_small)
        loop.run(config(), workdir)
    return workdir


def config(**changes: Any) -> ConfigDict:
    found = default_config()
    found.update(steps=23, batch_size=16, log_every=5, eval_every=6, checkpoint_every=4, keep_checkpoints=3)
    found.eval.batch_size = 64
    found.optimizer.update(learning_rate=0.01, ema=0.9)
    return override(found, changes)


def records(workdir: Path) -> list[dict[str, Any]]:
    """What the run wrote, without what may differ between two equal runs."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.endswith("seconds")}
        for line in lines
    ]


def steps_of(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def params_of(workdir: Path) -> dict[str, np.ndarray]:
    return initialize.evaluation_params(workdir)[0]["head"]


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Any) -> None:
    """Call `act(batch)` when the batch of step `number` (the first is 1) is put on the devices; it may replace it."""
    put, asked = Experiment.put, {"count": None}
    batches = Experiment.batches

    def counted_batches(self: Experiment, start: int) -> Any:
        asked["count"] = start
        return batches(self, start)

    def counted_put(self: Experiment, batch: Any) -> Any:
        if asked["count"] is not None and len(batch["mask"]) == self.config.batch_size:
            asked["count"] += 1
            if asked["count"] == number:
                batch = act(batch) or batch
        return put(self, batch)

    monkeypatch.setattr(Experiment, "batches", counted_batches)
    monkeypatch.setattr(Experiment, "put", counted_put)


class Killed(BaseException):
    """Stands for the end of the process."""


def die(batch: Any) -> None:
    raise Killed


def test_a_run_learns_and_records(small: None, tmp_path: Path) -> None:
    result = loop.run(config(steps=60, log_every=20, eval_every=20), tmp_path)
    found = records(tmp_path)
    assert [(record["step"], record["split"]) for record in found] == [
        (20, "train"),
        (20, "validation"),
        (40, "train"),
        (40, "validation"),
        (60, "train"),
        (60, "validation"),
        (60, "test"),
    ]
    assert result["test"]["accuracy"] > 0.8
    # 2 FLOPs a multiply-add, forward and the gradient of the kernel (no gradient of the pixels is needed).
    assert found[-1]["flops"] == result["flops"] == 60 * 2 * (2 * 16 * 64 * 10)
    assert found[-1]["tokens"] == result["tokens"] == 60 * 16 * 64
    assert steps_of(tmp_path)[-1] == 60
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["train_flops_per_step"] == {"": 2 * 2 * 16 * 64 * 10}
    assert facts["seconds_to_first_step"] > 0
    assert facts["cost_table"]["total"]["train_flops"] * 16 == facts["train_flops_per_step"][""]


def test_evaluation_counts_every_example_once(small: None, tmp_path: Path) -> None:
    """180 validation examples in batches of 64: the last is padded."""
    result = loop.run(config(steps=4), tmp_path)
    hits = result["validation"]["accuracy"] * 180
    assert abs(hits - round(hits)) < 1e-9
    built = experiment.build(config())
    kernel, bias = params_of(tmp_path)["kernel"], params_of(tmp_path)["bias"]
    batch = built.source.split("validation").batch(np.arange(180))
    logits = batch["image"].reshape(180, 64) @ kernel + bias
    assert round(hits) == (logits.argmax(1) == batch["label"]).sum()
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(chances[np.arange(180), batch["label"]]).mean()
    assert abs(result["validation"]["loss"] - loss) < 1e-5


@pytest.mark.parametrize("number", random.Random(4).sample(range(1, 24), 6))
def test_a_killed_run_goes_on_bit_for_bit(
    small: None, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Records, sums between records that span a checkpoint, and the final weights."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, number, die)
        loop.run(config(), tmp_path)
    result = loop.run(config(), tmp_path)
    assert records(tmp_path) == records(whole)
    for name, leaf in params_of(whole).items():
        np.testing.assert_array_equal(leaf, params_of(tmp_path)[name])
    last = records(whole)[-1]
    assert {name: result["test"][name] for name in last} == last


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_under_way(
    small: None, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        before_step(patch, 7, lambda batch: os.kill(os.getpid(), number))
        loop.run(config(), tmp_path)
    assert caught.value.code == code
    assert steps_of(tmp_path) == [4, 7]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    loop.run(config(), tmp_path)
    assert records(tmp_path) == records(whole)


def test_a_truncated_checkpoint_is_passed_over_and_told(
    small: None,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 15, die)
        loop.run(config(), tmp_path)
    largest = max((tmp_path / "checkpoints" / "12").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    capsys.readouterr()
    loop.run(config(), tmp_path)
    told = capsys.readouterr().out
    assert "checkpoint 12" in told and "going on from step 8" in told
    assert records(tmp_path) == records(whole)


def test_more_steps_continue_a_run_and_fewer_are_an_error(small: None, tmp_path: Path) -> None:
    loop.run(config(steps=8), tmp_path)
    with pytest.raises(ConfigError, match="config.steps is 6, but the run in .* has done 8 already"):
        loop.run(config(steps=6), tmp_path)
    result = loop.run(config(steps=12), tmp_path)
    assert result["step"] == 12 and result["tokens"] == 12 * 16 * 64


def test_a_finished_run_is_left_as_it_is(small: None, tmp_path: Path) -> None:
    first = loop.run(config(steps=8), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = loop.run(config(steps=8), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert again["test"] == first["test"] and again["step"] == 8


@pytest.mark.parametrize(
    ("number", "saved"),
    [(7, [4]), (9, [4, 8]), (11, [4, 8])],
    ids=["seen at a checkpoint", "seen at a record", "seen at an evaluation"],
)
def test_a_value_that_is_not_finite_stops_the_run_before_it_is_saved(
    small: None, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, saved: list[int]
) -> None:
    def poison(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        image = batch["image"].copy()
        image[3, 2, 1] = np.nan
        return {**batch, "image": image}

    with monkeypatch.context() as patch, pytest.raises(NonFiniteError) as caught:
        before_step(patch, number, poison)
        loop.run(config(), tmp_path)
    assert str(caught.value).startswith(f"step {number}: batch/image is not finite")
    assert "\n" not in str(caught.value)
    assert steps_of(tmp_path) == saved
    assert all(record["step"] < number for record in records(tmp_path))
    # With good data the same run goes on from the last checkpoint.
    loop.run(config(), tmp_path)
    assert records(tmp_path) == records(whole)


def test_numbers_in_the_stack_follow_their_schedule(small: None, tmp_path: Path) -> None:
    changes = {"steps": 12, "stack_vars.k": "0:1.0, 4:0.5, 8:1.0"}
    result = loop.run(config(**changes), tmp_path)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert sorted(facts["train_flops_per_step"]) == [
        "k=0.5",
        "k=1.0",
    ]  # two programs, though it changes twice
    whole, half = 4 * 16 * 64 * 10, 4 * 16 * 32 * 10
    assert facts["train_flops_per_step"] == {"k=1.0": whole, "k=0.5": half}
    assert result["flops"] == 8 * whole + 4 * half


def test_numbers_that_alternate_are_compiled_once_each(small: None, tmp_path: Path) -> None:
    changes = {"steps": 12, "stack_vars.k": "every 5: 1.0 else 0.5"}
    result = loop.run(config(**changes), tmp_path)
    facts = json.loads((tmp_path / "run.json").read_text())
    flops = facts["train_flops_per_step"]
    assert set(flops) == {"k=1.0", "k=0.5"}
    assert result["flops"] == 3 * flops["k=1.0"] + 9 * flops["k=0.5"]


def test_resuming_inside_a_schedule_of_the_stack(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(**{"steps": 12, "stack_vars.k": "0:1.0, 6:0.5"})
    loop.run(settings, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 10, die)
        loop.run(settings, tmp_path / "parts")
    loop.run(settings, tmp_path / "parts")
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


class Counted(Small):
    """The same with a block, so that its tokens can be counted."""

    @property
    def program(self) -> Any:
        present = round(64 * self.keep)
        step = BlockStep(0, types.SimpleNamespace(ffn=None, ffn_name="", special_name=""), (), present)
        return types.SimpleNamespace(flat=lambda: [step], present=64, depth=1, after=present)

    dense_layer_tokens = 64
    layer_tokens = property(lambda self: round(64 * self.keep))


def test_a_run_whose_learning_rate_follows_layer_tokens_goes_on_bit_for_bit(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        models,
        "build",
        lambda settings, *, stack_vars, train, **facts: Counted(stack_vars.get("k", 1.0), train),
    )
    settings = config(steps=8, log_every=1, eval_every=0)
    settings.stack_vars.k = "0:0.25, 3:every 2: 1.0 else 0.5"
    settings.optimizer.schedule.clock = "layer_tokens"
    loop.run(settings, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        before_step(patch, 6, die)  # the checkpoint of step 4 is among those that alternate
        loop.run(settings, tmp_path / "parts")
    loop.run(settings, tmp_path / "parts")
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    for name, leaf in params_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(leaf, params_of(tmp_path / "parts")[name])
    rates = [record["learning_rate"] for record in records(tmp_path / "parts") if record["split"] == "train"]
    followed = experiment.build(settings).optimizer.schedule
    np.testing.assert_allclose(rates, [float(followed(step)) for step in range(8)], rtol=1e-5, atol=1e-9)
    settings.optimizer.schedule.clock = "steps"
    by_steps = experiment.build(settings).optimizer.schedule
    assert not np.allclose(rates, [float(by_steps(step)) for step in range(8)])


def test_prefetching_changes_nothing(small: None, whole: Path, tmp_path: Path) -> None:
    loop.run(config(**{"data.prefetch": 2}), tmp_path)
    assert records(tmp_path) == records(whole)


def test_an_implicit_transfer_in_the_loop_is_an_error(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Experiment, "put", lambda self, batch: dict(batch))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(config(), tmp_path / "guarded")


def test_parameters_of_another_run(small: None, tmp_path: Path) -> None:
    loop.run(config(steps=8), tmp_path / "first")
    start = config(
        **{"steps": 1, "init_from.path": str(tmp_path / "first"), "init_from.fresh": ("head/bias",)}
    )
    state = experiment.build(start).init(
        initialize.load(experiment.build(start).config.init_from, Small(1, True).abstract_state())
    )
    first = params_of(tmp_path / "first")
    np.testing.assert_array_equal(state.params["head"]["kernel"], first["kernel"])
    np.testing.assert_array_equal(state.ema["head"]["kernel"], first["kernel"])
    assert not np.any(state.params["head"]["bias"]) and np.any(first["bias"])
    loop.run(start, tmp_path / "second")
    moved = np.abs(params_of(tmp_path / "second")["kernel"] - first["kernel"]).max()
    assert 0 < moved < 0.02


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepz": 3}, ["stepz", "Did you mean 'steps'?"]),
        ({"steps": 0}, ["config.steps", "0"]),
        ({"steps": 2.5}, ["config.steps", "2.5"]),
        ({"batch_size": -1}, ["config.batch_size"]),
        ({"batch_size": 12}, ["config.batch_size is 12", "multiple of 8"]),
        ({"batch_size": 4096}, ["4096", "1257"]),
        ({"optimizer.accumulate": 3}, ["accumulate", "batch_size=16"]),
        ({"optimizer.accumulate": 4}, ["batch_size / config.optimizer.accumulate is 4"]),
        ({"optimizer.name": "adamv"}, ["'adamv'"]),
        ({"optimizer.options.beta1": 0.9}, ["'beta1'"]),
        ({"optimizer.schedule.name": "cosin"}, ["'cosin'", "'cosine'"]),
        ({"mesh.data": 3}, ["mesh", "8"]),
        ({"mesh.fsdp": 0}, ["config.mesh.fsdp"]),
        ({"task.name": "clasify"}, ["clasify", "classify"]),
        ({"data.name": "digitz"}, ["digitz", "digits"]),
        ({"data.transform": "shft(1)"}, ["shft"]),
        ({"eval.split": "valid"}, ["'valid'", "'validation'"]),
        ({"eval.final_split": "tset"}, ["'tset'", "'test'"]),
        ({"eval.batch_size": 100}, ["config.eval.batch_size is 100"]),
        ({"stack_vars.k": "0:1.0, 5"}, ["stack_vars.k"]),
        ({"init_from.path": "/nowhere"}, ["/nowhere"]),
        ({"init_from.fresh": ("head",)}, ["init_from.fresh"]),
        ({"seed": -1}, ["config.seed"]),
    ],
)
def test_a_wrong_configuration_is_told_before_the_workdir_is_touched(
    small: None, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    workdir = tmp_path / "run"
    with pytest.raises(TokenLabError) as caught:
        loop.run(config(**changes), workdir)
    message = str(caught.value)
    assert len(message.splitlines()) in (1, 3)  # three when a caret shows the place
    for word in words:
        assert word in message
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("ready", "counted"), [([], True), ([True], True), ([True, False], False), ([False, True], True)]
)
def test_waiting_counts_only_while_the_devices_have_nothing_to_do(ready: list[bool], counted: bool) -> None:
    def batches() -> Any:
        time.sleep(0.02)
        yield "batch"

    trainer = types.SimpleNamespace(waited=0.0, step=0)
    in_flight = [types.SimpleNamespace(is_ready=lambda done=done: done) for done in ready]
    assert list(loop.Trainer._waiting(trainer, batches(), in_flight)) == ["batch"]
    assert (trainer.waited >= 0.02) == counted
