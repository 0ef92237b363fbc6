"""The README's table is what the records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.conftest import RECORDS
from tokenlab.bench import readme
from tokenlab.core.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
PAGE = f"# A\n\n{readme.BEGIN}\nold\n{readme.END}\n\nb\n"


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "cpu.json").write_text(json.dumps(RECORDS))
    return tmp_path


def test_the_readme_of_this_checkout_is_up_to_date() -> None:
    assert readme.main(["--check"], ROOT) == 0


def test_writing_and_checking(checkout, capsys) -> None:
    assert readme.main(["--check"], checkout) == 1
    assert (checkout / "README.md").read_text() == PAGE
    assert readme.main([], checkout) == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith("# A\n") and text.endswith("\n\nb\n") and "old" not in text
    assert (
        "| `block*4 + keep(0.5) + block*8` | scanned | 0.650 | 0.700 | 0.86 (0.80 to 0.91) | 61 % |" in text
    )
    assert readme.main(["--check"], checkout) == 0
    (checkout / "benchmarks" / "gpu.json").write_text(json.dumps([{**RECORDS[1], "device": "another"}]))
    assert readme.main(["--check"], checkout) == 1
    assert "a chip" in readme.render(checkout / "benchmarks").partition("another")[0]  # by file name


def test_without_records_it_says_how_to_make_them(checkout) -> None:
    (checkout / "benchmarks" / "cpu.json").unlink()
    assert readme.render(checkout / "benchmarks") == readme.NOTHING


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"stack"', "cannot read"),
        ("{}", "holds no list of records"),
        ("[]", "holds no list of records"),
        ("[3]", "a record of format None; expected 1"),
        (json.dumps([{**RECORDS[0], "format": 2}]), "a record of format 2; expected 1"),
        (json.dumps([{**RECORDS[0], "versions": {}}]), "a record without versions.jax"),
        (json.dumps([{"format": 1}]), "a record without stack, mode, execution"),
    ],
)
def test_other_files_are_told_and_nothing_is_written(checkout, capsys, content, message) -> None:
    (checkout / "benchmarks" / "odd.json").write_text(content)
    assert readme.main([], checkout) == 2
    error = capsys.readouterr().err
    assert message in error and "odd.json" in error
    assert (checkout / "README.md").read_text() == PAGE


@pytest.mark.parametrize("key", sorted(set(RECORDS[0]) - {"format"}))
def test_a_key_that_is_missing_is_named_or_not_needed(checkout, key) -> None:
    file = checkout / "benchmarks" / "odd.json"
    file.write_text(json.dumps([{k: v for k, v in record.items() if k != key} for record in RECORDS]))
    if key in readme.KEYS:
        with pytest.raises(DataError, match=f"odd.json: a record without {key};"):
            readme.render(checkout / "benchmarks")
    else:
        readme.render(checkout / "benchmarks")


@pytest.mark.parametrize("page", ["", readme.BEGIN, f"{readme.END}\n{readme.BEGIN}", PAGE + PAGE])
def test_marks_must_be_there_once(checkout, capsys, page) -> None:
    (checkout / "README.md").write_text(page)
    assert readme.main([], checkout) == 2
    assert "once each" in capsys.readouterr().err
