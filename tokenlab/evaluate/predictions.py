"""One pass over a whole split: what one or several models say of every example, on any number of devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab import data
from tokenlab.core.errors import DataError, NonFiniteError
from tokenlab.sharding.rows import RowLayout
from tokenlab.sharding.rules import row_sharding
from tokenlab.train.evaluation import Evaluator, compiled_together, means, place
from tokenlab.train.step import base_key


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of n examples of a split, in the split's order.

    Attributes:
      metrics: of the task: name -> weighted mean over the examples, summed in float64 over batches.
      logits: [n, C] float32; None where the model gives no vector an example.
      features: what the head reads, [n, D] float32; None where they are not asked for, the task does not use the
        model's `apply`, or the head reads more than a vector an example.
      labels: [n] int32; None where the data has no "label".
      index: [n] int64: number of each example within the split. Padding is left out, and so is an example that the
        data says to skip (`batch["mask"]` is 0).
      examples_per_second: measured: rows of a batch over the median time of the compiled forward pass, from its call to
        its results, while the next batches are read. The first batch, which compiles, does not count; a split of one
        batch is run twice.
      skipped: examples of the split that could not be read (`config.data.corrupt="skip"`).
    """

    metrics: dict[str, float]
    logits: np.ndarray | None
    features: np.ndarray | None
    labels: np.ndarray | None
    index: np.ndarray
    examples_per_second: float
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.index)


class _Kept:
    """A model that keeps the output of its last `apply`, so that one forward pass gives metrics and predictions."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.output: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self._model.apply(*args, **kwargs)
        return self.output


def predict(
    evaluators: Sequence[Evaluator],
    params: Sequence[Any],
    source: data.Source,
    split: str,
    batch_size: int,
    *,
    features: bool = True,
) -> list[Predictions]:
    """Run several models over a split that is read once.

    Args:
      evaluators: of the models; all on one mesh.
      params: of each, placed by its `params_shardings`; see `put`.
      source: of the data.
      split: of it.
      batch_size: rows of a batch over all devices, a multiple of the evaluators' `shards`; the last batch is padded.
      features: False leaves them out, and what would be computed for them alone.

    Returns:
      An entry an evaluator; the same, and whole, on every process.

    Raises:
      DataError: no such split, one without examples, or records that are not what the source says.
      NonFiniteError: a model gives logits that are not finite.
    """
    mesh = evaluators[0].mesh
    rows = row_sharding(mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    wanted = ("features", "logits") if features else ("logits",)
    steps = [_make_step(evaluator, rows, everywhere, wanted) for evaluator in evaluators]
    found: list[list[Any]] = [[] for _ in steps]
    seconds: list[list[float]] = [[] for _ in steps]
    common: list[dict[str, np.ndarray]] = []
    layout = RowLayout(rows, batch_size)
    last: tuple[Any, ...] = ()
    with jax.set_mesh(mesh):
        for number, batch in enumerate(data.eval_batches(source, split, batch_size, rows=layout.local)):
            last = (layout.put(batch), place(np.int32(number), everywhere))
            if not common:
                steps = [compiled_together(step, params[which], *last) for which, step in enumerate(steps)]
            for which, step in enumerate(steps):
                result, spent = _timed(step, params[which], *last)
                found[which].append(result)
                seconds[which].append(spent)
            facts = {key: result[key] for key in ("mask", "label") if key in result}
            common.append({**facts, "first": number * batch_size})
        if len(common) == 1:
            for which, step in enumerate(steps):
                seconds[which].append(_timed(step, params[which], *last)[1])
    if not common:
        raise DataError(f"split {split!r} of {source.name!r} has no examples: expected one that has.")
    if not any(facts["mask"].any() for facts in common):
        raise DataError(
            f"split {split!r} of {source.name!r}: none of its records can be read; mend the data."
        )
    real = [np.flatnonzero(facts["mask"] > 0) for facts in common]
    index = np.concatenate([facts["first"] + chosen for facts, chosen in zip(common, real, strict=True)])
    labels = _rows_of(common, "label", real)
    results = []
    for evaluator, each, spent in zip(evaluators, found, seconds, strict=True):
        sums = [part["sums"] for part in each]
        totals = jax.tree.map(lambda *leaves: float(np.sum(leaves, dtype=np.float64)), *sums)
        logits, vectors = (_rows_of(each, key, real) for key in ("logits", "features"))
        if logits is not None:
            _check_finite(logits, source, split)
        speed = batch_size / float(np.median(spent[1:]))
        left_out = len(source.split(split)) - len(index)
        results.append(
            Predictions(means(totals, evaluator.task), logits, vectors, labels, index, speed, left_out)
        )
    return results


def put(evaluators: Sequence[Evaluator], params: Sequence[Any]) -> list[Any]:
    """Parameters (numpy) of each model to where they live; an array that several models share is put there once."""
    placed: dict[tuple[int, NamedSharding], Array] = {}

    def leaf(array: np.ndarray, sharding: NamedSharding) -> Array:
        key = (id(array), sharding)
        if key not in placed:
            placed[key] = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        return placed[key]

    return [
        jax.tree.map(leaf, tree, evaluator.params_shardings)
        for evaluator, tree in zip(evaluators, params, strict=True)
    ]


def _make_step(
    evaluator: Evaluator, rows: NamedSharding, everywhere: NamedSharding, wanted: Sequence[str]
) -> Callable[..., dict[str, Any]]:
    """The compiled (params, batch, number of the batch) -> sums of the metrics, logits, features, mask, label."""

    def step(params: Any, batch: Any, number: Array) -> dict[str, Any]:
        rng = jax.random.fold_in(base_key(jnp.zeros((2,), jnp.uint32)), number)  # as in `make_eval_step`
        model = _Kept(evaluator.model)
        _, sums = evaluator.task.loss(model, params, batch, rng=rng, train=False)
        kept = {key: batch[key] for key in ("mask", "label") if key in batch}
        if model.output is not None:
            for key in wanted:
                if (leaf := getattr(model.output, key)).ndim == 2:
                    kept[key] = leaf.astype(jnp.float32)
        return {"sums": sums, **kept}

    return jax.jit(
        step, in_shardings=(evaluator.params_shardings, rows, everywhere), out_shardings=everywhere
    )


def _rows_of(batches: Sequence[dict[str, Any]], key: str, real: Sequence[np.ndarray]) -> np.ndarray | None:
    """The real rows of all batches under one key; None where they have no such key."""
    if key not in batches[0]:
        return None
    return np.concatenate([batch[key][chosen] for batch, chosen in zip(batches, real, strict=True)])


def _timed(step: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a step returns, on the host, and the seconds from its call to its results."""
    jax.block_until_ready(arguments)
    begin = time.perf_counter()
    result = jax.block_until_ready(step(*arguments))
    spent = time.perf_counter() - begin
    return jax.device_get(result), spent


def _check_finite(logits: np.ndarray, source: data.Source, split: str) -> None:
    bad = np.count_nonzero(~np.isfinite(logits).reshape(len(logits), -1).all(axis=1))
    if bad:
        raise NonFiniteError(
            f"the model gives logits that are not finite for {bad} of {len(logits)} examples of split {split!r} of "
            f"{source.name!r}; evaluate with config.model.dtype=float32, or an earlier checkpoint."
        )
