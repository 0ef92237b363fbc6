"""Labelled texts and pairs of texts in tables: .tsv, .csv and .jsonl, also .gz and .xz, columns by name.

    config.data.files = "reviews.tsv"                            shares of the rows, as of the source `text`
    config.data.text, pair, label = "document", None, "rating"   columns
    config.data.classes = {"bad": ("1", "2", "3", "4"), "good": ("9", "10")}   other rows are left out
    config.data.thresholds = (2.5,)                              or numbers at which the next class begins

A .tsv is cut at tabs and knows no quotes; its first line names the columns, as that of a .csv does.
"""

from __future__ import annotations

import bisect
import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenlab.core.errors import ConfigError, DataError, suggest
from tokenlab.data.sources import text as text_files
from tokenlab.data.text.sentences import Sentence, SentenceConfig, SentenceSource

KINDS = (".tsv", ".csv", ".jsonl")

LEAST_ROWS = 2
"""Of a class, where classes are the values that are there: one value a row is no label."""


@dataclass(frozen=True, kw_only=True)
class Config(SentenceConfig):
    """Tables of labelled texts.

    Attributes:
      files: a pattern such as "reviews/*.tsv", several, or one or several for each split.
      text: column of the text.
      pair: column of the second text of a pair; None for single texts.
      label: column of the label.
      classes: name of a class -> values of the label that are of it; rows with other values are left out. {} with no
        thresholds: each value is a class, in their order.
      thresholds: ascending; a label is then a number, and the class how many of them it reaches.
      fractions: as of the source `text`; the split of a row depends on its texts alone.
    """

    files: str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]]
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    classes: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    thresholds: tuple[float, ...] = ()
    fractions: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        text_files.check_fractions(self.files, self.fractions)
        if self.classes and self.thresholds:
            raise ConfigError(
                "config.data.classes and config.data.thresholds are both set; leave one of them out."
            )
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ConfigError(f"config.data.thresholds is {self.thresholds}; expected ascending numbers.")
        seen: dict[str, str] = {}
        for name, values in self.classes.items():
            for value in [values] if isinstance(values, str) else values:
                if value in seen:
                    raise ConfigError(
                        f"config.data.classes has the label {value!r} in {seen[value]!r} and {name!r}."
                    )
                seen[value] = name


def build(config: Config) -> SentenceSource:
    """The rows of `config.files`; `left_out` of the source counts those whose label is in no class, by split.

    Raises:
      DataError: a pattern matches no file, a file is of another kind, cannot be read or is in two splits, a column is
        missing, a row has another number of fields, a label is no number where thresholds are set, or a split or a
        class has no row.
    """
    by_split = isinstance(config.files, Mapping)
    patterns = dict(config.files) if by_split else {"": config.files}
    paths = {split: text_files.files_of(split, given) for split, given in patterns.items()}
    text_files.check_files(paths, KINDS, "table")
    rows = {split: [row for path in found for row in _rows(path, config)] for split, found in paths.items()}
    if not by_split:
        shares = text_files.shared_out(
            list(dict.fromkeys(_key(row) for row in rows[""])), config.fractions or text_files.FRACTIONS
        )
        split_of = {key: split for split, keys in shares.items() for key in keys}
        rows = {split: [row for row in rows[""] if split_of.get(_key(row)) == split] for split in shares}
    names, number_of = _classes(rows, config)
    sentences = {
        split: [Sentence(text, pair, number_of[label]) for text, pair, label in found if label in number_of]
        for split, found in rows.items()
    }
    listed = sorted({path for found in paths.values() for path in found})
    name = "labelled_text " + text_files.named(listed)
    source = SentenceSource(name, sentences, names, config)
    source.left_out = {split: len(found) - len(sentences[split]) for split, found in rows.items()}
    return source


Row = tuple[str, str | None, str]


