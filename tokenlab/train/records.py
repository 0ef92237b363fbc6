"""The folder of a run: whose it is, what it ran on, and its records, each of them once.

config.json            the configuration; a workdir belongs to one
tokenizer.json         of a run on text: the vocabulary that its weights know
run.json               versions, devices and facts of this session; `history` holds the sessions before it
metrics.jsonl          one JSON object a line: step, split, metrics
metrics.aside-1.jsonl  records that a resumed run makes anew, moved out of its way
tensorboard/           the same records for TensorBoard
checkpoints/           see tokenlab/train/checkpoint.py
samples/               pictures of what the model sampled, where config.sample_every asks for them
.lock                  held by the process that trains here

A workdir may be in a bucket (`gs://...`): see tokenlab/train/mirror.py.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections.config_dict import ConfigDict

import tokenlab
from tokenlab.core.bucket import Bucket, is_address
from tokenlab.core.config import diff, from_json, to_json
from tokenlab.core.errors import ConfigError, DataError, StorageError, TokenLabError
from tokenlab.train import metrics_file
from tokenlab.train.config import completed
from tokenlab.train.metrics_file import MetricsFile
from tokenlab.train.mirror import Mirror

MAY_CHANGE = (
    "hardware",
    "steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "sample_every",
    "keep_checkpoints",
    "data.corrupt",
    "data.memory",
    "data.prefetch",
    "data.threads",
    "data.workers",
    "model.execution",
    "model.remat",
    "optimizer.offload",
)
"""Keys of the configuration that may be others when a run goes on, as they change how numbers are worked out and not
which; so may those of `mesh`: it may go on elsewhere."""

TOKENIZER = "tokenizer.json"
"""The vocabulary that a run on text trained with, in its workdir, unless it is bytes."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Workdir:
    """The folder of one run, open for one process to write to; a context manager.

    Args:
        path: the folder; made, on entering, when missing. Or the mirror of a workdir in a bucket.
        config: the configuration of the run.
        primary: whether this process writes. Of the processes of one job only the first does, and in the others
            the methods do nothing. None: `jax.process_index() == 0`.

    Attributes:
        path: the folder, here.
        name: of the workdir, for messages: the folder, or its address.
        checkpoints: the folder for checkpoints in it, or their place in the bucket.
        notes: what is to be told about it after entering, one line each.

    Raises:
        ConfigError: the path is an address.

    Entering raises:
        StorageError: a bucket refuses, or cannot be reached.
        ConfigError: the folder belongs to a run of another configuration (the keys that differ are named;
            those of `MAY_CHANGE` and `mesh` may differ) or to an unknown one, another process trains in it, or it
            cannot be made. It stays as it was.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Mirror,
        config: Mapping[str, Any] | ConfigDict,
        *,
        primary: bool | None = None,
    ) -> None:
        if not isinstance(path, Mirror) and is_address(path):
            raise ConfigError(f"the workdir is {path}: expected a folder, or the mirror of one in a bucket")
        self._mirror = path if isinstance(path, Mirror) else None
        self.path = path.path if isinstance(path, Mirror) else Path(path).absolute()
        self.name = path.bucket if isinstance(path, Mirror) else self.path
        self.checkpoints: Path | Bucket = self.name / "checkpoints"
        self.notes: list[str] = []
        self._config = config
        self._primary = jax.process_index() == 0 if primary is None else primary
        self._run: dict[str, Any] = {}
        self._lock: int | None = None
        self._metrics: MetricsFile | None = None
        self._events: Any = None
        self._purge_step: int | None = None

    # ------------------------------------------------------------------------------------------ opening

    def __enter__(self) -> Workdir:
        if not self._primary:
            return self
        text = to_json(self._config)
        if self._mirror:
            self._mirror.fetch()
        self._changes()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise ConfigError(
                f"cannot use {self.path} as workdir: {error.strerror}; expected a folder that can be written to"
            ) from error
        try:
            changes = (
                self._changes()
            )  # again: another process may have come and gone before the lock was taken
            if changes is None or changes:
                write_atomic(self.path / "config.json", text + "\n")
            if self._mirror:
                self._mirror.push()
                self._mirror.start()
        except BaseException as error:
            self._close(error)
            raise
        if changes:
            self.notes.append(f"the configuration changed since the last session: {_listed(changes)}")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        try:
            self.close()
        except StorageError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the error that ended the block is the one to be shown

    def close(self) -> None:
        """Closes the files and gives the folder free."""
        for file in (self._metrics, self._events):
            if file is not None:
                file.close()
        self._metrics = self._events = None
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)  # which unlocks it, as the end of the process would
            self._lock = None
        if self._mirror and self._primary:
            self._mirror.release()

    def secure(self) -> None:
        """Returns when all records so far are where no end of this machine can take them: in the bucket, if any."""
        if self._mirror and self._primary:
            self._mirror.secure()

    def _changes(self) -> list[str] | None:
        """How the configuration differs from the folder's, where it may; None when the folder is new."""
        if not (self.path / "config.json").exists():
            for name in ("metrics.jsonl", "run.json", "checkpoints"):
                if (self.path / name).exists() or (self._mirror and self._mirror.holds(name)):
                    raise ConfigError(
                        f"{self.name} holds {name} but no config.json, so whose it is cannot be told; give another "
                        "workdir, or put its config.json back"
                    )
            return None
        changes = diff(completed(read_config(self.path)), completed(self._config))
        wrong = [line for line in changes if not _may_change(line.split(":")[0])]
        if wrong:
            raise ConfigError(
                f"{self.name} belongs to a run of another configuration: {_listed(wrong)}; give another "
                f"workdir, or the configuration in its config.json (only {', '.join(MAY_CHANGE)} and mesh may change)"
            )
        return changes

    def _take_lock(self) -> None:
        if self._mirror:
            note = self._mirror.take()
            if note:
                self.notes.append(note)
            self._mirror.fetch()  # again, as below
            return
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._lock, 200, 0).decode(errors="replace").strip()
            os.close(self._lock)
            self._lock = None
            raise ConfigError(
                f"{self.path} is in use by {holder or 'another process'}; wait for it, end it, or give another workdir"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            self.notes.append(
                f"the file system of {self.path} has no locks: nothing stops a second process from training in it"
            )
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def check_shared(self, patience: float = 30.0) -> None:
        """Of several processes: all see the same folder and run the same configuration; to be called when the first
        has entered.

        Args:
            patience: seconds in which a network file system has to show what another host wrote.

        Raises:
            ConfigError: this process sees no config.json in the folder, or it is not of its configuration.
        """
        if self._primary:
            return
        deadline = time.monotonic() + patience
        if self._mirror:
            self._mirror.fetch()
        while not (self.path / "config.json").exists():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"process {jax.process_index()} on {socket.gethostname()} does not see "
                    f"{self.name}/config.json, which process 0 wrote: expected a workdir that all hosts "
                    "share, such as a mounted bucket or NFS"
                )
            time.sleep(0.2)
        changes = diff(completed(read_config(self.path)), completed(self._config))
        if changes:
            raise ConfigError(
                f"process {jax.process_index()} on {socket.gethostname()} was started with another configuration than "
                f"process 0: {_listed(changes)}; give all the same"
            )

    def keep_tokenizer(self, tokenizer: Any) -> None:
        """Keeps a vocabulary that could be another one day (trained on text, or a file elsewhere): tokenizer.json."""
        if self._primary and hasattr(tokenizer, "to_json") and not (self.path / TOKENIZER).exists():
            write_atomic(self.path / TOKENIZER, tokenizer.to_json())

    # ------------------------------------------------------------------------------------------ run.json

    def begin_run(self, facts: Mapping[str, Any], step: int) -> list[str]:
        """Writes run.json for this session: its environment, when and from where it started, and `facts`.

        What the file said of the session before moves into its `history`, as far as it differs.

        Args:
            facts: of JSON values, such as the parameter count and the cost table; `update_run` adds more later.
            step: the step that the session starts from.

        Returns:
            Notes, one line each, when versions, devices or facts differ from the session before.
        """
        if not self._primary:
            return []
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        lasting = {"environment": environment(), **facts}
        self._run = {"started": now, "from_step": step, **lasting, "history": []}
        notes = []
        if (self.path / "run.json").exists():
            before = read_run(self.path)
            history = before.pop("history", [])
            shared = {key: before[key] for key in lasting if key in before}
            changes = diff(shared, {key: lasting[key] for key in shared})
            same = {key for key in shared if not diff({key: shared[key]}, {key: lasting[key]})}
            self._run["history"] = [
                *history,
                {key: value for key, value in before.items() if key not in same},
            ]
            if changes:
                notes.append(
                    "the session before ran under other conditions, so results may not repeat bit for bit: "
                    f"{_listed(changes)}"
                )
        self._write_run()
        return notes

    def update_run(self, facts: Mapping[str, Any]) -> None:
        """Adds facts to run.json that become known later, such as compile times; a key is replaced as a whole."""
        if not self._primary:
            return
        if not self._run:
            raise RuntimeError("Workdir.update_run before Workdir.begin_run")
        self._run |= facts
        self._write_run()

    def _write_run(self) -> None:
        write_json(self.path / "run.json", self._run)

    # ------------------------------------------------------------------------------------------ records

    def rewind(self, step: int) -> list[str]:
        """Makes the records end at `step`; to be called once, before the first `record`.

        Records of later steps, which the run is going to make anew, and a last line that was cut short go to
        `metrics.aside-<n>.jsonl`. However often the process is killed, no record is lost or there twice.

        Returns:
            A note, when something was moved.

        Raises:
            DataError: metrics.jsonl holds a line that is not a record.
        """
        if not self._primary:
            return []
        moved, aside = metrics_file.rewind(self.path, step)
        self._metrics = MetricsFile(self.path)
        # TensorBoard drops what earlier files hold from this step on.
        earlier = any((self.path / "tensorboard").glob("events.*"))
        earlier = earlier or bool(self._mirror and self._mirror.holds("tensorboard"))
        self._purge_step = step + 1 if earlier else None
        return [f"moved {moved} records past step {step} to {aside}"] if moved else []

    def record(self, record: Mapping[str, Any]) -> None:
        """Adds a record to metrics.jsonl, where it is safe from the end of the process, and to TensorBoard.

        TensorBoard gets the finite numbers.

        Args:
            record: "step" (int), "split" (str), and numbers, strings, booleans or None by name. Numbers that are not
                finite are written as null, with their value in "nonfinite": JSON has none.

        Raises:
            TokenLabError: the file cannot be written (no space).
            StorageError: another process has taken the workdir over.
        """
        if not self._primary:
            return
        if self._mirror:
            self._mirror.tell_if_lost()
        if self._metrics is None:
            raise RuntimeError("Workdir.record before Workdir.rewind")
        self._metrics.append(record)
        if self._events is None:
            self._events = _event_writer()(
                str(self.path / "tensorboard"),
                purge_step=self._purge_step,
                max_queue=1000,
                flush_secs=10,
                # The name that tensorboardX gives a file is only unique to the second.
                filename_suffix=f".{os.getpid()}.{time.monotonic_ns()}",
            )
        for name, value in record.items():
            if name == "step" or isinstance(value, str | bool | None):
                continue
            number = float(
                value
            )  # tensorboardX takes no integer past 64 bits, and warns of what is not finite
            if math.isfinite(number):
                self._events.add_scalar(f"{record['split']}/{name}", number, record["step"])


