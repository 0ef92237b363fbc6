"""NumPy files: a folder of `SPLIT.npz` or memory-mapped `SPLIT/KEY.npy`, or one .npz with every split.

Laid out as one of
- `path/SPLIT.npz` with keys such as `image` and `label`;
- `path/SPLIT/KEY.npy`, one file a key, memory-mapped: only the rows asked for are read;
- `path.npz` with `SPLIT_image(s)` and `SPLIT_label(s)` (as MedMNIST has it), or x_train, y_train, x_test, y_test.

`classes.txt`, a name a line, in the folder (or beside the .npz) names the classes. Keys "images", "x" are "image", and
"labels", "y" are "label". Images are uint8 or floats; [n, H, W] get a channel axis. Labels are integers [n] or [n, 1],
given as int32; floats of other widths are given as float32.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenlab.core.errors import DataError
from tokenlab.data.source import Batch, DataConfig, Records, Spec, check_split

KEYS = {"images": "image", "x": "image", "labels": "label", "y": "label"}
KNOWN_KEYS = ("image", "label", *KEYS)
MOST_CLASSES = 2**31 - 1
"""Labels are given as int32."""

SAMPLED_ROWS = 256
"""Rows of a .npy file that go into the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Config(DataConfig):
    """NumPy files.

    Attributes:
      path: the folder, or the .npz file.
      num_classes: labels are in [0, num_classes); None for one more than the largest label of the split "train" (of
        all splits where there is none of that name).
    """

    path: str
    num_classes: int | None = None


def build(config: Config) -> NumpySource:
    """The arrays at `config.path`.

    Raises:
      DataError: nothing there is laid out as described above, or the arrays do not fit each other.
    """
    return NumpySource(config.path, config.num_classes)