def _key(row: Row) -> str:
    """The texts of a row, which decide its split: equal ones are in the same."""
    return row[0] if row[1] is None else f"{row[0]}\n{row[1]}"


def _classes(rows: Mapping[str, list[Row]], config: Config) -> tuple[tuple[str, ...], dict[str, int]]:
    """The names of the classes, and the class of each value of the label."""
    values = sorted({label for found in rows.values() for _, _, label in found}, key=_order)
    if config.thresholds:
        names = [f"below {config.thresholds[0]:g}", *(f"{at:g} or more" for at in config.thresholds)]
        return tuple(names), {
            value: bisect.bisect_right(config.thresholds, _number(value, config)) for value in values
        }
    if config.classes:
        number_of = {
            value: number
            for number, given in enumerate(config.classes.values())
            for value in ([given] if isinstance(given, str) else given)
        }
        for name, number in zip(config.classes, range(len(config.classes)), strict=True):
            if not any(number_of.get(value) == number for value in values):
                raise DataError(
                    f"config.data.classes: no row is of class {name!r}; the labels of column {config.label!r}: "
                    f"{_listed(values)}."
                )
        return tuple(config.classes), number_of
    count = sum(map(len, rows.values()))
    if len(values) < 2 or count < LEAST_ROWS * len(values):
        raise DataError(
            f"column {config.label!r} has {len(values)} values in {count} rows: {_listed(values)}; expected a label "
            "with two values or more, each of several rows, or set config.data.classes or config.data.thresholds."
        )
    return tuple(values), {value: number for number, value in enumerate(values)}


def _order(value: str) -> tuple[float, str]:
    try:
        number = float(value)
    except ValueError:
        return math.inf, value
    return (number if math.isfinite(number) else math.inf), value


def _number(value: str, config: Config) -> float:
    number = _order(value)[0]
    if number == math.inf:
        raise DataError(
            f"column {config.label!r} holds {value!r}, which is no number; config.data.thresholds needs numbers."
        )
    return number


def _listed(values: list[str]) -> str:
    return ", ".join(map(repr, values[:10])) + (f" and {len(values) - 10} more" if len(values) > 10 else "")


def _rows(path: str, config: Config) -> Iterator[Row]:
    for number, record in _records(path):
        where = f"{path!r}, line {number}"
        found = []
        for key, column in (("text", config.text), ("pair", config.pair), ("label", config.label)):
            if column is None:
                found.append(None)
                continue
            value = record.get(column)
            if value is None:
                raise DataError(
                    f"{where}: it has no column {column!r} (config.data.{key}).{suggest(column, map(str, record))}"
                )
            if key == "label" and isinstance(value, bool | int | float):
                value = str(value)
            if not isinstance(value, str):
                raise DataError(f"{where}: column {column!r} is a {type(value).__name__}; expected text.")
            found.append(value)
        if not found[0].strip() or (found[1] is not None and not found[1].strip()):
            continue  # as of documents: white space is no text
        yield tuple(found)


def _records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of the line and values by column."""
    content, kind = text_files.contents(path), text_files.suffix_of(path)
    if kind == ".jsonl":
        for number, line in enumerate(content.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path!r}, line {number}: it is no JSON ({error}).") from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{path!r}, line {number}: it is a {type(record).__name__}; expected an object."
                )
            yield number, record
        return
    if kind == ".tsv":
        lines = content.removesuffix("\n").split("\n")
        table = (line.removesuffix("\r").split("\t") for line in lines)
    else:
        table = csv.reader(io.StringIO(content, newline=""))
    names: list[str] | None = None
    for number, fields in enumerate(table, 1):
        if names is None:
            names = [name.removeprefix("\ufeff") for name in fields]
        elif fields and fields != [""]:
            if len(fields) != len(names):
                raise DataError(
                    f"{path!r}, line {number}: it has {len(fields)} fields, and the first line {len(names)} names."
                )
            yield number, dict(zip(names, fields, strict=True))
