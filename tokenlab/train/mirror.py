"""A run whose workdir is in a bucket: its small files are kept in a folder here, and the bucket gets them whole.

Records are appended to, rewound and locked, which a bucket does not offer. So the first process works on a folder of
its own, as on any other, and writes what changed in it to the bucket: every minute, at the end, and before each
checkpoint becomes one. Whatever checkpoint is there, its records are too; and records past it are made anew by the run
that goes on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tokenlab.core.bucket import Bucket, is_address
from tokenlab.core.errors import ConfigError, StorageError
from tokenlab.core.lease import NAME as LOCK
from tokenlab.core.lease import Lease
from tokenlab.train.places import ADDRESS

EVERY = 60.0
"""Seconds between two writings of what changed."""

_READ = (
    ".json",
    ".jsonl",
    ".pending",
)  # what a run reads of what it wrote; its pictures and events only go out


class Mirror:
    """A folder here that stands for a workdir in a bucket; a context manager, at whose end it is removed.

    Where something could not be written to the bucket it stays, and the error says where it is.

    Args:
        address: of the workdir.

    Attributes:
        bucket: the workdir.
        path: the folder here.

    Raises:
        ConfigError, StorageError: as `Bucket`; methods too.
    """

    def __init__(self, address: str | os.PathLike[str]) -> None:
        self.bucket = Bucket(address)
        self.path = Path(tempfile.mkdtemp(prefix="tokenlab-"))
        (self.path / ADDRESS).write_text(self.bucket.address, encoding="utf-8")
        self._known: dict[str, tuple[int, int]] = {}
        self._pushing = threading.Lock()
        self._lease: Lease | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._keep = False

    def __enter__(self) -> Mirror:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._keep:
            shutil.rmtree(self.path, ignore_errors=True)

    def fetch(self) -> None:
        """Brings what a run reads of its workdir: configuration, facts, records, vocabulary."""
        for name in self.bucket.entries()[0]:
            if name.endswith(_READ) and name != LOCK:
                content = self.bucket.read(name)
                if content is not None:
                    (self.path / name).write_bytes(content)
                    self._known[name] = _stamp(self.path / name)

    def holds(self, folder: str) -> bool:
        """Whether the bucket has something in a folder of the workdir."""
        return not (self.bucket / folder).is_empty()

    def push(self) -> None:
        """Writes to the bucket what is new or changed here, and removes there what was removed here."""
        with self._pushing:
            found = {
                file.relative_to(self.path).as_posix(): file
                for file in sorted(self.path.rglob("*"))
                if file.is_file() and not file.name.startswith(".")
            }
            # Sorted, so that records which are moved aside are there before those that stay replace all of them.
            for name, file in found.items():
                with contextlib.suppress(FileNotFoundError):  # renamed in this moment: the next time
                    stamp = _stamp(file)
                    if self._known.get(name) != stamp:
                        self.bucket.write(name, _whole(file))
                        self._known[name] = stamp
            gone = [name for name in self._known if name not in found]
            self.bucket.delete(*gone)
            for name in gone:
                del self._known[name]

    def take(self) -> str | None:
        """Becomes the only one that writes to the workdir; returns a note. Raises ConfigError when another one does."""
        self._lease = Lease(self.bucket)
        return self._lease.take()

    def start(self) -> None:
        """Begins to write what changed every `EVERY` seconds."""
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def tell_if_lost(self) -> None:
        """Raises StorageError when another process has taken the workdir over."""
        if self._lease is not None:
            self._lease.tell_if_lost()

    def secure(self) -> None:
        """Writes what changed, and makes sure that the workdir is still this process's, before and after."""
        self._push_if_ours()
        if self._lease is not None:
            self._lease.check()

    def release(self) -> None:
        """Writes what changed, and gives the workdir free."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if self._lease is not None:
                self._push_if_ours()
        except StorageError as error:
            self._keep = True
            raise StorageError(f"{error} What could not be written is in {self.path}.") from error
        finally:
            if self._lease is not None:
                self._lease.release()
                self._lease = None

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            # What cannot be written now is written the next time, or said when a checkpoint needs it.
            with contextlib.suppress(StorageError):
                self._push_if_ours()

    def _push_if_ours(self) -> None:
        """As `push`, but one that slept while another process took over must not write over what that has written."""
        if self._lease is not None:
            self._lease.check()
        self.push()


@contextlib.contextmanager
def opened(workdir: str | os.PathLike[str]) -> Iterator[Mirror | None]:
    """The mirror of a workdir in a bucket; None of one that is a folder."""
    if not is_address(workdir):
        yield None
        return
    with Mirror(workdir) as mirror:
        yield mirror


@contextlib.contextmanager
def here(workdir: str | os.PathLike[str], *, push: bool = False) -> Iterator[Path]:
    """A run's workdir, to read: itself, or a folder that stands for it where it is in a bucket.

    Args:
        workdir: of a training run.
        push: write what was added to the folder, such as pictures, to the bucket.

    Raises:
        ConfigError: the address holds no run.
        StorageError: as `Bucket`.
    """
    if not is_address(workdir):
        yield Path(workdir)
        return
    with Mirror(os.fspath(workdir).rstrip("/").removesuffix("/checkpoints")) as mirror:
        mirror.fetch()
        if not (mirror.path / "config.json").exists():
            raise ConfigError(f"{workdir} holds no config.json: expected the workdir of a training run.")
        yield mirror.path
        if push:
            mirror.push()


def _stamp(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_mtime_ns, facts.st_size


def _whole(file: Path) -> bytes:
    """The content of a file; of records without a line that is just being written."""
    content = file.read_bytes()
    return content[: content.rfind(b"\n") + 1] if file.suffix == ".jsonl" else content
