"""table.md."""

from __future__ import annotations

import re

from tests.compare.report import example
from tokenlab.compare import report


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_table() -> None:
    head, rule, *arms = rows(report.markdown(example.results()))
    assert len(head) == len(rule) == 12
    assert {len(row) for row in arms} == {12}
    assert head[:4] == ["arm", "stack", "test accuracy", "difference to dense"]
    dense, keep, odd, *_, waits = arms
    assert dense[:4] == ["dense", "`block*12`", "0.9608 (0.9583 to 0.9634)", "baseline"]
    assert keep[3:8] == ["+0.0094 (+0.0076 to +0.0113)", "240 TFLOPs", "1.79 GFLOPs", "60.4 ms", "448 MB"]
    assert odd[7] == waits[2] == waits[3] == "–"
    assert [row[-1] for row in arms] == ["finished"] * 5 + ["partial", "waiting"]


def test_names_are_shown_as_they_are() -> None:
    name = rows(report.markdown(example.results()))[4][0]
    assert re.sub(r"\\(.)", r"\1", name) == example.ODD
    assert not re.search(r"(?<!\\)[<>&$_|]", name)


def test_sentences_and_notes() -> None:
    text = report.markdown(example.results())
    assert text.startswith(
        "# Vision transformers on digits at equal training FLOPs\n\n6 of 7 arms were trained"
    )
    assert "- registers waits to be run.\n" in text
    assert text.endswith("- the last step of keep ran past the budget by 0.3 %, within the tolerance\n")


def test_one_seed() -> None:
    assert rows(report.markdown(example.one_seed()))[3][2:4] == ["0.9692", "+0.0094"]
