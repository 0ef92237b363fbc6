"""`tokenlab data show` of rows of pictures and text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.image_text.pairs import made
from tokenlab import cli
from tokenlab.data.image_text import show
from tokenlab.data.splits import sliced


def test_counts_and_rows() -> None:
    source = made()
    lines = show.show_lines(source, "dev")
    assert lines[0].split(maxsplit=1)[1] == (
        "bytes, 257 ids; 2 delimiters; file.npz, 5 codes, 2 x 2 a picture; 24 tokens an example"
    )
    assert (
        lines[1]
        .split(maxsplit=1)[1]
        .startswith("22 examples of 22 pictures, 16.7% of the tokens codes; 440 targets")
    )
    assert lines[1].endswith("% of the texts") and not lines[1].endswith("0.0% of the texts")
    assert lines[3] == "  first examples of 'dev'"
    text = "\n".join(lines)
    assert text.count("24 tokens, 4 codes") == 3 and text.count("<2x2 image>") == 3
    assert "'tiny'  and its end" in text
    # A slice shows the same rows.
    part = show.show_lines(sliced(source, {"dev": "dev[1:]"}), "dev")
    assert part[3].startswith("    0: 24 tokens") and part[1].endswith("bytes each")


def test_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "show", "image_text", "--split=test"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits and shakespeare  (comes with the package)"
    assert any("<8x8 image>" in line and "and its end" in line for line in lines)
    assert not list(tmp_path.iterdir())
    assert cli.main(["data", "show", "image_text", "--png=x.png"]) == cli.EXIT_ERROR
    assert "--png is for pictures, and source 'digits and shakespeare' holds text" in capsys.readouterr().err


def test_ngrams_are_of_text_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "ngram", "--config=configs/image_text_digits.py"]) == cli.EXIT_ERROR
    assert "source 'digits and shakespeare' holds no text" in capsys.readouterr().err
