"""Records in JSON, and the tables that pages of docs/ show of them between two marks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenlab.core.errors import DataError, TokenLabError
from tokenlab.train.records import write_atomic

FORMAT = 1


def read(file: Path, empty: Mapping[str, Any]) -> dict[str, Any]:
    """A record, `empty` where there is none.

    Args:
      file: written by a command of `tokenlab.bench`.
      empty: what every record has, each with a value of its type; "format" comes to it.

    Raises: DataError when it holds something else.
    """
    if not file.exists():
        return {"format": FORMAT, **empty}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}; expected what this command writes.") from error
    if (
        not isinstance(found, dict)
        or found.get("format") != FORMAT
        or not all(isinstance(found.get(name), type(value)) for name, value in empty.items())
    ):
        raise DataError(f"{file} is no record of format {FORMAT}: expected what this command writes.")
    return found


def updated(page: Path, tables: str, begin: str, end: str) -> str:
    """The text of a page with the tables between its marks.

    Raises: DataError when there is no such page, or without the marks once each, in their order.
    """
    if not page.is_file():
        raise DataError(f"{page.absolute()} is not there; run this in the root of a checkout.")
    before, first, rest = page.read_text(encoding="utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last or begin in rest or end in after:
        raise DataError(f"{page}: expected {begin} and {end} once each, in this order.")
    return f"{before}{begin}\n{tables}\n{end}{after}"


def refresh(page: Path, begin: str, end: str, tables: Callable[[], str], *, check: bool, command: str) -> int:
    """Writes tables into a page; with `check` only says whether it is out of date.

    What is wrong with the page is told before `tables` makes anything. Returns the exit status of a command: 0, 1 for
    out of date, 2 for a mistake, which is told.
    """
    try:
        updated(page, "", begin, end)
        wanted = updated(page, tables(), begin, end)
        if wanted == page.read_text(encoding="utf-8"):
            return 0
        if check:
            print(f"{page} is out of date: run {command}", file=sys.stderr)
            return 1
        write_atomic(page, wanted)
    except TokenLabError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return 2
    return 0
