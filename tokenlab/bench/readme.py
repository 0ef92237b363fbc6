"""The README's table of measurements, made of the records in benchmarks/.

python -m tokenlab.bench.readme            write it between the marks in README.md
python -m tokenlab.bench.readme --check    only say whether it is up to date (exit status 1 when not)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenlab.bench import table
from tokenlab.core.errors import DataError, TokenLabError
from tokenlab.train.records import write_atomic

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
COLUMNS = (
    "stack",
    "runs",
    "FLOPs / dense",
    "time / dense",
    "realised (95 %)",
    "of measured peak",
    "of datasheet",
)
KEYS = (
    "stack",
    "mode",
    "execution",
    "flops_ratio",
    "time_ratio",
    "realised",
    "realised_low",
    "realised_high",
    "mfu",
    "mfu_datasheet",
    "size",
    "dtype",
    "batch_size",
    "rounds",
    "platform",
    "device",
    "devices",
    "cores",
    "versions",
)
"""What the tables read of a record."""

NOTHING = "No measurements yet: `tokenlab benchmark --suite=core --json=benchmarks/NAME.json` makes them."


def render(folder: Path) -> str:
    """The tables of every record file in a folder, in the order of their names.

    Raises:
      DataError: a file that does not hold records of `tokenlab benchmark --json`.
    """
    parts = [table.to_markdown(read(file), COLUMNS).strip() for file in sorted(folder.glob("*.json"))]
    return "\n\n".join(parts) or NOTHING


def read(file: Path) -> list[dict]:
    """The records in a file. Raises DataError when it holds something else."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {file}: {error}; expected what `tokenlab benchmark --json` writes."
        ) from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{file} holds no list of records: expected what `tokenlab benchmark --json` writes.")
    for record in records:
        said = record.get("format") if isinstance(record, dict) else None
        if said != table.FORMAT:
            raise DataError(
                f"{file}: a record of format {said!r}; expected {table.FORMAT}: measure again with "
                "`tokenlab benchmark --json`."
            )
        missing = [key for key in KEYS if key not in record]
        if not missing and (not isinstance(record["versions"], dict) or "jax" not in record["versions"]):
            missing = ["versions.jax"]
        if missing:
            raise DataError(
                f"{file}: a record without {', '.join(missing)}; measure again with `tokenlab benchmark --json`."
            )
    return records


def updated(text: str, tables: str) -> str:
    """A page with the tables between its marks.

    Raises:
      DataError: the marks are not there once each, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise DataError(f"README.md: expected {BEGIN} and {END} once each, in this order.")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main(argv: Sequence[str] | None = None, root: Path = Path(".")) -> int:
    """Run the command in the root of a checkout; returns the exit status: 0, 1 (not up to date) or 2 (a mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenlab.bench.readme", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 when it is out of date"
    )
    check = parser.parse_args(argv).check
    page = root / "README.md"
    try:
        if not page.is_file():
            raise DataError(f"{page.absolute()} is not there; run this in the root of a checkout.")
        text = page.read_text(encoding="utf-8")
        wanted = updated(text, render(root / "benchmarks"))
        if wanted == text:
            print("README.md is up to date")
            return 0
        if check:
            print("README.md is out of date: run python -m tokenlab.bench.readme", file=sys.stderr)
            return 1
        write_atomic(page, wanted)
    except TokenLabError as error:
        print(f"readme: error: {error}", file=sys.stderr)
        return 2
    print("README.md is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
