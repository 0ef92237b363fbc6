"""Tiny encoder language models for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests import decoders
from tokenlab import models

VOCABULARY, MASK = 37, 36
weights = decoders.weights


def build(stack: str, length: int = 24, *, train: bool = False, outputs: int = VOCABULARY, **settings: Any):
    """An encoder of width 16 over the stack, for sequences of `length`; without `train_only` items."""
    settings = {"name": "encoder_lm", "size": "nano", "stack": stack, **settings}
    return models.build(settings, spec={"ids": ((length,), "int32")}, num_outputs=outputs, train=train)


def batch(rows: int, length: int = 24, seed: int = 0, *, full: bool = False) -> dict[str, np.ndarray]:
    """What `masked_lm` reads: CLS (id 0), words of one to three tokens, padding (id 1) behind."""
    draws = np.random.default_rng(seed)
    lengths = np.full(rows, length) if full else draws.integers(length // 2, length + 1, rows)
    ids = draws.integers(2, MASK, (rows, length))
    word = np.cumsum(draws.random((rows, length)) < 0.6, axis=1) + 1
    inside = np.arange(length) < lengths[:, None]
    ids, word = np.where(inside, ids, 1), np.where(inside, word, 0)
    ids[:, 0], word[:, 0] = 0, 0
    return {
        "ids": ids.astype(np.int32),
        "word": (word - (word > 0) * (word[:, 1:2] - 1)).astype(np.int32),
        "bytes": np.where(word > 0, 1 + ids % 3, 0).astype(np.float32),
        "length": lengths.astype(np.int32),
        "mask_id": np.full(rows, MASK, np.int32),
        "special_ids": np.tile(np.array([1, 0, MASK], np.int32), (rows, 1)),
        "mask": np.ones(rows, np.float32),
    }
