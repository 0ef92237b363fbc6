"""The pictures of a split with their captions, read from its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tokenlab.data.image_text.source import documents
from tokenlab.data.source import Source, check_split


class Pair(NamedTuple):
    """A picture and its caption.

    Attributes:
      caption: as it stands in the row.
      codes: int32 [h, w].
    """

    caption: str
    codes: np.ndarray


def pairs(source: Source, split: str) -> Iterator[Pair]:
    """Every pair of a split, in the order of the rows.

    A pair stands in a split both ways round; it is read where its picture comes first. There the caption goes from the
    picture to the end of the document, also in rows that are one segment (`config.data.isolate=False`). What the last
    row repeats is repeated here.

    Raises:
      DataError: there is no such split.
    """
    check_split(source, split)
    records = source.split(split)
    for number in range(len(records)):
        for document in documents(records[number], source.tokenizer):
            *_, picture, caption = (None, None, *document.parts)
            if isinstance(picture, np.ndarray) and isinstance(caption, str):
                yield Pair(caption, picture)
