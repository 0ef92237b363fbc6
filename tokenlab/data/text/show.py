"""What `tokenlab data show` and `tokenlab data ngram` print of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenlab.core.errors import DataError
from tokenlab.data.source import Source, check_split
from tokenlab.data.text.ngram import NGram
from tokenlab.data.text.source import TRAIN

EXAMPLES = 3
PIECES = 8
"""Documents that are shown of an example."""

WIDTH = 88
"""Characters that are shown of a document."""

_CHUNK = 512


@dataclass(frozen=True)
class Counts:
    """What the examples of a split hold.

    Attributes:
      examples: rows of N places.
      documents: whose end is in them.
      tokens: places that are no padding.
      targets: that count.
      num_bytes: of text that those targets stand for.
      padding: share of the places.
    """

    examples: int
    documents: int
    tokens: int
    targets: int
    num_bytes: int
    padding: float


def is_text(source: Source) -> bool:
    """Whether its examples are text and nothing else."""
    return getattr(source, "tokenizer", None) is not None and "modality" not in source.spec


def count(source: Source, split: str) -> Counts:
    """Read a split once and count.

    Raises:
      DataError: there is no such split.
    """
    check_split(source, split)
    records, end = source.split(split), source.tokenizer.end
    places = tokens = targets = num_bytes = documents = 0
    for first in range(0, len(records), _CHUNK):
        batch = records.batch(np.arange(first, min(first + _CHUNK, len(records))))
        counted = batch["weight"] > 0
        places += counted.size
        tokens += int((batch["segment"] > 0).sum())
        targets += int(counted.sum())
        num_bytes += int(batch["bytes"].sum(dtype=np.float64))
        documents += int((counted & (batch["target"] == end)).sum())
    return Counts(len(records), documents, tokens, targets, num_bytes, 1 - tokens / places)


def show_lines(source: Source, split: str) -> list[str]:
    """A source of text in lines: the counts of each split, and the first examples of `split`.

    Raises:
      DataError: there is no such split.
    """
    check_split(source, split)
    if "target" not in source.spec:
        return _encoder_lines(source, split)
    length = source.spec["ids"][0][0]
    width = max(map(len, [*source.splits, "tokenizer"]))
    tokenizer = f"{source.tokenizer.name}, {source.vocab_size:,} ids; {length:,} tokens an example"
    lines = [f"  {'tokenizer':<{width}}  {tokenizer}"]
    for name in source.splits:
        found = count(source, name)
        lines.append(
            f"  {name:<{width}}  {many(found.examples, 'example')} of {many(found.documents, 'document')}; "
            f"{many(found.targets, 'target')}, {found.num_bytes / max(found.targets, 1):.2f} bytes each; "
            f"{found.padding:.1%} padding"
        )
    lines.append(f"  first examples of {split!r}")
    records = source.split(split)
    for number in range(min(EXAMPLES, len(records))):
        lines += _example_lines(source, number, records[number])
    return lines


def _encoder_lines(source: Source, split: str) -> list[str]:
    """Rows for an encoder, or labelled texts: how many there are, and the first of `split`."""
    width = max(map(len, [*source.splits, "tokenizer"]))
    tokenizer = (
        f"{source.tokenizer.name}, {source.vocab_size:,} ids; {source.spec['ids'][0][0]:,} tokens an example"
    )
    lines = [f"  {'tokenizer':<{width}}  {tokenizer}"]
    inner = getattr(source, "source", source)
    cut, left_out = (getattr(inner, name, {}) for name in ("cut", "left_out"))
    for name, examples in source.splits.items():
        more = f"; {cut[name]:,} cut to their length" if name in cut else ""
        more += f"; {left_out[name]:,} rows left out, whose label is of no class" if name in left_out else ""
        lines.append(f"  {name:<{width}}  {many(examples, 'example')}{more}")
    if source.class_names:
        lines.append(f"  {'classes':<{width}}  {', '.join(source.class_names)}")
    lines.append(f"  first examples of {split!r}")
    records, pad = source.split(split), source.tokenizer.specials.pad
    for number in range(min(EXAMPLES, len(records))):
        record = records[number]
        used = record["ids"] != pad
        kind = record.get("type", np.zeros_like(record["ids"]))
        texts = [source.tokenizer.decode(record["ids"][used & (kind == which)]) for which in (0, 1)]
        shown = " | ".join(shortened(repr(text)) for text in texts if text)
        said = f"{source.class_names[record['label']]}: " if "label" in record else ""
        lines.append(f"    {number}: {int(used.sum())} tokens  {said}{shown}")
    return lines


def _example_lines(source: Source, number: int, record: dict[str, Any]) -> Iterator[str]:
    pieces = _pieces(record, source.tokenizer.end)
    used = int((record["segment"] > 0).sum())
    yield f"    {number}: {used} tokens, {many(len(pieces), 'document')}"
    for piece in pieces[:PIECES]:
        shown = shortened(repr(source.tokenizer.decode(record["ids"][piece])))
        ends = source.tokenizer.end in record["target"][piece] * (record["weight"][piece] > 0)
        yield f"      {piece.stop - piece.start:>5}  {shown}{'  and its end' if ends else ''}"
    if len(pieces) > PIECES:
        yield f"      ... and {len(pieces) - PIECES} more"


def shortened(text: str) -> str:
    """A text, or of one that is too long for a line its beginning and its end."""
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 30]} ... {text[-25:]}"


def _pieces(record: dict[str, Any], end: int) -> list[slice]:
    """Where the documents lie in a row. A row that is one segment is cut at the ends, which are its only borders."""
    used = int((record["segment"] > 0).sum())
    ids, target = record["ids"][:used], record["target"][:used]
    new = np.diff(record["segment"][:used], prepend=0) > 0
    # The end is the last input of a document in a stream; in a fitted row it is a target only.
    new[1:] |= (ids[:-1] == end) | ((target[:-1] == end) & (ids[1:] != end))
    starts = np.flatnonzero(new)
    return [slice(a, b) for a, b in zip(starts.tolist(), [*starts[1:].tolist(), used], strict=True)]


def ngram_lines(source: Source, split: str, order: int) -> list[str]:
    """A table of bits per byte of a split, for n-grams up to `order` that counted the train split.

    Raises:
      ConfigError: the order is out of range.
      DataError: the source holds no text, or there is no such split, or no train split.
    """
    if getattr(source, "tokenizer", None) is None or {"modality", "label"} & set(source.spec):
        raise DataError(f"source {source.name!r} holds no text; its keys: {', '.join(source.spec)}.")
    check_split(source, TRAIN)
    check_split(source, split)
    if split == TRAIN:
        raise DataError(
            f"split {TRAIN!r} is what n-grams are counted in; expected another of {', '.join(source.splits)}."
        )
    bits = NGram(source.split(TRAIN).text(), order).bits_per_byte(source.split(split).text())
    lines = [
        f"{source.name}: interpolated byte n-grams (Witten-Bell), counted in {TRAIN!r}, bits per byte of {split!r}",
        "  order  bits per byte",
    ]
    return lines + [f"  {n:>5}  {each:>13.3f}" for n, each in enumerate(bits, 1)]


def many(number: int, what: str) -> str:
    """ "1 example", "1,234 examples"."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
