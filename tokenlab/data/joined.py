"""Stretches of records, of one source or of several, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tokenlab.data.source import Batch, Records, Spec, stackable


class Stretch(NamedTuple):
    """Some records in a row.

    Attributes:
      records: they are among.
      start, stop: the first, and one past the last.
      offset: added to their labels.
    """

    records: Records
    start: int
    stop: int
    offset: int = 0


class JoinedRecords:
    """Stretches as one `Records`.

    Args:
      stretches: one or more, none of them empty.
      spec: of the result. A key that it cannot stack comes as a list, even where a stretch by itself gives an array.
    """

    def __init__(self, stretches: Sequence[Stretch], spec: Spec):
        self._stretches, self._spec = tuple(stretches), dict(spec)
        self._ends = np.cumsum([stretch.stop - stretch.start for stretch in stretches])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        stretch = self._stretches[which]
        return _labelled(stretch.records[index - int(self._ends[which]) + stretch.stop], stretch.offset)

    def text(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """The documents, or the parts of them, that records `start` to `stop` - 1 hold; of records of text only."""
        stop = len(self) if stop is None else stop
        begin = 0
        for stretch, end in zip(self._stretches, self._ends.tolist(), strict=True):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield from stretch.records.text(first - begin + stretch.start, last - begin + stretch.start)
            begin = end

    def batch(self, indices: np.ndarray) -> Batch:
        """See `Records.batch`."""
        indices = np.asarray(indices)
        result: Batch = {
            key: np.empty((len(indices), *shape), dtype)
            if stackable((shape, dtype))
            else [None] * len(indices)
            for key, (shape, dtype) in self._spec.items()
        }
        of = np.searchsorted(self._ends, indices, side="right")
        for which in np.unique(of).tolist():
            rows, stretch = np.flatnonzero(of == which), self._stretches[which]
            found = stretch.records.batch(indices[rows] - self._ends[which] + stretch.stop)
            _put(result, rows, _labelled(found, stretch.offset))
        return result


def _labelled(found: Batch, offset: int) -> Batch:
    return {**found, "label": (found["label"] + offset).astype(np.int32)} if offset else found


def _put(result: Batch, rows: np.ndarray, found: Mapping) -> None:
    """Writes some rows of a batch."""
    for key, target in result.items():
        if isinstance(target, np.ndarray):
            target[rows] = found[key]
        else:
            for row, value in zip(rows.tolist(), found[key], strict=True):
                target[row] = value
