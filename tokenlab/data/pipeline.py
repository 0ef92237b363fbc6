"""From a source to batches: training batches as a pure function of (seed, step), evaluation batches with exact counts.

Nothing here has a position of its own. A run that goes on at step t, on any number of processes, asks for batch t and
sees what the uninterrupted run would have seen; its checkpoint keeps `TrainStream.state(t)` only to notice when the
question has changed.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from tokenlab.core.errors import DataError
from tokenlab.data.augment import Augment
from tokenlab.data.draws import Purpose, check_seed, permutation
from tokenlab.data.source import Batch, Source, check_batch

T = TypeVar("T")


class TrainStream:
    """Endless training batches of a split, shuffled anew each epoch.

    Example p of the run is example `p % n` of epoch `p // n`, where n is the size of the split, and row i of step t is
    example `t * batch_size + i`. So batches run over the end of an epoch, every epoch holds every example once, and
    the order of the global batch does not depend on the number of processes: each takes its contiguous rows. The order
    of an epoch is made with its first batch and kept for two epochs: 8 bytes an example, 0.15 s a million of them.

    Args:
      source: what to read.
      split: its split.
      batch_size: rows of the global batch, over all processes; at most the size of the split, so that no batch holds
        an example three times, and divisible by `process_count`.
      seed: in [0, 2**64); decides order and augmentation.
      augment: changes to images, "" for none (see `tokenlab.data.augment`).
      process_index: this process, in [0, process_count).
      process_count: processes that share the global batch.

    Raises:
      DataError: one of these does not hold, the split is unknown or the augmentation does not parse.
    """

    def __init__(
        self,
        source: Source,
        split: str,
        batch_size: int,
        *,
        seed: int,
        augment: str = "",
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._records = source.split(split)
        self._source = source
        self._split = split
        self._seed = check_seed(seed)
        self._augment = Augment(augment, source.spec)
        self._size = len(self._records)
        self._rows = _process_rows(batch_size, process_index, process_count)
        self._batch_size = batch_size
        if batch_size > self._size:
            raise DataError(
                f"batch_size {batch_size} is larger than split {split!r} of source {source.name!r}; "
                f"expected at most its {self._size} examples"
            )
        # A batch touches two epochs at most. The cache is safe to share with a prefetching thread.
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def indices(self, step: int) -> np.ndarray:
        """Which examples of the split this process sees at `step`: int64 [rows of this process]."""
        if step < 0:
            raise DataError(f"step is {step}; expected 0 or more")
        first = step * self._batch_size
        position = np.arange(first + self._rows.start, first + self._rows.stop)
        epoch, place = np.divmod(position, self._size)
        result = self._order(int(epoch[0]))[place]
        if epoch[-1] != epoch[0]:
            result = np.where(epoch == epoch[0], result, self._order(int(epoch[-1]))[place])
        return result

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of `step` (0 is the first).

        Returns:
          The spec's keys as arrays [rows, ...], and "mask" float32 [rows], all ones.

        Raises:
          DataError: the records are not what the source's spec says, or hold NaN or infinity.
        """
        indices = self.indices(step)
        batch = self._records.batch(indices)
        check_batch(batch, self._source, self._split, indices)
        batch = self._augment(
            batch, seed=self._seed, step=step, rows=self._rows, global_batch=self._batch_size
        )
        return {**batch, "mask": np.ones(len(indices), np.float32)}

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data, JSON: the next step, and all that the batches depend on."""
        return {"step": step, **self._identity()}

    def check(self, state: Mapping[str, Any]) -> int:
        """The step to go on with, when `state` (from a checkpoint) is of the same batches.

        The number of processes may differ: it does not change the order.

        Raises:
          DataError: the checkpoint was written with other data, seed, batch size or augmentation; the message names
            each difference.
        """
        identity = self._identity()
        differences = [
            f"{key} is {value!r} and was {state.get(key)!r}"
            for key, value in identity.items()
            if state.get(key) != value
        ]
        step = state.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            differences.append(f"its step is {step!r}, expected an int >= 0")
        if differences:
            raise DataError(
                f"the checkpoint's data state does not fit this run: {'; '.join(differences)}. "
                "Go on with the same data settings, or start anew in another workdir"
            )
        return step

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self._source.fingerprint,
            "split": self._split,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "augment": self._augment.text,
        }

    def _make_order(self, epoch: int) -> np.ndarray:
        return permutation(self._seed, Purpose.ORDER, epoch, self._size)


def eval_batches(
    source: Source, split: str, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """All examples of a split once, in its own order; the last batch is padded.

    Args:
      source: what to read.
      split: its split.
      batch_size: rows of the global batch, divisible by `process_count`; it may exceed the split.
      process_index: this process, in [0, process_count).
      process_count: processes that share each batch; each sees its contiguous rows, and as many batches as the others.

    Yields:
      The spec's keys as arrays [batch_size / process_count, ...], and "mask" float32 [rows]: 1 for an example, 0 for
      a row of zeros that fills the last batch. Over all processes the masks sum to the size of the split.

    Raises:
      DataError: at the call, for a bad batch size or split; while iterating, for records that are not what the spec
        says.
    """
    records = source.split(split)
    rows = _process_rows(batch_size, process_index, process_count)
    return _eval_batches(records, source, split, batch_size, rows)


def num_eval_batches(source: Source, split: str, batch_size: int) -> int:
    """How many batches `eval_batches` yields with the same arguments; raises as it does."""
    _process_rows(batch_size, 0, 1)
    return -(-len(source.split(split)) // batch_size)


def _eval_batches(records: Any, source: Source, split: str, batch_size: int, rows: range) -> Iterator[Batch]:
    size = len(records)
    for first in range(0, size, batch_size):
        indices = np.arange(min(first + rows.start, size), min(first + rows.stop, size))
        # A process whose rows are all padding still joins in with a batch of the right shape.
        batch = records.batch(indices)
        check_batch(batch, source, split, indices)
        batch["mask"] = np.ones(len(indices), np.float32)
        missing = len(rows) - len(indices)
        if missing:
            batch = {key: _pad(array, missing) for key, array in batch.items()}
        yield batch


def _pad(array: np.ndarray, missing: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


def _process_rows(batch_size: int, process_index: int, process_count: int) -> range:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size is {batch_size!r}; expected an int >= 1")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise DataError(
            f"process {process_index} of {process_count}; expected an index from 0 to the count - 1"
        )
    if batch_size % process_count:
        raise DataError(
            f"batch_size {batch_size} does not divide over {process_count} processes; expected a multiple of them"
        )
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


class Prefetch(Generic[T]):
    """Iterates over `make(step)` for step = start, start + 1, ..., making `depth` of them ahead in a thread.

    Use it in a `with` block; leaving the block ends the thread. What `make` raises is raised by `next` at the step
    where it happened, as the same exception.

    Args:
      make: a function of the step, such as `TrainStream.batch`; called in the thread when `depth` > 0.
      start: first step.
      stop: the step before which to end; None goes on for ever.
      depth: batches made ahead; 0 uses no thread and makes each batch when it is asked for.
      put: applied to each batch in the same thread, for example to move it to the devices.

    Raises:
      DataError: depth is negative.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        start: int = 0,
        *,
        stop: int | None = None,
        depth: int = 0,
        put: Callable[[Any], T] | None = None,
    ):
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            raise DataError(f"prefetch is {depth!r}; expected an int >= 0")
        self._make = make
        self._put = put
        self._step = start
        self._asked = start
        self._stop = stop
        self._depth = depth
        self._ahead: deque[Future[T]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenlab-data") if depth else None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stop is not None and self._step >= self._stop:
            self.close()
            raise StopIteration
        step, self._step = self._step, self._step + 1
        if self._thread is None:
            return self._one(step)
        # One more than `depth` are under way while the oldest is waited for.
        while self._asked <= step + self._depth and (self._stop is None or self._asked < self._stop):
            self._ahead.append(self._thread.submit(self._one, self._asked))
            self._asked += 1
        return self._ahead.popleft().result()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the iteration and its thread: what has begun is finished, what waits is dropped. May be called again."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._ahead.clear()
        self._stop = self._step

    def _one(self, step: int) -> T:
        batch = self._make(step)
        return batch if self._put is None else self._put(batch)
