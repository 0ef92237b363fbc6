"""Rows of N tokens with exactly P pictures each, filled up with text; nothing is padded.

The tokens of a split lie in one array: documents with a picture, then texts, each document followed by its end. A row
takes the next P documents with a picture and as much of the texts as there is room for, which is cut in two at a place
drawn for the row. These P + 2 pieces stand in an order drawn for the row, so that where a token stands says little of
what it is. The texts follow one another through the rows of a split; where they are too short they begin anew.

As in `tokenlab.data.text.packing.fit` the end of a document is a target only: it takes no place. So every token of a
row is followed by one of its own document, and every target counts.
"""

from __future__ import annotations

import enum

import numpy as np

from tokenlab.data import draws
from tokenlab.data.draws import Purpose
from tokenlab.data.text.packing import Packed

SEED = 2407
"""Of rows, orders and phrases, and of nothing else: they are the same in every run."""


class Draw(enum.IntEnum):
    """What is drawn with `SEED`."""

    ROWS = 0
    ORDER = 1
    FIRST = 2
    PHRASE = 3


def words(what: Draw, count: int) -> np.ndarray:
    """`count` random words, uint64; the first k of n words are the k words that `count=k` gives."""
    return draws.words(SEED, Purpose.PACKING, what, count)


def documents(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Both documents of every pair of a picture and its caption, in the order in which rows take them.

    All pairs in an order drawn once, in each of which a draw decides whether the caption or the picture comes first;
    then all of them again in the same order, the other way round. So P <= n documents in a row are of P pairs.

    Args:
      pairs: n.

    Returns:
      The pair of each document, int64 [2n], and whether its caption comes first, bool [2n].
    """
    order = np.argsort(words(Draw.ORDER, pairs), kind="stable")
    caption_first = words(Draw.FIRST, pairs)[order] % 2 == 0
    return np.tile(order, 2), np.concatenate([caption_first, ~caption_first])


class Texts:
    """The tokens of texts in an array, an end behind each; they are taken in their order, and anew after the last.

    Args:
      first: where they begin in the array.
      sizes: int64 [texts], tokens of each with its end; 2 or more.

    Attributes:
      total: tokens that there are to take; ends are not taken.
      taken: so far.
    """

    def __init__(self, first: int, sizes: np.ndarray):
        self._begins = first + np.cumsum(sizes) - sizes
        self._stops = np.cumsum(sizes - 1)
        self.total = int(self._stops[-1])
        self.taken = 0

    def take(self, count: int) -> list[tuple[int, int]]:
        """The next `count` tokens as pieces (start, length) of the array; a piece is part of one text."""
        found = []
        while count:
            place = self.taken % self.total
            text = int(np.searchsorted(self._stops, place, side="right"))
            left = int(self._stops[text]) - place
            length = min(count, left)
            # A text's last token stands just before its end, which is not counted in `place`.
            size = int(self._stops[text]) - (int(self._stops[text - 1]) if text else 0)
            found.append((int(self._begins[text]) + size - left, length))
            self.taken += length
            count -= length
        return found


def rows(sizes: np.ndarray, texts: Texts, length: int, pictures: int) -> Packed:
    """The rows of a split. The last one is filled up with the first documents.

    Args:
      sizes: int64 [M], tokens of each document with a picture, its end included; they begin the array.
      texts: that fill the rows.
      length: N; no P documents are longer together.
      pictures: P.
    """
    begins = np.cumsum(sizes) - sizes
    count = -(-len(sizes) // pictures)
    pieces: list[tuple[int, int]] = []
    ends = [0]
    for row, drawn in enumerate(words(Draw.ROWS, count * (pictures + 3)).reshape(count, -1)):
        own = np.arange(row * pictures, (row + 1) * pictures) % len(sizes)
        room = length - int((sizes[own] - 1).sum())
        cut = int(drawn[0] % np.uint64(room + 1))
        fills = [cut, room - cut]
        found: list[tuple[int, int]] = []
        for which in np.argsort(drawn[1:], kind="stable").tolist():
            if which < pictures:
                found.append((int(begins[own[which]]), int(sizes[own[which]]) - 1))
            else:
                found += texts.take(fills.pop())
        pieces += _joined(found)
        ends.append(len(pieces))
    starts, lengths = np.array(pieces, np.int64).T
    return Packed(length, starts, lengths, np.array(ends))


def _joined(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pieces, where two that continue each other are one."""
    found = pieces[:1]
    for start, length in pieces[1:]:
        if start == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found
