"""What `tokenlab data show` prints of rows of pictures and text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokenlab.core.modality import TEXT
from tokenlab.data.image_text.source import documents
from tokenlab.data.source import Batch, Source, check_split
from tokenlab.data.text.show import EXAMPLES, many, shortened

_CHUNK = 512


def is_text(source: Source) -> bool:
    """Whether its examples are rows of pictures and text."""
    return getattr(source, "tokenizer", None) is not None and "modality" in source.spec


def show_lines(source: Source, split: str) -> list[str]:
    """A source of pictures and text in lines: the counts of each split, and the first rows of `split`.

    Raises:
      DataError: there is no such split.
    """
    check_split(source, split)
    known = source.tokenizer
    height, width = known.grid
    column = max(map(len, [*source.splits, "vocabulary"]))
    size = f"{source.spec['ids'][0][0]:,} tokens an example"
    lines = [
        f"  {'vocabulary':<{column}}  {known.text.name}, {known.text.vocab_size:,} ids; 2 delimiters; {known.codec}, "
        f"{known.codes:,} codes, {height} x {width} a picture; {size}"
    ]
    for name in source.splits:
        lines.append(f"  {name:<{column}}  {_counts(source, name)}")
    lines.append(f"  first examples of {split!r}")
    records = source.split(split)
    for number in range(min(EXAMPLES, len(records))):
        lines += _row_lines(source, number, records[number])
    return lines


def _counts(source: Source, split: str) -> str:
    """What the rows of a split hold, read once."""
    records, known = source.split(split), source.tokenizer
    pictures = codes = targets = of_text = 0
    num_bytes = 0.0
    for first in range(0, len(records), _CHUNK):
        batch = records.batch(np.arange(first, min(first + _CHUNK, len(records))))
        pictures += int((batch["ids"] == known.begin).sum())
        codes += int(batch["modality"].sum())
        targets += batch["target"].size
        of_text += int((batch["target_modality"] == TEXT).sum())
        num_bytes += float(batch["bytes"].sum(dtype=np.float64))
    read = getattr(records, "text_read", None)  # of a whole split it is known
    of_all = "" if read is None else f"; {read:.1%} of the texts"
    return (
        f"{many(len(records), 'example')} of {many(pictures, 'picture')}, {codes / targets:.1%} of the tokens codes; "
        f"{many(of_text, 'target')} of text, {num_bytes / of_text:.2f} bytes each{of_all}"
    )


def _row_lines(source: Source, number: int, record: Batch) -> Iterator[str]:
    found = documents(record, source.tokenizer)
    codes = int(record["modality"].sum())
    yield f"    {number}: {len(record['ids'])} tokens, {many(codes, 'code')}, {many(len(found), 'document')}"
    for document in found:
        shown = [
            shortened(repr(part)) if isinstance(part, str) else f"<{'x'.join(map(str, part.shape))} image>"
            for part in document.parts
        ]
        yield f"      {document.tokens:>5}  {' '.join(shown)}{'  and its end' if document.ends else ''}"