def _event_writer() -> Callable[..., Any]:
    """tensorboardX's writer, imported without the clients of clouds that it looks for: slow, and records are local."""
    clients = [name for name in ("boto3", "google.cloud.storage") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(clients))  # None: as if they were not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in clients:
            del sys.modules[name]
    return SummaryWriter


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or key.startswith("mesh.")


def environment() -> dict[str, Any]:
    """What results depend on besides configuration and code: versions, devices, cores, platform."""
    affinity = getattr(os, "sched_getaffinity", None)
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "tokenlab": tokenlab.__version__,
        "python": platform.python_version(),
        **versions,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "system": platform.platform(),
    }


def read_config(workdir: str | os.PathLike[str]) -> ConfigDict:
    """The configuration of a run. Raises ConfigError when the folder has none or it cannot be read."""
    path = Path(workdir) / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; expected the workdir of a run") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_run(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """What run.json says. Raises DataError when the folder has none or it cannot be read."""
    path = Path(workdir) / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {path}: {error}; expected a JSON object, or no file to begin anew"
        ) from error
    if not isinstance(run, dict):
        raise DataError(
            f"{path} holds a JSON {type(run).__name__}; expected an object, or no file to begin anew"
        )
    return run


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run, in the order of writing.

    Args:
        path: a workdir, or a file of records.

    Raises:
        DataError: there is no such file, or a line of it is not a record; the message names the line.
    """
    return metrics_file.read(Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON so that the file holds all of it or what it held before. Raises TokenLabError."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TokenLabError(
            f"{path} cannot hold what was given: {error}; expected finite JSON values"
        ) from error
    write_atomic(path, text + "\n")


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file so that it holds all of it or what it held before. Raises TokenLabError."""
    try:
        metrics_file.replace(Path(path), content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise TokenLabError(
            f"cannot write {path}: {error.strerror}; expected a folder that can be written to, with free space"
        ) from error


def _listed(lines: list[str]) -> str:
    return "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
