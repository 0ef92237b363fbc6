"""Labelled texts from tables: formats, columns, classes, splits, and what is refused."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError

ROWS = [(f'text {i} "quoted, so', f"other {i}", str(i % 5)) for i in range(200)]


def write(folder: Path, kind: str = "tsv", rows=ROWS, header=("document", "second", "rating")) -> str:
    path = folder / f"rows.{kind}"
    if kind.startswith("tsv"):
        text = "\n".join("\t".join(row) for row in [header, *rows]) + "\n"
    elif kind.startswith("csv"):
        quoted = [[field.replace('"', '""') for field in row] for row in [header, *rows]]
        text = "\n".join(",".join(f'"{field}"' for field in row) for row in quoted)
    else:
        text = "\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in rows)
    content = text.encode()
    path.write_bytes(lzma.compress(content) if kind.endswith(".xz") else content)
    return str(path)


def build(files, **options):
    options = {"text": "document", "label": "rating", **options}
    return data.build({"name": "labelled_text", "files": files, **options})


def texts(source, split):
    rows = source.split(split).batch(np.arange(source.splits[split]))
    return [
        bytes(row[1 : n - 1].astype(np.uint8)).decode()
        for row, n in zip(rows["ids"], rows["length"], strict=True)
    ]


def test_formats_hold_the_same(tmp_path: Path) -> None:
    found = [build({"train": write(tmp_path, kind)}) for kind in ("tsv", "csv", "jsonl", "tsv.xz")]
    for source in found:
        assert texts(source, "train") == [row[0] for row in ROWS]
        labels = source.split("train").batch(np.arange(200))["label"]
        assert labels.tolist() == [i % 5 for i in range(200)]
        assert source.class_names == ("0", "1", "2", "3", "4") and source.num_classes == 5


def test_values_make_classes_and_other_rows_are_left_out(tmp_path: Path) -> None:
    source = build({"train": write(tmp_path)}, classes={"low": ("0", "1"), "high": "4"})
    assert source.class_names == ("low", "high") and source.source.left_out == {"train": 80}
    labels = source.split("train").batch(np.arange(120))["label"]
    assert labels.tolist() == [int(i % 5 == 4) for i in range(200) if i % 5 in (0, 1, 4)]


def test_numbers_make_classes(tmp_path: Path) -> None:
    source = build({"train": write(tmp_path)}, thresholds=(1.5, 4))
    assert source.class_names == ("below 1.5", "1.5 or more", "4 or more")
    labels = source.split("train").batch(np.arange(5))["label"]
    assert labels.tolist() == [0, 0, 1, 1, 2]


def test_pairs_and_shares(tmp_path: Path) -> None:
    path = write(tmp_path)
    source = build(path, pair="second")
    assert set(source.splits) == {"train", "validation", "test"} and sum(source.splits.values()) == 200
    assert source.split("train")[0]["type"].any()
    grown = build(write(tmp_path, rows=[*ROWS, ("new", "pair", "3")]), pair="second")
    for split in ("validation", "test"):
        assert set(texts(source, split)) <= set(texts(grown, split))
    doubled = build(write(tmp_path, rows=[*ROWS, *ROWS]))
    assert not set(texts(doubled, "train")) & set(texts(doubled, "test"))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            {"text": "documnt"},
            DataError,
            r"no column 'documnt' \(config.data.text\). Did you mean 'document'",
        ),
        ({"pair": "third"}, DataError, r"no column 'third' \(config.data.pair\)"),
        ({"classes": {"a": ("0", "1"), "b": ("1",)}}, ConfigError, "has the label '1' in 'a' and 'b'"),
        ({"classes": {"a": ("0",), "b": ("9",)}}, DataError, "no row is of class 'b'; the labels .*'0', '1'"),
        ({"classes": {"a": ("0",)}, "thresholds": (1.0,)}, ConfigError, "are both set"),
        ({"thresholds": (2.0, 1.0)}, ConfigError, "expected ascending numbers"),
        ({"label": "document"}, DataError, "has 200 values in 200 rows"),
        ({"label": "document", "thresholds": (1.0,)}, DataError, "which is no number"),
        ({"fractions": {"train": 0.5}}, ConfigError, "config.data.fractions"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(tmp_path: Path, options, error, says) -> None:
    with pytest.raises(error, match=says):
        build(write(tmp_path), **options)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="matches no file"):
        build(str(tmp_path / "none*.tsv"))
    (tmp_path / "short.tsv").write_text("document\trating\nonly one\n")
    with pytest.raises(DataError, match="line 2: it has 1 fields, and the first line 2 names"):
        build(str(tmp_path / "short.tsv"))
    (tmp_path / "bad.jsonl").write_text('{"document": 3, "rating": "1"}')
    with pytest.raises(DataError, match="line 1: column 'document' is a int"):
        build(str(tmp_path / "bad.jsonl"))
    (tmp_path / "list.jsonl").write_text("[1]")
    with pytest.raises(DataError, match="it is a list; expected an object"):
        build(str(tmp_path / "list.jsonl"))
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(DataError, match=r"no table that is known here; expected .tsv, .csv, .jsonl"):
        build(str(tmp_path / "rows.txt"))
    path = write(tmp_path)
    with pytest.raises(DataError, match="in splits 'train' and 'test'"):
        build({"train": path, "test": path})
