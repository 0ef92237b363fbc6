"""What a data source is: named splits of records that can be read in any order.

Everything behind it (arrays in memory, a memory-mapped file, TFDS or grain records, a mixture) looks the same to the
pipeline: a length, and the records at given indices. A source is a file in `tokenlab/data/sources/` with a
`Config(DataConfig)` and a `build(config) -> Source`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from tokenlab.core.errors import ConfigError, DataError, NameLookupError, suggest
from tokenlab.core.names import Module

Batch: TypeAlias = dict[str, Any]
"""Values by key. In a batch a key whose spec is `stackable` is an array with a leading axis of examples, any other a
list with an entry an example; in a single record there is no axis of examples."""

Spec: TypeAlias = Mapping[str, tuple[tuple[int | None, ...], str]]
"""(shape, dtype name) of each key of one example, for example `{"image": ((8, 8, 1), "float32")}`.

None in a shape is a size that differs between records. The dtype "encoded" stands for `bytes` of a picture (JPEG, PNG,
WebP, ...); its shape is what it decodes to.
"""

ENCODED = "encoded"


@dataclass(frozen=True)
class DataConfig:
    """`config.data`. A source with options of its own extends this class as `Config`.

    Attributes:
      name: the source: a module of `tokenlab/data/sources/`.
      transform: what is done to training images, for example "decode|random_resized_crop(192)|flip_lr|
        value_range(-1, 1)" (see `tokenlab.data.transform`); None for what the images need and nothing more.
      eval_transform: the same at evaluation, without random operations.
      splits: splits made of the source's own, such as {"train": "train[:90%]", "validation": "train[90%:]"} (see
        `tokenlab.data.splits`); {} for the source's own.
      corrupt: a record that cannot be read: "stop" names it and stops, "skip" gives its row no weight and goes on.
      memory: pictures of a split that take at most so many MiB decoded are decoded once and kept; None is 1024
        without workers and 0 with them, as each would keep its own.
      prefetch: training batches made ahead; 0 makes each when it is asked for. For batches that take less than about
        a millisecond to make, a thread costs more than it saves.
      threads: threads that make batches, in each process; they need prefetch >= 1.
      workers: processes that make batches; 0 makes them in the process that trains. They need prefetch >= 1.
    """

    name: str = "digits"
    transform: str | None = None
    eval_transform: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    corrupt: Literal["stop", "skip"] = "stop"
    memory: int | None = None
    prefetch: int = 0
    threads: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        for key, least in (("memory", 0), ("prefetch", 0), ("threads", 1), ("workers", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"config.data.{key} is {value}; expected at least {least}.")
        if not self.prefetch and (self.workers or self.threads > 1):
            raise ConfigError(
                f"config.data.prefetch is 0 with {self.workers} workers and {self.threads} threads, which make batches "
                "ahead; set config.data.prefetch to 1 or more."
            )


@runtime_checkable
class Records(Protocol):
    """Random access to the records of one split (what grain calls a random access data source, and batches)."""

    def __len__(self) -> int:
        """The number of records n."""
        ...

    def __getitem__(self, index: int) -> Batch:
        """Record `index` in [0, n): values without a batch axis. Raises DataError where it cannot be read."""
        ...

    def batch(self, indices: np.ndarray) -> Batch:
        """The records at `indices` (int64 [B], each in [0, n), repeats allowed): arrays [B, ...], and lists of what
        cannot be stacked.

        The arrays are the caller's: changing them must not change the source. Raises DataError where one cannot be
        read.
        """
        ...


class FileError(DataError):
    """A file that cannot be read at all: not the fault of one record, so no record is skipped for it."""


@runtime_checkable
class Source(Protocol):
    """A data set: splits, what an example looks like, and a fingerprint of what it holds.

    Attributes:
      name: for messages and records.
      splits: number of examples by split name.
      spec: (shape, dtype) of each key of one example, as `Records.batch` gives them.
      num_classes: labels are in [0, num_classes); None for a source without labels.
      class_names: a name for each class, where they are known.
      fingerprint: changes when content, splits or order change; saved with a run and compared when it goes on.
    """

    name: str
    splits: Mapping[str, int]
    spec: Spec
    num_classes: int | None
    class_names: tuple[str, ...] | None
    fingerprint: str

    def split(self, name: str) -> Records:
        """The records of a split.

        Raises:
          DataError: there is no such split.
        """
        ...


class ArrayRecords:
    """Records held in arrays [n, ...], in memory or memory-mapped.

    Args:
      arrays: one array by key, all of the same length n.

    Raises:
      DataError: there is no array, or the lengths differ.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        lengths = {key: len(array) for key, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"arrays of records must be one or more, all of the same length; given {lengths}")
        # A memory-mapped array stays one underneath; what is read from it is then a plain array.
        self.arrays = {key: np.asarray(array) for key, array in arrays.items()}
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length}")
        return {key: np.array(array[index]) for key, array in self.arrays.items()}

    def batch(self, indices: np.ndarray) -> Batch:
        """See `Records.batch`."""
        return {key: np.take(array, indices, axis=0) for key, array in self.arrays.items()}


