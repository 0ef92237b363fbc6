"""Training on a set with records that cannot be read: stop names the first, skip counts and names them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data import tiny_tfds
from tokenlab import evaluate
from tokenlab.core.errors import DataError
from tokenlab.train import default_config, loop
from tokenlab.train.records import read_metrics, read_run


def config(folder: Path, corrupt: str):
    found = default_config()
    found.update(steps=4, batch_size=8, log_every=2, eval_every=0, checkpoint_every=0)
    found.model.update(size="nano/2", stack="block")
    found.eval.update(split="test", final_split=None, batch_size=8)
    transform = "decode|resize(4)|value_range(-1, 1)"
    found.data = {
        "name": "tfds",
        "dataset": str(folder),
        "transform": transform,
        "eval_transform": transform,
        "corrupt": corrupt,
    }
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    corrupt = {"train": {3: "picture", 5: "record"}}
    return tiny_tfds.make(tmp_path / "data", splits={"train": 16, "test": 8}, corrupt=corrupt)


def test_stop_names_the_record(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"split 'train'[,:] record (3|5).*: .*config.data.corrupt='skip'"):
        loop.run(config(folder, "stop"), tmp_path / "run")


def test_skip_goes_on_and_says_which(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.run(config(folder, "skip"), tmp_path / "run")
    skipped = read_run(tmp_path / "run")["skipped_records"]
    assert {split: set(records) for split, records in skipped.items()} == {"train": {"3", "5"}}
    said = capsys.readouterr().out
    assert said.count("left out: record 3 of split 'train'") == 1
    assert said.count("left out: record 5 of split 'train'") == 1
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == 4 and 0 <= last["data_seconds"]


def test_evaluation_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the last batch holds nothing but one such record."""
    corrupt = {"test": {8: "picture"}}
    folder = tiny_tfds.make(tmp_path / "data", splits={"train": 16, "test": 9}, corrupt=corrupt)
    loop.run(config(folder, "skip"), tmp_path / "run")
    assert capsys.readouterr().out.count("left out: record 8 of split 'test'") == 1
    assert read_run(tmp_path / "run")["skipped_records"].keys() == {"test"}
    result = evaluate.run(str(tmp_path / "run"), pictures=False)
    assert (result["examples"], result["examples_left_out"]) == (8, 1)
    assert result["accuracy"] == pytest.approx(read_metrics(tmp_path / "run")[-1]["accuracy"])


def test_a_split_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    corrupt = {"test": {0: "picture", 1: "picture"}}
    folder = tiny_tfds.make(tmp_path / "data", splits={"train": 16, "test": 2}, corrupt=corrupt)
    with pytest.raises(DataError, match="none of the 2 records of split 'test' can be read"):
        loop.run(config(folder, "skip"), tmp_path / "run")


def test_a_batch_of_which_nothing_can_be_read_stops_the_run(tmp_path: Path) -> None:
    corrupt = {"train": dict.fromkeys(range(16), "picture")}
    folder = tiny_tfds.make(tmp_path / "data", splits={"train": 16, "test": 2}, corrupt=corrupt)
    wanted = config(folder, "skip")
    wanted.batch_size = 16
    with pytest.raises(DataError, match="none of 16 records of a batch can be read; source"):
        loop.run(wanted, tmp_path / "run")
