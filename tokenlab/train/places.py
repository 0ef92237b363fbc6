"""Where checkpoints are: a folder of a file system, or of a bucket. What differs between the two, and nothing else.

On a file system a checkpoint becomes one when its folder is renamed. In a bucket nothing can be renamed: it becomes one
when its manifest is written, the last object of all, and a folder without a manifest is none. What a killed process
leaves half-written or half-removed is removed when the next one opens the place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from tokenlab.core.bucket import Bucket, is_address
from tokenlab.core.errors import CheckpointError, StorageError
from tokenlab.train import manifest
from tokenlab.train.manifest import MANIFEST, MANIFEST_OF_BUCKET, META, Which, one_line

TEMPORARY = ".orbax-checkpoint-tmp"
"""What Orbax appends to the name of a folder it has not finished."""

ADDRESS = ".bucket"
"""A file in a folder here that stands for a workdir in a bucket: the address of that."""

_FOLDER = "checkpoints"
_DELETED = ".deleted"


class Place(Protocol):
    """Checkpoints by step. What cannot be done raises OSError or StorageError.

    Attributes:
        seals_last: whether a checkpoint is sealed when Orbax is done with it, or before it is renamed.
    """

    seals_last: bool

    def __str__(self) -> str: ...
    def path(self, step: int) -> Any:
        """What Orbax writes to and reads from."""

    def open(self) -> None:
        """Makes the place, and removes what killed processes left."""

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending, damaged ones included."""

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, in a few words."""

    def read_record(self, step: int) -> dict[str, Any]:
        """Its meta data; see `manifest.read_record`."""

    def seal(self, step: int, record: str) -> None:
        """Completes a checkpoint whose arrays are written."""

    def discard(self, step: int) -> None:
        """Removes what a save that failed left; raises nothing."""

    def remove(self, step: int) -> None:
        """Removes a checkpoint, so that at no moment half of one passes for a whole one."""

    def move_aside(self, step: int) -> str:
        """Gives a damaged one another name, which is returned."""

    def free(self) -> int | None:
        """Bytes that are free; None where that is not known."""


class Folder:
    """Checkpoints on a file system."""

    seals_last = False

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory).absolute()

    def __str__(self) -> str:
        return str(self.directory)

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.iterdir():
            if TEMPORARY in left.name or left.name.endswith(_DELETED):
                shutil.rmtree(left)

    def steps(self) -> list[int]:
        return manifest.committed_steps(self.directory)

    def damage(self, step: int) -> str | None:
        return manifest.damage(self.path(step))

    def read_record(self, step: int) -> dict[str, Any]:
        return manifest.read_record(self.path(step))

    def seal(self, step: int, record: str) -> None:
        (folder,) = self.directory.glob(f"{step}{TEMPORARY}*")  # about to be renamed by Orbax
        manifest.seal(folder, record)

    def discard(self, step: int) -> None:
        for left in self.directory.glob(f"{step}{TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)

    def remove(self, step: int) -> None:
        # Renamed first: a process killed while it removes files leaves no half of a checkpoint.
        shutil.rmtree(self.path(step).rename(self.directory / f"{step}{_DELETED}"))

    def move_aside(self, step: int) -> str:
        number = 1
        while (aside := self.directory / f"{step}.damaged-{number}").exists():
            number += 1
        self.path(step).rename(aside)
        return aside.name

    def free(self) -> int | None:
        return shutil.disk_usage(self.directory).free


class InBucket:
    """Checkpoints in a bucket. One process at a time may write there: see `tokenlab.core.lease`."""

    seals_last = True

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket

    def __str__(self) -> str:
        return str(self.bucket)

    def path(self, step: int) -> Any:
        from tokenlab.train.bucket_path import BucketPath

        return BucketPath(f"{self.bucket}/{step}")

    def open(self) -> None:
        whole = set(self.steps())
        for step in self._folders():
            if step not in whole:
                self._empty(step)

    def steps(self) -> list[int]:
        return [step for step in self._folders() if self._manifest(step) is not None]

    def damage(self, step: int) -> str | None:
        found = {name.partition("/")[2]: item for name, item in self.bucket.objects(f"{step}/").items()}
        name = self._manifest(step)
        if name is None:
            return f"{MANIFEST_OF_BUCKET} is missing"
        try:
            text = (self.bucket.read(f"{step}/{name}") or b"").decode()
        except UnicodeDecodeError as error:
            return f"{name}: {one_line(error)}"

        def digest(file: str) -> str | None:
            if file not in found:
                return None
            if name == MANIFEST_OF_BUCKET and found[file].md5 is not None:
                return found[file].md5
            return self._digest(f"{step}/{file}", "md5" if name == MANIFEST_OF_BUCKET else "sha256")

        return manifest.differences(text, name, digest)

    def read_record(self, step: int) -> dict[str, Any]:
        return manifest.read_record(self.path(step))

    def seal(self, step: int, record: str) -> None:
        self.bucket.write(f"{step}/{META}", record.encode())
        prefix = f"{step}/"
        found = {name.removeprefix(prefix): item for name, item in self.bucket.objects(prefix).items()}
        digests = {
            name: found[name].md5 or self._digest(prefix + name, "md5") for name in manifest.listed(found)
        }
        self.bucket.write(f"{step}/{MANIFEST_OF_BUCKET}", manifest.text_of(digests).encode())

    def discard(self, step: int) -> None:
        try:
            if self._manifest(step) is None:
                self._empty(step)
        except StorageError:
            return  # the next process that opens the place does it

    def remove(self, step: int) -> None:
        self.bucket.delete(f"{step}/{MANIFEST_OF_BUCKET}", f"{step}/{MANIFEST}")
        self._empty(step)

    def move_aside(self, step: int) -> str:
        _, folders = self.bucket.entries()
        number = 1
        while (aside := f"{step}.damaged-{number}") in folders:
            number += 1
        names = self.bucket.objects(f"{step}/")
        self.bucket.copy_each({name: f"{aside}/{name.partition('/')[2]}" for name in names})
        self.remove(step)
        return aside

    def free(self) -> int | None:
        return None

    def _folders(self) -> list[int]:
        return sorted(int(name) for name in self.bucket.entries()[1] if name.isdecimal())

    def _manifest(self, step: int) -> str | None:
        """The name of its manifest: ours, or that of a checkpoint that was copied from a file system."""
        names = (MANIFEST_OF_BUCKET, MANIFEST)
        return next((name for name in names if self.bucket.generation(f"{step}/{name}") is not None), None)

    def _empty(self, step: int) -> None:
        self.bucket.delete(*self.bucket.objects(f"{step}/"))

    def _digest(self, name: str, algorithm: str) -> str | None:
        content = self.bucket.read(name)
        return None if content is None else hashlib.new(algorithm, content).hexdigest()


def place(directory: str | os.PathLike[str] | Bucket) -> Place:
    """The place of checkpoints that a folder or an address is."""
    if isinstance(directory, Bucket):
        return InBucket(directory)
    return InBucket(Bucket(directory)) if is_address(directory) else Folder(directory)


def in_workdir(workdir: str | os.PathLike[str]) -> Place:
    """The checkpoints that a workdir has, or will have."""
    return place(f"{os.fspath(workdir).rstrip('/')}/{_FOLDER}")


def of_run(path: str | os.PathLike[str]) -> Place:
    """The checkpoints of a run.

    Args:
        path: a workdir, its folder of checkpoints, the address of one of these, or a folder that stands for it.
    """
    if is_address(path):
        address = os.fspath(path).rstrip("/")
        return place(address) if address.endswith(f"/{_FOLDER}") else in_workdir(address)
    directory = Path(path).absolute()
    if (directory / ADDRESS).is_file():
        return of_run((directory / ADDRESS).read_text(encoding="utf-8"))
    return in_workdir(directory) if (directory / _FOLDER).is_dir() else place(directory)


def whole_step(where: Place, which: Which) -> int:
    """The step of the checkpoint that `which` means, after every file of it was verified.

    Raises CheckpointError when there is no such checkpoint or it is damaged; takes no other one in its place.
    """
    steps = where.steps()
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {where}; expected a workdir with one, or its checkpoints folder"
        )
    if which == "latest":
        step = steps[-1]
    elif which == "best":
        step = _best(where, steps)
    elif which in steps:
        step = int(which)
    else:
        known = ", ".join(map(str, steps))
        raise CheckpointError(
            f"no checkpoint {which!r} in {where}; expected 'latest', 'best' or one of {known}"
        )
    reason = where.damage(step)
    if reason is not None:
        others = ", ".join(str(other) for other in steps if other != step) or "none"
        raise CheckpointError(
            f"checkpoint {step} in {where} is damaged ({reason}); give another step (there are: {others})"
        )
    return step


def _best(where: Place, steps: list[int]) -> int:
    records = {step: where.read_record(step) for step in steps}
    rules = [record["best"] for record in records.values() if record["best"]]
    best = None
    if rules:
        metric = rules[-1]["metric"]
        values = {step: record["metrics"].get(metric) for step, record in records.items()}
        best = manifest.best_of(values, rules[-1]["mode"])
    if best is None:
        raise CheckpointError(f"no checkpoint in {where} has a metric to choose the best by; give a step")
    return best
