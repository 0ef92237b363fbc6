"""metrics.jsonl: appended to line by line, rewound when a run goes on from an earlier step, and read back.

No record is lost or doubled by a process that ends at any moment. Appending writes a whole line at once. Rewinding
writes what is to leave the file to `metrics.aside.pending`, then replaces the file, then gives the first its name;
who finds a pending file sees by the lines in it whether the file was replaced, and finishes or forgets the rewind.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenlab.core.errors import DataError, TokenLabError

NAME = "metrics.jsonl"
PENDING = "metrics.aside.pending"

_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsFile:
    """metrics.jsonl of a folder, open for appending. Raises TokenLabError when it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._error(error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line; when this returns, the end of the process cannot take it back."""
        line = memoryview(encode(record))
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _error(self, error: OSError) -> TokenLabError:
        return TokenLabError(
            f"cannot write {self.path}: {error.strerror}; expected a folder that can be written to, with free space"
        )


def encode(record: Mapping[str, Any]) -> bytes:
    """A record as one line of strict JSON: null for a number that is not finite, whose value "nonfinite" holds."""
    line = {name: value.item() if hasattr(value, "item") else value for name, value in record.items()}
    if type(line.get("step")) is not int or type(line.get("split")) is not str:
        raise TokenLabError(f"a record needs an integer 'step' and a text 'split'; given {line!r:.200}")
    nonfinite = {
        name: str(value)
        for name, value in line.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if nonfinite:
        line |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
    try:
        return json.dumps(line, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise TokenLabError(f"a record holds names and JSON values: {error}; given {line!r:.200}") from error


def decode(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The record in a line. Raises DataError naming file and line when it is none."""
    try:
        record = json.loads(line)
        nonfinite = record.pop("nonfinite", {})
        record |= {name: _NONFINITE[value] for name, value in nonfinite.items()}
        if type(record["step"]) is int:
            return record
        problem = "its step is not an integer"
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
    text = line.decode(errors="replace")
    raise DataError(
        f"{path} line {number} is not a record ({problem}): {text[:80]!r}; expected a JSON object with a step; "
        "remove the line to read the rest"
    )


def read(path: Path) -> list[dict[str, Any]]:
    """Every record of a file. Raises DataError when there is no such file or a line is not a record."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; expected a file of records") from error
    if lines[-1] == b"":
        lines.pop()
    return [decode(line, path, number) for number, line in enumerate(lines, 1)]


def rewind(folder: Path, step: int) -> tuple[int, str]:
    """Moves every record past `step`, and a last line that was cut short, from metrics.jsonl to a file of its own.

    Returns:
        (how many lines were moved, name of the file they are in); (0, "") when there were none.

    Raises:
        DataError: a line other than the last is not a record.
        TokenLabError: the folder cannot be written to.
    """
    path, pending = folder / NAME, folder / PENDING
    try:
        _settle(folder)
        whole, torn = _lines(path)
        later = [decode(line, path, number)["step"] > step for number, line in enumerate(whole, 1)]
        stays = [line for line, is_later in zip(whole, later, strict=True) if not is_later]
        moved = [line for line, is_later in zip(whole, later, strict=True) if is_later] + torn
        if not moved:
            return 0, ""
        replace(pending, b"".join(line + b"\n" for line in moved))
        replace(path, b"".join(line + b"\n" for line in stays))
        return len(moved), _name_pending(folder)
    except OSError as error:
        raise TokenLabError(
            f"cannot rewind {path}: {error.strerror}; expected a folder that can be written to"
        ) from error


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment, power failures included, it is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lines(path: Path) -> tuple[list[bytes], list[bytes]]:
    """The whole lines of a file, and what follows the last of them, if anything."""
    if not path.exists():
        return [], []
    *whole, rest = path.read_bytes().split(b"\n")
    return whole, [rest] if rest else []


def _settle(folder: Path) -> None:
    """Finishes a rewind that ended half-way, or forgets it when metrics.jsonl was not replaced yet."""
    pending = folder / PENDING
    if not pending.exists():
        return
    whole, torn = _lines(folder / NAME)
    moved, _ = _lines(pending)
    if set(moved) <= {*whole, *torn}:
        pending.unlink()
    else:
        _name_pending(folder)


def _name_pending(folder: Path) -> str:
    number = 1
    while (aside := folder / f"metrics.aside-{number}.jsonl").exists():
        number += 1
    (folder / PENDING).rename(aside)
    return aside.name
