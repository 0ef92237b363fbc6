from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.data import tiny_tfds
from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.source import Source
from tokenlab.data.sources import folder


def build(path: Path, **options: int) -> folder.FolderSource:
    return folder.build(folder.Config(path=str(path), **options))


def write(root: Path, splits: dict[str, dict[str, list[str]]]) -> dict[str, bytes]:
    """Pictures of these names; returns the content by relative path. Written in an order that is not sorted."""
    found = {}
    for split, classes in splits.items():
        for name, files in reversed(classes.items()):
            (root / split / name).mkdir(parents=True)
            for file in reversed(files):
                content = tiny_tfds.png(tiny_tfds.pictures(1, (4, 5, 3), seed=len(found))[0])
                (root / split / name / file).write_bytes(content)
                found[f"{split}/{name}/{file}"] = content
    return found


BOTH = {
    "train": {"ant": ["b.png", "a.JPG", "c.jpeg"], "bee": ["z.webp", "y.bmp"]},
    "test": {"ant": ["1.png"], "bee": ["2.png"]},
}


def test_sorted_by_class_and_file(tmp_path: Path) -> None:
    content = write(tmp_path, BOTH)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / "ant" / ".hidden.png").write_bytes(b"x")
    source = build(tmp_path)
    assert isinstance(source, Source)
    assert source.splits == {"test": 2, "train": 5}
    assert source.spec == {"image": ((None, None, 3), "encoded"), "label": ((), "int32")}
    assert (source.num_classes, source.class_names) == (2, ("ant", "bee"))
    expected = ["ant/a.JPG", "ant/b.png", "ant/c.jpeg", "bee/y.bmp", "bee/z.webp"]
    records = pickle.loads(pickle.dumps(source.split("train")))
    batch = records.batch(np.array([4, 0, 1, 2, 3]))
    assert batch["image"] == [content[f"train/{expected[i]}"] for i in (4, 0, 1, 2, 3)]
    assert batch["label"].tolist() == [1, 0, 0, 0, 1] and batch["label"].dtype == np.int32
    assert records[3] == {"image": content["train/bee/y.bmp"], "label": 1}
    with pytest.raises(IndexError):
        records[5]


def test_channels(tmp_path: Path) -> None:
    write(tmp_path, BOTH)
    assert build(tmp_path, channels=1).spec["image"] == ((None, None, 1), "encoded")
    with pytest.raises(ConfigError, match="config.data.channels is 4"):
        build(tmp_path, channels=4)


def test_the_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    write(tmp_path, BOTH)
    before = build(tmp_path).fingerprint
    assert build(tmp_path).fingerprint == before
    file = tmp_path / "test" / "ant" / "1.png"
    file.rename(file.with_name("3.png"))
    renamed = build(tmp_path).fingerprint
    file.with_name("3.png").write_bytes(b"other")
    assert len({before, renamed, build(tmp_path).fingerprint}) == 3


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    write(tmp_path, BOTH)
    before = build(tmp_path).fingerprint
    content = (tmp_path / "train" / "ant" / "b.png").read_bytes()
    with open(os.fsencode(tmp_path / "train" / "ant") + b"/\xff.png", "wb") as file:
        file.write(content)
    source = build(tmp_path)
    assert source.splits["train"] == 6 and source.fingerprint != before
    assert source.split("train")[3]["image"] == content


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    write(tmp_path, {**BOTH, "validation": {"ant": ["1.png"]}})
    with pytest.raises(DataError, match="split 'validation' has no class 'bee', which another split has"):
        build(tmp_path)


def test_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no folder for a split: expected SPLIT/CLASS"):
        build(tmp_path)
    write(tmp_path, BOTH)
    (tmp_path / "extra").mkdir()
    with pytest.raises(DataError, match="extra' is empty: expected a folder for each class"):
        build(tmp_path)
    (tmp_path / "extra").rmdir()
    (tmp_path / "test" / "bee" / "2.png").unlink()
    with pytest.raises(DataError, match="test/bee' holds no picture: expected .jpg"):
        build(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, BOTH)
    records = build(tmp_path).split("train")
    (tmp_path / "train" / "ant" / "b.png").write_bytes(b"")
    (tmp_path / "train" / "bee" / "y.bmp").unlink()
    with pytest.raises(DataError, match=r"record 1, .*ant/b.png', is an empty file"):
        records.batch(np.array([0, 1]))
    with pytest.raises(DataError, match=r"record 3, .*bee/y.bmp', cannot be read: No such file"):
        records[3]
    assert len(records.batch(np.array([0, 2, 4]))["image"]) == 3
