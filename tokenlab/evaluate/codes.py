"""What a tokenizer of pictures makes of whole splits: every code in order, and how well they give the pictures back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab import data
from tokenlab.core.errors import DataError
from tokenlab.evaluate.trained import Trained
from tokenlab.models.vq_image import VQImage
from tokenlab.ops import quantize
from tokenlab.sharding.rows import RowLayout
from tokenlab.sharding.rules import row_sharding
from tokenlab.train.evaluation import Evaluator

BEYOND = 1e-3
"""How far pictures may lie outside their value range, as a share of it: rounding, and no more."""


@dataclass(frozen=True, eq=False)
class CodedSplit:
    """A split as codes.

    Attributes:
      codes: of every example that could be read, in the split's order: [n, h, w] int32.
      mse: mean squared error of the pictures that the codes give.
      left_out: examples that could not be read (`config.data.corrupt="skip"`).
    """

    codes: np.ndarray
    mse: float
    left_out: int


def gives_codes(trained: Trained) -> bool:
    """Whether the model is a tokenizer of pictures."""
    return isinstance(trained.model, VQImage)


@dataclass(frozen=True, eq=False)
class Coder:
    """A trained tokenizer that is compiled once and then run over splits.

    Attributes:
      trained: a run of `vq_image`.
    """

    trained: Trained

    @cached_property
    def _evaluator(self) -> Evaluator:
        mesh = self.trained.config.mesh.build()
        return Evaluator(self.trained.model, self.trained.task, mesh)

    @cached_property
    def _params(self) -> Any:
        return self._evaluator.put(self.trained.params)

    @cached_property
    def _step(self) -> Callable[..., Any]:
        model, mesh = self.trained.model, self._evaluator.mesh

        def step(params: Any, batch: Any) -> tuple[Any, Any, Any]:
            codes = model.encode(params, batch["image"])
            off = model.decode(params, codes) - batch["image"]
            return codes, jnp.mean(off**2, axis=(1, 2, 3)), batch["mask"]

        rows = row_sharding(mesh)
        everywhere = NamedSharding(mesh, PartitionSpec())
        shardings = (self._evaluator.params_shardings, rows)
        return jax.jit(step, in_shardings=shardings, out_shardings=everywhere)

    def __call__(self, split: str) -> CodedSplit:
        """The codes of a split, as at evaluation: nothing random is done to its pictures.

        Raises:
          DataError: no such split, records that are not what the source says, none that can be read, or values outside
            `config.task.value_range`.
        """
        source, evaluator = self.trained.source, self._evaluator
        shards = evaluator.shards
        size = -(-self.trained.config.eval.batch_size // shards) * shards  # padding counts nothing
        rows = row_sharding(evaluator.mesh)
        layout = RowLayout(rows, size)
        codes, errors = [], []
        with jax.set_mesh(evaluator.mesh):
            for batch in data.eval_batches(source, split, size, rows=layout.local):
                self._check(batch, split)
                shown = {key: batch[key] for key in ("image", "mask")}
                found, error, mask = jax.device_get(self._step(self._params, layout.put(shown)))
                codes.append(found[mask > 0])
                errors.append(error[mask > 0].astype(np.float64))
        whole = np.concatenate(codes) if codes else np.zeros((0, *self.trained.model.grid), np.int32)
        if not len(whole):
            raise DataError(
                f"split {split!r} of {source.name!r} has no picture that can be read: expected one that has."
            )
        mse = float(np.concatenate(errors).mean())
        return CodedSplit(whole, mse, len(source.split(split)) - len(whole))

    def _check(self, batch: data.Batch, split: str) -> None:
        low, high = self.trained.task.settings.value_range
        shown = batch["image"][batch["mask"] > 0]
        slack = BEYOND * (high - low)
        if shown.size and not low - slack <= shown.min() <= shown.max() <= high + slack:
            raise DataError(
                f"pictures of split {split!r} of {self.trained.source.name!r} have values from {shown.min():g} to "
                f"{shown.max():g}; expected {low:g} to {high:g}, as config.task.value_range says: train with the "
                "range of the data."
            )


def used(codes: Iterable[np.ndarray], count: int) -> dict[str, Any]:
    """How codes use a codebook of `count`: "codes", "codes_used" (distinct ones) and "code_perplexity"."""
    counts = sum(np.bincount(each.reshape(-1), minlength=count) for each in codes)
    return {
        "codes": count,
        "codes_used": int(np.count_nonzero(counts)),
        "code_perplexity": float(quantize.usage(jnp.asarray(counts, jnp.float32)).perplexity),
    }
