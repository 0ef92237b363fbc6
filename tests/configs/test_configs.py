"""Every file in configs/ is a run that could start: model, data, optimizer and stack fit each other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import pytest
from ml_collections.config_dict import ConfigDict

from tests.data import tiny_tfds
from tokenlab import data
from tokenlab.compare import CompareConfig
from tokenlab.compare.config import changes_of
from tokenlab.core import config as configs
from tokenlab.train import experiment

FOLDER = Path(__file__).resolve().parents[2] / "configs"
COMPARISONS = sorted(FOLDER.glob("compare/*.py"))
RECIPES = sorted(FOLDER.glob("sharding/*.py"))
FILES = sorted(set(FOLDER.glob("**/*.py")) - {*COMPARISONS, *RECIPES})


def skip_without(settings: ConfigDict) -> None:
    """Skip where the prepared set that is read is not there."""
    dataset = settings.get("dataset") if settings.name == "tfds" else settings.get("pictures")
    if dataset in (None, "digits", "emoji"):
        return
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder:
        pytest.skip("TFDS_DATA_DIR is not set: this configuration reads a prepared TFDS set")
    if not (Path(folder) / dataset).is_dir():
        pytest.skip(f"{dataset} is not in TFDS_DATA_DIR")


def own_text(config: ConfigDict, folder: Path) -> None:
    """Text of our own in place of text that is not in the package, and batches that it is enough for."""
    if config.data.name != "text":
        return
    lines = (json.dumps({"text": f"{number} green bottles. " * 40}) for number in range(1, 400))
    (folder / "own.jsonl").write_text("\n".join(lines))
    config.data.files = (str(folder / "*.jsonl"),)
    config.batch_size = config.eval.batch_size = 8
    if config.data.tokenizer == "bpe(30522)":  # more than there are pairs in it
        config.data.tokenizer = "bpe(260)"


def own_pictures(settings: ConfigDict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny prepared set in place of one that is not here."""
    if settings.name != "tfds":
        return
    images = {split: tiny_tfds.pictures(16, (32, 32, 3)) for split in ("train", "validation", "test")}
    tiny_tfds.make(folder, name=settings.dataset, images=images)
    settings.splits = {split: split for split in images}
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))


def own_series(settings: ConfigDict, folder: Path) -> None:
    """Series of our own in place of files that are not in the package."""
    if settings.name != "series_csv":
        return
    lines = ["date,a,b", *(f"{hour},{hour % 24},{hour % 7}" for hour in range(12_000, 27_000))]
    files = [folder / Path(name).name.removesuffix(".xz") for name in settings.files]
    for file in files:
        file.write_text("\n".join(lines))
    settings.files = tuple(map(str, files))


def test_there_are_configs() -> None:
    assert FOLDER / "quickstart.py" in FILES


@pytest.mark.quick(
    "quickstart", "clothing", "encoder_lm", "jumbo", "lm_quickstart", "mae", "moma", "soft_moe"
)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_builds(file: Path, tmp_path: Path) -> None:
    config = configs.load(file)
    skip_without(config.data)
    own_text(config, tmp_path)
    own_series(config.data, tmp_path)
    built = experiment.build(config)
    assert jax.tree.leaves(built.abstract_state.params)
    assert built.step_cost(0).model_flops > 0
    assert configs.diff(configs.from_json(configs.to_json(config)), config) == []


@pytest.mark.parametrize(
    "file",
    # One reads all of Fashion-MNIST, one trains a tokenizer.
    [
        pytest.param(file, marks=pytest.mark.slow if file.stem in ("moma", "sctd") else ())
        for file in COMPARISONS
    ],
    ids=lambda file: file.stem,
)
def test_a_comparison_builds(file: Path, tmp_path: Path) -> None:
    config = configs.load(file)
    skip_without(config.base.data)
    own_series(config.base.data, tmp_path)
    arm = configs.to_dataclass(CompareConfig, config).arms[-1]
    built = experiment.build(configs.override(config.base, changes_of(arm)))
    assert jax.tree.leaves(built.abstract_state.params)
    assert configs.diff(configs.from_json(configs.to_json(config)), config) == []


