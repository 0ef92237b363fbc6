"""Two real digits side by side, 8 x 16 grey, a hundred classes (00 to 99); no network is needed.

The halves are the pictures of the source `digits`, and both are of the same split, so that no digit of a test pair was
seen in training. A class has as many pairs as any other, or one more, and every picture of a digit is shown about as
often as any other of it. There are about 125 of each to train on, so pairs are many and strokes few: what is asked of a
model is to carry two answers out of one picture.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from tokenlab.core.errors import ConfigError
from tokenlab.data.draws import Purpose, permutation
from tokenlab.data.source import ArraySource, DataConfig
from tokenlab.data.sources import digits

NUM_CLASSES = digits.NUM_CLASSES**2
HELD_OUT = {"validation": 1000, "test": 2000}


@dataclass(frozen=True)
class Config(DataConfig):
    """Pairs of digits.

    Attributes:
      examples: pairs to train on, at least 100, of each class as many as of any other or one more. Validation has 1,000
        and test 2,000.
    """

    examples: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples < NUM_CLASSES:
            raise ConfigError(
                f"config.data.examples is {self.examples}: expected at least {NUM_CLASSES}, a pair of each class."
            )


def build(config: Config) -> ArraySource:
    """The pairs, with image float32 [8, 16, 1] in [-1, 1] (-1 is paper, 1 is ink) and label int32 [] in [0, 100)."""
    return _pairs(config.examples)


@functools.cache
def _pairs(examples: int) -> ArraySource:
    source = digits.build(digits.Config())
    arrays = {}
    for number, (split, count) in enumerate({"train": examples, **HELD_OUT}.items()):
        one = source.split(split).batch(np.arange(source.splits[split]))
        label = np.arange(count, dtype=np.int32) % NUM_CLASSES
        halves = [
            one["image"][_pictures(one["label"], digit, 2 * number + side)]
            for side, digit in enumerate(np.divmod(label, digits.NUM_CLASSES))
        ]
        arrays[split] = {"image": np.concatenate(halves, axis=2), "label": label}
    return ArraySource("digit_pairs", arrays, NUM_CLASSES)


def _pictures(labels: np.ndarray, wanted: np.ndarray, stream: int) -> np.ndarray:
    """A picture of every digit in `wanted` [n]: those of a digit in turn, in a new order whenever they are used up."""
    found = np.empty(len(wanted), dtype=np.int64)
    for digit in range(digits.NUM_CLASSES):
        places, pictures = np.flatnonzero(wanted == digit), np.flatnonzero(labels == digit)
        rounds = -(-len(places) // len(pictures))
        first = 10**6 * (stream + 1) + digit
        orders = [
            permutation(digits.SPLIT_SEED, Purpose.SPLIT, first + 10 * turn, len(pictures))
            for turn in range(rounds)
        ]
        found[places] = pictures[np.concatenate(orders)[: len(places)]]
    return found