@dataclass(frozen=True)
class Column:
    """One array of a split, and what is done to it.

    Attributes:
      file: a .npy file, or a .npz file.
      member: name in the .npz file, "" for a .npy file.
      dtype: that its rows are given as.
      row: shape of a row as given; what is stored has as many values.
    """

    file: str
    member: str
    dtype: str = ""
    row: tuple[int, ...] = ()

    def open(self) -> np.ndarray:
        """The array as stored [n, ...]; of a .npy file nothing is read yet.

        Raises:
          DataError: the file cannot be read, or holds pickled objects.
        """
        try:
            if not self.member:
                return np.load(self.file, mmap_mode="r", allow_pickle=False)
            # Opened here: of a broken file np.load would leave it open.
            with open(self.file, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return arrays[self.member]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            what = f"key {self.member!r} of {self.file!r}" if self.member else f"{self.file!r}"
            raise DataError(f"{what} cannot be read: {' '.join(str(error).split())}") from error


class NumpySource:
    """NumPy files as a `Source`.

    The fingerprint is a hash of the content of .npz files. Of .npy files, which may be far larger than memory, it is
    one of size, time of change, shape, dtype and 256 rows spread evenly: a row changed in place in between is told by
    the time of change only.

    Args:
      path: a folder or a .npz file.
      num_classes: see `Config`.

    Raises:
      DataError: as `build`.
    """

    def __init__(self, path: str, num_classes: int | None = None):
        root = Path(path).expanduser()
        self.name = f"arrays {root.name}"
        columns = _columns(root)
        digest = hashlib.sha256()
        self._columns: dict[str, dict[str, Column]] = {}
        self.splits: dict[str, int] = {}
        specs: dict[str, Spec] = {}
        labels: dict[str, np.ndarray] = {}
        for split, found in columns.items():
            arrays = {key: column.open() for key, column in found.items()}
            self.splits[split] = _length(split, arrays, root)
            self._columns[split] = {
                key: _described(split, key, column, arrays[key]) for key, column in found.items()
            }
            specs[split] = {key: (column.row, column.dtype) for key, column in self._columns[split].items()}
            for key, column in sorted(found.items()):
                _update(digest, split, key, column, arrays[key])
            if "label" in arrays:
                labels[split] = np.asarray(arrays["label"]).reshape(-1)
        first = next(iter(specs))
        for split, spec in specs.items():
            if spec != specs[first]:
                raise DataError(
                    f"{self.name!r}: split {split!r} has {spec}, split {first!r} has {specs[first]}."
                )
        self.spec: Spec = specs[first]
        self.class_names = _class_names(root)
        self.num_classes = _num_classes(self.name, labels, num_classes, self.class_names)
        self.fingerprint = f"arrays:{digest.hexdigest()[:16]}:{self.num_classes}"

    def split(self, name: str) -> Records:
        """See `Source.split`."""
        check_split(self, name)
        return NumpyRecords(self.splits[name], self._columns[name])


class NumpyRecords:
    """The records of a split; pickled, they are the paths, and the files are opened where they are read.

    Args:
      length: number of records.
      columns: by key.
    """

    def __init__(self, length: int, columns: Mapping[str, Column]):
        self._length = length
        self._columns = dict(columns)
        self._arrays: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length}")
        return {key: values[0] for key, values in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> Batch:
        """See `Records.batch`."""
        result: Batch = {}
        for key, column in self._columns.items():
            if key not in self._arrays:
                self._arrays[key] = column.open()
            # Indexing with an array copies the rows asked for and nothing else, whatever the order in the file.
            rows = np.asarray(self._arrays[key])[np.asarray(indices)]
            result[key] = np.ascontiguousarray(rows.reshape(len(rows), *column.row), dtype=column.dtype)
        return result


def _columns(root: Path) -> dict[str, dict[str, Column]]:
    """The columns of each split by key, as the files are laid out."""
    found: dict[str, dict[str, Column]] = {}

    def add(split: str, key: str, column: Column) -> None:
        key = KEYS.get(key, key)
        if key in found.setdefault(split, {}):
            raise DataError(f"{str(root)!r}: split {split!r} has two arrays for key {key!r}; expected one.")
        found[split][key] = column

    if root.is_file():
        members = _members(root)
        known = {split for split, key in map(_split_and_key, members) if key in KNOWN_KEYS}
        for member in members:
            split, key = _split_and_key(member, known)
            if not split or not key:
                raise DataError(
                    f"{str(root)!r} has the key {member!r}; expected SPLIT_KEY such as train_image."
                )
            add(split, key, Column(str(root), member))
    elif root.is_dir():
        for path in sorted(root.iterdir()):
            if path.suffix == ".npz":
                for member in _members(path):
                    add(path.stem, member, Column(str(path), member))
            elif path.is_dir() and not path.name.startswith("."):
                for file in sorted(path.glob("*.npy")):
                    add(path.name, file.stem, Column(str(file), ""))
    else:
        raise DataError(f"config.data.path: there is no file or folder {str(root)!r}.")
    if not found:
        raise DataError(
            f"{str(root)!r} holds no split: expected SPLIT.npz, or SPLIT/KEY.npy such as train/image.npy."
        )
    return found


def _split_and_key(member: str, splits: Collection[str] = ()) -> tuple[str, str]:
    """The two halves of "train_image", "my_train_image" or "x_train"; empty where it is not of this form.

    Args:
      member: name of an array.
      splits: known from other arrays; an array of another key than those of images and labels belongs to the longest
        that its name begins with, else its split ends at the first "_".
    """
    if match := re.fullmatch(rf"(\w+)_({'|'.join(KNOWN_KEYS)})", member):
        return match[1], match[2]
    if match := re.fullmatch(r"([xy])_(\w+)", member):
        return match[2], match[1]
    for split in sorted(splits, key=len, reverse=True):
        if member.startswith(f"{split}_"):
            return split, member.removeprefix(f"{split}_")
    match = re.fullmatch(r"(\w+?)_(\w+)", member)
    return (match[1], match[2]) if match else ("", "")


def _members(file: Path) -> list[str]:
    if file.suffix == ".npy":
        raise DataError(
            f"config.data.path: {str(file)!r} is a single array; expected a .npz file with every split, or a folder "
            "with SPLIT/KEY.npy such as train/image.npy."
        )
    if not zipfile.is_zipfile(file):
        raise DataError(f"{str(file)!r} is no .npz file, or it is cut off; expected one of numpy.savez.")
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return list(arrays.files)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{str(file)!r} is no .npz file: {' '.join(str(error).split())}") from error


def _length(split: str, arrays: Mapping[str, np.ndarray], root: Path) -> int:
    lengths = {key: len(array) if array.ndim else -1 for key, array in arrays.items()}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < 1:
        raise DataError(
            f"{str(root)!r}: the arrays of split {split!r} must have one or more rows, all as many; given "
            f"{ {key: array.shape for key, array in arrays.items()} }."
        )
    return next(iter(lengths.values()))


def _described(split: str, key: str, column: Column, array: np.ndarray) -> Column:
    """`column` with the shape and dtype that its rows are given as."""
    row, kind = array.shape[1:], array.dtype.kind
    if kind not in "biuf":
        raise DataError(f"{column.file!r}: {key!r} of split {split!r} is {array.dtype}; expected numbers.")
    if key == "label" and (kind == "f" or row not in ((), (1,))):
        raise DataError(
            f"{column.file!r}: label of split {split!r} is {array.dtype}{list(array.shape)}; expected integers [n]: of "
            "one-hot labels .argmax(axis=1), and for other targets another key."
        )
    if key == "image" and kind != "f" and array.dtype != np.uint8:
        raise DataError(
            f"{column.file!r}: image of split {split!r} is {array.dtype}{list(array.shape)}; expected uint8 or floats: "
            "bring it to 0 to 255 and save it with .astype(np.uint8)."
        )
    if key == "label":
        return replace(column, dtype="int32", row=())
    if key == "image" and len(row) == 2:
        row = (*row, 1)
    return replace(column, dtype="float32" if kind == "f" else array.dtype.name, row=row)


def _update(digest: Any, split: str, key: str, column: Column, array: np.ndarray) -> None:
    digest.update(f"{split}/{key}:{array.dtype.str}{array.shape};".encode())
    if column.member:
        digest.update(np.ascontiguousarray(array))
        return
    status = Path(column.file).stat()
    digest.update(f"{status.st_size},{status.st_mtime_ns};".encode())
    rows = np.linspace(0, len(array) - 1, min(SAMPLED_ROWS, len(array))).astype(np.int64)
    digest.update(np.ascontiguousarray(np.asarray(array)[rows]))


def _class_names(root: Path) -> tuple[str, ...] | None:
    file = (root if root.is_dir() else root.parent) / "classes.txt"
    if not file.is_file():
        return None
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def _num_classes(
    name: str, labels: Mapping[str, np.ndarray], given: int | None, class_names: tuple[str, ...] | None
) -> int | None:
    """The number of classes, after checking that every label is below it; None without labels."""
    if not labels:
        if given is not None or class_names is not None:
            raise DataError(f"{name!r} has no labels; expected them with num_classes or classes.txt.")
        return None
    if given is not None and class_names is not None and given != len(class_names):
        raise DataError(
            f"{name!r}: classes.txt has {len(class_names)} names; config.data.num_classes is {given}."
        )
    counted = labels.get("train")
    number = given or (class_names and len(class_names))
    if number is None:
        number = (
            int(max(array.max() for array in ([counted] if counted is not None else labels.values()))) + 1
        )
    number = min(number, MOST_CLASSES)
    for split, array in labels.items():
        outside = np.flatnonzero((array < 0) | (array >= number))
        if len(outside):
            raise DataError(
                f"{name!r}, split {split!r}: label of example {outside[0]} is {array[outside[0]]}; expected 0 to "
                f"{number - 1} (config.data.num_classes)."
            )
    return number
