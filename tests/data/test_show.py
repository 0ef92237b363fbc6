from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest

from tests.data import tiny_tfds
from tokenlab import cli
from tokenlab.core.errors import DataError
from tokenlab.data import prepared, show


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sets, where the environment looks for them; the current folder is an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv(prepared.DATA_DIR_VARIABLE, str(tmp_path / "sets"))
    (tmp_path / "sets").mkdir()
    return tmp_path / "sets"


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["data", *words]) == cli.EXIT_ERROR
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "list"]) == 0
    assert "(none; --data-dir=DIR or TFDS_DATA_DIR names another folder)" in capsys.readouterr().out
    tiny_tfds.make(folder, name="one", splits={"train": 1234, "test": 3}, version="2.0.1")
    tiny_tfds.make(folder, name="two", info={"fileFormat": "tfrecord"})
    (tiny_tfds.make(folder, name="torn") / "features.json").write_text("{")
    assert cli.main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"prepared TFDS sets in {folder}"
    assert lines[1].split() == ["one", "2.0.1", "0.2", "MiB", "train", "1,234,", "test", "3"]
    assert "torn" in lines[2] and "features.json' cannot be read" in lines[2]
    assert lines[3].endswith("train 9, test 6  (tfrecord: not readable here)")
    embedded = [line.split(maxsplit=1) for line in lines[lines.index("sources that need no files") + 1 :]]
    assert [name for name, _ in embedded] == [
        *("digit_pairs", "digits", "emoji", "image_text"),
        *("python_sentences", "python_text", "shakespeare"),
    ]
    assert embedded[1][1].startswith("1,797 real handwritten digits")


def test_show_prints_and_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Every picture of a class is of one colour, which must be found in the class's row.
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
    labels = [0, 1, 2, 1, 1]
    images = [np.broadcast_to(colours[label], (8, 8, 3)) for label in labels]
    tiny_tfds.make(
        folder, images={"train": images, "dev": images[:2]}, labels={"train": labels, "dev": [0, 1]}
    )
    assert cli.main(["data", "show", "tiny"]) == 0
    text = capsys.readouterr().out
    assert (
        text.startswith("tiny 1.0.0\n") and "train 5 (" in text and "image  image uint8 [8 x 8 x 3]" in text
    )
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert rows == [["0", "cat", "1"], ["1", "dog", "3"], ["2", "owl", "1"]]
    picture = cv2.imread("tiny.png", cv2.IMREAD_COLOR_RGB)
    assert picture is not None and [path.name for path in Path().iterdir()] == ["tiny.png"]
    places = []
    areas = []
    for colour in colours:
        found = np.abs(picture.astype(int) - colour).max(axis=-1) < 20
        places.append(np.flatnonzero(found.any(axis=1)).mean())
        areas.append(found.sum())
    assert places == sorted(places)
    assert areas[1] == pytest.approx(3 * areas[0], rel=0.1)


def test_show_of_another_split_and_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = tiny_tfds.make(folder)
    assert cli.main(["data", "show", str(version), "--split=test", "--png=x.png"]) == 0
    assert "classes of 'test'" in capsys.readouterr().out
    assert [path.name for path in Path().iterdir()] == ["x.png"]


def test_show_of_what_comes_with_the_package(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "show", "digits", "--split=test"]) == 0
    assert "test 360" in capsys.readouterr().out
    assert cv2.imread("digits.png") is not None


def test_labels_that_are_no_class_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tiny_tfds.pictures(3)
    tiny_tfds.make(folder, images={"test": images}, labels={"test": [-1, 0, -1]})
    assert cli.main(["data", "show", "tiny"]) == 0
    assert "-1  is no class: 2 records have this label" in capsys.readouterr().out


