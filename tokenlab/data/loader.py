"""Batches made ahead, in a thread, in several, or in worker processes; and their workers' clean end.

What is made is a function of the step, so who makes it and when changes nothing. Threads and processes are grain's: a
`MapDataset` whose element i is the batch of step i.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, Generic, TypeVar

from tokenlab.core.errors import DataError, TokenLabError

T = TypeVar("T")

FOR_EVER = 2**40
"""Steps of an iteration that has no end: grain wants a length."""

WATCH = 0.5
"""Seconds between a worker's looks at whether its parent still lives."""


class Prefetch(Generic[T]):
    """Iterates over `make(step)` for step = start, start + 1, ..., making `depth` of them ahead.

    Use it in a `with` block; leaving the block ends its threads and processes. What `make` raises is raised by `next`
    at the step where it happened, as the same exception.

    Args:
      make: a function of the step, such as `TrainStream.batch`; with workers it must pickle.
      start: first step.
      stop: the step before which to end; None goes on for ever.
      depth: batches made ahead; 0 uses no thread and makes each batch when it is asked for.
      put: applied to each batch, for example to move it to the devices; with `depth` > 0 in a thread of this process.
      threads: that make batches, in each process.
      workers: processes that make batches; 0 for none but this one.

    Raises:
      DataError: a number is out of range; or, from `next`, a worker died.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        start: int = 0,
        *,
        stop: int | None = None,
        depth: int = 0,
        put: Callable[[Any], T] | None = None,
        threads: int = 1,
        workers: int = 0,
    ):
        for what, value, least in (("prefetch", depth, 0), ("threads", threads, 1), ("workers", workers, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DataError(f"{what} is {value!r}; expected an int >= {least}")
        if not depth and (threads > 1 or workers):
            raise DataError(f"prefetch is 0 with {threads} threads and {workers} workers; expected 1 or more")
        self._make = make
        self._put = put
        self._step = start
        self._asked = start
        self._stop = stop
        self._depth = depth
        self._ahead: deque[Future[T]] = deque()
        first = _block_interrupts if workers else None
        name = "tokenlab-data"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=first) if depth else None
        self._made: Iterator[Any] | None = None
        self._begin: Callable[[], Iterator[Any]] | None = None
        if threads > 1 or workers:
            end = start + FOR_EVER if stop is None else max(stop, start)
            self._begin = partial(_grain_iterator, make, start, end, depth, threads, workers)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stop is not None and self._step >= self._stop:
            self.close()
            raise StopIteration
        step, self._step = self._step, self._step + 1
        if self._thread is None:
            return self._one(step)
        # One more than `depth` are under way while the oldest is waited for. grain holds `depth` of its own.
        depth = self._depth if self._begin is None else 1
        while self._asked <= step + depth and (self._stop is None or self._asked < self._stop):
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
        """End the iteration: what has begun is finished, what waits is dropped. May be called again."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._ahead.clear()
        if self._made is not None:
            self._made.close()
            self._made = None
        self._stop = self._step

    def _one(self, step: int) -> T:
        batch = self._make(step) if self._begin is None else self._next_made()
        return batch if self._put is None else self._put(batch)

    def _next_made(self) -> Any:
        if self._made is None:
            self._made = self._begin()
        try:
            return next(self._made)
        except TokenLabError:
            raise
        except RuntimeError as error:
            raise DataError(
                f"a worker that makes batches ended: {' '.join(str(error).split())} It may have run out of memory; the "
                "run goes on from its last checkpoint with fewer config.data.workers, or 0"
            ) from error


def _grain_iterator(
    make: Callable[[int], Any], start: int, stop: int, depth: int, threads: int, workers: int
) -> Any:
    import grain  # here, as it takes half a second and most runs on small sets need none of it
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its flags, which no absl application has parsed here
    batches = grain.MapDataset.range(start, stop).map(make)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(depth, threads))
    made = batches.to_iter_dataset(options)
    if not workers:
        return iter(made)
    # Batches come through pipes. Shared memory is quicker for large ones, but what is under way when a run ends would
    # be left to Python's tracker, which complains of it.
    pipes = grain.experimental.DatasetOptions(min_shm_size=2**62)
    made = grain.experimental.WithOptionsIterDataset(made, pipes).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, depth // workers)),
        worker_init_fn=Worker(os.getpid()),
    )
    return iter(made)


def _block_interrupts() -> None:
    """For the thread that starts workers: they inherit that they do not see Ctrl-C, which goes to every process of a
    terminal. It is the parent's business, which ends them."""
    # Starting Python's tracker of shared memory unblocks the signal again, so it is started before.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


class Worker:
    """What a worker does first: see to it that it does not outlive its parent.

    A parent that is killed cannot tell its workers; they look for it themselves.

    Args:
      parent: its process id.
    """

    def __init__(self, parent: int):
        self._parent = parent

    def __call__(self, worker: int, workers: int) -> None:
        """Called by grain in the worker, with its number and how many there are."""
        del worker, workers
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=self._watch, name="tokenlab-parent-watch", daemon=True).start()

    def _watch(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(WATCH)
        os._exit(1)
