"""A source together with what is done to its images: examples that a model can read. Text passes as it is.

Reading is by index, so nothing has a position. Pictures that fit into memory are decoded once. A record that cannot be
read is named, and stops the run or, with `corrupt="skip"`, becomes a row of zeros without weight (its mask is 0).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tokenlab.core.errors import DataError
from tokenlab.data import transform as transforms
from tokenlab.data.source import (
    Batch,
    DataConfig,
    FileError,
    Records,
    Source,
    Spec,
    check_batch,
    check_split,
    stackable,
)
from tokenlab.data.text.tokenizer import Tokenizer
from tokenlab.data.transform import IMAGE, Transform

MEMORY = 1024
"""MiB of decoded pictures kept of a split where `config.data.memory` does not say."""

READ = 256
"""Records that are read and decoded in one go when a split is taken into memory."""


LOST = 16
"""A training batch of so many records or more, none of which can be read, is no accident: it stops the run."""


class Unreadable(str):
    """Why a picture cannot be read, in the place of the picture."""


class Dataset:
    """Examples of a source; it looks like a source whose records are ready for a model.

    Args:
      source: of the records.
      config: `transform`, `eval_transform`, `corrupt`, `memory` and how batches are made; the source's own default
        transform and nothing ahead when left out.

    Attributes:
      source: as given.
      name, splits, num_classes, class_names, fingerprint: of the source.
      tokenizer, vocab_size: of a source of text, else None.
      spec: (shape, dtype) of each key of an example, after the transform.
      train_transform, eval_transform: what is done to images.
      config: as given.

    Raises:
      DataError: a transform does not parse or does not fit the images; the two give different examples, or none of
        fixed shape; the evaluation transform is random.
    """

    def __init__(self, source: Source, config: DataConfig | None = None):
        config = config or DataConfig(name=source.name)
        self.source, self.config = source, config
        self.name, self.splits = source.name, source.splits
        self.num_classes, self.fingerprint = source.num_classes, source.fingerprint
        self.class_names = getattr(source, "class_names", None)
        self.tokenizer: Tokenizer | None = getattr(source, "tokenizer", None)
        self.vocab_size: int | None = getattr(source, "vocab_size", None)
        standard = transforms.default(source.spec)
        texts = [standard if text is None else text for text in (config.transform, config.eval_transform)]
        self.eval_transform = Transform(texts[1], source.spec, key="config.data.eval_transform")
        self.train_transform = self.eval_transform
        if texts[0] != texts[1]:
            self.train_transform = Transform(texts[0], source.spec, key="config.data.transform")
        self.spec: Spec = self.eval_transform.spec
        self._check(config)
        self._memory = (0 if config.workers else MEMORY) if config.memory is None else config.memory
        self._opened: dict[str, Records] = {}
        self._decoded: dict[str, Batch | None] = {}
        self._lock = threading.Lock()

    def _check(self, config: DataConfig) -> None:
        if self.eval_transform.draws:
            raise DataError(
                f"config.data.eval_transform {self.eval_transform.text!r} is random; expected operations that do the "
                "same every time, such as decode|resize_small(256)|central_crop(224)|value_range(-1, 1)"
            )
        for key, (shape, dtype) in self.spec.items():
            if not stackable((shape, dtype)):
                hint = " (decode|resize(224)|value_range(-1, 1), for example)" if key == IMAGE else ""
                raise DataError(
                    f"{key!r} of source {self.name!r} is {dtype}{list(shape)} after config.data.eval_transform "
                    f"{self.eval_transform.text!r}; expected arrays of one shape: decode and resize it there and in "
                    f"config.data.transform{hint}"
                )
        if dict(self.train_transform.spec) != dict(self.spec):
            given, wanted = self.train_transform.spec[IMAGE], self.spec[IMAGE]
            raise DataError(
                f"config.data.transform {self.train_transform.text!r} gives images {given[1]}{list(given[0])}, "
                f"config.data.eval_transform {self.eval_transform.text!r} {wanted[1]}{list(wanted[0])}; "
                "they must be the same"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A worker decodes for itself what it keeps.
        return {**self.__dict__, "_decoded": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def split(self, name: str) -> Records:
        """The source's own records of a split, opened once. Raises DataError, with the nearest name, for no such."""
        if name not in self._opened:
            self._opened[name] = self.source.split(name)
        return self._opened[name]

    def text(self, split: str) -> Iterator[str]:
        """The documents of a split in their order. Raises DataError: no such split, or the source is none of text."""
        if self.tokenizer is None:
            raise DataError(f"source {self.name!r} holds no text; expected one of text, such as shakespeare.")
        return self.split(split).text()

    def read(self, split: str, indices: np.ndarray, draws: np.ndarray | None = None) -> Batch:
        """Examples, transformed.

        Args:
          split: of the source.
          indices: int64 [B].
          draws: float32 [B, train_transform.draws] for training; None for evaluation.

        Returns:
          The spec's keys as arrays [B, ...], and "mask" float32 [B]: 1, or 0 where a record was skipped.

        Raises:
          DataError: a record cannot be read and `config.corrupt` is "stop", none of LOST or more for training can, or
            one is not what the spec says. FileError: a whole file cannot be read.
        """
        change = self.eval_transform if draws is None else self.train_transform
        mask = np.ones(len(indices), np.float32)
        kept = self._kept(split) if change.decodes else None
        records, wrong = self._records(split, indices) if kept is None else (_take(kept, indices), {})
        images = list(records[IMAGE]) if IMAGE in self.spec else []
        for row, image in enumerate(images):
            if row in wrong:
                continue
            if isinstance(image, Unreadable):
                wrong[row] = image
                continue
            try:
                images[row] = change(image, None if draws is None else draws[row], decoded=kept is not None)
            except DataError as error:
                wrong[row] = str(error)
        for row, why in wrong.items():
            if self.config.corrupt == "stop":
                raise DataError(
                    f"{self._named(split, int(indices[row]), why)}. Mend the data, or leave such records out with "
                    "config.data.corrupt='skip'"
                )
            mask[row] = 0
        if draws is not None and len(wrong) == len(indices) >= LOST:
            first = self._named(split, int(indices[0]), wrong[0])
            raise DataError(f"none of {len(indices)} records of a batch can be read; {first}")
        batch = self._stacked(records, images, wrong, len(indices))
        check_batch(batch, self, split, indices)
        return {**batch, "mask": mask}

    def _named(self, split: str, index: int, why: str) -> str:
        """What is wrong with a record, and with which, unless that says it itself."""
        said = f"split {split!r}" in why and f"record {index}" in why
        return why if said else f"source {self.name!r}, split {split!r}, record {index}: {why}"

    def why(self, split: str, index: int) -> str:
        """What is wrong with a record that was skipped."""
        records, wrong = self._records(split, np.array([index]))
        if wrong:
            return wrong[0]
        try:
            self.eval_transform(records[IMAGE][0], None)
        except DataError as error:
            return str(error)
        return "it cannot be changed as config.data.transform says"

    # ------------------------------------------------------------------------------------------ parts of reading

    def _records(self, split: str, indices: np.ndarray) -> tuple[Batch, dict[int, str]]:
        """The source's records, and what is wrong with those that cannot be read, by row."""
        records = self.split(split)
        try:
            return records.batch(indices), {}
        except FileError:
            raise
        except DataError:
            pass  # one of them; which, and are the others well?
        found: list[Batch | None] = []
        wrong = {}
        for row, index in enumerate(indices.tolist()):
            try:
                found.append(records[index])
            except DataError as error:
                found.append(None)
                wrong[row] = str(error)
        batch: Batch = {}
        for key, (shape, dtype) in self.source.spec.items():
            if stackable((shape, dtype)):
                zero = np.zeros(shape, dtype)
                batch[key] = np.array([zero if record is None else record[key] for record in found], dtype)
            else:
                batch[key] = [None if record is None else record[key] for record in found]
        return batch, wrong

    def _stacked(self, records: Batch, images: list[Any], wrong: dict[int, str], rows: int) -> Batch:
        batch = {key: records[key] for key in self.spec if key != IMAGE}
        for array in batch.values():
            for row in wrong:
                array[row] = 0
        if IMAGE in self.spec:
            shape, dtype = self.spec[IMAGE]
            stacked = np.empty((rows, *shape), dtype)
            for row, image in enumerate(images):
                if row in wrong:
                    stacked[row] = 0
                    continue
                if image.shape != tuple(shape) or image.dtype.name != dtype:
                    raise DataError(
                        f"source {self.name!r}: an image is {image.dtype.name}{list(image.shape)}; expected "
                        f"{dtype}{list(shape)}"
                    )
                stacked[row] = image
            batch[IMAGE] = stacked
        return batch

    def _kept(self, split: str) -> Batch | None:
        """A whole split with its pictures decoded (an error in place of one that cannot be), or None: not kept."""
        check_split(self, split)
        with self._lock:
            if split not in self._decoded:
                self._decoded[split] = self._decode(split) if self._fits(split) else None
            return self._decoded[split]

    def _fits(self, split: str) -> bool:
        size, shape = self.splits[split], self.source.spec[IMAGE][0]
        if not self._memory:
            return False
        if None in shape:  # some of them tell how large they are
            sample = np.linspace(0, size - 1, min(size, 32)).astype(np.int64)
            records, wrong = self._records(split, sample)
            sizes = [
                getattr(_attempt(self.eval_transform, data), "nbytes", 0)
                for row, data in enumerate(records[IMAGE])
                if row not in wrong
            ]
            each = sum(sizes) / max(len(sizes), 1)
        else:
            each = float(np.prod(shape))
        return size * each <= self._memory * 2**20

    def _decode(self, split: str) -> Batch:
        """A whole split, on as many threads as make batches (at least two)."""
        size = self.splits[split]

        def part(first: int) -> Batch:
            records, wrong = self._records(split, np.arange(first, min(first + READ, size)))
            records[IMAGE] = [
                Unreadable(wrong[row]) if row in wrong else _attempt(self.eval_transform, data)
                for row, data in enumerate(records[IMAGE])
            ]
            return records

        with ThreadPoolExecutor(max(2, self.config.threads), thread_name_prefix="tokenlab-decode") as pool:
            parts = list(pool.map(part, range(0, size, READ)))
        whole: Batch = {}
        for key in list(parts[0]):
            values = [part.pop(key) for part in parts]
            if isinstance(values[0], np.ndarray):
                whole[key] = np.concatenate(values)
                continue
            whole[key] = [value for part in values for value in part]
            if len({getattr(value, "shape", None) for value in whole[key]} - {None}) == 1 and not any(
                isinstance(value, Unreadable) for value in whole[key]
            ):
                whole[key] = np.stack(whole[key])
        return whole


def _take(whole: Batch, indices: np.ndarray) -> Batch:
    return {
        key: np.take(values, indices, axis=0)
        if isinstance(values, np.ndarray)
        else [values[index] for index in indices.tolist()]
        for key, values in whole.items()
    }


def _attempt(transform: Transform, data: bytes) -> np.ndarray | Unreadable:
    try:
        return transform.decode(data)
    except DataError as error:
        return Unreadable(error)
