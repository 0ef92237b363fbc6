"""What an arm needs to be as good as the baseline is at its end: the factor that papers call eta.

    eta = training FLOPs of the baseline, whole run / training FLOPs at which the arm first is as good

on the split that is evaluated during training (Lin et al. 2024, MoMa, arXiv 2407.21770, section 4.1, who read it off
the training loss). Between two evaluations the metric is taken to be a straight line. Learning rates fall to the end of
each arm's own run, so the factor tells where a run passes, not what a shorter run with its own schedule would reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def reached(
    curve: Sequence[Mapping[str, Any]], split: str, metric: str, level: float, *, higher: bool
) -> float | None:
    """Training FLOPs at which a run first is as good as `level`; None where it never is.

    Args:
      curve: points of one run, as results hold them.
      split, metric: what is read of them.
      level: of the metric.
      higher: whether higher values are better.
    """
    sign = 1.0 if higher else -1.0
    points = [(p["train_flops"], sign * p[metric]) for p in curve if p["split"] == split and metric in p]
    wanted, before = sign * level, None
    for cost, value in points:
        if value >= wanted:
            if before is None or value == before[1]:
                return float(cost)
            share = (wanted - before[1]) / (value - before[1])
            return float(before[0] + share * (cost - before[0]))
        before = (cost, value)
    return None


def factors(
    runs: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]],
    split: str,
    metric: str,
    *,
    higher: bool,
) -> list[float | None]:
    """eta of every run, against the baseline's run of the same seed; None where the arm never gets there.

    Args:
      runs, baseline: of the results, with "seed" and "curve". Seeds that the baseline lacks are left out.
      split, metric, higher: as in `reached`.
    """
    theirs = {run["seed"]: run["curve"] for run in baseline}
    found: list[float | None] = []
    for run in runs:
        last = [p for p in theirs.get(run["seed"], ()) if p["split"] == split and metric in p][-1:]
        if last:
            own = reached(run["curve"], split, metric, last[0][metric], higher=higher)
            found.append(None if own is None else last[0]["train_flops"] / own)
    return found
