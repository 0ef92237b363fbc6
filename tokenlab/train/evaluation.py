"""Metrics of a model over a whole split: each example counted once, on any number of devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokenlab import data
from tokenlab.core.errors import DataError
from tokenlab.sharding import agree, rules, watch
from tokenlab.sharding.rows import RowLayout
from tokenlab.train.step import make_eval_step

AHEAD = 4
"""Batches the host may hand out before the devices have done them."""


@dataclass(frozen=True)
class Evaluated:
    """What came out of an evaluation.

    Attributes:
        metrics: name -> weighted mean; a metric without weight is left out.
        skipped: records among this process's rows that could not be read (`config.data.corrupt="skip"`).
    """

    metrics: dict[str, float]
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Evaluator:
    """A model that is compiled once, at the first use, and then run over splits.

    Attributes:
        model: built with `train=False`.
        task: its metrics leave out rows whose `batch["mask"]` is 0.
        mesh: devices by axis.
        shardings: of the parameters; None = by the model's own logical axes.
    """

    model: Any
    task: Any
    mesh: Mesh
    shardings: Any = None
    _steps: dict[int, Callable[..., Any]] = field(default_factory=dict, repr=False)

    @cached_property
    def params_shardings(self) -> Any:
        """Where the parameters live."""
        if self.shardings is not None:
            return self.shardings
        return rules.shardings(self.model.abstract_state(), self.model.logical_axes(), self.mesh)

    @cached_property
    def _step(self) -> Callable[..., Any]:
        return make_eval_step(
            self.model,
            self.task,
            params_shardings=self.params_shardings,
            batch_sharding=rules.row_sharding(self.mesh),
            replicated=NamedSharding(self.mesh, PartitionSpec()),
        )

    def _compiled(self, arguments: Any, batch_size: int) -> Callable[..., Any]:
        if batch_size not in self._steps:
            self._steps[batch_size] = compiled_together(self._step, *arguments)
        return self._steps[batch_size]

    def put(self, params: Any) -> Any:
        """Parameters, numpy arrays that every process has whole, to where they live."""

        def leaf(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree.map(leaf, params, self.params_shardings)

    @property
    def shards(self) -> int:
        """Devices that share a batch; a batch size must be a multiple of it."""
        return rules.ways("batch", self.mesh)

    def __call__(self, params: Any, source: data.Source, split: str, batch_size: int) -> Evaluated:
        """Metrics over a whole split.

        Args:
            params: like `model.abstract_state()`, placed by `params_shardings`.
            source: of the data.
            split: of the source.
            batch_size: rows of a batch over all devices, a multiple of `shards`; the last batch is padded.

        Returns:
            Metrics, summed in float64 over batches, and how many examples this process's share of the split lacks.

        Raises:
            DataError: not one example of the split can be read.
        """
        layout = RowLayout(rules.row_sharding(self.mesh), batch_size)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        sums: list[Any] = []
        left_out: list[int] = []
        with jax.set_mesh(self.mesh):
            for index, batch in enumerate(data.eval_batches(source, split, batch_size, rows=layout.local)):
                watch.progress(f"evaluates batch {index} of split {split!r}")
                left_out += skipped(source, split, batch_size, index, batch["mask"], layout.local)
                arguments = (params, layout.put(batch), place(np.int32(index), everywhere))
                sums.append(self._compiled(arguments, batch_size)(*arguments))
                jax.block_until_ready(sums[max(index - AHEAD, 0)])
        totals = jax.tree.map(lambda *leaves: float(np.sum(leaves, dtype=np.float64)), *jax.device_get(sums))
        found = means(totals, self.task)
        if not found:
            raise DataError(
                f"source {source.name!r}: none of the {len(source.split(split))} records of split {split!r} can be "
                "read; mend the data."
            )
        return Evaluated(found, tuple(left_out))


def skipped(
    source: data.Source,
    split: str,
    batch_size: int,
    number: int,
    mask: np.ndarray,
    rows: np.ndarray,
) -> list[int]:
    """The records of a batch of `data.eval_batches` that could not be read: those of mask 0 that are no padding.

    Args:
        number: of the batch.
        mask: [rows of this process].
        rows: of the global batch, that this process reads.
    """
    records = number * batch_size + rows[mask == 0]
    return records[records < len(source.split(split))].tolist()


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process has whole, or that are the same everywhere, onto the devices as global arrays."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    with jax.transfer_guard("allow"):  # asked for, which the guard cannot know here
        return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), tree)


def compiled_together(step: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """A jitted function for these arguments: of several processes, all have compiled it before one runs it."""
    if jax.process_count() == 1:
        return step
    compiled = step.lower(*arguments).compile()
    agree.meet()
    return compiled


def means(sums: Mapping[str, tuple[float, float]], task: Any) -> dict[str, float]:
    """name -> sum / weight, of what has weight, and what the task derives of these; sorted by name."""
    found = {name: float(total) / float(weight) for name, (total, weight) in sums.items() if weight}
    derived = getattr(task, "derived", None)
    if derived is not None and found:
        found |= derived(found)
    return dict(sorted(found.items()))
