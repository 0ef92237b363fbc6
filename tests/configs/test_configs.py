"""Every file in configs/ is a run that could start: model, data, optimizer and stack fit each other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import pytest
from ml_collections.config_dict import ConfigDict

from tokenlab.compare import CompareConfig
from tokenlab.core import config as configs
from tokenlab.train import experiment

FOLDER = Path(__file__).resolve().parents[2] / "configs"
COMPARISONS = sorted(FOLDER.glob("compare/*.py"))
FILES = sorted(set(FOLDER.glob("**/*.py")) - {*COMPARISONS})


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_builds(file: Path, tmp_path: Path) -> None:
    config = configs.load(file)
    skip_without(config.data)
    if config.data.name == "text":  # text of one's own
        lines = (json.dumps({"text": f"{number} green bottles. " * 40}) for number in range(1, 400))
        (tmp_path / "own.jsonl").write_text("\n".join(lines))
        config.data.files = (str(tmp_path / "*.jsonl"),)
        config.batch_size = config.eval.batch_size = 8
    own_series(config.data, tmp_path)
    built = experiment.build(config)
    assert jax.tree.leaves(built.abstract_state.params)
    assert built.step_cost(0).model_flops > 0
    assert configs.diff(configs.from_json(configs.to_json(config)), config) == []


@pytest.mark.parametrize("file", COMPARISONS, ids=lambda file: file.stem)
def test_a_comparison_builds(file: Path, tmp_path: Path) -> None:
    config = configs.load(file)
    skip_without(config.base.data)
    own_series(config.base.data, tmp_path)
    comparison = configs.to_dataclass(CompareConfig, config)
    for arm in (comparison.arms[0], comparison.arms[-1]):
        changes = {key: value for key, value in arm.items() if key != "name"}
        built = experiment.build(configs.override(config.base, changes))
        assert jax.tree.leaves(built.abstract_state.params)
    assert configs.diff(configs.from_json(configs.to_json(config)), config) == []


@pytest.mark.slow
@pytest.mark.parametrize("file", COMPARISONS, ids=lambda file: file.stem)
def test_every_arm_of_a_comparison_builds(file: Path, tmp_path: Path) -> None:
    config = configs.load(file)
    skip_without(config.base.data)
    own_series(config.base.data, tmp_path)
    for arm in configs.to_dataclass(CompareConfig, config).arms:
        changes = {key: value for key, value in arm.items() if key != "name"}
        assert experiment.build(configs.override(config.base, changes)).step_cost(0).model_flops > 0


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
