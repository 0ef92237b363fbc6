"""What makes a folder a whole checkpoint: its meta data, and the checksum of every file in it.

`meta.json` holds what is not an array: the name, shape and dtype of every leaf, metrics, and the meta data of
the run. `manifest.sha256` holds a checksum of each file in the format of `sha256sum -c`. Orbax and
TensorStore notice much of the damage a file can take, but not all of it (array data carries no checksum of
its own), so the manifest is what decides whether a checkpoint is whole.

In a bucket, which knows the MD5 of each object, the manifest is `manifest.md5`, in the format of `md5sum -c`; a
checkpoint that is copied from one place to the other is whole there too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from tokenlab.core.errors import CheckpointError, StorageError

MANIFEST = "manifest.sha256"
MANIFEST_OF_BUCKET = "manifest.md5"
META = "meta.json"
FORMAT = 1

# Orbax rewrites the first and adds the second after the manifest is made, and neither is read on restore.
_UNLISTED = {MANIFEST, MANIFEST_OF_BUCKET, "_CHECKPOINT_METADATA", "commit_success.txt"}

Which = int | Literal["latest", "best"]


def seal(folder: Path, record: str) -> None:
    """Adds `record` (the text of `meta.json`) and the manifest to a folder that is otherwise complete.

    Raises OSError when they cannot be written.
    """
    _write(folder / META, record)
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    names = (path.relative_to(folder).as_posix() for path in files)
    _write(folder / MANIFEST, text_of({name: _digest(folder / name, "sha256") for name in listed(names)}))


def listed(names: Iterable[str]) -> list[str]:
    """Of the names of a checkpoint's files those that its manifest lists, in its order.

    META comes last and a manifest without it is refused: one that was cut short cannot pass for whole.
    """
    return [*sorted(set(names) - _UNLISTED - {META}), META]


def text_of(digests: Mapping[str, str]) -> str:
    """The text of a manifest."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None when each is as it was written."""
    name, algorithm = MANIFEST, "sha256"
    if not (folder / MANIFEST).exists() and (folder / MANIFEST_OF_BUCKET).exists():
        name, algorithm = MANIFEST_OF_BUCKET, "md5"
    try:
        text = (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError) as error:
        return f"{name}: {one_line(error)}"

    def digest(file: str) -> str | None:
        try:
            return _digest(folder / file, algorithm)
        except FileNotFoundError:
            return None

    return differences(text, name, digest)


def differences(text: str, manifest: str, digest: Callable[[str], str | None]) -> str | None:
    """What differs from a manifest, in a few words; None where nothing does.

    Args:
        text: of the manifest.
        manifest: its name.
        digest: the checksum of a file now; None where there is none.
    """
    lines = text.split("\n")
    names = []
    for line in lines[:-1]:
        expected, _, name = line.partition("  ")
        try:
            found = digest(name)
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            return f"{name}: {one_line(error)}"
        if found is None:
            return f"{name} is missing"
        if found != expected:
            return f"{name} is not as it was written"
        names.append(name)
    return None if META in names and lines[-1] == "" else f"{manifest} is cut short"


def read_record(folder: Path) -> dict[str, Any]:
    """The content of `meta.json`. Raises CheckpointError when it cannot be read or has another format."""
    try:
        record = json.loads((folder / META).read_text(encoding="utf-8"))
        version = record["format"]
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged ({META}: {one_line(error)}); give another step"
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {version!r}, expected {FORMAT}; read it with the version of "
            "TokenLab that wrote it (run.json in its workdir names it)"
        )
    return record


def committed_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, damaged ones included; none without such a folder."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def best_of(values: Mapping[int, float | None], mode: str) -> int | None:
    """The step of the largest ("max") or smallest ("min") value, the earliest of equals; None without any."""
    sign = 1 if mode == "max" else -1
    known = {step: sign * value for step, value in values.items() if value is not None}
    return max(sorted(known), key=known.__getitem__, default=None)


def one_line(error: BaseException) -> str:
    """The message of an error as one line: long ones without their middle, TensorStore's without its settings."""
    text = " ".join(str(error).split()).split(" [tensorstore_spec")[0] or type(error).__name__
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-245:]}"


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
