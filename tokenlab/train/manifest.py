"""What makes a folder a whole checkpoint: its meta data, and the checksum of every file in it.

`meta.json` holds what is not an array: the name, shape and dtype of every leaf, metrics, and the meta data of
the run. `manifest.sha256` holds a checksum of each file in the format of `sha256sum -c`. Orbax and
TensorStore notice much of the damage a file can take, but not all of it (array data carries no checksum of
its own), so the manifest is what decides whether a checkpoint is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tokenlab.core.errors import CheckpointError

MANIFEST = "manifest.sha256"
META = "meta.json"
FORMAT = 1

# Orbax rewrites the first and adds the second after the manifest is made, and neither is read on restore.
_UNLISTED = {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}

Which = int | Literal["latest", "best"]


def seal(folder: Path, record: str) -> None:
    """Adds `record` (the text of `meta.json`) and the manifest to a folder that is otherwise complete.

    Raises OSError when they cannot be written.
    """
    _write(folder / META, record)
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    # META comes last and a manifest without it is refused: one that was cut short cannot pass for whole.
    names = [name for name in names if name not in _UNLISTED | {META}] + [META]
    _write(folder / MANIFEST, "".join(f"{_sha256(folder / name)}  {name}\n" for name in names))


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None when each is as it was written."""
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {one_line(error)}"
    names = []
    for line in lines[:-1]:
        digest, _, name = line.partition("  ")
        try:
            if _sha256(folder / name) != digest:
                return f"{name} is not as it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name}: {one_line(error)}"
        names.append(name)
    return None if META in names and lines[-1] == "" else f"{MANIFEST} is cut short"


def read_record(folder: Path) -> dict[str, Any]:
    """The content of `meta.json`. Raises CheckpointError when it cannot be read or has another format."""
    try:
        record = json.loads((folder / META).read_text(encoding="utf-8"))
        version = record["format"]
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


def whole_step(directory: Path, which: Which) -> int:
    """The step of the checkpoint that `which` means, after every file of it was verified.

    Raises CheckpointError when there is no such checkpoint or it is damaged; takes no other one in its place.
    """
    steps = committed_steps(directory)
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {directory}; expected a workdir with one, or its checkpoints folder"
        )
    if which == "latest":
        step = steps[-1]
    elif which == "best":
        step = _best_on_disk(directory, steps)
    elif which in steps:
        step = int(which)
    else:
        known = ", ".join(map(str, steps))
        raise CheckpointError(
            f"no checkpoint {which!r} in {directory}; expected 'latest', 'best' or one of {known}"
        )
    reason = damage(directory / str(step))
    if reason is not None:
        others = ", ".join(str(other) for other in steps if other != step) or "none"
        raise CheckpointError(
            f"checkpoint {step} in {directory} is damaged ({reason}); give another step (there are: {others})"
        )
    return step


def one_line(error: BaseException) -> str:
    """The message of an error as one line: long ones without their middle, TensorStore's without its settings."""
    text = " ".join(str(error).split()).split(" [tensorstore_spec")[0] or type(error).__name__
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-245:]}"


def _best_on_disk(directory: Path, steps: list[int]) -> int:
    records = {step: read_record(directory / str(step)) for step in steps}
    rules = [record["best"] for record in records.values() if record["best"]]
    best = None
    if rules:
        metric = rules[-1]["metric"]
        best = best_of(
            {step: record["metrics"].get(metric) for step, record in records.items()}, rules[-1]["mode"]
        )
    if best is None:
        raise CheckpointError(f"no checkpoint in {directory} has a metric to choose the best by; give a step")
    return best


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
