"""What timed rounds say: the ratio of two times, and the realised part of a counted saving with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tokenlab.core.errors import ConfigError

RESAMPLES = 2000
LEVEL = 0.95
SMALLEST_SAVING = 0.02
"""Counted savings below this are smaller than what timing can tell; a fraction of them would be noise."""


class Realised(NamedTuple):
    """The realised part of a counted saving, and its bootstrap interval at `LEVEL`."""

    value: float
    low: float
    high: float


def ratios(arm_seconds: Sequence[float], dense_seconds: Sequence[float]) -> np.ndarray:
    """Time over the dense one's time of the same round, [rounds]: a slow round is compared with a slow round.

    Raises:
      ConfigError: no rounds, or not as many of both.
    """
    if not arm_seconds or len(arm_seconds) != len(dense_seconds):
        raise ConfigError(
            f"timing: {len(arm_seconds)} rounds of the arm and {len(dense_seconds)} of the dense one: "
            "expected as many of both, at least 1."
        )
    return np.asarray(arm_seconds, np.float64) / np.asarray(dense_seconds, np.float64)


def time_ratio(arm_seconds: Sequence[float], dense_seconds: Sequence[float]) -> float:
    """Median of `ratios`. Raises ConfigError as they do."""
    return float(np.median(ratios(arm_seconds, dense_seconds)))


def realised(
    arm_seconds: Sequence[float], dense_seconds: Sequence[float], flops_ratio: float, *, seed: int = 0
) -> Realised | None:
    """(1 - time ratio) / (1 - FLOPs ratio): 1 where all that is saved on paper is saved on the machine.

    The interval is of the percentiles of the median over resampled rounds; the same rounds give the same interval.

    Args:
      arm_seconds, dense_seconds: seconds a step, [rounds], of the same rounds.
      flops_ratio: counted FLOPs over the dense one's.
      seed: of the resampling.

    Returns:
      None where less than `SMALLEST_SAVING` is saved on paper.

    Raises:
      ConfigError: no rounds, or not as many of both.
    """
    each = ratios(arm_seconds, dense_seconds)
    if flops_ratio >= 1 - SMALLEST_SAVING:
        return None
    saving = 1 - flops_ratio
    drawn = np.random.default_rng(seed).integers(len(each), size=(RESAMPLES, len(each)))
    medians = np.median(each[drawn], axis=1)
    tail = (1 - LEVEL) / 2
    slow, fast = np.quantile(medians, 1 - tail), np.quantile(medians, tail)
    return Realised(*(float((1 - ratio) / saving) for ratio in (np.median(each), slow, fast)))
