"""Labelled texts for an encoder: one text or a pair, and a class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.source import Batch, DataConfig, Spec, check_split
from tokenlab.data.text import tokenizer
from tokenlab.data.text.source import TRAIN, check_unchanged
from tokenlab.data.text.tokenizer import Tokenizer


class Sentence(NamedTuple):
    """An example: a text, or a pair of them, and the number of its class."""

    text: str
    pair: str | None
    label: int


@dataclass(frozen=True)
class SentenceConfig(DataConfig):
    """What every source of labelled texts has.

    Attributes:
      length: N, tokens of an example, special ones included; 4 or more. Of longer texts the ends are cut off, of a pair
        from the longer one first.
      tokenizer: "bytes", "bpe(4096)" (trained on the train split) or the path of a tokenizer.json: that of the run
        whose weights are tuned, which keeps it in its workdir.
    """

    length: int = 64
    tokenizer: str = "bytes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 4:
            raise ConfigError(f"config.data.length is {self.length}; expected at least 4 tokens.")
        check_unchanged(self, "text")


class SentenceSource:
    """Labelled texts by split as a `Source` of examples.

    Every example is CLS, a text and an end; of a pair another text and its end follow. It has

        ids     int32 [N]  tokens, those of padding in padding
        length  int32 []   how many are no padding
        type    int32 [N]  1 in the second text of a pair and its end, else 0
        label   int32 []   number of the class

    Args:
      name: of the source.
      sentences: by split.
      class_names: of the classes, in the order of their numbers.
      config: `length` and `tokenizer`.

    Attributes:
      vocab_size: V; ids are in [0, V).
      tokenizer: that made the ids.
      cut: by split, how many texts or pairs were too long.
      (further: see `tokenlab.data.Source`)

    Raises:
      ConfigError: the tokenizer's size is too small.
      DataError: there is no split or an empty one, a label is of no class, or the tokenizer cannot be used.
    """

    def __init__(
        self,
        name: str,
        sentences: Mapping[str, Sequence[Sentence]],
        class_names: tuple[str, ...],
        config: SentenceConfig,
    ):
        self.name, self.class_names, self.num_classes = name, class_names, len(class_names)
        if not sentences:
            raise DataError(f"source {name!r} has no split.")
        for split, found in sentences.items():
            if not found:
                raise DataError(f"source {name!r}: split {split!r} has no text; expected one or more.")
            wrong = next((one for one in found if not 0 <= one.label < self.num_classes), None)
            if wrong is not None:
                raise DataError(
                    f"source {name!r}: split {split!r} has the label {wrong.label}; expected 0 to "
                    f"{self.num_classes - 1}."
                )
        if TRAIN not in sentences and config.tokenizer.startswith("bpe("):
            raise DataError(
                f"config.data.tokenizer is {config.tokenizer!r}, which is trained on split {TRAIN!r}, and source "
                f"{name!r} has only {', '.join(sentences)}; expected such a split, 'bytes' or the path of a "
                "tokenizer.json."
            )
        texts = [part for one in sentences.get(TRAIN, ()) for part in one[:2] if part is not None]
        self.tokenizer: Tokenizer = tokenizer.build(config.tokenizer, texts, encoder=True)
        self.vocab_size = self.tokenizer.vocab_size
        self.spec: Spec = {
            "ids": ((config.length,), "int32"),
            "length": ((), "int32"),
            "type": ((config.length,), "int32"),
            "label": ((), "int32"),
        }
        self._records = {
            split: SentenceRecords(found, self.tokenizer, config.length) for split, found in sentences.items()
        }
        self.splits = {split: len(records) for split, records in self._records.items()}
        self.cut = {split: records.cut for split, records in self._records.items()}
        says = f"{self.tokenizer.fingerprint};{config.length};{class_names};{_digest(sentences)}"
        self.fingerprint = f"{name}:{hashlib.sha256(says.encode()).hexdigest()[:16]}"

    def split(self, name: str) -> SentenceRecords:
        """See `Source.split`."""
        check_split(self, name)
        return self._records[name]


class SentenceRecords:
    """The examples of a split; see `SentenceSource` for what each holds.

    Args:
      sentences: of the split.
      tokenizer: with specials.
      length: N.

    Attributes:
      cut: how many were too long.
    """

    def __init__(self, sentences: Sequence[Sentence], tokenizer: Tokenizer, length: int):
        specials = tokenizer.specials
        self._ids = np.full((len(sentences), length), specials.pad, np.int32)
        self._ends = np.zeros((len(sentences), 2), np.int32)  # of the first text, and of all
        self._labels = np.array([one.label for one in sentences], np.int32)
        self.cut = 0
        first = tokenizer.encode_each(one.text for one in sentences)
        second = tokenizer.encode_each("" if one.pair is None else one.pair for one in sentences)
        for row, (one, a, b) in enumerate(zip(sentences, first, second, strict=True)):
            room = length - (2 if one.pair is None else 3)
            long, other = kept_of_pair(len(a), len(b), room)
            self.cut += (long, other) != (len(a), len(b))
            parts = [[specials.cls], a[:long], [specials.sep]]
            if one.pair is not None:
                parts += [b[:other], [specials.sep]]
            ids = np.concatenate(parts)
            self._ids[row, : len(ids)] = ids
            self._ends[row] = long + 2, len(ids)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return {key: array[0] for key, array in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> Batch:
        """See `Records.batch`."""
        ids, ends = self._ids[indices], self._ends[indices]
        place = np.arange(ids.shape[1])
        second = (place >= ends[:, :1]) & (place < ends[:, 1:])
        return {
            "ids": ids,
            "length": ends[:, 1].copy(),
            "type": second.astype(np.int32),
            "label": self._labels[indices],
        }


def kept_of_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept, together at most `room`: the longer one is cut first."""
    if first + second <= room:
        return first, second
    half = room // 2
    if first <= half:
        return first, room - first
    if second <= half:
        return room - second, second
    return room - half, half


def _digest(sentences: Mapping[str, Sequence[Sentence]]) -> str:
    """SHA-256 over the splits and their examples."""
    digest = hashlib.sha256()
    for split, found in sentences.items():
        digest.update(f"{split}:{len(found)};".encode())
        for one in found:
            for part in (one.text, one.pair or ""):
                content = part.encode("utf-8")
                digest.update(f"{len(content)};".encode())
                digest.update(content)
            digest.update(f"{one.label};{one.pair is None};".encode())
    return digest.hexdigest()
