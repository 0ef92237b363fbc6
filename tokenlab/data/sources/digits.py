"""1,797 real handwritten digits, 8 x 8 grey, ten classes; they come with scikit-learn, so no network is needed.

The pictures are the test part of the UCI "Optical Recognition of Handwritten Digits" set (13 writers, written as
32 x 32 bitmaps and counted down to 8 x 8 with values 0 to 16). Each split holds every class in proportion, and writers
are mixed over the splits, as is usual with this set: an accuracy here says how models compare, not how well strangers'
handwriting would be read. With 360 test examples an accuracy of 0.97 has a standard error of 0.009.

Source: Alpaydin and Kaynak, "Cascading classifiers", Kybernetika 34(4), 1998.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenlab.data.draws import Purpose, permutation
from tokenlab.data.source import ArraySource, DataConfig

NUM_CLASSES = 10
SPLITS = {"train": 1257, "validation": 180, "test": 360}
SPLIT_SEED = 1797
"""Of the split, and of nothing else: the split is the same in every run."""


@dataclass(frozen=True)
class Config(DataConfig):
    """Digits have no options of their own."""


def build(config: Config) -> ArraySource:
    """The digits, with image float32 [8, 8, 1] in [-1, 1] (-1 is paper, 1 is ink) and label int32 [] in [0, 10)."""
    del config
    return _digits()


@functools.cache
def _digits() -> ArraySource:
    pixels, labels = load()
    images = (pixels.astype(np.float32) / 8.0 - 1.0)[..., None]
    arrays = {
        split: {"image": images[indices], "label": labels[indices].astype(np.int32)}
        for split, indices in split_indices(labels).items()
    }
    return ArraySource("digits", arrays, NUM_CLASSES)


def load() -> tuple[np.ndarray, np.ndarray]:
    """All digits in scikit-learn's order: pixels uint8 [1797, 8, 8] in 0 .. 16 and labels int64 [1797] in 0 .. 9.

    The file inside scikit-learn is read directly: importing `sklearn.datasets` takes 3 s on 2 cores, reading the file
    5 ms. Where the file is not found (another layout of scikit-learn) the import gives the same numbers.
    """
    package = importlib.util.find_spec("sklearn")
    folders = package.submodule_search_locations if package else None
    path = Path(folders[0]) / "datasets" / "data" / "digits.csv.gz" if folders else None
    if path is not None and path.is_file():
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        return table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.int64)


def split_indices(labels: np.ndarray) -> Mapping[str, np.ndarray]:
    """The fixed split: for each split the indices of its examples, int64 [n], ascending.

    Every class is shuffled with `SPLIT_SEED` and dealt out: its share of each held-out split is the class's part of
    all examples, rounded down, and the classes with the largest remainders (ties: the smaller label) give one more
    until the split has its size.

    Args:
      labels: int64 [1797].
    """
    counts = np.bincount(labels, minlength=NUM_CLASSES)
    shuffled = [
        np.flatnonzero(labels == label)[permutation(SPLIT_SEED, Purpose.SPLIT, label, count)]
        for label, count in enumerate(counts)
    ]
    result: dict[str, np.ndarray] = {}
    taken = np.zeros(NUM_CLASSES, dtype=np.int64)
    for split in ("test", "validation"):
        share, remainder = np.divmod(counts * SPLITS[split], counts.sum())
        share[np.argsort(-remainder, kind="stable")[: SPLITS[split] - share.sum()]] += 1
        parts = [indices[start : start + n] for indices, start, n in zip(shuffled, taken, share, strict=True)]
        result[split] = np.sort(np.concatenate(parts))
        taken += share
    rest = [indices[start:] for indices, start in zip(shuffled, taken, strict=True)]
    return {"train": np.sort(np.concatenate(rest)), **result}
