"""Text as a data source: documents become rows of N tokens, each with the token that follows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.source import Batch, DataConfig, Spec, check_split
from tokenlab.data.text import packing, tokenizer
from tokenlab.data.text.encoder_rows import Words, encoder_rows, encoder_spec
from tokenlab.data.text.tokenizer import Tokenizer

TRAIN = "train"
PACKINGS = {"stream": packing.stream, "fit": packing.fit}


@dataclass(frozen=True)
class TextConfig(DataConfig):
    """What every source of text has.

    Attributes:
      length: N, tokens of an example; 2 or more.
      tokenizer: "bytes", "bpe(4096)" (trained on the train split) or the path of a tokenizer.json.
      packing: "stream": windows of all documents joined; "fit": whole documents, packed into rows.
      isolate: each document of a row has a segment and positions of its own. False: a row is one segment, so that
        attention crosses documents; what is predicted is the same.
      encoder: rows are for an encoder, see `TextSource`; the vocabulary then has a mask, CLS and padding.
    """

    length: int = 256
    tokenizer: str = "bytes"
    packing: Literal["stream", "fit"] = "stream"
    isolate: bool = True
    encoder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise ConfigError(f"config.data.length is {self.length}; expected at least 2 tokens.")
        check_unchanged(self, "text")


def check_unchanged(config: DataConfig, what: str) -> None:
    """Raise a ConfigError where `config` asks to change images or to leave records out: `what` is read whole."""
    for key in ("transform", "eval_transform"):
        if getattr(config, key) is not None:
            raise ConfigError(
                f"config.data.{key} is {getattr(config, key)!r}; it is done to images, of which {what} has none: leave "
                "it out."
            )
    if config.corrupt != "stop":
        raise ConfigError(
            f"config.data.corrupt is {config.corrupt!r}; expected 'stop', as {what} is read before the run begins: "
            "nothing of it is left out in silence."
        )


class Vocabulary:
    """What a model must know of text, without any: see `TextSource` for the attributes.

    Args:
      config: of the source; its tokenizer is "bytes" or a path.
    """

    num_classes = None
    class_names = None

    def __init__(self, config: TextConfig):
        self.name = config.name
        self.tokenizer: Tokenizer = tokenizer.build(config.tokenizer, (), encoder=config.encoder)
        self.vocab_size = self.tokenizer.vocab_size
        self.spec = spec_of(config.length, config.encoder)


class TextSource:
    """Documents by split as a `Source` of examples.

    Every example has

        ids       int32 [N]    tokens
        target    int32 [N]    the token that follows each
        weight    float32 [N]  1 where the target counts: 0 in padding, and where the target begins another document
        bytes     float32 [N]  bytes of text that the target stands for, 0 where it has no weight or is an end
        segment   int32 [N]    number of the document within the row, from 1
        position  int32 [N]    within the document's piece in this row, from 0

    and zeros of all of them in padding. With `encoder` the row begins with CLS and it has

        ids       int32 [N]    tokens, those of padding in padding
        word      int32 [N]    number of the word within the row, from 1, see `Words`; 0 where no text stands
        bytes     float32 [N]  bytes of text that the token itself stands for
        segment   int32 [N]    as above; CLS is of the first document
        position  int32 [N]    as above, one more in the first document, which CLS begins
        mask_id   int32 []     the token that stands for a hidden one
        special_ids int32 [4]  that, CLS, the end of a document, and padding

    The tokens of a split are kept once; examples are made when they are read.

    Args:
      name: of the source.
      documents: texts by split. One that holds nothing but white space is left out.
      config: `length`, `tokenizer`, `packing` and `isolate`.

    Attributes:
      vocab_size: V; ids are in [0, V).
      tokenizer: that made the ids.
      (further: see `tokenlab.data.Source`)

    Raises:
      ConfigError: the tokenizer's size is too small.
      DataError: there is no split, a split has no document, or the tokenizer cannot be used.
    """

    num_classes = None
    class_names = None

    def __init__(self, name: str, documents: Mapping[str, Sequence[str]], config: TextConfig):
        self.name = name
        if not documents:
            raise DataError(f"source {name!r} has no split.")
        kept = {split: [text for text in texts if text.strip()] for split, texts in documents.items()}
        for split, texts in kept.items():
            if not texts:
                raise DataError(
                    f"source {name!r}: split {split!r} has no document: {len(documents[split])} were given, and each "
                    "holds nothing but white space; expected text."
                    if documents[split]
                    else f"source {name!r}: split {split!r} has no document; expected one or more."
                )
        if TRAIN not in kept and config.tokenizer.startswith("bpe("):
            raise DataError(
                f"config.data.tokenizer is {config.tokenizer!r}, which is trained on split {TRAIN!r}, and source "
                f"{name!r} has only {', '.join(kept)}; expected such a split, 'bytes' or the path of a tokenizer.json."
            )
        self.tokenizer: Tokenizer = tokenizer.build(
            config.tokenizer, kept.get(TRAIN, ()), encoder=config.encoder
        )
        self._words = Words(self.tokenizer) if config.encoder else None
        self.vocab_size = self.tokenizer.vocab_size
        self._records = {split: self._read(split, texts, config) for split, texts in kept.items()}
        self.splits = {split: len(records) for split, records in self._records.items()}
        self.spec = spec_of(config.length, config.encoder)
        says = f"{self.tokenizer.fingerprint};{config.packing};{config.length};{config.isolate};{digest_of(kept)}"
        self.fingerprint = f"{name}:{hashlib.sha256(says.encode()).hexdigest()[:16]}"

    def _read(self, split: str, texts: Sequence[str], config: TextConfig) -> TextRecords:
        try:
            tokens, sizes = joined(self.tokenizer, texts)
        except DataError as error:
            raise DataError(f"source {self.name!r}, split {split!r}: {error}") from error
        packed = PACKINGS[config.packing](sizes, config.length - config.encoder)
        return TextRecords(tokens, packed, self.tokenizer, config.isolate, self._words)

    def split(self, name: str) -> TextRecords:
        """See `Source.split`."""
        check_split(self, name)
        return self._records[name]

    def text(self, split: str) -> Iterator[str]:
        """The documents of a split in their order. Raises DataError: there is no such split."""
        return self.split(split).text()


def spec_of(length: int, encoder: bool = False) -> Spec:
    """What an example of N tokens holds, see `TextSource`."""
    if encoder:
        return encoder_spec(length)
    return {
        key: ((length,), "float32" if key in ("weight", "bytes") else "int32")
        for key in ("ids", "target", "weight", "bytes", "segment", "position")
    }


class TextRecords:
    """The examples of a split; see `TextSource` for what each holds.

    Args:
      tokens: [T], all documents, each followed by its end.
      packed: the rows.
      tokenizer: that made the tokens.
      isolate: see `TextConfig`.
      words: of the tokenizer, for rows for an encoder; None for others.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        packed: packing.Packed,
        tokenizer: Tokenizer,
        isolate: bool,
        words: Words | None = None,
    ):
        self._tokens, self._packed, self._tokenizer, self._isolate = tokens, packed, tokenizer, isolate
        self._words = words

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return {key: array[0] for key, array in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> Batch:
        """See `Records.batch`."""
        found = self._packed.unpack(self._tokens, indices)
        pieces, inside = found["segment"], found["segment"] > 0
        counts = inside & (found["ids"] != self._tokenizer.end)
        if not self._isolate:
            found["segment"] = inside.astype(np.int32)
            found["position"] = np.where(inside, np.arange(self._packed.length, dtype=np.int32), 0)
        if self._words is not None:
            return encoder_rows(found, pieces, self._tokenizer, self._words)
        lengths = self._tokenizer.byte_lengths[found["target"]]
        return {
            "ids": found["ids"],
            "target": found["target"],
            "weight": counts.astype(np.float32),
            "bytes": np.where(counts, lengths, 0).astype(np.float32),
            "segment": found["segment"],
            "position": found["position"],
        }

    def text(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """The documents, or the parts of them, that examples `start` to `stop` - 1 hold, in their order."""
        for first, last in self._packed.spans(start, len(self) if stop is None else stop):
            tokens = self._tokens[first:last]
            cuts = np.flatnonzero(tokens == self._tokenizer.end)
            for begin, end in zip(np.append(0, cuts + 1), np.append(cuts, len(tokens)), strict=True):
                if end > begin:
                    yield self._tokenizer.decode(tokens[begin:end])


def joined(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """All documents, each followed by its end [T], as uint16 where that holds every id; and the size of each, int64."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    end = np.array([tokenizer.end], dtype)
    parts, sizes = [], []
    for ids in tokenizer.encode_each(texts):
        parts += [ids.astype(dtype), end]
        sizes.append(len(ids) + 1)
    return np.concatenate(parts), np.array(sizes, np.int64)


def digest_of(documents: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 over the splits and their documents."""
    digest = hashlib.sha256()
    for split, texts in documents.items():
        digest.update(f"{split}:{len(texts)};".encode())
        for text in texts:
            content = text.encode("utf-8")
            digest.update(f"{len(content)};".encode())
            digest.update(content)
    return digest.hexdigest()
