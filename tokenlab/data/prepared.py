"""Prepared TFDS sets as they lie in a folder: found and described from their JSON files, without importing TFDS.

A set is a folder NAME/VERSION (or NAME/CONFIG/VERSION) with `dataset_info.json`, `features.json`, the names of its
classes in `KEY.labels.txt`, and the records in files by split. Paths may be local or remote (`gs://...`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from tokenlab.core.errors import DataError, suggest

DATA_DIR_VARIABLE = "TFDS_DATA_DIR"
DEFAULT_DATA_DIR = "~/tensorflow_datasets"
"""Where TFDS itself looks without `data_dir` and without the environment variable."""

FORMAT = "array_record"
INFO = "dataset_info.json"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_DIGITS = 5  # of a shard's number in a file name, at least


@dataclass(frozen=True)
class Shard:
    """One file of records: where it lies and how many records it holds."""

    path: str
    length: int


@dataclass(frozen=True)
class Feature:
    """One feature of a record, nested ones under "a/b".

    Attributes:
      kind: "image", "classLabel", "tensor", "text", ... as features.json calls it.
      shape: of one value; None for a size that differs, and for a shape that the file does not say.
      dtype: as features.json calls it, "" where it does not say.
      encoding: of a tensor stored as bytes ("zlib", "bytes"), else "".
      num_classes: of a class label, else 0.
      optional: may be missing in a record.
    """

    kind: str
    shape: tuple[int | None, ...] = ()
    dtype: str = ""
    encoding: str = ""
    num_classes: int = 0
    optional: bool = False

    def __str__(self) -> str:
        if self.kind == "classLabel":
            return f"class label of {self.num_classes}"
        sizes = " x ".join("?" if size is None else str(size) for size in self.shape)
        return " ".join(part for part in (self.kind, self.dtype, sizes and f"[{sizes}]") if part)


@dataclass(frozen=True)
class Prepared:
    """What the JSON files of a prepared set say.

    Attributes:
      folder: the folder of the version.
      name: with its config, "name" or "name/config".
      file_formats: formats the records lie there in.
      splits: the files of each split, as array_record.
      num_bytes: size of each split's records.
      features: by name, flat.
      supervised: (input, label) as the set's author named them, or None.
    """

    folder: str
    name: str
    version: str
    file_formats: tuple[str, ...]
    splits: Mapping[str, tuple[Shard, ...]]
    num_bytes: Mapping[str, int]
    features: Mapping[str, Feature]
    supervised: tuple[str, str] | None

    def counts(self) -> dict[str, int]:
        """Number of records by split."""
        return {split: sum(shard.length for shard in shards) for split, shards in self.splits.items()}

    def class_names(self, key: str) -> tuple[str, ...] | None:
        """The names of the classes of the class label `key`, or None when the set does not name them."""
        file = epath.Path(self.folder) / f"{key.replace('/', '-')}.labels.txt"
        if not file.exists():
            return None
        names = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
        expected = self.features[key].num_classes
        if len(names) != expected:
            raise DataError(
                f"{file} names {len(names)} classes; features.json says that {key!r} has {expected}."
            )
        return names


def data_dir(given: str | None = None) -> str:
    """The folder of prepared sets: as given, else the environment's TFDS_DATA_DIR, else TFDS's default."""
    return str(epath.Path(given or os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR).expanduser())


def find(dataset: str, folder: str | None = None) -> Prepared:
    """The prepared set called `dataset`.

    Args:
      dataset: "name", "name:1.2.3" or "name/config:1.2.3" of a set in `folder`, where the newest version is taken
        unless one is given; or the folder of a set itself: a path that is absolute, remote, or begins with "." or "~".
      folder: the folder of prepared sets, see `data_dir`.

    Raises:
      DataError: there is no such set (with the nearest name), version or folder, or its files cannot be read.
    """
    if not dataset:
        raise DataError('config.data.dataset is empty: expected a name such as "fashion_mnist" or a folder.')
    if dataset.startswith((".", "~", "/")) or "://" in dataset:
        path = epath.Path(dataset).expanduser()
        if not path.is_dir():
            raise DataError(f"there is no folder {dataset!r}: expected the folder of a prepared TFDS set.")
        return read(_version_folder(path, dataset, ""))
    root = epath.Path(data_dir(folder))
    if not root.is_dir():
        raise DataError(
            f"the folder of TFDS sets {str(root)!r} does not exist: set config.data.data_dir or the environment "
            f"variable {DATA_DIR_VARIABLE}."
        )
    name, _, version = dataset.partition(":")
    if not (root / name).is_dir():
        known = sorted({found.partition("/")[0] for found, _ in scan(str(root))})
        raise DataError(
            f"there is no prepared TFDS set {name!r} in {str(root)!r}.{suggest(name, known)} "
            f"With a network, `tokenlab data prepare {name}` prepares one that TFDS knows."
        )
    return read(_version_folder(root / name, dataset, version))


def scan(folder: str) -> Iterator[tuple[str, str]]:
    """(name, folder of a version) of every prepared set in `folder`, sorted, versions ascending."""
    root = epath.Path(folder)
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        inner = sorted(each for each in path.iterdir() if each.is_dir())
        for version in _sorted_versions(inner):
            yield path.name, str(version)
        for config in inner:
            if not _VERSION.fullmatch(config.name):
                for version in _sorted_versions(each for each in config.iterdir() if each.is_dir()):
                    yield f"{path.name}/{config.name}", str(version)


def _sorted_versions(folders: Any) -> list[Any]:
    found = [path for path in folders if _VERSION.fullmatch(path.name) and (path / INFO).exists()]
    return sorted(found, key=lambda path: tuple(map(int, path.name.split("."))))


def _version_folder(path: Any, dataset: str, version: str) -> Any:
    """The folder of a version: `path` itself, or the newest (or the given) version below it."""
    if not version and (path / INFO).exists():
        return path
    folders = [each for each in path.iterdir() if each.is_dir()]
    versions = _sorted_versions(folders)
    if not versions:
        configs = [
            each for each in folders if _sorted_versions(sub for sub in each.iterdir() if sub.is_dir())
        ]
        if len(configs) == 1:
            return _version_folder(configs[0], dataset, version)
        if configs:
            names = ", ".join(sorted(f"{path.name}/{config.name}" for config in configs))
            raise DataError(f"TFDS set {dataset!r} has several configs: expected one of {names}.")
        raise DataError(f"{str(path)!r} holds no prepared TFDS set: expected {INFO}, or VERSION/{INFO}.")
    if not version:
        return versions[-1]
    for each in versions:
        if each.name == version:
            return each
    raise DataError(
        f"TFDS set {dataset!r}: there is no version {version!r}.{suggest(version, [v.name for v in versions])}"
    )


def read(folder: Any) -> Prepared:
    """Read the JSON files in the folder of a version.

    Raises:
      DataError: a file is missing or does not say what it must.
    """
    folder = epath.Path(folder)
    info, features = _json(folder / INFO), _json(folder / "features.json")
    try:
        formats = (info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", ()))
        splits = {split["name"]: _shards(folder, info["name"], split) for split in info.get("splits", ())}
        return Prepared(
            folder=str(folder),
            name="/".join(part for part in (info["name"], info.get("configName")) if part),
            version=info["version"],
            file_formats=formats,
            splits=splits,
            num_bytes={split["name"]: int(split.get("numBytes", 0)) for split in info.get("splits", ())},
            features=dict(_flat(features)),
            supervised=_supervised(info),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{str(folder)!r}: {INFO} or features.json is not as TFDS writes it "
            f"({type(error).__name__}: {error})."
        ) from error


def convert_hint(found: Prepared) -> str:
    """What to do with a set whose records are no array_record files."""
    return (
        f"TFDS set {found.name!r} {found.version}: its records are {found.file_formats[0]} files; expected {FORMAT}. "
        f"Convert them: tfds convert_format --dataset_version_dir={found.folder} --out_file_format={FORMAT} "
        "(needs TensorFlow)."
    )


def _json(file: Any) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise DataError(f"{str(file)!r} is missing: prepare the set anew with TFDS 4.0 or later.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{str(file)!r} holds a {type(found).__name__}: expected a JSON object.")
    return found


def _shards(folder: Any, name: str, split: Mapping[str, Any]) -> tuple[Shard, ...]:
    lengths = [int(length) for length in split.get("shardLengths", ())]
    shards = []
    for index, length in enumerate(lengths):
        number, total = f"{index:0{_DIGITS}}", f"{len(lengths):0{_DIGITS}}"
        words = {
            "DATASET": name,
            "SPLIT": split["name"],
            "FILEFORMAT": FORMAT,
            "SHARD_INDEX": number,
            "NUM_SHARDS": total,
            "SHARD_X_OF_Y": f"{number}-of-{total}",
        }
        file = split.get("filepathTemplate") or TEMPLATE
        for word, value in words.items():
            file = file.replace(f"${{{word}}}", value).replace(f"{{{word}}}", value)
        shards.append(Shard(str(folder / file), length))
    return tuple(shards)


def _supervised(info: Mapping[str, Any]) -> tuple[str, str] | None:
    items = info.get("supervisedKeys", {}).get("tuple", {}).get("items", ())
    keys = [item.get("featureKey") for item in items]
    return (keys[0], keys[1]) if len(keys) == 2 and all(keys) else None


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Feature]]:
    if "featuresDict" in node:
        for key, inner in node["featuresDict"].get("features", {}).items():
            yield from _flat(inner, f"{prefix}/{key}" if prefix else key)
        return
    kind = next((key for key, value in node.items() if isinstance(value, dict)), "")
    content = node.get(kind, {})
    sizes = [int(size) for size in content.get("shape", {}).get("dimensions", ())]
    yield (
        prefix,
        Feature(
            kind=kind or node.get("pythonClassName", "unknown").rpartition(".")[2],
            shape=tuple(None if size < 0 else size for size in sizes),
            dtype=str(content.get("dtype", "")),
            encoding="" if content.get("encoding", "none") == "none" else str(content["encoding"]),
            num_classes=int(content.get("numClasses", 0)),
            optional=bool(content.get("optional", False)),
        ),
    )
