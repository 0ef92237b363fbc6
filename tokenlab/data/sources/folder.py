"""Folders of pictures: `path/SPLIT/CLASS/*.jpg` (also jpeg, png, webp, bmp); a class a folder, sorted by name.

Pictures stay encoded until the pipeline. Their order is that of the names of classes and files, on every file system.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.source import ENCODED, Batch, DataConfig, Records, Spec, check_split

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class Config(DataConfig):
    """Folders of pictures.

    Attributes:
      path: the folder with a folder for each split.
      channels: that pictures are decoded to: 3 (colour) or 1 (grey).
    """

    path: str
    channels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in (1, 3):
            raise ConfigError(f"config.data.channels is {self.channels}; expected 1 (grey) or 3 (colour).")


def build(config: Config) -> FolderSource:
    """The pictures under `config.path`.

    Raises:
      DataError: there is no split, a split or a class is empty, or two splits differ in their classes.
    """
    return FolderSource(config.path, config.channels)


class FolderSource:
    """Folders of pictures as a `Source`; the fingerprint is of the names and sizes of all files.

    Args:
      path: see `Config`.
      channels: see `Config`.

    Raises:
      DataError: as `build`.
    """

    def __init__(self, path: str, channels: int = 3):
        root = Path(path).expanduser()
        if not root.is_dir():
            raise DataError(f"config.data.path: there is no folder {str(root)!r}.")
        self.name = f"folder {root.name}"
        self._root = root
        splits = _folders(root)
        if not splits:
            raise DataError(f"{str(root)!r} has no folder for a split: expected SPLIT/CLASS/*.jpg.")
        self.class_names = self._classes(splits)
        self.num_classes = len(self.class_names)
        self.spec: Spec = {"image": ((None, None, channels), ENCODED), "label": ((), "int32")}
        digest = hashlib.sha256(f"{channels};".encode())
        self._records: dict[str, FolderRecords] = {}
        for split in splits:
            files: list[str] = []
            labels: list[int] = []
            for label, name in enumerate(self.class_names):
                found = _pictures(root / split / name)
                if not found:
                    raise DataError(
                        f"{str(root / split / name)!r} holds no picture: expected {', '.join(SUFFIXES)} files."
                    )
                for file, size in found:
                    digest.update(os.fsencode(f"{split}/{name}/{file}:{size};"))  # a name may be no UTF-8
                files += [f"{name}/{file}" for file, _ in found]
                labels += [label] * len(found)
            self._records[split] = FolderRecords(str(root / split), files, np.array(labels, dtype=np.int32))
        self.splits = {split: len(records) for split, records in self._records.items()}
        self.fingerprint = f"folder:{digest.hexdigest()[:16]}"

    def _classes(self, splits: Sequence[str]) -> tuple[str, ...]:
        found = {split: _folders(self._root / split) for split in splits}
        for split, names in found.items():
            if not names:
                raise DataError(f"{str(self._root / split)!r} is empty: expected a folder for each class.")
        every = sorted(set().union(*found.values()))
        for name in every:
            without = [split for split, names in found.items() if name not in names]
            if without:
                raise DataError(
                    f"{self.name!r}: split {without[0]!r} has no class {name!r}, which another split has; expected "
                    "the same classes in every split."
                )
        return tuple(every)

    def split(self, name: str) -> Records:
        """See `Source.split`."""
        check_split(self, name)
        return self._records[name]


class FolderRecords:
    """The pictures of a split, read when they are asked for.

    Args:
      folder: of the split.
      files: relative to it, in order.
      labels: int32 [n].
    """

    def __init__(self, folder: str, files: Sequence[str], labels: np.ndarray):
        self._folder, self._files, self._labels = folder, files, labels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return {"image": self._read(index), "label": self._labels[index]}

    def batch(self, indices: np.ndarray) -> Batch:
        """See `Records.batch`."""
        indices = np.asarray(indices)
        return {"image": [self._read(index) for index in indices.tolist()], "label": self._labels[indices]}

    def _read(self, index: int) -> bytes:
        file = os.path.join(self._folder, self._files[index])
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise DataError(f"record {index}, {file!r}, cannot be read: {error.strerror}.") from error
        if not content:
            raise DataError(f"record {index}, {file!r}, is an empty file; expected a picture.")
        return content


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _pictures(path: Path) -> list[tuple[str, int]]:
    """(name, size in bytes) of each picture in a folder, sorted."""
    with os.scandir(path) as entries:
        return sorted(
            (entry.name, entry.stat().st_size)
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
        )
