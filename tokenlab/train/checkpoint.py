"""Checkpoints: the state and the facts that belong to it, written whole or not at all, checked before use.

A checkpoint is a folder named by its step. Orbax writes the arrays into it asynchronously, under a temporary
name; `meta.json` and a manifest of checksums are added (tokenlab/train/manifest.py), and one rename makes it
a checkpoint. In a bucket it is the manifest, written last, that does (tokenlab/train/places.py). A damaged one is never
read: restoring takes the one before it and says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from tokenlab.core.bucket import Bucket
from tokenlab.core.errors import CheckpointError, StorageError, suggest
from tokenlab.core.lease import TakenOver
from tokenlab.sharding import agree
from tokenlab.train import leaves, manifest, places
from tokenlab.train.manifest import Which, one_line

LEAST_SHARE = 1 << 20
"""Bytes that each of several devices with the same array writes of it at least."""


class Checkpoints:
    """The checkpoints of one run: saved in the background, the newest ones and the best one kept.

    With several processes each of them makes one and calls the same methods in the same order, on a file
    system that all of them see, or in a bucket.

    Args:
        directory: the folder of the checkpoints, or its address; created when missing. What a killed save left is
            removed.
        keep: how many of the newest checkpoints stay, >= 1.
        best: whether the checkpoint with the largest ("max") or smallest ("min") `metric` stays too, the
            earliest of equals. None: none does.
        metric: the key of that metric in the `metrics` given to `save`.
        before: called in the first process, in the background, before a checkpoint becomes one: what has to be safe
            by then. What it raises fails the save.

    Raises:
        CheckpointError: `keep` or `best` is out of range, or the folder cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Bucket,
        *,
        keep: int,
        best: Literal["max", "min"] | None = None,
        metric: str = "accuracy",
        before: Callable[[], None] | None = None,
    ) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise CheckpointError(f"keep={keep!r} checkpoints; expected an integer of at least 1")
        if best not in ("max", "min", None):
            raise CheckpointError(f"best={best!r}; expected 'max', 'min' or None")
        _silence_orbax()
        self._place = places.place(directory)
        self._keep, self._mode, self._metric, self._before = keep, best, metric, before
        self._primary = jax.process_index() == 0
        try:
            if self._primary:
                self._place.open()
        except OSError as error:
            raise CheckpointError(
                f"cannot open the checkpoint folder {directory}: {one_line(error)}; expected a folder that "
                "can be written to"
            ) from error
        self._values = {step: self._value_on_disk(step) for step in self.steps()}
        self._pending: tuple[int, str] | None = None
        self._finisher: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._checkpointer = self._new_checkpointer()

    def steps(self) -> list[int]:
        """The steps that have a committed checkpoint, ascending."""
        return self._place.steps()

    def best_step(self) -> int | None:
        """The step of the best metric among the checkpoints present; None when none has one."""
        return manifest.best_of(dict(self._values), self._mode) if self._mode else None

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Starts to save; returns once the arrays may be donated, while files are written in the background.

        One save is under way at a time: a second one waits for the first. Older checkpoints are removed only
        after the new one is committed.

        Args:
            step: the number of optimizer steps behind `state`, >= 0.
            state: a pytree of jax arrays of any dtype (bfloat16, integers, typed and raw PRNG keys).
            meta: what else a run needs to go on, of JSON values; finite numbers only.
            metrics: metrics at this step; with `best` they hold `metric`. A metric that is not finite never
                counts as the best. None: this checkpoint cannot be the best.
            wait: return only when the checkpoint is committed.

        Raises:
            CheckpointError: the step is saved already, an argument cannot be saved, or writing failed (no
                space, no permission), be it of this checkpoint or of the one before it. Older checkpoints
                stay as they were.
        """
        self.wait()
        if step in self.steps():
            raise CheckpointError(
                f"step {step} is saved already in {self._place}; expected a step without a checkpoint "
                "(Checkpoints.steps() lists those that have one)"
            )
        named = leaves.named(state)
        numbers = {key: float(value) for key, value in (metrics or {}).items()}
        if self._mode and metrics is not None and self._metric not in numbers:
            raise CheckpointError(
                f"the best checkpoint is chosen by {self._metric!r}, which is not among the metrics of step "
                f"{step}.{suggest(self._metric, numbers)}"
            )
        finite = {key: number if math.isfinite(number) else None for key, number in numbers.items()}
        record = {
            "format": manifest.FORMAT,
            "step": step,
            "leaves": leaves.describe(named),
            "metrics": finite,
            "best": {"mode": self._mode, "metric": self._metric} if self._mode else None,
            "meta": dict(meta),
        }
        try:
            self._pending = (step, json.dumps(record, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the meta data of step {step} is not JSON: {one_line(error)}; expected strings, booleans, "
                "finite numbers, None, lists, and dicts with string keys"
            ) from error
        self._check_space(step, sum(leaf.nbytes for leaf in named.values()))
        try:
            with jax.transfer_guard("allow"):  # copying the state to the host is what a save is for
                arrays = ocp.args.PyTreeSave(leaves.to_save(named))
                self._checkpointer.save(self._place.path(step), args=arrays)
        except Exception as error:  # whatever Orbax raises, the user is told in one line
            self._discard(step, error)
            raise self._save_error(step, error) from error
        self._finisher = threading.Thread(
            target=self._finish, args=(step, finite.get(self._metric)), name=f"checkpoint-{step}"
        )
        self._finisher.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way. Raises CheckpointError, once, when the last save failed."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Waits for the save under way and releases Orbax's threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # the error that ended the block is the one to be shown

    def restore_latest(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int, list[str]] | None:
        """Restores the newest checkpoint that is whole.

        A damaged checkpoint (a file missing, cut short or altered) is renamed to `<step>.damaged-<k>`, never
        deleted, and the one before it is taken. Nothing is renamed unless a whole one is found and fits.

        Args:
            abstract_state: a pytree like the saved one whose leaves have `shape`, `dtype` and `sharding`
                (`jax.ShapeDtypeStruct`); the sharding may differ from that of the save. A leaf without one
                goes to the first device.

        Returns:
            (state, meta, step, notes), each note one line about a checkpoint that was passed over; None when
            there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints but none is whole, or the newest whole one is of another
                model (a leaf is missing, is too many, or has another shape or dtype).
        """
        self.wait()
        steps = self.steps()
        damaged: dict[int, str] = {}
        chosen = -1 if steps else -2
        if self._primary:
            for step in reversed(steps):
                reason = self._place.damage(step)
                if reason is None:
                    chosen = step
                    break
                damaged[step] = reason
        chosen = agree.from_primary(chosen)
        if chosen == -2:
            return None
        if chosen == -1:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self._place} can be read ({reasons}); move the "
                "folder away, or give another workdir, to start anew"
            )
        state, meta = self._restore(chosen, abstract_state)
        notes = []
        for step, reason in damaged.items():
            moved = self._move_aside(step)
            notes.append(f"checkpoint {step} is damaged ({reason}): moved to {moved}, going on from {chosen}")
        return state, meta, chosen, notes

    def restore(self, which: Which, abstract_state: Any) -> tuple[Any, dict[str, Any], int]:
        """Restores one checkpoint, given by its step, as "latest" or as "best", and no other in its place.

        Arguments as for `restore_latest`. Returns (state, meta, step).

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or it is of another model.
        """
        self.wait()
        step = agree.from_primary(places.whole_step(self._place, which) if self._primary else -1)
        return *self._restore(step, abstract_state), step

    def _restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        record = self._place.read_record(step)
        return leaves.restore(self._place.path(step), record["leaves"], abstract_state), record["meta"]

    def _new_checkpointer(self) -> ocp.AsyncCheckpointer:
        # Made in the background, a folder that cannot be made leaves threads that wait five minutes for it.
        options = ocp.options.AsyncOptions(
            post_finalization_callback=None if self._place.seals_last else self._seal,
            create_directories_asynchronously=False,
        )
        return ocp.AsyncCheckpointer(_handler(), async_options=options)

    def _seal(self) -> None:
        """Completes the folder that Orbax has filled; in the first process, in the background.

        An error raised here fails the save.
        """
        assert self._pending is not None
        if self._before is not None:
            self._before()
        self._place.seal(*self._pending)

    def _finish(self, step: int, value: float | None) -> None:
        """Waits for the save under way, then removes what is to be kept no longer; the body of a thread."""
        try:
            self._checkpointer.wait_until_finished()
            if self._place.seals_last and self._primary:
                self._seal()
        except BaseException as error:  # left to the thread it would be a traceback on stderr, and lost
            self._discard(step, error)
            self._failure = self._save_error(step, error)
            return
        self._values[step] = value
        old = None
        try:
            steps = self.steps()
            for old in sorted(set(steps) - {*steps[-self._keep :], self.best_step()}):
                self._values.pop(old, None)
                if self._primary:
                    self._place.remove(old)
        except (OSError, StorageError) as error:
            self._failure = CheckpointError(
                f"cannot remove the old checkpoint {old} in {self._place}: {one_line(error)}; "
                f"expected a folder that can be written to (step {step} is saved)"
            )

    def _check_space(self, step: int, needed: int) -> None:
        """Tells of a full disk before anything is written; a quota only shows while writing."""
        try:
            free = self._place.free() if self._primary else None
        except OSError as error:
            raise self._save_error(step, error) from error
        free = agree.from_primary(None if free is None else free // 10**6)
        if free is not None and free * 10**6 < needed:
            raise CheckpointError(
                f"cannot save step {step} in {self._place}: it takes {needed / 1e6:.1f} MB of space and {free} MB "
                "are free; make room, or give another workdir"
            )

    def _discard(self, step: int, error: BaseException) -> None:
        """Removes what a failed save left on disk and in Orbax, whose background errors surface singly.

        Where another process has taken the place over, that may be saving the same step: its files stay.
        """
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        self._checkpointer = self._new_checkpointer()
        if self._primary and not isinstance(error, TakenOver):
            self._place.discard(step)

    def _save_error(self, step: int, error: BaseException) -> CheckpointError:
        remaining = "not known"
        with contextlib.suppress(StorageError):
            remaining = ", ".join(map(str, self.steps())) or "none"
        return CheckpointError(
            f"cannot save step {step} in {self._place}: {one_line(error)}; expected a folder that can be "
            f"written to, with free space (whole checkpoints: {remaining})"
        )

    def _move_aside(self, step: int) -> str:
        try:
            aside = self._place.move_aside(step)
        except OSError as error:
            raise CheckpointError(
                f"cannot move the damaged checkpoint {self._place.path(step)} aside: {one_line(error)}; move it away "
                "by hand"
            ) from error
        self._values.pop(step, None)
        return aside

    def _value_on_disk(self, step: int) -> float | None:
        """The metric of a checkpoint of an earlier session; None where its meta data cannot be read."""
        with contextlib.suppress(CheckpointError):
            return self._place.read_record(step)["metrics"].get(self._metric)
        return None


def load_params(
    path: str | os.PathLike[str], which: Which = "latest", *, part: str = "params"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads one part of a saved state without knowing the rest (the optimizer). Changes nothing on disk.

    Args:
        path: a workdir, its folder of checkpoints, or the address of one of these.
        which: "latest", "best", or a step.
        part: the name of the part at the top of the state: "params", "ema", ...

    Returns:
        (tree, meta): nested dicts of numpy arrays with the dtypes of the save; the meta data given to `save`,
        with the key "step" added.

    Raises:
        CheckpointError: there is no such checkpoint or no such part in it, or the checkpoint is damaged.
    """
    _silence_orbax()
    where = places.of_run(path)
    step = places.whole_step(where, which)
    record = where.read_record(step)
    return leaves.restore_part(where.path(step), record["leaves"], part), {**record["meta"], "step": step}


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's way to write arrays, but for small ones that several devices have whole: one device writes those.

    Orbax lets each of the devices write its share of every leaf. To cut that out is a program for each shape and share
    (some hundred for a small model on eight devices) that is compiled while the first save holds up the training.
    """
    # It keeps what kind of random keys a leaf holds, and Orbax gives no public name for it: one that does not have it
    # there writes in its own way, which takes longer and is as good.
    store = getattr(ocp.type_handlers.get_type_handler(jax.Array), "_array_metadata_store", None)
    if store is None:
        return ocp.PyTreeCheckpointHandler()
    arrays = ocp.type_handlers.ArrayHandler(
        array_metadata_store=store, min_slice_bytes_for_replica_parallel=LEAST_SHARE
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _NotFromOrbax(logging.Filter):
    """Drops what Orbax logs: every step of every save, and errors that are raised here as CheckpointError."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.pathname.startswith(_ORBAX)


