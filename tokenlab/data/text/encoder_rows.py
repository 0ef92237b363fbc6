"""Rows for an encoder: CLS in front, tokens that know their word, and what stands for a hidden one."""

from __future__ import annotations

import numpy as np

from tokenlab.data.source import Batch, Spec
from tokenlab.data.text.tokenizer import Specials, Tokenizer

SPACE, LETTER, OTHER = 1, 2, 3
"""Kinds of bytes; letters are also digits, underscores and all that is not ASCII. 0 is no byte."""


class Words:
    """Tells where words begin, for any tokenizer, from the bytes its ids stand for.

    A word is a run of letters, or of other characters that are no space, with the spaces before it: "def f(x):" is
    "def", " f", "(", "x", "):". In a language that is written without spaces that may be a whole sentence.

    Args:
      tokenizer: of the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        kinds = np.full(256, LETTER)
        for byte in range(128):
            character = chr(byte)
            kinds[byte] = SPACE if character.isspace() else OTHER
            if character.isalnum() or character == "_":
                kinds[byte] = LETTER
        pieces = [tokenizer.to_bytes([number]) for number in range(tokenizer.vocab_size)]
        self._first = np.array([kinds[piece[0]] if piece else 0 for piece in pieces], np.int8)
        self._last = np.array([kinds[piece[-1]] if piece else 0 for piece in pieces], np.int8)

    def number(self, ids: np.ndarray, segment: np.ndarray) -> np.ndarray:
        """Which word of its row each token is of, from 1 on; 0 for tokens that stand for no text: int32 [B, N].

        Args:
          ids: int [B, N].
          segment: int [B, N], 0 for padding; no word is of two.
        """
        first, last = (np.where(segment > 0, table[ids], 0) for table in (self._first, self._last))
        before = np.pad(last, ((0, 0), (1, 0)))[:, :-1]
        goes_on = (before == SPACE) | (first == before)
        goes_on &= (first > 0) & (before > 0) & (np.diff(segment, axis=1, prepend=-1) == 0)
        begins = (first > 0) & ~goes_on
        return (np.cumsum(begins, axis=1) * (first > 0)).astype(np.int32)


def encoder_spec(length: int) -> Spec:
    """What an example of N tokens holds, see `TextSource`."""
    row, number = ((length,), "int32"), ((), "int32")
    return {
        "ids": row,
        "word": row,
        "bytes": ((length,), "float32"),
        "segment": row,
        "position": row,
        "mask_id": number,
        "special_ids": ((len(Specials._fields),), "int32"),
    }


def encoder_rows(
    found: dict[str, np.ndarray], pieces: np.ndarray, tokenizer: Tokenizer, words: Words
) -> Batch:
    """Rows of N - 1 tokens with CLS in front.

    Args:
      found: "ids", "segment" and "position" [B, N - 1] as text has them, zeros in padding.
      pieces: [B, N - 1] int, the piece of a document each token is of, 0 in padding: no word is of two.
      tokenizer: that made the ids, with specials.
      words: of that tokenizer.

    Returns:
      Arrays [B, N], see `TextSource`. CLS belongs to the first document of its row.
    """
    specials: Specials = tokenizer.specials
    inside = found["segment"] > 0
    ids = np.where(inside, found["ids"], specials.pad)
    leaves = {
        "ids": (ids, specials.cls),
        "word": (words.number(ids, pieces), 0),
        "bytes": (np.where(inside, tokenizer.byte_lengths[ids], 0), 0),
        "segment": (found["segment"], 1),
        "position": (found["position"] + (found["segment"] == 1), 0),
    }
    rows = {
        key: np.pad(values, ((0, 0), (1, 0)), constant_values=front).astype(
            np.float32 if key == "bytes" else np.int32
        )
        for key, (values, front) in leaves.items()
    }
    return rows | {
        "mask_id": np.full(len(ids), specials.mask, np.int32),
        "special_ids": np.tile(np.array(specials, np.int32), (len(ids), 1)),
    }
