"""The report of a comparison: a page that opens offline, a table in Markdown, and pictures.

Input is what results.json holds (format 1). The report fills in no number: it only places, sorts and writes out those
that are there. What is missing is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenlab.compare.report.markdown import markdown
from tokenlab.compare.report.page import html
from tokenlab.compare.report.pictures import draw
from tokenlab.compare.report.reading import checked
from tokenlab.core.errors import TokenLabError
from tokenlab.train.records import write_atomic

__all__ = ["html", "markdown", "write"]


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes index.html, table.md and the PNGs; each file is whole, or what it was before.

    Args:
      results: of format 1, as results.json of a comparison holds them.
      folder: of the comparison. The report goes to its folder `report`; paths of pictures are relative to it.

    Returns:
      The files written, index.html first.

    Raises:
      DataError: the results are of another format, or have no arm or no arm of the baseline's name.
      TokenLabError: a file cannot be written.
    """
    checked(results)
    target = Path(folder) / "report"
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokenLabError(
            f"cannot make {target}: {error.strerror}; expected a folder that can be written to"
        ) from error
    page, table = target / "index.html", target / "table.md"
    write_atomic(page, html(results, Path(folder)))
    write_atomic(table, markdown(results))
    return [page, table, *draw(results, target)]
