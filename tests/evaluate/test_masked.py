"""A masked autoencoder from training to what is made of it: pictures, probes, a classifier that starts from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenlab.core.config import override
from tokenlab.core.errors import CheckpointError
from tokenlab.evaluate import command, cost_report, trained
from tokenlab.models.state import flat
from tokenlab.train import default_config, run
from tokenlab.train.initialize import evaluation_params


def settings(model: str, task: str, **changes: Any) -> Any:
    config = default_config(model=model, task=task)
    config.update(steps=2, batch_size=16, log_every=1, eval_every=0, checkpoint_every=0)
    config.model.update(size="nano/4", stack="block", position="sincos")
    config.eval.update(batch_size=360, final_split=None)
    config.data.splits = {"train": "train[:40]", "validation": "validation[:20]", "test": "test[:30]"}
    return override(config, changes)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("mae") / "run"
    return workdir, run(settings("mae", "mae", **{"model.keep": 0.5}), workdir)


def test_training_lowers_what_the_records_call_loss(pretrained: tuple[Path, dict[str, Any]]) -> None:
    _, said = pretrained
    assert 0 < said["train"]["loss"] < 5 and 0 < said["validation"]["loss"] < 5


def test_probes_read_whole_images_and_the_picture_shows_three_of_each(
    pretrained: tuple[Path, dict[str, Any]],
) -> None:
    workdir, _ = pretrained
    plain = command.run(workdir, split="test", pictures=True)
    assert plain["tokens_per_example"] == 3 and "probe" not in plain
    again = command.run(workdir, split="test", pictures=False, probes="knn")
    assert 0 <= again["probe"]["knn"]["accuracy"] <= 1
    assert again["loss"] == plain["loss"] and again["flops_per_example"] == plain["flops_per_example"]
    with Image.open(workdir / "reconstructions.png") as picture:
        assert picture.width > 3 * 8 * 10 and len(np.unique(np.asarray(picture.convert("L")))) > 20
    dense = trained.load(workdir, {"model.keep": "1.0"})
    assert dense.model.tokens_per_example == 5


def test_costs_are_beside_those_of_every_patch_seen() -> None:
    report = cost_report(settings("mae", "mae"))
    assert report.title == "block: cost of one example of digits, beside block*1 with keep=1.0"
    seen, dense = (
        next(row for row in made.rows if row.name == "block_00") for made in (report.table, report.dense)
    )
    assert (seen.tokens, dense.tokens) == (2, 5) and seen.forward_flops < dense.forward_flops


def test_a_classifier_starts_from_the_encoder_and_is_told_what_is_left_out(
    pretrained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Linear probing: the encoder and its norm are those that were trained, and stay so; the decoder is gone."""
    workdir, _ = pretrained
    start = {"init_from.path": str(workdir), "init_from.fresh": ("head/classifier",)}
    only = {"optimizer.only": ("head/classifier/*",), "optimizer.learning_rate": 0.1}
    run(settings("vit", "classify", **start, **only), tmp_path / "probe")
    assert "holds decoder, which pre-training alone needs: left out" in capsys.readouterr().out
    before, after = (flat(evaluation_params(folder)[0]) for folder in (workdir, tmp_path / "probe"))
    assert not any(path.startswith("decoder") for path in after)
    for path, leaf in after.items():
        if path.startswith("head/classifier"):
            assert np.abs(leaf).max() > 0
        else:
            np.testing.assert_array_equal(leaf, before[path])
    with pytest.raises(CheckpointError, match=r"head/classifier/.* does not have it"):
        run(settings("vit", "classify", **{"init_from.path": str(workdir)}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
