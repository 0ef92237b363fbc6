"""Time series in CSV files (also .gz and .xz): windows of rows as records, with the rows that follow or a class.

    config.data.files = ("ETTh1.csv.xz",)                    windows, and the `horizon` rows after each
    config.data.files = ("ETTh1.csv.xz", "ETTh2.csv.xz")     with horizon=0: windows, and which file each is from

A file has a line of names and then a row a step, oldest first; empty lines at its end do not count. Rows are split in
their order: the first for training, the next for validation, the last for the test, so that nothing of the future is
learned from. Every column is scaled by its mean and deviation over the training rows, of all files together.

What is predicted lies within its split. The window before it may begin in the split before, as is usual with these sets
(Informer, Zhou et al. 2021, arXiv 2012.07436): so a test set has as many windows whatever their length. Windows that
are classified lie within their split whole. The two transformers of that paper, 12, 4 and 4 months of hours, are
`rows={"train": 8640, "validation": 2880, "test": 2880}`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import lzma
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.source import Batch, DataConfig, Records, Spec, check_split

SPLITS = ("train", "validation", "test")
"""In the order of time. A mapping in a configuration has no order of its own."""

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
PACKED = {".gz": gzip.decompress, ".xz": lzma.decompress}


@dataclass(frozen=True, kw_only=True)
class Config(DataConfig):
    """CSV files of series.

    Attributes:
      files: one file or several, all with the columns that are read.
      window: T, rows of a record.
      horizon: S, rows to be predicted after it; 0 for classes: the label is the file's place in `files`.
      columns: names of those that are read, in this order; () for all but the first, which is a date.
      stride: rows from the beginning of a window to that of the next.
      rows: of "train", "validation" and "test", which follow one another: rows of each file, counts (the rest is left
        out) or shares of 1; None is 70, 10 and 20 %.
    """

    files: tuple[str, ...]
    window: int = 96
    horizon: int = 96
    columns: tuple[str, ...] = ()
    stride: int = 1
    rows: Mapping[str, int | float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.files, str) or not self.files:
            raise ConfigError(
                f"config.data.files is {self.files!r}; expected one or more paths, such as ('a.csv',)."
            )
        for key, least in (("window", 1), ("horizon", 0), ("stride", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"config.data.{key} is {getattr(self, key)}; expected at least {least}.")
        if not self.horizon and len(self.files) < 2:
            raise ConfigError(
                "config.data.horizon is 0, so windows are of the class of their file, and there is one file; expected "
                "two or more, or a horizon."
            )
        if self.rows is None:
            return
        kinds = {type(value) for value in self.rows.values()}
        whole, shares = kinds == {int}, kinds == {float}
        fits = bool(self.rows) and min(self.rows.values()) > 0 and (whole or shares)
        named = "train" in self.rows and set(self.rows) <= set(SPLITS)
        if not fits or not named or (shares and not sum(self.rows.values()) <= 1 + 1e-9):
            raise ConfigError(
                f"config.data.rows is {dict(self.rows)}; expected of 'train', and of 'validation' and 'test' where "
                "they are wanted, all counts >= 1 or all shares > 0 of at most 1 together."
            )


@dataclass(frozen=True, eq=False)
class Table:
    """A file's columns.

    Attributes:
      path: of the file.
      columns: names.
      values: [R, C] float64.
    """

    path: str
    columns: tuple[str, ...]
    values: np.ndarray


class WindowRecords:
    """The windows of one split, cut out of the rows when they are asked for.

    Args:
      tables: [R, C] float32 of each file, scaled.
      starts: of each window (which file, first row): int64 [n, 2].
      window, horizon: T and S; S = 0 for classes.
    """

    def __init__(self, tables: Sequence[np.ndarray], starts: np.ndarray, window: int, horizon: int):
        self._tables, self.starts = tables, starts
        self._window, self._horizon = window, horizon

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return {key: value[0] for key, value in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> Batch:
        """See `Records.batch`: "series" [B, T, C], and "target" [B, S, C] or "label" int32 [B]."""
        files, first = self.starts[indices].T
        whole = np.stack(
            [
                self._tables[file][row : row + self._window + self._horizon]
                for file, row in zip(files, first, strict=True)
            ]
        )
        if not self._horizon:
            return {"series": whole, "label": files.astype(np.int32)}
        return {
            "series": np.ascontiguousarray(whole[:, : self._window]),
            "target": np.ascontiguousarray(whole[:, self._window :]),
        }


class SeriesSource:
    """Windows of CSV files; see `tokenlab.data.source.Source`.

    Attributes:
      columns: names of the C channels.
      mean, deviation: [C] float64, of the training rows, by which channels are scaled.

    Raises:
      DataError: a file cannot be read, files have different columns, or a split has room for no window.
    """

    def __init__(self, config: Config):
        tables = [read(path, config.columns) for path in config.files]
        for table in tables:
            if table.columns != tables[0].columns:
                raise DataError(
                    f"{table.path!r} has columns {', '.join(table.columns)}, {tables[0].path!r} "
                    f"{', '.join(tables[0].columns)}; expected the same, or config.data.columns to choose those of all."
                )
        self.name = f"series {Path(tables[0].path).name}" + (
            f" and {len(tables) - 1} more" if tables[1:] else ""
        )
        self.columns = tables[0].columns
        self._config = config
        bounds = [bounds_of(len(table.values), config.rows or SHARES, table.path) for table in tables]
        train = np.concatenate(
            [table.values[slice(*own["train"])] for table, own in zip(tables, bounds, strict=True)]
        )
        self.mean, deviation = train.mean(axis=0), train.std(axis=0)
        self.deviation = np.where(deviation > 0, deviation, 1.0)
        scaled = [((table.values - self.mean) / self.deviation).astype(np.float32) for table in tables]
        self._records = {}
        for split in bounds[0]:
            starts = [
                (which, first)
                for which, own in enumerate(bounds)
                for first in self._starts(own[split], split == "train")
            ]
            if not starts:
                raise DataError(
                    f"split {split!r} of {self.name} has {bounds[0][split][1] - bounds[0][split][0]} rows and room for "
                    f"no window of {config.window} and {config.horizon} rows; set config.data.window, "
                    "config.data.horizon or config.data.rows."
                )
            self._records[split] = WindowRecords(
                scaled, np.array(starts, np.int64), config.window, config.horizon
            )
        self.splits = {split: len(records) for split, records in self._records.items()}
        channels = len(self.columns)
        self.spec: Spec = {"series": ((config.window, channels), "float32")}
        self.num_classes: int | None = None
        self.class_names: tuple[str, ...] | None = None
        if config.horizon:
            self.spec = {**self.spec, "target": ((config.horizon, channels), "float32")}
        else:
            self.spec = {**self.spec, "label": ((), "int32")}
            self.num_classes = len(tables)
            self.class_names = tuple(Path(table.path).name.partition(".")[0] for table in tables)
        digest = hashlib.sha256(repr((self.columns, bounds, config.window, config.horizon)).encode())
        for table in tables:
            digest.update(np.ascontiguousarray(table.values))
        for records in self._records.values():
            digest.update(records.starts)
        self.fingerprint = f"series_csv:{digest.hexdigest()[:16]}"

    def _starts(self, bounds: tuple[int, int], first: bool) -> range:
        """First rows of the windows whose answers lie within `bounds`; `first`: of the split that has none before."""
        begin, end = bounds
        config = self._config
        # What is predicted is of this split; what it is predicted from may reach back.
        back = 0 if first or not config.horizon else min(config.window, begin)
        return range(begin - back, end - config.window - config.horizon + 1, config.stride)

    def split(self, name: str) -> Records:
        """See `Source.split`."""
        check_split(self, name)
        return self._records[name]


def build(config: Config) -> SeriesSource:
    """The windows of `config.files`; raises as `SeriesSource`."""
    return SeriesSource(config)


def bounds_of(total: int, rows: Mapping[str, int | float], path: str) -> dict[str, tuple[int, int]]:
    """split -> (first row, last + 1), one after the other in the order of `SPLITS`.

    Args:
      total: rows of the file.
      rows: of each split: counts, or shares of the file.
      path: of the file, for the message.

    Raises:
      DataError: the file has fewer rows than the counts ask for.
    """
    found, begin, share = {}, 0, 0.0
    for split in filter(rows.__contains__, SPLITS):
        amount = rows[split]
        share += amount
        end = begin + amount if isinstance(amount, int) else math.floor(share * total + 1e-6)
        found[split] = (begin, end)
        begin = end
    if begin > total:
        raise DataError(f"{path!r} has {total} rows; config.data.rows asks for {begin}.")
    return found


def read(path: str, columns: Sequence[str] = ()) -> Table:
    """The numbers of a CSV file.

    Args:
      path: .csv, also .gz and .xz.
      columns: names, in the order wanted; () for all but the first.

    Raises:
      DataError: the file cannot be read; it has no such column, no rows, a row of another length, or a cell that is no
        finite number: the message names line and column.
    """
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
        text = PACKED.get(file.suffix, bytes)(content).decode("utf-8")
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path!r} cannot be read: {error}.") from error
    lines = list(csv.reader(text.rstrip().splitlines()))
    if len(lines) < 2:
        raise DataError(f"{path!r} has {len(lines)} lines; expected a line of names and then rows.")
    header = [name.strip() for name in lines[0]]
    wanted = tuple(columns) or tuple(header[1:])
    for name in wanted:
        if name not in header:
            raise DataError(
                f"{path!r} has no column {name!r} (config.data.columns); it has {', '.join(header)}."
            )
    if not wanted:
        raise DataError(f"{path!r} has one column, {header[0]!r}; expected a date and then one or more.")
    places = [header.index(name) for name in wanted]
    values = np.empty((len(lines) - 1, len(wanted)))
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise DataError(f"{path!r}, line {number}: {len(line)} cells; expected {len(header)}.")
        for column, place in enumerate(places):
            try:
                value = float(line[place])
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise DataError(
                    f"{path!r}, line {number}, column {wanted[column]!r}: {line[place]!r} is no finite number."
                )
            values[number - 2, column] = value
    return Table(path, wanted, values)
