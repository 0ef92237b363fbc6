from __future__ import annotations

from pathlib import Path

import pytest

from tests.data import tiny_tfds
from tokenlab import cli
from tokenlab.data import TextConfig, TextSource
from tokenlab.data.splits import sliced
from tokenlab.data.text import show

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({{"data": {data}}})
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with texts, and configurations of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("abc|défgh|ij")
    (tmp_path / "b.txt").write_text("abcabcabc")
    data = {
        "name": "text",
        "files": {"train": "a.txt", "validation": "b.txt"},
        "split_on": "|",
        "length": 4,
        "isolate": True,
    }
    (tmp_path / "lm.py").write_text(CONFIG.format(data={**data, "packing": "stream"}))
    (tmp_path / "digits.py").write_text(CONFIG.format(data={"name": "digits"}))
    (tmp_path / "none.py").write_text("from ml_collections import ConfigDict\nget_config = ConfigDict\n")
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(["data", *words]) == 0
    return capsys.readouterr().out.splitlines()


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["data", *words]) == cli.EXIT_ERROR
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("isolate", [True, False])
def test_a_stream(capsys: pytest.CaptureFixture[str], isolate: bool) -> None:
    # abc. défgh. ij. is 4 + 7 + 3 tokens (é is two), of which 13 are inputs and 11 targets count.
    assert said(capsys, "show", "--config=lm.py", f"--config.data.isolate={isolate}") == [
        "text a.txt and 1 more",
        "  tokenizer   bytes, 257 ids; 4 tokens an example",
        "  train       4 examples of 3 documents; 11 targets, 0.73 bytes each; 18.8% padding",
        "  validation  3 examples of 1 document; 9 targets, 0.89 bytes each; 25.0% padding",
        "  first examples of 'train'",
        "    0: 4 tokens, 1 document",
        "          4  'abc'  and its end",
        "    1: 4 tokens, 1 document",
        "          4  'déf'",
        "    2: 4 tokens, 2 documents",
        "          3  'gh'  and its end",
        "          1  'i'",
    ]


def test_fitted_rows_and_another_split(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("show", "--config=lm.py", "--config.data.packing=fit", "--config.data.length=6", "--split=train")
    for isolate in (True, False):
        lines = said(capsys, *given, f"--config.data.isolate={isolate}")
        assert lines[2].endswith("2 examples of 3 documents; 11 targets, 0.73 bytes each; 8.3% padding")
        assert lines[5:] == [
            "    0: 5 tokens, 2 documents",
            "          3  'abc'  and its end",
            "          2  'ij'  and its end",
            "    1: 6 tokens, 1 document",
            "          6  'défgh'  and its end",
        ]


def test_long_documents_and_many(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("|".join(["x" * 200, *"abcdefghijk"]))
    lines = said(capsys, "show", "--config=lm.py", "--config.data.length=256")
    assert lines[6].startswith("        201  'xxx") and "xxx ... xxx" in lines[6] and len(lines[6]) < 120
    assert lines[-1] == "      ... and 4 more"


def test_what_comes_with_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "show", "shakespeare", "--split=test")
    assert lines[0] == "shakespeare  (comes with the package)"
    assert (
        lines[2].split()
        == "train 3,922 examples of 1 document; 1,003,854 targets, 1.00 bytes each; 0.0% padding".split()
    )
    assert lines[5] == "  first examples of 'test'" and lines[7].startswith(
        """        256  "rance ta'en\\nAs shall"""
    )
    assert [path.name for path in Path().iterdir() if path.suffix == ".png"] == []


def test_a_prepared_set(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feature = {"pythonClassName": "x.Text", "text": {}}
    folder = tiny_tfds.make(here, features={"text": feature}, extra={"text": [b"some text"] * 9})
    features = (folder / "features.json").read_text()
    (folder / "features.json").write_text('{"featuresDict": {"features": {"text": {"text": {}}}}}')
    lines = said(capsys, "show", "tiny", f"--data-dir={here}")
    assert lines[0] == "tiny 1.0.0" and "    text  text" in lines
    assert "         10  'some text'  and its end" in lines
    # With pictures in it, it is a set of pictures.
    (folder / "features.json").write_text(features)
    assert "  wrote tiny.png" in said(capsys, "show", "tiny", f"--data-dir={here}")


def test_pictures_of_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "show", "--config=digits.py", "--png=x.png")
    assert lines[0] == "digits" and lines[-1] == "  wrote x.png" and Path("x.png").is_file()


def test_counts_of_slices() -> None:
    source = TextSource("tiny", {"train": ["abcdefgh", "ij"]}, TextConfig(length=4))
    found = show.count(sliced(source, {"train": "train[1:]"}), "train")
    assert found == show.Counts(examples=2, documents=2, tokens=7, targets=6, num_bytes=4, padding=1 / 8)


def test_padding_is_no_end_of_a_document() -> None:
    """Where the end has id 0, as padding has."""
    source = TextSource("tiny", {"train": ["abc", "de"]}, TextConfig(length=4, tokenizer="bpe(257)"))
    assert source.tokenizer.end == 0
    assert show.count(source, "train") == show.Counts(2, 2, tokens=6, targets=5, num_bytes=3, padding=1 / 4)


def test_ngrams(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "ngram", "--config=lm.py", "--order=2")
    assert lines[0].endswith("(Witten-Bell), counted in 'train', bits per byte of 'validation'")
    assert lines[1].split() == ["order", "bits", "per", "byte"]
    rows = [line.split() for line in lines[2:]]
    assert [row[0] for row in rows] == ["1", "2"] and float(rows[1][1]) < float(rows[0][1])
    assert len(said(capsys, "ngram", "--config=lm.py")) == 7


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config=FILE is missing" in error_of(capsys, "ngram")
    assert "data show takes no --order: it belongs to `data ngram`" in error_of(
        capsys, "show", "digits", "--order=2"
    )
    assert "data list takes no --config: it belongs to `data show` and `data ngram`" in error_of(
        capsys, "list", "--config=lm.py"
    )
    assert "got 1 names: expected `data show --config=FILE`" in error_of(
        capsys, "show", "x", "--config=lm.py"
    )
    assert "got 1 names: expected `data ngram --config=FILE`" in error_of(
        capsys, "ngram", "x", "--config=lm.py"
    )
    assert "with --config set --config.data.data_dir" in error_of(
        capsys, "show", "--config=lm.py", "--data-dir=x"
    )
    assert "give it with --config=FILE" in error_of(capsys, "show", "digits", "--config.data.length=3")
    assert "has no config.data" in error_of(capsys, "show", "--config=none.py")
    assert "--png is for pictures" in error_of(capsys, "show", "--config=lm.py", "--png=x.png")
    assert "has no split 'dev'" in error_of(capsys, "show", "--config=lm.py", "--split=dev")
    assert "has no split 'dev'" in error_of(capsys, "ngram", "--config=lm.py", "--split=dev")
    assert "is what n-grams are counted in; expected another of train, validation" in error_of(
        capsys, "ngram", "--config=lm.py", "--split=train"
    )
    assert "the order of an n-gram is 6; expected 1 to 5" in error_of(
        capsys, "ngram", "--config=lm.py", "--order=6"
    )
    assert "data: --order=x: expected a whole number" in error_of(
        capsys, "ngram", "--config=lm.py", "--order=x"
    )
    assert "source 'digits' holds no text; its keys: image, label" in error_of(
        capsys, "ngram", "--config=digits.py"
    )