def test_large_splits_are_counted_in_part(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tfds.make(folder, splits={"train": show._CHUNK + 8})
    monkeypatch.setattr(show, "MOST_BYTES", 1)
    assert cli.main(["data", "show", "tiny"]) == 0
    assert f"counted in the first {show._CHUNK} records" in capsys.readouterr().out


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tfds.make(folder)
    tiny_tfds.make(folder, name="torn", corrupt={"train": {4: "picture"}})
    tiny_tfds.make(folder, name="worse", corrupt={"train": {4: "record"}})
    assert "an action is missing. Known: list, ngram, prepare, show." in error_of(capsys)
    assert "unknown action 'lst'. Did you mean 'list'?" in error_of(capsys, "lst")
    assert "got 0 names: expected `data show NAME`" in error_of(capsys, "show")
    assert "got 1 names: expected `data list`" in error_of(capsys, "list", "tiny")
    assert "data list takes no --png" in error_of(capsys, "list", "--png=a.png")
    assert "data prepare takes no --split" in error_of(capsys, "prepare", "x", "--split=train")
    assert "--data-dir=nowhere is no folder" in error_of(capsys, "list", "--data-dir=nowhere")
    assert "Did you mean 'tiny'?" in error_of(capsys, "show", "tny")
    assert "has no split 'tran'. Did you mean 'train'?" in error_of(capsys, "show", "tiny", "--split=tran")
    assert "--png=no/a.png cannot be written" in error_of(capsys, "show", "tiny", "--png=no/a.png")
    assert "--png=/proc/a.png cannot be written" in error_of(capsys, "show", "tiny", "--png=/proc/a.png")
    assert "split 'train': record 4: its 18 bytes are no picture" in error_of(capsys, "show", "torn")
    assert "record 4 (file" in error_of(capsys, "show", "worse")
    assert list(Path().iterdir()) == []


def test_names_that_are_no_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("arrays", "folder", "tfds", "mixture"):
        expected = (
            f"'{name}' is a source with settings of its own, which `show` does not take; expected a TFDS set"
        )
        assert expected in error_of(capsys, "show", name)
    assert "no prepared TFDS set 'dgits'" in (said := error_of(capsys, "show", "dgits"))
    assert said.endswith("Did you mean 'digits'?\n")
    for action in ("show", "prepare"):
        assert "':3.0.1' has no name before its version; expected NAME:3.0.1" in error_of(
            capsys, action, ":3.0.1"
        )


def test_a_picture_that_is_cut_off_is_not_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = cv2.imencode(".jpg", tiny_tfds.pictures(1, (64, 64, 3))[0])[1].tobytes()
    source = SimpleNamespace(name="x", spec={"image": ((64, 64, 3), "encoded")})
    assert show._picture(source, "train", 3, whole).shape == (64, 64, 3)
    with pytest.raises(
        DataError, match=r"source 'x', split 'train': record 3: its \d+ bytes are .* cut off\.$"
    ):
        show._picture(source, "train", 3, whole[:-40])


def test_prepare_without_tensorflow(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert "install tokenlab-jax[prepare]" in error_of(capsys, "prepare", "mnist")


def fake_tfds(monkeypatch: pytest.MonkeyPatch, write) -> None:
    """Stands for TensorFlow and TFDS, which need a network: `write(data_dir)` is what preparing does."""

    def builder(name: str, data_dir: str) -> SimpleNamespace:
        def download_and_prepare(file_format: str) -> None:
            assert file_format == "array_record"
            made.data_dir = str(write(Path(data_dir)))

        made = SimpleNamespace(download_and_prepare=download_and_prepare)
        return made

    module = ModuleType("tensorflow_datasets")
    module.builder = builder
    monkeypatch.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


def test_prepare(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tfds(monkeypatch, lambda data_dir: tiny_tfds.make(data_dir))
    assert cli.main(["data", "prepare", "tiny"]) == 0
    assert capsys.readouterr().out == f"prepared tiny 1.0.0 in {folder}/tiny/1.0.0\n"


def test_prepare_that_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(data_dir: Path) -> Path:
        raise OSError("no network\nand many more lines")

    fake_tfds(monkeypatch, fail)
    assert "TFDS cannot prepare 'tiny': OSError: no network" in error_of(capsys, "prepare", "tiny")
    fake_tfds(monkeypatch, lambda data_dir: tiny_tfds.make(data_dir, info={"fileFormat": "tfrecord"}))
    with pytest.raises(
        DataError, match="its records are tfrecord files; expected array_record. Convert them"
    ):
        show.run(["prepare", "tiny"])
