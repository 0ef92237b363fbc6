"""What folding gains by the roofline: the page shows the record, and the record what the formulas say."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tokenlab.bench import mappings
from tokenlab.core.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
ROWS = {each["command"]: each for each in mappings.read(ROOT / mappings.RECORD)["rows"]}


def recorded(case):
    return ROWS[shlex.join(case.command)]


def test_the_page_shows_the_record(capsys) -> None:
    assert mappings.main(["--check"], ROOT) == 0, capsys.readouterr().err


def test_folding_beats_the_best_mapping_without_it() -> None:
    """On one slice and on several, where the batch has fewer examples than there are experts; elsewhere it need not."""
    gains = {}
    for case in mappings.CASES:
        said = recorded(case)
        assert said["folded"]["fits"] and said["unfolded"]["fits"]
        gains[case.topology, case.batch, case.length] = (
            said["unfolded"]["seconds"] / said["folded"]["seconds"]
        )
    assert gains["v5p:4x8x8", 4, 4096] > 1.5 and gains["v5e:4x4*16", 16, 4096] > 1.5
    assert gains["v5p:4x8x8", 256, 4096] == pytest.approx(1, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", mappings.CASES, ids=lambda case: f"{case.topology}-{case.batch}-{case.length}"
)
def test_the_record_is_what_the_search_says(case) -> None:
    said, found = recorded(case), mappings.row(case, ROOT)
    assert said["mappings"] == found["mappings"]
    for what in ("folded", "unfolded"):
        assert said[what]["plan"] == found[what]["plan"]
        for name in ("seconds", "in_turn_seconds", "collective_seconds", "network_seconds"):
            assert said[what][name] == pytest.approx(found[what][name]), name


def test_what_is_no_record(tmp_path) -> None:
    file = tmp_path / "record.json"
    for text, message in (("{", "cannot read"), ("[]", "no record")):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            mappings.read(file)
