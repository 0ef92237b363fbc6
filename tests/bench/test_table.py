"""Tables of records."""

from __future__ import annotations

import io

from rich.console import Console

from tests.bench.conftest import RECORDS
from tokenlab.bench.table import to_markdown, to_rich


def test_for_a_terminal() -> None:
    screen = io.StringIO()
    for table in to_rich(RECORDS, 200):
        Console(width=200, file=screen).print(table)
    texts = (
        "keep(0.5)",
        "scanned",
        "0.86 (0.80 to 0.91)",
        "325 (320 to 1250)",
        "61 %",
        "200, memory",
        "250 MB",
        "12.3",
    )
    for text in texts:
        assert text in screen.getvalue(), text
    assert "of datasheet" not in screen.getvalue()  # empty throughout


def test_in_markdown() -> None:
    found = to_markdown(RECORDS)
    assert found.startswith("Train step, Ti/16, float32, batch 8, 11 rounds, a chip, 2 cores, jax 0.0:\n")
    assert "| `block*12` | scanned | 1.000 | 1.000 |  |" in found
    assert "| `block*4 + keep(0.5) + block*8` | scanned | 0.650 | 0.700 | 0.86 (0.80 to 0.91) |" in found


def test_a_table_a_mode() -> None:
    both = [
        *RECORDS,
        *({**record, "mode": "inference", "mfu_datasheet": 0.5, "platform": "tpu"} for record in RECORDS),
    ]
    assert len(to_rich(both, 200)) == 2
    _, _, inference = to_markdown(both).partition("Inference, ")
    assert "of datasheet" in inference and "| 50 % |" in inference and "a chip, 1 device, " in inference


def test_a_narrow_terminal_gets_the_first_columns() -> None:
    wide, narrow = (len(to_rich(RECORDS, width)[0].columns) for width in (300, 100))
    assert wide == 11 and 5 <= narrow < wide