@pytest.mark.slow
@pytest.mark.parametrize("file", COMPARISONS, ids=lambda file: file.stem)
def test_every_arm_of_a_comparison_builds(file: Path, tmp_path: Path) -> None:
    config = configs.load(file)
    skip_without(config.base.data)
    own_series(config.base.data, tmp_path)
    source = data.build(config.base.data)
    for arm in configs.to_dataclass(CompareConfig, config).arms:
        changed = configs.override(config.base, changes_of(arm))
        same = configs.diff(changed.data, config.base.data) == []
        built = experiment.build(changed, source=source if same else None)
        assert built.step_cost(0).model_flops > 0


RUNS = (
    "random_ltd.py:gpt2",
    "random_ltd.py:gpt3",
    "random_ltd.py:bert-large",
    "random_ltd.py:bert-large,dense",
    "random_ltd.py:vit",
    "random_ltd.py:vit-cifar",
    "skipvit.py:S/16",
    "skipvit.py:warm-up",
)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_further_runs_of_a_config_build(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    config = configs.load(f"{FOLDER}/{run}")
    own_text(config, tmp_path)
    own_pictures(config.data, tmp_path, monkeypatch)
    config.batch_size = config.eval.batch_size = 8
    assert jax.tree.leaves(experiment.build(config).abstract_state.params)
    assert configs.diff(configs.from_json(configs.to_json(config)), config) == []


COMPARED = (
    "random_ltd.py:vit",
    "random_ltd.py:vit,steps",
    "random_ltd.py:decoder,steps",
    "skipvit.py:200",
    "jumbo.py:pairs,16",
    "jumbo.py:pairs,32",
    "jumbo.py:cifar10,32",
    "sctd.py:200",
)


@pytest.mark.slow
@pytest.mark.parametrize("run", COMPARED)
def test_further_comparisons_of_a_config_build(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All arms, without TFDS_DATA_DIR."""
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    config = configs.load(f"{FOLDER}/compare/{run}")
    own_pictures(config.base.data, tmp_path, monkeypatch)
    config.base.batch_size = config.base.eval.batch_size = 8
    source = data.build(config.base.data)
    for arm in configs.to_dataclass(CompareConfig, config).arms:
        built = experiment.build(configs.override(config.base, changes_of(arm)), source=source)
        assert jax.tree.leaves(built.abstract_state.params)


@pytest.mark.parametrize("file", [*FILES, *COMPARISONS], ids=lambda file: file.stem)
def test_a_config_says_what_it_is_and_how_to_run_it(file: Path) -> None:
    text = file.read_text()
    assert f"--config=configs/{file.relative_to(FOLDER)}" in text.split('"""')[1]


@pytest.mark.parametrize("run", ["cifar10,jumbo", "fashion,registers", "N256", "B", "L", "H,jumbo"])
def test_every_masked_autoencoder_and_what_goes_on_from_it_say_the_same_of_the_encoder(run: str) -> None:
    """The settings that decide the encoder's weights are the same; the published sizes and steps."""
    trained, *others = (
        configs.load(f"{FOLDER / name}:{run}") for name in ("mae.py", "linear_probe.py", "finetune.py")
    )
    for key in ("size", "stack", "head", "registers", "position", "norm_eps", "activation"):
        assert {other.model[key] for other in others} == {trained.model[key]}
    assert others[0].optimizer.only == ("head/classifier/*",) and others[1].optimizer.layer_decay == 0.75
    if run[0] in "BLH":
        assert trained.batch_size == 4096 and trained.steps == 1600 * 309
        assert trained.optimizer.learning_rate == pytest.approx(2.4e-3)
