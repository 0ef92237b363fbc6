"""Interpolated n-grams over bytes: what a model of text without any learning but counting reaches.

With c the byte, h the n - 1 symbols before it, C(h) how often h was followed by anything and T(h) by how many different
symbols (Witten-Bell):

    P_n(c | h) = (C(h c) + T(h) P_{n-1}(c | h')) / (C(h) + T(h)),    h' = h without its first symbol
    P_0(c) = 1 / 257

A context that was never seen leaves P_{n-1} as it is. The symbols are the 256 bytes and the end of a document, as for a
byte-level model, and what is predicted is the same: all symbols of a document but the first, its end included.
Contexts do not reach into the document before.

Source: Witten and Bell, "The zero-frequency problem", IEEE Trans. Information Theory 37(4), 1991 (method C).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from tokenlab.core.errors import ConfigError, DataError

SYMBOLS = 257
END = 256
MOST_ORDER = 5
CHUNK = 1 << 22
"""Bytes that are counted in one go, or one document."""


class NGram:
    """Counts of all n-grams up to an order.

    Args:
      documents: to count.
      order: the longest n-gram, 1 to 5.

    Raises:
      ConfigError: the order is out of range.
      DataError: there is no document.
    """

    def __init__(self, documents: Iterable[str], order: int = MOST_ORDER):
        if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MOST_ORDER:
            raise ConfigError(f"the order of an n-gram is {order!r}; expected 1 to {MOST_ORDER}.")
        self.order = order
        self._levels = [_Level.empty() for _ in range(order)]
        for symbols, place in _chunks(documents):
            for n, level in enumerate(self._levels, 1):
                keys, _ = _keys(symbols, place, n)
                level.add(keys)
        if not len(self._levels[0].grams):
            raise DataError("there is no document to count n-grams in; expected text.")
        for level in self._levels:
            level.finish()

    def bits_per_byte(self, documents: Iterable[str]) -> list[float]:
        """For the orders 1, 2, ..., `order`: bits a byte of documents that the counts may not know.

        The first byte of a document is neither predicted nor counted.

        Raises:
          DataError: no document has two bytes.
        """
        bits = np.zeros(self.order)
        num_bytes = 0
        for symbols, place in _chunks(documents):
            probability = np.full(len(symbols), 1.0 / SYMBOLS)
            predicted = place > 0
            num_bytes += int((predicted & (symbols != END)).sum())
            for n, level in enumerate(self._levels, 1):
                keys, rows = _keys(symbols, place, n)
                probability[rows] = level.interpolate(keys, probability[rows])
                bits[n - 1] -= np.log2(probability[predicted]).sum()
        if not num_bytes:
            raise DataError("there is no document of two bytes or more to predict; expected text.")
        return (bits / num_bytes).tolist()


class _Level:
    """The n-grams of one order, as numbers in base 257, ascending, and how often each occurs."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray):
        self.grams, self.counts = grams, counts

    @classmethod
    def empty(cls) -> _Level:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))

    def add(self, keys: np.ndarray) -> None:
        grams, counts = np.unique(keys, return_counts=True)
        merged, place = np.unique(np.append(self.grams, grams), return_inverse=True)
        # Sums as float64 are exact up to 2**53.
        total = np.bincount(place, weights=np.append(self.counts, counts), minlength=len(merged))
        self.grams, self.counts = merged, total.astype(np.int64)

    def finish(self) -> None:
        """What follows each context: how much, C, and how many different symbols, T."""
        self.contexts, first, self.types = np.unique(
            self.grams // SYMBOLS, return_index=True, return_counts=True
        )
        self.totals = np.add.reduceat(self.counts, first) if len(first) else self.counts

    def interpolate(self, keys: np.ndarray, below: np.ndarray) -> np.ndarray:
        """P_n of n-grams [T], where P_{n-1} is `below` [T]."""
        if not len(self.grams):  # every document that was counted is shorter
            return below
        context, known = _look_up(self.contexts, keys // SYMBOLS)
        gram, seen = _look_up(self.grams, keys)
        count = np.where(seen, self.counts[gram], 0)
        types, total = self.types[context], self.totals[context]
        return np.where(known, (count + types * below) / (total + types), below)


def _look_up(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each key stands in an ascending table, and whether it does; 0 where not."""
    place = np.searchsorted(table, keys)
    place[place == len(table)] = 0
    found = table[place] == keys
    return np.where(found, place, 0), found


def _keys(symbols: np.ndarray, place: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams that lie within a document, as numbers in base 257, and where each ends."""
    rows = np.flatnonzero(place >= n - 1)
    keys = np.zeros(len(rows), np.int64)
    for back in range(n - 1, -1, -1):
        keys = keys * SYMBOLS + symbols[rows - back]
    return keys, rows


def _chunks(documents: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents joined: the symbols int16 [T], an end after each, and each symbol's place in its document int64 [T]."""
    parts: list[np.ndarray] = []
    size = 0
    for text in documents:
        content = np.frombuffer(text.encode("utf-8"), np.uint8)
        if not len(content):
            continue
        parts.append(np.append(content.astype(np.int16), np.int16(END)))
        size += len(parts[-1])
        if size >= CHUNK:
            yield _join(parts)
            parts, size = [], 0
    if parts:
        yield _join(parts)


def _join(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(parts), np.concatenate([np.arange(len(part)) for part in parts])
