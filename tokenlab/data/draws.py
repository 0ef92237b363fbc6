"""Random numbers as a pure function of (seed, purpose, index): nothing to save, nothing to restore.

They come from the raw 64-bit words of numpy's Philox, which numpy keeps the same in all versions; the methods of
`numpy.random.Generator` may change their streams from one version to the next, so none is used here.
"""

from __future__ import annotations

import enum

import numpy as np

from tokenlab.core.errors import DataError


class Purpose(enum.IntEnum):
    """What numbers are drawn for; two purposes never share a stream, whatever their seed and index."""

    SPLIT = 1
    ORDER = 2
    AUGMENT = 3
    MIXTURE = 4
    PACKING = 5


def check_seed(seed: int) -> int:
    """The seed, when it is an integer in [0, 2**64).

    Raises:
      DataError: it is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise DataError(f"seed is {seed!r}; expected an integer from 0 to 2**64 - 1")
    return int(seed)


def words(seed: int, purpose: Purpose, index: int, count: int) -> np.ndarray:
    """`count` random words, uint64 [count].

    Args:
      seed: of the run, in [0, 2**64).
      purpose: keeps streams apart that have the same seed and index.
      index: which draw of this purpose: an epoch, a step, a class, in [0, 2**64).
      count: how many; the first k of n words are the k words that `count=k` gives.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x64-10).
    """
    key = np.array([seed, index], dtype=np.uint64)
    counter = np.array([0, 0, 0, purpose], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniform(seed: int, purpose: Purpose, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [0, 1), float32 of `shape`, exact multiples of 2**-24; arguments as of `words`."""
    drawn = words(seed, purpose, index, int(np.prod(shape, dtype=np.int64)))
    return ((drawn >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def permutation(seed: int, purpose: Purpose, index: int, n: int) -> np.ndarray:
    """A uniformly random order of 0 .. n-1, int64 [n]: the order of n random words; arguments as of `words`."""
    return np.argsort(words(seed, purpose, index, n), kind="stable")
