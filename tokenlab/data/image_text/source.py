"""Pictures with captions, and text between them, as a data source: rows of N tokens of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.image_text import rows
from tokenlab.data.image_text.codec import Coded, checksum
from tokenlab.data.image_text.vocabulary import ImageTextVocabulary, saved
from tokenlab.data.source import Batch, DataConfig, Spec, check_split
from tokenlab.data.text import tokenizer
from tokenlab.data.text.packing import Packed
from tokenlab.data.text.source import TRAIN, check_unchanged, joined, spec_of

DELIMITERS = 2
"""Tokens of a document with a picture beside its caption and the codes: BEGIN and END."""


@dataclass(frozen=True)
class ImageTextConfig(DataConfig):
    """What every source of pictures and text has.

    Attributes:
      length: N, tokens of an example; 2 or more.
      pictures_per_row: P, pictures of an example; 1 or more.
      codec: "grey(17)", or the path of a file of codes; see `tokenlab.data.image_text.codec`.
      tokenizer: of text: "bytes", "bpe(4096)" (trained on the train split's texts and captions), the path of a
        tokenizer.json, or that of the vocabulary which a run on such data keeps.
      isolate: each document of a row has a segment and positions of its own. False: a row is one segment, so that
        attention crosses documents; what is predicted is the same.
    """

    length: int = 128
    pictures_per_row: int = 1
    codec: str = "grey(17)"
    tokenizer: str = "bytes"
    isolate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("length", 2), ("pictures_per_row", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"config.data.{key} is {getattr(self, key)}; expected at least {least}.")
        check_unchanged(self, "a row of codes and text")


class WithoutExamples:
    """What a model must know of pictures and text, without any: see `ImageTextSource` for the attributes.

    Args:
      config: of the source.
      vocabulary: that a run kept.
    """

    num_classes = None
    class_names = None

    def __init__(self, config: ImageTextConfig, vocabulary: ImageTextVocabulary):
        self.name, self.tokenizer, self.vocab_size = config.name, vocabulary, vocabulary.vocab_size
        self.spec = _spec(config.length)


class Document(NamedTuple):
    """A document of a row, or the piece of one.

    Attributes:
      parts: text, and pictures as codes [h, w], in their order.
      tokens: that it takes.
      ends: whether the document ends here.
    """

    parts: list[str | np.ndarray]
    tokens: int
    ends: bool


def documents(record: Batch, vocabulary: ImageTextVocabulary) -> list[Document]:
    """What stands in a row, read from its tokens.

    Args:
      record: one example. Where it is one segment, only ends tell documents apart: a piece of text without one is
        one with what follows it.
      vocabulary: of its ids.
    """
    ids, ends = record["ids"], record["target"] == vocabulary.end
    new = (np.diff(record["segment"]) != 0) | ends[:-1]
    pieces = np.split(np.arange(len(ids)), np.flatnonzero(new) + 1)
    return [Document(vocabulary.parts(ids[piece]), len(piece), bool(ends[piece[-1]])) for piece in pieces]


class ImageTextSource:
    """Pictures as codes, their captions, and texts, by split, as a `Source` of rows.

    A picture and its caption are two documents of every split: caption, BEGIN, codes, END; and BEGIN, codes, END,
    caption. Every row holds the next P of them and is filled with pieces of the texts to exactly N tokens, P h w of
    them codes (see `tokenlab.data.image_text.rows`). Nothing is padded. Every example has

        ids              int32 [N]    tokens
        target           int32 [N]    the token that follows each
        weight           float32 [N]  1: every target counts
        bytes            float32 [N]  bytes of text that the target stands for; 0 for codes, delimiters and ends
        segment          int32 [N]    number of the document within the row, from 1
        position         int32 [N]    within the document's piece in this row, from 0
        modality         int32 [N]    of each token: 1 for codes, 0 for all else (`tokenlab.core.modality`)
        target_modality  int32 [N]    of each target

    Args:
      name: of the source.
      coded: the pictures.
      captions: of each picture, by split, in the order of the codes.
      texts: by split. One that holds nothing but white space is left out.
      config: `length`, `pictures_per_row`, `tokenizer` and `isolate`.

    Attributes:
      vocab_size: V; ids are in [0, V).
      tokenizer: the vocabulary of text and codes.
      (further: see `tokenlab.data.Source`; its splits are those that both pictures and texts have)

    Raises:
      ConfigError: P pictures do not fit into N tokens, or the tokenizer's size is too small.
      DataError: no split has both pictures and text, captions are missing, a split has fewer than P pictures or no
        text, or the tokenizer cannot be used.
    """

    num_classes = None
    class_names = None

    def __init__(
        self,
        name: str,
        coded: Coded,
        captions: Mapping[str, Sequence[str]],
        texts: Mapping[str, Sequence[str]],
        config: ImageTextConfig,
    ):
        self.name = name
        common = [split for split in coded.splits if split in texts]
        if not common:
            raise DataError(
                f"source {name!r}: pictures have the splits {', '.join(coded.splits)}, texts {', '.join(texts)}; "
                "expected one or more that both have."
            )
        kept = {split: [text for text in texts[split] if text.strip()] for split in common}
        for split in common:
            self._check(split, coded.splits[split], captions[split], kept[split], config)
        self.tokenizer = self._vocabulary(coded, captions, kept, config)
        self.vocab_size = self.tokenizer.vocab_size
        self._records = {
            split: self._read(split, coded.splits[split], captions[split], kept[split], config)
            for split in common
        }
        self.splits = {split: len(records) for split, records in self._records.items()}
        self.spec = _spec(config.length)
        says = f"{self.tokenizer.text.fingerprint};{coded.codes};{coded.grid};{coded.fingerprint};{config.isolate};"
        digest = hashlib.sha256(says.encode())
        for split, records in self._records.items():
            digest.update(f"{split};".encode())
            records.update(digest)
        self.fingerprint = f"{name}:{digest.hexdigest()[:16]}"

    def _check(
        self,
        split: str,
        codes: np.ndarray,
        captions: Sequence[str],
        texts: Sequence[str],
        config: ImageTextConfig,
    ) -> None:
        where = f"source {self.name!r}, split {split!r}"
        if len(codes) != len(captions):
            raise DataError(
                f"{where}: {len(codes)} pictures have {len(captions)} captions; expected one each."
            )
        empty = next((i for i, caption in enumerate(captions) if not caption.strip()), None)
        if empty is not None:
            raise DataError(f"{where}: the caption of picture {empty} is {captions[empty]!r}; expected text.")
        if len(codes) < config.pictures_per_row:
            raise DataError(
                f"{where} has {len(codes)} pictures, fewer than the {config.pictures_per_row} of each row; expected a "
                f"config.data.pictures_per_row of at most {len(codes)}."
            )
        if not texts:
            raise DataError(
                f"{where} has no text to fill rows with; expected some that is more than white space."
            )

    def _vocabulary(
        self,
        coded: Coded,
        captions: Mapping[str, Sequence[str]],
        texts: Mapping[str, Sequence[str]],
        config: ImageTextConfig,
    ) -> ImageTextVocabulary:
        of_file = None if coded.pixels is not None else checksum(coded.splits)
        if known := saved(config.tokenizer):
            if (known.codes, known.grid) != (coded.codes, coded.grid):
                raise DataError(
                    f"config.data.tokenizer {config.tokenizer!r} is of pictures of {known.grid[0]} x {known.grid[1]} "
                    f"codes out of {known.codes}; config.data.codec gives {coded.grid[0]} x {coded.grid[1]} out of "
                    f"{coded.codes}. Expected the codec that it was kept with, {known.codec!r}."
                )
            return ImageTextVocabulary(known.text, coded.codes, coded.grid, coded.name, of_file)
        if TRAIN not in texts and config.tokenizer.startswith("bpe("):
            raise DataError(
                f"config.data.tokenizer is {config.tokenizer!r}, which is trained on split {TRAIN!r}, and source "
                f"{self.name!r} has only {', '.join(texts)}; expected such a split, 'bytes' or the path of a "
                "tokenizer.json."
            )
        of_text = tokenizer.build(config.tokenizer, [*texts.get(TRAIN, ()), *captions.get(TRAIN, ())])
        return ImageTextVocabulary(of_text, coded.codes, coded.grid, coded.name, of_file)

    def _read(
        self,
        split: str,
        codes: np.ndarray,
        captions: Sequence[str],
        texts: Sequence[str],
        config: ImageTextConfig,
    ) -> ImageTextRecords:
        known = self.tokenizer
        try:
            encoded = list(known.encode_each(captions))
            of_texts, text_sizes = joined(known, texts)
        except DataError as error:
            raise DataError(f"source {self.name!r}, split {split!r}: {error}") from error
        height, width = known.grid
        longest = max(map(len, encoded))
        each = longest + height * width + DELIMITERS
        if config.pictures_per_row * each > config.length:
            raise ConfigError(
                f"config.data.length is {config.length}, and {config.pictures_per_row} pictures (config.data."
                f"pictures_per_row) take up to {config.pictures_per_row * each} tokens in split {split!r}: "
                f"{height} x {width} codes, {DELIMITERS} delimiters and a caption of up to {longest} each. Expected at "
                "least that length, fewer pictures, or smaller ones (config.data.size)."
            )
        end = np.array([known.end], np.int32)
        pictures = known.pictures(codes)
        parts, sizes = [], []
        for pair, caption_first in zip(*rows.documents(len(codes)), strict=True):
            picture, caption = pictures[pair], encoded[pair]
            parts += [caption, picture, end] if caption_first else [picture, caption, end]
            sizes.append(len(caption) + len(picture) + 1)
        dtype = np.uint16 if known.vocab_size <= 2**16 else np.int32
        tokens = np.concatenate([np.concatenate(parts).astype(dtype), of_texts.astype(dtype)])
        fill = rows.Texts(sum(sizes), text_sizes)
        packed = rows.rows(np.array(sizes, np.int64), fill, config.length, config.pictures_per_row)
        return ImageTextRecords(tokens, packed, known, config.isolate, fill.taken / fill.total)

    def split(self, name: str) -> ImageTextRecords:
        """See `Source.split`."""
        check_split(self, name)
        return self._records[name]

    def text(self, split: str) -> Iterator[str]:
        """The captions and pieces of text of a split in their order. Raises DataError: there is no such split."""
        return self.split(split).text()


def _spec(length: int) -> Spec:
    return {**spec_of(length), **dict.fromkeys(("modality", "target_modality"), ((length,), "int32"))}


class ImageTextRecords:
    """The rows of a split; see `ImageTextSource` for what each holds.

    Args:
      tokens: [T], all documents, each followed by its end.
      packed: the rows.
      vocabulary: of the tokens.
      isolate: see `ImageTextConfig`.
      text_read: how much of the texts the rows take: 0.5 is half of them, 2 all of them twice.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        packed: Packed,
        vocabulary: ImageTextVocabulary,
        isolate: bool,
        text_read: float,
    ):
        self._tokens, self._packed, self._vocabulary = tokens, packed, vocabulary
        self._isolate, self.text_read = isolate, text_read

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return {key: array[0] for key, array in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> Batch:
        """See `Records.batch`."""
        found = self._packed.unpack(self._tokens, indices)
        ids, target = found["ids"], found["target"]
        if not self._isolate:
            found["segment"] = np.ones_like(ids)
            found["position"] = np.tile(np.arange(self._packed.length, dtype=np.int32), (len(ids), 1))
        return {
            "ids": ids,
            "target": target,
            "weight": np.ones(ids.shape, np.float32),
            "bytes": self._vocabulary.byte_lengths[target].astype(np.float32),
            "segment": found["segment"],
            "position": found["position"],
            "modality": self._vocabulary.modality(ids),
            "target_modality": self._vocabulary.modality(target),
        }

    def text(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """The captions and pieces of text that rows `start` to `stop` - 1 hold, in their order."""
        for index in range(start, len(self) if stop is None else stop):
            for document in documents(self[index], self._vocabulary):
                yield from (part for part in document.parts if isinstance(part, str))

    def update(self, digest: Any) -> None:
        """Take everything that the rows are made of into a digest."""
        packed = self._packed
        digest.update(
            f"{packed.length};{len(self._tokens)};{len(packed.starts)};{self._tokens.dtype};".encode()
        )
        for array in (self._tokens, packed.starts, packed.lengths, packed.rows):
            digest.update(np.ascontiguousarray(array))
