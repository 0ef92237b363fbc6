from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data import tiny_tfds
from tokenlab import data
from tokenlab.core.errors import DataError
from tokenlab.data import prepared

TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
TEXTS = [b"one", "zwei \u00e9".encode(), b"three"]


def make(folder: Path, texts: list[bytes] = TEXTS, **options) -> Path:
    """A set with pictures, labels and texts: 3 records for training, 2 for the test."""
    options = {
        "splits": {"train": 3, "test": 2},
        "features": {"text": TEXT},
        "extra": {"text": texts},
        **options,
    }
    return tiny_tfds.make(folder, **options)


def build(folder: Path, **options) -> data.TextSource:
    return data.source_of(
        {"name": "tfds_text", "dataset": "tiny", "data_dir": str(folder), "length": 4, **options}
    )


def test_a_record_is_a_document(tmp_path: Path) -> None:
    make(tmp_path, shards=2)
    source = build(tmp_path)
    assert {split: list(source.text(split)) for split in source.splits} == {
        "train": ["one", "zwei \u00e9", "three"],
        "test": ["one", "zwei \u00e9"],
    }
    assert source.name == "tiny" and source.fingerprint.startswith("tiny:")


def test_texts_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenlab.data.sources import tfds_text

    monkeypatch.setattr(tfds_text, "_CHUNK", 2)
    make(tmp_path)
    assert list(build(tmp_path).text("train")) == ["one", "zwei \u00e9", "three"]


def test_where_sets_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(prepared.DATA_DIR_VARIABLE, str(tmp_path))
    folder = make(tmp_path)
    for dataset in ("tiny", "tiny:1.0.0", str(folder)):
        assert data.source_of({"name": "tfds_text", "dataset": dataset}).splits == {"train": 1, "test": 1}


def test_which_text(tmp_path: Path) -> None:
    strings = {"pythonClassName": "x.Tensor", "tensor": {"dtype": "string", "shape": {}, "encoding": "none"}}
    make(
        tmp_path,
        features={"text": TEXT, "title": strings},
        extra={"text": TEXTS, "title": [b"A", b"B", b"C"]},
    )
    with pytest.raises(DataError, match="holds several texts: text, title; set config.data.text_key"):
        build(tmp_path)
    assert list(build(tmp_path, text_key="title").text("train")) == ["A", "B", "C"]
    with pytest.raises(DataError, match="has no text 'titel'. Did you mean 'title'?"):
        build(tmp_path, text_key="titel")


def test_a_set_without_text(tmp_path: Path) -> None:
    tiny_tfds.make(tmp_path)
    with pytest.raises(DataError, match=r"holds no text. Its features: image \(image uint8 .*label"):
        build(tmp_path)


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    make(tmp_path / "latin", [b"one", b"caf\xe9", b"three"])
    with pytest.raises(DataError, match="'tiny', split 'train': record 1 is no UTF-8: byte 3 is 0xe9"):
        build(tmp_path / "latin")
    make(tmp_path / "torn", corrupt={"train": {2: "record"}})
    with pytest.raises(DataError, match="split 'train': record 2 .*no tf.train.Example"):
        build(tmp_path / "torn")
    make(tmp_path / "old", info={"fileFormat": "tfrecord"})
    with pytest.raises(DataError, match="its records are tfrecord files; expected array_record"):
        build(tmp_path / "old")
    file = next(make(tmp_path / "gone").glob("*test*"))
    file.unlink()
    with pytest.raises(DataError, match="file 'tiny-test.array_record-00000-of-00001': it is missing"):
        build(tmp_path / "gone")


def test_a_split_without_records(tmp_path: Path) -> None:
    folder = make(tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"].append({"name": "empty", "shardLengths": [], "numBytes": "0"})
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match="split 'empty' has no document"):
        build(tmp_path)