class _NotOfFailedSaves(logging.Filter):
    """Drops what asyncio logs of tasks of Orbax that nobody waited for; other tasks' reports stay.

    At the first write that fails Orbax leaves the others where they are and closes the event loop of the save.
    Whenever the garbage collector comes to one of them, asyncio logs its error with a traceback, long after the one
    line that the user should see.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        # A task is shown with the file of its coroutine; of a future of several the error tells whose the first was.
        task, _, _ = record.getMessage().partition(" exception=")
        if " coro=<" in task:
            return f" at {_ORBAX}" not in task
        frames = record.exc_info and getattr(record.exc_info[1], "__traceback__", None)
        return not (frames and frames.tb_frame.f_code.co_filename.startswith(_ORBAX))


class _NotTooLate:
    """A hook for errors nobody can catch that drops those of writes which a failed save has left behind.

    TensorStore tells the closed loop when such a write ends; and a write that had not begun is a coroutine that was
    never awaited, an error where warnings are errors (elsewhere the filter of `_silence_orbax` drops it).
    """

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        given, error = unraisable.object, unraisable.exc_value
        ended = given is None and _says_loop_is_closed(error)
        not_begun = isinstance(given, types.CoroutineType) and given.cr_code.co_filename.startswith(_ORBAX)
        if not (ended or (not_begun and isinstance(error, RuntimeWarning))):
            self._hook(unraisable)


def _says_loop_is_closed(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


_ORBAX = os.path.join(os.path.dirname(ocp.__file__), "")
_NOT_FROM_ORBAX = _NotFromOrbax()
_NOT_OF_FAILED_SAVES = _NotOfFailedSaves()
_NOT_BEGUN = (
    r"coroutine '(async_serialize_from_host(\.<locals>\.write_fragment)?|_async_serialize_shardings|"
    r"_async_serialize_replica_slices)' was never awaited"
)


def _silence_orbax() -> None:
    """Orbax logs through the one logger of absl, whose level is not ours to set: its records are filtered.

    So is what Python reports of a failed save that Orbax does not tidy up; its error is raised as CheckpointError.
    """
    logging.getLogger("absl").addFilter(_NOT_FROM_ORBAX)
    logging.getLogger("asyncio").addFilter(_NOT_OF_FAILED_SAVES)
    warnings.filterwarnings("ignore", _NOT_BEGUN, RuntimeWarning)
    if not isinstance(sys.unraisablehook, _NotTooLate):
        sys.unraisablehook = _NotTooLate(sys.unraisablehook)
