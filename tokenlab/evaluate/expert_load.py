"""Where the work goes among experts: each one's share, block by block."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from tokenlab import data
from tokenlab.layers.program import BlockStep, steps_of

LOOKED_AT = 256
"""Examples that the shares are measured on."""


def has_experts(model: Any) -> bool:
    """Whether some block of the model's stack has experts."""
    steps = steps_of(model)
    return any(isinstance(step, BlockStep) and hasattr(step.block.ffn, "num_experts") for step in steps)


def loads(model: Any, params: Any, source: data.Source, split: str) -> dict[str, list[float]]:
    """Name of each block with a router that can load its experts unevenly -> their shares, which sum to 1.

    Args:
      model: with `apply(..., record=True)`, see `tokenlab.models.vit.ViT`.
      params: its weights.
      source, split: whose first 256 examples are looked at.

    Raises:
      DataError: there is no such split.
    """
    run = jax.jit(lambda params, batch: model.apply(params, batch, record=True).loads)
    totals: dict[str, np.ndarray] = {}
    seen = 0
    for batch in data.eval_batches(source, split, LOOKED_AT // 4):
        whole = {key: value for key, value in batch.items() if key != "mask"}
        if not bool(np.all(batch["mask"] > 0)) and seen:
            break  # rows that only fill the last batch would be routed, too
        for name, share in run(params, whole).items():
            totals[name] = totals.get(name, 0.0) + np.asarray(share, np.float64)
        seen += len(batch["mask"])
        if seen >= LOOKED_AT:
            break
    return {name: [float(value) for value in total / total.sum()] for name, total in totals.items()}
