"""Runs of an encoder: stopped and resumed, its checkpoint evaluated, and tuned for classes with a fresh head."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass, override
from tokenlab.core.errors import CheckpointError, ConfigError
from tokenlab.data.sources import labelled_text, text
from tokenlab.evaluate import trained
from tokenlab.train import default_config, loop
from tokenlab.train.experiment import build as build_experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and sentences of two classes."""
    folder = tmp_path_factory.mktemp("text")
    draws = np.random.default_rng(0)
    lines = [" ".join(draws.choice(["one", "two", "three", "four"], 12)) for _ in range(120)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    rows = [f"{line[:20]}\t{int('two' in line[:20])}" for line in lines]
    (folder / "rows.tsv").write_text("\n".join(["text\tlabel", *rows]))
    return folder


def shortened(config: ConfigDict, length: int, **changes: Any) -> ConfigDict:
    config.steps = 4
    config.batch_size = config.eval.batch_size = 8
    config.log_every = 1
    config.checkpoint_every = 2
    config.model.size = "nano"
    config.data.length = length
    return override(config, changes)


def masked(folder: Path, **changes: Any) -> ConfigDict:
    config = default_config(model="encoder_lm", task="masked_lm")
    config.data = from_dataclass(
        text.Config(name="text", files=str(folder / "text.txt"), split_on="\n\n", encoder=True)
    )
    config.task.hide = "words"
    return shortened(config, 24, **changes)


def classes(folder: Path, **changes: Any) -> ConfigDict:
    config = default_config(model="encoder_lm", task="classify")
    config.data = from_dataclass(labelled_text.Config(name="labelled_text", files=str(folder / "rows.tsv")))
    config.model.head = "classify"
    config.model.vocab_size = 260
    config.model.positions = 24
    return shortened(config, 16, **changes)


def losses(workdir: Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    loop.run(masked(folder), folder / "whole")
    return folder / "whole"


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(folder: Path, whole: Path) -> None:
    workdir = folder / "halves"

    def requested(self: Any, step: int) -> bool:
        if step == 2:
            self._received = signal.SIGTERM
        return step == 2

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop.Interrupt, "requested", requested)
        loop.run(masked(folder), workdir)
    assert len(losses(workdir)) == 2
    loop.run(masked(folder), workdir)
    assert len(losses(whole)) == 4 and losses(workdir) == losses(whole)


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_alike_whenever_it_is(whole: Path) -> None:
    found = trained.load(whole)
    assert found.step == 4 and found.model.stack_text == "block*2"
    with pytest.raises(CheckpointError, match="embed/position"):
        trained.load(whole, {"data.length": 12})


@pytest.mark.slow
def test_a_trained_encoder_is_tuned_with_a_fresh_head(folder: Path, whole: Path) -> None:
    changes = {"init_from.path": str(whole), "init_from.fresh": ("head",)}
    loop.run(classes(folder, **changes), folder / "tuned")
    before, after = trained.load(whole).params, trained.load(folder / "tuned").params
    assert before["embed"]["table"].shape == after["embed"]["table"].shape
    # Four steps move weights a little; fresh ones would be elsewhere.
    moved = np.abs(before["embed"]["table"] - after["embed"]["table"]).max()
    assert 0 < moved < 0.02 and set(after["head"]) == {"pooler", "classifier"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init_from.fresh": ()}, "head"),
        ({"init_from.fresh": ("head",), "model.vocab_size": 300}, "embed/table"),
        ({"init_from.fresh": ("head",), "model.positions": None}, "embed/position"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_named(folder: Path, whole: Path, changes, says) -> None:
    with pytest.raises(CheckpointError, match=says):
        loop.run(classes(folder, **{"init_from.path": str(whole), **changes}), folder / "other")


def test_classes_need_to_know_the_vocabulary(folder: Path) -> None:
    with pytest.raises(ConfigError, match="config.model.vocab_size is None"):
        build_experiment(classes(folder, **{"model.vocab_size": None}))
    with pytest.raises(ConfigError, match="mixup and config.task.cutmix mix images"):
        build_experiment(classes(folder, **{"task.mixup": 0.2}))
