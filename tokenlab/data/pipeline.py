"""From a source to batches: training batches as a pure function of (seed, step), evaluation batches with exact counts.

Nothing here has a position of its own. A run that goes on at step t, on any number of processes, asks for batch t and
sees what the uninterrupted run would have seen; its checkpoint keeps `TrainStream.state(t)` only to notice when the
question has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tokenlab.core.errors import DataError
from tokenlab.data.dataset import Dataset
from tokenlab.data.draws import Purpose, check_seed, permutation, uniform
from tokenlab.data.loader import Prefetch
from tokenlab.data.source import Batch, Source


class TrainStream:
    """Endless training batches of a split, shuffled anew each epoch.

    Example p of the run is example `p % n` of epoch `p // n`, where n is the size of the split, and row i of step t is
    example `t * batch_size + i`. So batches run over the end of an epoch, every epoch holds every example once, and
    the order of the global batch does not depend on the number of processes: each reads the rows of its devices. The
    order of an epoch is made with its first batch and kept for two: 8 bytes an example, 0.15 s a million of them.

    Args:
      source: what to read, a `Dataset` or a source whose images need no more than its default transform.
      split: its split.
      batch_size: rows of the global batch, over all processes; at most the size of the split, so that no batch holds
        an example three times; of a small part of a mixture it may.
      seed: in [0, 2**64); decides order and random changes to images.
      rows: which rows of the global batch this process reads, ascending (`tokenlab.sharding.rows.local_rows` knows
        those of its devices); None = all.

    Raises:
      DataError: one of these does not hold, or the split is unknown.
    """

    def __init__(
        self,
        source: Source | Dataset,
        split: str,
        batch_size: int,
        *,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
    ):
        self._dataset = as_dataset(source)
        self._split = split
        self._seed = check_seed(seed)
        self._size = len(source.split(split))
        self._parts = Parts.of(self._dataset.source, split)
        self._rows = _checked_rows(batch_size, rows)
        self._batch_size = batch_size
        if batch_size > self._size:
            raise DataError(
                f"batch_size {batch_size} is larger than split {split!r} of source {source.name!r}; "
                f"expected at most its {self._size} examples"
            )
        self._remember()

    def _remember(self) -> None:
        # A batch touches two epochs at most of each part. The cache is safe to share between threads.
        self._order = functools.lru_cache(maxsize=2 * len(self._parts.sizes))(self._make_order)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def indices(self, step: int) -> np.ndarray:
        """Which examples of the split this process sees at `step`: int64 [rows of this process]."""
        if step < 0:
            raise DataError(f"step is {step}; expected 0 or more")
        first = step * self._batch_size
        position = first + self._rows
        part, position = self._parts.assign(self._seed, position)
        result = np.empty(len(position), np.int64)
        for which, size in enumerate(self._parts.sizes):
            rows = np.flatnonzero(part == which)
            epochs, place = np.divmod(position[rows], size)
            for epoch in np.unique(epochs).tolist():
                inside = epochs == epoch
                result[rows[inside]] = self._parts.starts[which] + self._order(which, epoch)[place[inside]]
        return result

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of `step` (0 is the first).

        Returns:
          The spec's keys as arrays [rows, ...], and "mask" float32 [rows]: ones, and 0 for a record that was skipped.

        Raises:
          DataError: as `Dataset.read`.
        """
        indices = self.indices(step)
        shape = (self._batch_size, self._dataset.train_transform.draws)
        draws = uniform(self._seed, Purpose.AUGMENT, step, shape)
        return self._dataset.read(self._split, indices, draws[self._rows])

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data, JSON: the next step, and all that the batches depend on."""
        return {"step": step, **self._identity()}

    def check(self, state: Mapping[str, Any]) -> int:
        """The step to go on with, when `state` (from a checkpoint) is of the same batches.

        The number of processes may differ: it does not change the order.

        Raises:
          DataError: the checkpoint was written with other data, seed, batch size or transform; the message names
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
            "fingerprint": self._dataset.fingerprint,
            "split": self._split,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "transform": self._dataset.train_transform.text,
        }

    def _make_order(self, part: int, epoch: int) -> np.ndarray:
        # The first part draws what a source without parts draws; 2**32 epochs keep the parts apart.
        return permutation(self._seed, Purpose.ORDER, epoch + (part << 32), self._parts.sizes[part])