class ArraySource:
    """A `Source` of arrays by split.

    Args:
      name: of the source.
      splits: for each split one array [n, ...] by key; every split has the same keys, shapes and dtypes.
      num_classes: labels are in [0, num_classes), or None.
      class_names: a name for each class, or None.

    Raises:
      DataError: there is no split, a split is empty, or two splits differ in keys, shapes or dtypes.
    """

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Mapping[str, np.ndarray]],
        num_classes: int | None,
        class_names: tuple[str, ...] | None = None,
    ):
        if not splits:
            raise DataError(f"source {name!r} has no split")
        self.name = name
        self.num_classes = num_classes
        self.class_names = class_names
        self._records = {split: ArrayRecords(arrays) for split, arrays in splits.items()}
        self.splits = {split: len(records) for split, records in self._records.items()}
        specs = {split: _spec_of(arrays) for split, arrays in splits.items()}
        first = next(iter(specs))
        for split, spec in specs.items():
            if not self.splits[split]:
                raise DataError(f"split {split!r} of source {name!r} is empty")
            if spec != specs[first]:
                raise DataError(
                    f"source {name!r}: split {split!r} has {spec}, split {first!r} has {specs[first]}"
                )
        self.spec: Spec = specs[first]
        self.fingerprint = f"{name}:{_digest(splits)}"

    def split(self, name: str) -> Records:
        """See `Source.split`."""
        check_split(self, name)
        return self._records[name]


def stackable(entry: tuple[tuple[int | None, ...], str]) -> bool:
    """Whether records of this (shape, dtype) come as one array; else they come as a list."""
    shape, dtype = entry
    return dtype != ENCODED and None not in shape


def check_name(name: object, sources: Iterable[Module], key: str) -> None:
    """Raise a `NameLookupError` with the nearest name when none of `sources` has the name that `key` gives."""
    known = [module.name for module in sources]
    if name not in known:
        raise NameLookupError(f"{key} is {name!r}; expected the name of a source.{suggest(str(name), known)}")


def check_split(source: Source, name: str) -> None:
    """Raise a `DataError` with the nearest name when `source` has no split `name`."""
    if name not in source.splits:
        raise DataError(f"source {source.name!r} has no split {name!r}.{suggest(name, source.splits)}")


def check_batch(batch: Batch, source: Source, split: str, indices: np.ndarray) -> None:
    """Check the records at `indices` against what the source says of itself.

    Args:
      batch: arrays [B, ...] as `Records.batch` gave them.
      source: where they are from.
      split: the split's name, for the message.
      indices: int64 [B], to name the example that is wrong.

    Raises:
      DataError: a key is missing or unknown, a shape or dtype is not the spec's, a float is NaN or infinite, or a
        label is not in [0, num_classes). The message names the key, what was given and what was expected.
    """
    where = f"source {source.name!r}, split {split!r}"
    if batch.keys() != source.spec.keys():
        raise DataError(f"{where}: records have keys {sorted(batch)}; the spec has {sorted(source.spec)}")
    for key, (shape, dtype) in source.spec.items():
        array = batch[key]
        given = (array.shape, array.dtype.name)
        if given != ((len(indices), *shape), dtype):
            raise DataError(
                f"{where}: key {key!r} is {given[1]}{list(given[0])}; "
                f"expected {dtype}{[len(indices), *shape]} ({len(indices)} examples of the spec's {list(shape)})"
            )
        if array.dtype.kind == "f" and not _all_finite(array):
            example = int(indices[_first_row(~np.isfinite(array))])
            raise DataError(
                f"{where}: key {key!r} of example {example} holds NaN or infinity; expected finite numbers"
            )
    labels = batch.get("label")
    if labels is not None and source.num_classes is not None and labels.size:
        outside = (labels < 0) | (labels >= source.num_classes)
        if outside.any():
            row = _first_row(outside)
            raise DataError(
                f"{where}: label of example {int(indices[row])} is {labels[row].tolist()}; "
                f"expected 0 to {source.num_classes - 1}"
            )


def _all_finite(array: np.ndarray) -> bool:
    # One sum is several times cheaper than a mask as large as the array; only a sum of finite numbers that overflows
    # needs the mask.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.sum(array))) or bool(np.isfinite(array).all())


def _first_row(wrong: np.ndarray) -> int:
    return int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))[0])


def _spec_of(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {key: (array.shape[1:], array.dtype.name) for key, array in arrays.items()}


def _digest(splits: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, its first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for split, arrays in splits.items():
        for key, array in sorted(arrays.items()):
            digest.update(f"{split}/{key}:{array.dtype.str}{array.shape};".encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]
