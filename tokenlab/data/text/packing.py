"""Packing: documents of any length into rows of N tokens.

All documents of a split lie one after another in one array, each followed by its end token. A row is a list of pieces
of that array, so that packing costs a few numbers a piece and rows are made when they are asked for. The target of a
token is the one that follows it in the array; each document's targets are therefore all its tokens but the first, and
its end. Every target counts exactly once, whichever way documents are packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """Where the rows of a split lie in the array of its tokens.

    Attributes:
      length: N, tokens of a row.
      starts: int64 [P], the first token of each piece; a row's pieces follow each other.
      lengths: int64 [P], tokens of each piece; a piece is part of one document.
      rows: int64 [R + 1]; the pieces of row r are rows[r] to rows[r + 1] - 1.
    """

    length: int
    starts: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        """The number of rows R."""
        return len(self.rows) - 1

    def unpack(self, tokens: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Some rows as arrays.

        Args:
          tokens: [T], all documents, each followed by its end.
          indices: int64 [B], each in [0, R), repeats allowed.

        Returns:
          int32 [B, N] each, 0 in padding: "ids"; "target", the token that follows; "segment", the number of the piece
          within its row, from 1; "position" within the piece, from 0.
        """
        indices = np.asarray(indices, np.int64)
        counts = self.rows[indices + 1] - self.rows[indices]
        pieces = np.repeat(self.rows[indices], counts) + _ranges(counts)
        lengths = self.lengths[pieces]
        number = np.repeat(_ranges(counts), lengths)
        within = _ranges(lengths)
        source = np.repeat(self.starts[pieces], lengths) + within
        filled = np.add.reduceat(lengths, np.cumsum(counts) - counts)
        place = np.repeat(np.arange(len(indices)) * self.length, filled) + _ranges(filled)
        result = {}
        for key, values in (
            ("ids", tokens[source]),
            ("target", tokens[source + 1]),
            ("segment", number + 1),
            ("position", within),
        ):
            array = np.zeros(len(indices) * self.length, np.int32)
            array[place] = values
            result[key] = array.reshape(len(indices), self.length)
        return result

    def spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where the tokens of rows `start` to `stop` - 1 lie, their targets included: (first, last + 1), ascending.

        Pieces that follow each other in the array are one span.
        """
        if start >= stop:
            return []
        pieces = slice(int(self.rows[start]), int(self.rows[stop]))
        order = np.argsort(self.starts[pieces], kind="stable")
        first = self.starts[pieces][order]
        last = first + self.lengths[pieces][order] + 1
        new = np.flatnonzero(np.append(True, first[1:] > last[:-1]))
        return list(
            zip(first[new].tolist(), last[np.append(new[1:] - 1, len(last) - 1)].tolist(), strict=True)
        )


def stream(sizes: np.ndarray, length: int) -> Packed:
    """Windows of N + 1 tokens of the whole array, each beginning with the last token of the one before.

    So no token is the input of two rows, and every target but the first token of all is there once. Only the last row
    is padded.

    Args:
      sizes: int64 [documents], tokens of each with its end; 2 or more.
      length: N.
    """
    total = int(sizes.sum()) - 1  # the last token of all is nobody's input
    begins = np.cumsum(sizes) - sizes
    starts = np.union1d(np.arange(0, total, length), begins)
    rows = np.searchsorted(starts, np.arange(0, total + length, length))
    return Packed(length, starts, np.diff(np.append(starts, total)), rows)


def fit(sizes: np.ndarray, length: int) -> Packed:
    """Whole documents, each into the fullest row that has room for it, the longest first (best fit decreasing).

    A document of more than N tokens is cut into pieces of N and a rest first. Rows hold documents in their order and
    follow each other by their first one. The end of a document is a target only: it takes no place.

    Args:
      sizes: int64 [documents], tokens of each with its end; 2 or more.
      length: N.

    Source: Ding et al., "Fewer truncations improve language modeling", ICML 2024 (best-fit packing).
    """
    begins, inputs = np.cumsum(sizes) - sizes, sizes - 1
    counts = -(-inputs // length)
    offset = _ranges(counts) * length
    starts = np.repeat(begins, counts) + offset
    lengths = np.minimum(np.repeat(inputs, counts) - offset, length)
    row_of = _best_fit(lengths, length)
    # Rows are numbered by their first piece, and pieces lie in their order within.
    _, first, number = np.unique(row_of, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    row_of = rank[number]
    order = np.argsort(row_of, kind="stable")
    rows = np.searchsorted(row_of[order], np.arange(len(first) + 1))
    return Packed(length, starts[order], lengths[order], rows)


def _best_fit(lengths: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece, int64 [P]; ties go to the piece that comes first and to the row that was opened last."""
    row_of = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit k is set where some row has room for exactly k more
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    for piece, size in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row, opened = length, opened, opened + 1
        row_of[piece] = row
        if room > size:
            with_room[room - size].append(row)
            rooms |= 1 << (room - size)
    return row_of


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. c - 1 for each count c, one after the other: int64 [sum of counts]."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
