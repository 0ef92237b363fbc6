"""Evaluating trained weights: exact counts, other stacks, what may be changed, what is told when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.evaluate.conftest import STACK, copy
from tokenlab import data, evaluate
from tokenlab.core.errors import CheckpointError, ConfigError, DataError, StackError, TokenLabError
from tokenlab.evaluate import load
from tokenlab.train.checkpoint import load_params


def files(workdir: Path) -> dict[str, float]:
    return {str(path.relative_to(workdir)): path.stat().st_mtime_ns for path in sorted(workdir.rglob("*"))}


def test_evaluation_repeats_what_the_run_said(trained: Any, tmp_path: Path, capsys: Any) -> None:
    workdir, said = trained
    target = tmp_path / "result.json"
    result = evaluate.run(workdir, {}, json=target, pictures=False)
    assert result["accuracy"] == said["test"]["accuracy"]
    assert result["loss"] == pytest.approx(said["test"]["loss"], rel=1e-6)
    assert json.loads(target.read_text()) == result
    assert {"split", "loss", "accuracy", "stack", "flops_per_example"} <= result.keys()
    assert (result["split"], result["stack"], result["examples"]) == ("test", STACK, 360)
    assert (result["tokens_per_example"], result["checkpoint_step"]) == (17, 6)
    printed = capsys.readouterr().out
    assert "train_only=True" in printed and f"{result['accuracy']:.4f}" in printed


def test_accuracy_is_that_of_a_plain_forward_pass_with_the_moving_average(trained: Any) -> None:
    workdir, _ = trained
    found = load(workdir)
    average, _ = load_params(workdir, "latest", part="ema")
    raw, _ = load_params(workdir, "latest")
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, average))
    assert not jax.tree.all(jax.tree.map(np.array_equal, average, raw))
    records = found.source.split("validation")
    batch = records.batch(np.arange(len(records)))
    logits = np.asarray(jax.jit(found.model.apply)(average, batch).logits, np.float64)
    right = np.mean(np.argmax(logits, axis=-1) == batch["label"])
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    loss = -np.mean(log_softmax[np.arange(len(records)), batch["label"]])
    result = evaluate.run(workdir, {}, split="validation", pictures=False)
    assert result["accuracy"] == pytest.approx(right, abs=1e-12)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("rows", ["7", "360", "1000"])
def test_each_example_counts_once_whatever_the_batch_size(trained: Any, rows: str) -> None:
    workdir, said = trained
    result = evaluate.run(workdir, {"eval.batch_size": rows}, pictures=False)
    assert result["accuracy"] == pytest.approx(said["test"]["accuracy"], abs=1e-12)
    assert result["loss"] == pytest.approx(said["test"]["loss"], rel=1e-5)


def test_another_stack_on_the_same_weights(trained: Any) -> None:
    workdir, said = trained
    # keep(train_only=True) is not there at evaluation, and keep(1.0) keeps everything.
    dense = evaluate.run(workdir, {"model.stack": "block*2"}, pictures=False)
    whole = evaluate.run(workdir, {"model.stack": "block + keep(1.0, by=norm) + block"}, pictures=False)
    assert dense["accuracy"] == whole["accuracy"] == said["test"]["accuracy"]
    assert dense["flops_per_example"] == whole["flops_per_example"]
    assert dense["flops_per_example"] == evaluate.run(workdir, {}, pictures=False)["flops_per_example"]
    changes = {"eval.stack": "block + keep(k) + block", "stack_vars.k": "0.5"}
    half = evaluate.run(workdir, changes, pictures=False)
    assert half["stack"] == "block + keep(0.5) + block"
    assert half["flops_per_example"] < 0.8 * dense["flops_per_example"]
    assert half["loss"] != dense["loss"]


def test_flops_per_example_are_those_of_the_forward_pass(trained: Any) -> None:
    workdir, _ = trained
    n, d, f, patch, classes = 17, 16, 32, 4, 10
    block = 2 * n * (4 * d * d + 2 * d * f) + 4 * n * n * d
    result = evaluate.run(workdir, {}, pictures=False)
    assert result["flops_per_example"] == 2 * (n - 1) * patch * d + 2 * block + 2 * d * classes


def test_the_stack_of_the_run_and_what_goes_before_it(trained: Any, tmp_path: Path) -> None:
    workdir = copy(trained[0], tmp_path / "run", **{"eval.stack": "block + keep(4) + block"})

    def stack(**overrides: str) -> str:
        return load(
            workdir, {key.replace("_", "."): text for key, text in overrides.items()}
        ).model.stack_text

    assert stack() == "block + keep(4) + block"
    assert stack(model_stack="block*2") == "block*2"
    assert stack(eval_stack="block*2") == "block*2"
    assert stack(eval_stack="None") == STACK


def test_scheduled_numbers_are_those_of_the_last_step_and_may_be_unused(trained: Any, tmp_path: Path) -> None:
    settings = {"model.stack": "block + keep(k) + block", "stack_vars": {"k": "0:12, 5:8, 6:4"}}
    workdir = copy(trained[0], tmp_path / "run", **settings)
    assert load(workdir).model.stack_text == "block + keep(8) + block"
    assert load(workdir, checkpoint=3).model.stack_text == "block + keep(12) + block"
    assert load(workdir, {"stack_vars.k": "2"}).model.stack_text == "block + keep(2) + block"
    assert load(workdir, {"model.stack": "block*2"}).model.stack_text == "block*2"
    with pytest.raises(StackError, match=r"stack_vars\.k is not used"):
        load(workdir, {"model.stack": "block*2", "stack_vars.k": "4"})


def test_learned_items_must_be_there_and_are_left_out_when_not_used(trained: Any, capsys: Any) -> None:
    workdir, _ = trained
    with pytest.raises(
        CheckpointError, match=r"items/skip/.*checkpoint 6 of .* does not have it.*init_from\.fresh"
    ):
        load(workdir, {"model.stack": "block + skip(keep=0.5, by=learned)(block)"})
    evaluate.run(workdir, {"model.stack": "block*2"}, pictures=False)
    assert "holds items/keep, which the stack does not use: left out" in " ".join(
        capsys.readouterr().out.split()
    )
    assert not load(workdir, {"model.stack": "block + keep(0.5, by=learned) + block"}).notes


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"overrides": {"optimizer.learning_rate": "1"}},
            ConfigError,
            ["optimizer.learning_rate", "model.stack"],
        ),
        ({"overrides": {"model.stak": "block"}}, ConfigError, ["config.model has no key 'stak'", "'stack'"]),
        ({"overrides": {"model.width": "8"}}, ConfigError, ["config.model.width", "training"]),
        (
            {"overrides": {"data.transform": "shift(1)"}},
            ConfigError,
            ["config.data.transform", "training images"],
        ),
        ({"overrides": {"eval.split": "train"}}, ConfigError, ["config.eval.split", "--split"]),
        ({"overrides": {"eval.batch_size": "0"}}, ConfigError, ["config.eval.batch_size is 0"]),
        (
            {"overrides": {"model.stack": "block*2", "eval.stack": "block*2"}},
            ConfigError,
            ["config.model.stack and config.eval.stack"],
        ),
        ({"overrides": {"model.stack": "block*2 + keeep(4)"}}, StackError, ["keeep", "'keep'", "^"]),
        (
            {"overrides": {"model.stack": "block*3"}},
            CheckpointError,
            ["blocks/attention", "as (2,", "as (3,", "a stack with 2 blocks"],
        ),
        ({"overrides": {"mesh.data": "3"}}, TokenLabError, ["mesh"]),
        ({"split": "tset"}, DataError, ["tset", "'test'"]),
        ({"checkpoint": 4}, CheckpointError, ["no checkpoint 4", "3, 6"]),
    ],
)
def test_what_cannot_be_is_told_and_nothing_written(
    trained: Any, arguments: dict[str, Any], error: type[Exception], words: list[str], tmp_path: Path
) -> None:
    workdir, _ = trained
    before = files(workdir)
    with pytest.raises(error) as caught:
        evaluate.run(workdir, **{"overrides": {}, "json": tmp_path / "a.json", **arguments})
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) in (1, 3)  # three when a caret shows the place
    assert files(workdir) == before and not (tmp_path / "a.json").exists()


def test_a_folder_that_is_no_run(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        evaluate.run(tmp_path, {}, pictures=False)
    (tmp_path / "config.json").write_text((trained[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no checkpoints yet"):
        evaluate.run(tmp_path, {}, pictures=False)


def test_an_earlier_checkpoint_and_the_best_one(trained: Any) -> None:
    workdir, _ = trained
    assert evaluate.run(workdir, {}, pictures=False, checkpoint=3)["checkpoint_step"] == 3
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    validation = {line["step"]: line["accuracy"] for line in lines if line["split"] == "validation"}
    best = max(sorted(validation), key=validation.__getitem__)
    result = evaluate.run(workdir, {}, split="validation", pictures=False, checkpoint="best")
    assert (result["checkpoint_step"], result["accuracy"]) == (best, validation[best])


def test_pictures(trained: Any, tmp_path: Path) -> None:
    workdir, _ = trained
    assert not (workdir / "tokens.png").exists()
    evaluate.run(workdir, {})
    assert (workdir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not (workdir / "tokens.png").exists()
    evaluate.run(workdir, {"model.stack": "block + keep(0.5) + block"})
    assert (workdir / "tokens.png").read_bytes().startswith(b"\x89PNG")
    for name in ("report.png", "tokens.png"):
        (workdir / name).unlink()
    assert data.build({"name": "digits"}).splits["test"] == 360


def test_images_of_another_size_than_those_of_training(trained: Any, tmp_path: Path) -> None:
    """Positions stay those of the training grid and are resampled; the transform of training does not matter."""
    changed = {"data.transform": "rotate(10)"}
    workdir = copy(trained[0], tmp_path / "run", **changed)
    found = load(workdir, {"data.eval_transform": "resize(12)"})
    assert found.source.spec["image"][0] == (12, 12, 1)
    assert found.model.grid == (6, 6) and found.model.settings.position_grid == (4, 4)
    assert found.params["embed"]["position"].shape == (16, 16)
    result = evaluate.measure(found, "test")
    assert result["tokens_per_example"] == 37 and result["examples"] == 360
    other = load(workdir, {"data.eval_transform": "resize(12)", "model.position_grid": "(2, 8)"})
    assert other.model.settings.position_grid == (2, 8)
