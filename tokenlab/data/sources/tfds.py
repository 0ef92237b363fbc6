"""Prepared TFDS sets with array_record files, read without TensorFlow; pictures stay encoded until the pipeline.

A record gives "image" (encoded bytes), "label" where the set has class labels, and every other feature of fixed shape
that is a number, under its own name ("a/b" for a nested one). Texts, sequences, audio and video are left out.

The files are read directly, see `tokenlab.data.example`: measured on 2 busy cores, 25,000 to 70,000 records/s in
batches of 128 (28 px and 192 px), where `tfds.data_source` gives 7,000 to 17,000 and takes a second to import.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from google.protobuf.message import DecodeError

from tokenlab.core.errors import DataError, suggest
from tokenlab.data import example, prepared
from tokenlab.data.source import ENCODED, Batch, DataConfig, FileError, Records, Spec, check_split

READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
"""What array_record itself recommends for reading at random."""


@dataclass(frozen=True, kw_only=True)
class Config(DataConfig):
    """A prepared TFDS set.

    Attributes:
      dataset: "fashion_mnist", "fashion_mnist:3.0.1" (else the newest version), "name/config", or the folder of a
        prepared set: a path that is absolute, remote ("gs://...") or begins with "." or "~".
      data_dir: folder of prepared sets; None for the environment's TFDS_DATA_DIR, else TFDS's own default.
      image_key: which feature is the picture; needed only where there are several and the set does not say.
      label_key: the same for the class label.
    """

    dataset: str
    data_dir: str | None = None
    image_key: str | None = None
    label_key: str | None = None


def build(config: Config) -> TfdsSource:
    """The set that `config.dataset` names.

    Raises:
      DataError: it is not there, its records are in another format, or it holds no picture.
    """
    return TfdsSource(
        prepared.find(config.dataset, config.data_dir), image_key=config.image_key, label_key=config.label_key
    )


@dataclass(frozen=True)
class Field:
    """How one key is read from a record.

    Attributes:
      feature: its name in the record.
      stored: "bytes", "int64" or "float", as tf.train.Example keeps it.
      shape: of the value; () for the encoded picture too.
      dtype: numpy name, or "encoded".
    """

    feature: str
    stored: str
    shape: tuple[int, ...]
    dtype: str


class TfdsSource:
    """A prepared TFDS set as a `Source`.

    Args:
      found: what its JSON files say.
      image_key: name of the picture's feature, or None for the only one, or the one that the set names.
      label_key: the same for the class label.

    Raises:
      DataError: the records are in another format, there is no picture or more than one, or a file is missing.
    """

    def __init__(
        self, found: prepared.Prepared, *, image_key: str | None = None, label_key: str | None = None
    ):
        self.name = found.name
        where = f"TFDS set {found.name!r} {found.version}"
        if prepared.FORMAT not in found.file_formats:
            raise DataError(prepared.convert_hint(found))
        image, label = _keys(found, where, image_key, label_key)
        self.fields = _fields(found, where, image, label)
        height, width, channels = found.features[image].shape
        self.spec: Spec = {
            key: ((height, width, channels or 3) if field.dtype == ENCODED else field.shape, field.dtype)
            for key, field in self.fields.items()
        }
        self.num_classes = found.features[label].num_classes if label else None
        self.class_names = found.class_names(label) if label else None
        self._shards = found.splits
        self.splits = found.counts()
        _check_files(where, found)
        for split, count in self.splits.items():
            if not count:
                raise DataError(f"{where}: split {split!r} is empty.")
        if not self.splits:
            raise DataError(f"{where} has no split.")
        self.fingerprint = (
            f"tfds:{found.name}:{found.version}:{_digest(found, image, label, self.class_names)}"
        )

    def split(self, name: str) -> Records:
        """See `Source.split`."""
        check_split(self, name)
        return TfdsRecords(f"{self.name!r}, split {name!r}", self._shards[name], self.fields)


def _check_files(where: str, found: prepared.Prepared) -> None:
    """Every file of every split is there. Their folders are listed once, as a bucket answers that at once."""
    paths = [epath.Path(shard.path) for shards in found.splits.values() for shard in shards]
    there = {folder: {path.name for path in folder.iterdir()} for folder in {path.parent for path in paths}}
    missing = sorted(path.name for path in paths if path.name not in there[path.parent])
    if missing:
        raise DataError(
            f"{where}: {len(missing)} of its {len(paths)} files are missing, the first {missing[0]!r}; prepare the set "
            "anew, or copy it as a whole."
        )


def _keys(
    found: prepared.Prepared, where: str, image_key: str | None, label_key: str | None
) -> tuple[str, str | None]:
    """The features that are the picture and the class label (None when there is none)."""
    listed = ", ".join(f"{key} ({feature})" for key, feature in found.features.items()) or "none"

    def choose(kind: str, what: str, given: str | None, named: str | None) -> str | None:
        keys = [key for key, feature in found.features.items() if feature.kind == kind]
        if given is not None:
            if given not in keys:
                near = suggest(given, keys)
                raise DataError(f"{where} has no {what} {given!r}.{near} Its features: {listed}.")
            return given
        if len(keys) > 1 and named not in keys:
            names = ", ".join(keys)
            raise DataError(
                f"{where} has several features of kind {what}: {names}; set config.data.{what}_key."
            )
        return named if named in keys else keys[0] if keys else None

    image = choose("image", "image", image_key, found.supervised and found.supervised[0])
    label = choose("classLabel", "label", label_key, found.supervised and found.supervised[1])
    if image is None:
        raise DataError(f"{where} holds no picture; its features: {listed}.")
    shape = found.features[image].shape or (None, None, 3)
    if found.features[image].dtype not in ("", "uint8") or len(shape) != 3 or shape[2] not in (None, 1, 3):
        raise DataError(
            f"{where}: {image!r} is {found.features[image]}; expected a uint8 picture with 1 or 3 channels."
        )
    return image, label


def _fields(found: prepared.Prepared, where: str, image: str, label: str | None) -> dict[str, Field]:
    fields = {"image": Field(image, "bytes", (), ENCODED)}
    if label is not None:
        fields["label"] = Field(label, "int64", (), "int32")
    for key, feature in found.features.items():
        if key in (image, label) or feature.optional or feature.encoding or None in feature.shape:
            continue
        if feature.kind == "classLabel":
            field = Field(key, "int64", (), "int32")
        elif feature.kind == "tensor" and feature.dtype.startswith(("int", "uint", "bool")):
            field = Field(key, "int64", feature.shape, feature.dtype)
        elif feature.kind == "tensor" and feature.dtype.startswith("float"):
            field = Field(key, "float", feature.shape, feature.dtype)
        else:
            continue
        if key in fields:
            raise DataError(
                f"{where}: feature {key!r} has the name under which {fields[key].feature!r} is given; expected "
                f"config.data.{key}_key={key}, or none of that name."
            )
        fields[key] = field
    return fields


class TfdsRecords:
    """The records of a split. Files are opened when first read from, in each process anew.

    Args:
      where: set and split, for messages.
      shards: its files.
      fields: by key, how each is read.
    """

    def __init__(self, where: str, shards: Sequence[prepared.Shard], fields: Mapping[str, Field]):
        self._where = where
        self._shards = tuple(shards)
        self._fields = dict(fields)
        self._ends = np.cumsum([shard.length for shard in self._shards])
        self._forget()

    def _forget(self) -> None:
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        found = self._parsed(np.array([index]))
        return {key: _value(field, found[key][0]) for key, field in self._fields.items()}

    def batch(self, indices: np.ndarray) -> Batch:
        """See `Records.batch`."""
        found = self._parsed(np.asarray(indices))
        result: Batch = {}
        for key, field in self._fields.items():
            if field.dtype == ENCODED:
                result[key] = [values[0] for values in found[key]]
            else:
                array = np.asarray(found[key], dtype=field.dtype)
                result[key] = array.reshape(len(indices), *field.shape)
        return result

    def _parsed(self, indices: np.ndarray) -> dict[str, list[Any]]:
        """For each key the stored lists of the records at `indices`, each of the length that its shape says."""
        result: dict[str, list[Any]] = {key: [] for key in self._fields}
        checks = [
            (key, field.feature, example.LISTS[field.stored], int(np.prod(field.shape, dtype=np.int64)))
            for key, field in self._fields.items()
        ]
        for index, record in zip(indices.tolist(), self._raw(indices), strict=True):
            try:
                features = example.parse(record)
            except DecodeError:
                raise self._error(index, "its bytes are no tf.train.Example") from None
            for key, feature, kind, length in checks:
                # `in` first: asking the map for a name that it does not hold would add it.
                values = getattr(features[feature], kind).value if feature in features else ()
                if len(values) != length:
                    raise self._error(
                        index, f"feature {feature!r} has {len(values)} values ({kind}); expected {length}"
                    )
                result[key].append(values)
        return result

    def _raw(self, indices: np.ndarray) -> list[bytes]:
        """The bytes of the records at `indices`."""
        which = np.searchsorted(self._ends, indices, side="right")
        found: list[bytes] = [b""] * len(indices)
        for number in np.unique(which).tolist():
            rows = np.flatnonzero(which == number)
            first = int(self._ends[number]) - self._shards[number].length
            reader = self._reader(number)
            places = (indices[rows] - first).tolist()
            try:
                records = reader.read(places)
            except RuntimeError:  # which one it was is known only when they are read one by one
                records = [self._one(reader, place, first) for place in places]
            for row, record in zip(rows.tolist(), records, strict=True):
                found[row] = record
        return found

    def _one(self, reader: Any, place: int, first: int) -> bytes:
        try:
            return reader.read([place])[0]
        except RuntimeError as error:
            raise self._error(first + place, str(error)) from None

    def _reader(self, number: int) -> Any:
        """The opened file `number`."""
        if number in self._readers:
            return self._readers[number]
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if number not in self._readers:
                shard = self._shards[number]
                try:
                    reader = ArrayRecordReader(shard.path, options=READER_OPTIONS)
                    length = reader.num_records()
                except RuntimeError as error:
                    raise self._file_error(shard, str(error)) from None
                if length != shard.length:
                    there = epath.Path(shard.path).exists()
                    what = f"is cut off or damaged: it shows {length} records" if there else "is missing"
                    raise self._file_error(shard, f"it {what}; expected {shard.length} records")
                self._readers[number] = reader
        return self._readers[number]

    def _file_error(self, shard: prepared.Shard, why: str) -> FileError:
        why = " ".join(why.split())
        return FileError(f"TFDS set {self._where}: file {Path(shard.path).name!r}: {why}")

    def _error(self, index: int, why: str) -> DataError:
        shard = self._shards[int(np.searchsorted(self._ends, index, side="right"))]
        why = " ".join(why.split())
        return DataError(f"TFDS set {self._where}: record {index} (file {Path(shard.path).name!r}): {why}")


def _value(field: Field, values: Any) -> Any:
    if field.dtype == ENCODED:
        return values[0]
    return np.asarray(values, dtype=field.dtype).reshape(field.shape)


def _digest(
    found: prepared.Prepared, image: str, label: str | None, class_names: tuple[str, ...] | None
) -> str:
    """SHA-256 over what the JSON files say and the keys chosen, its first 16 hexadecimal digits."""
    says = {
        "lengths": {split: [shard.length for shard in shards] for split, shards in found.splits.items()},
        "bytes": dict(found.num_bytes),
        "features": {key: asdict(feature) for key, feature in found.features.items()},
        "keys": [image, label],
        "classes": class_names,
    }
    return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:16]