class Parts:
    """Which part of a mixture an example of the run comes from; a source that is no mixture is one part.

    Examples come in groups of `GROUP`. Every group holds each part's share, rounded to whole examples, in a random
    order of its own; within a part, examples follow each other as they do in a source alone. So shares hold over any
    stretch of the run, and every part is read epoch by epoch.

    Args:
      sizes: examples of each part, in the order in which the source holds them one after the other.
      weights: > 0, of each; only their proportions matter.

    Raises:
      DataError: a part is so light that a group would hold none of it.
    """

    GROUP = 4096

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]):
        self.sizes = tuple(int(size) for size in sizes)
        self.starts = np.cumsum([0, *self.sizes])[:-1]
        # Of the largest weight, as a sum of large ones may be more than a float holds.
        proportions = np.array(weights, np.float64) / np.max(weights)
        exact = proportions / proportions.sum() * self.GROUP
        shares = np.floor(exact).astype(np.int64)
        shares[np.argsort(shares - exact, kind="stable")[: self.GROUP - shares.sum()]] += 1
        if not shares.all():
            part = int(np.argmin(shares))
            raise DataError(
                f"part {part} of a mixture has weight {weights[part]}, the largest weight is {max(weights)}; expected "
                f"at least 1/{self.GROUP} of all weights together"
            )
        self._shares = shares

    @classmethod
    def of(cls, source: Source, split: str) -> Parts:
        """The parts that a source says a split has."""
        parts = getattr(source, "parts", None)
        found = parts(split) if parts else ((len(source.split(split)), 1.0),)
        return cls([size for size, _ in found], [weight for _, weight in found])

    def assign(self, seed: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For examples of the run, int64 [B] ascending: their parts, and their places in the parts' own sequences."""
        if len(self.sizes) == 1:
            return np.zeros_like(position), position
        group, place = np.divmod(position, self.GROUP)
        part, within = np.empty_like(position), np.empty_like(position)
        for number in np.unique(group).tolist():
            rows = group == number
            order = permutation(seed, Purpose.MIXTURE, number, self.GROUP)
            parts = np.repeat(np.arange(len(self.sizes)), self._shares)[order]
            # Of the examples of its part in this group, which one is each?
            rank = np.empty(self.GROUP, np.int64)
            for which, share in enumerate(self._shares.tolist()):
                rank[parts == which] = np.arange(share)
            part[rows] = parts[place[rows]]
            within[rows] = number * self._shares[part[rows]] + rank[place[rows]]
        return part, within


def as_dataset(source: Source | Dataset) -> Dataset:
    """A source as it is, with no more done to its images than they need."""
    return source if isinstance(source, Dataset) else Dataset(source)


def eval_batches(
    source: Source | Dataset,
    split: str,
    batch_size: int,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """All examples of a split once, in its own order; the last batch is padded.

    Args:
      source: what to read.
      split: its split.
      batch_size: rows of the global batch; it may exceed the split.
      rows: which of them this process reads, as of `TrainStream`; each process sees as many batches as the others.

    Yields:
      The spec's keys as arrays [rows of this process, ...], and "mask" float32 [rows]: 1 for an example, 0 for a row
      of zeros that fills the last batch. Over all rows the masks sum to the size of the split.

    Raises:
      DataError: at the call, for a bad batch size or split; while iterating, for records that are not what the spec
        says.
    """
    dataset = as_dataset(source)
    wanted = _checked_rows(batch_size, rows)
    size = len(source.split(split))
    return _eval_batches(dataset, split, batch_size, wanted, size)


def num_eval_batches(source: Source, split: str, batch_size: int) -> int:
    """How many batches `eval_batches` yields with the same arguments; raises as it does."""
    _checked_rows(batch_size, None)
    return -(-len(source.split(split)) // batch_size)


def _eval_batches(
    dataset: Dataset, split: str, batch_size: int, rows: np.ndarray, size: int
) -> Iterator[Batch]:
    def make(number: int) -> Batch:
        indices = number * batch_size + rows
        indices = indices[indices < size]
        # A process whose rows are all padding still joins in with a batch of the right shape.
        batch = dataset.read(split, indices)
        missing = len(rows) - len(indices)
        return {key: _pad(array, missing) for key, array in batch.items()} if missing else batch

    # Workers would be gone before they paid for their start.
    ahead = {"depth": dataset.config.prefetch, "threads": dataset.config.threads}
    with Prefetch(make, stop=-(-size // batch_size), **ahead) as batches:
        yield from batches


def _pad(array: np.ndarray, missing: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


def _checked_rows(batch_size: int, rows: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """The rows to read of a global batch, int64; all where `rows` is None."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size is {batch_size!r}; expected an int >= 1")
    if rows is None:
        return np.arange(batch_size)
    found = np.asarray(rows)
    if found.ndim != 1 or not len(found) or found.dtype.kind != "i" or (np.diff(found) < 1).any():
        raise DataError(f"rows of a batch are {rows!r}; expected row numbers, each once and ascending")
    if found[0] < 0 or found[-1] >= batch_size:
        raise DataError(
            f"rows {found[0]} to {found[-1]} of a batch of {batch_size}; expected numbers from 0 to {batch_size - 1}"
        )
    return found.astype(np.int64)
