"""PNGs of the report: quality against each cost, and the learning curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from tokenlab.compare.report import reading
from tokenlab.core.errors import TokenLabError
from tokenlab.evaluate import style

AGAINST = {"step": "steps", "train_flops": "counted training FLOPs", "seconds": "seconds of training"}
"""Key of a record of a learning curve -> label of the axis."""


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes pareto_<cost>.png for each cost that an arm has, and curves.png where there is a curve.

    Args:
      results: of format 1.
      folder: there already.

    Returns:
      The files written.

    Raises:
      TokenLabError: a file cannot be written.
    """
    try:
        drawn = [_pareto(results, cost, folder / f"pareto_{cost.key}.png") for cost in reading.COSTS]
        return [path for path in (*drawn, _curves(results, folder / "curves.png")) if path is not None]
    except OSError as error:
        raise TokenLabError(
            f"cannot write the pictures to {folder}: {error.strerror}; expected a folder that can be written to, "
            "with free space"
        ) from error


def _pareto(results: Mapping[str, Any], cost: reading.Cost, path: Path) -> Path | None:
    looks, metric = reading.looks(results), results["metric"]
    arms = [arm for arm in results["arms"] if arm["quality"] is not None and arm[cost.key] is not None]
    if not arms:
        return None
    figure = style.new(6.4, 4.2)
    axes = figure.subplots()
    style.plain(axes)
    by_name = {arm["name"]: arm for arm in arms}
    best = [by_name[name] for name in reading.front(results, cost.key)]
    costs = [arm[cost.key] for arm in arms]
    left, right = _range(costs)
    axes.plot(
        [*(arm[cost.key] for arm in best), right],
        [arm["quality"]["mean"] for arm in (*best, best[-1])],
        color=style.GREY,
        linewidth=1,
        drawstyle="steps-post",
        zorder=1,
    )
    for arm in arms:
        _point(axes, arm, arm[cost.key], looks[arm["name"]])
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter(unit=cost.unit, sep=" "))
    axes.set_xlabel(f"{cost.title} ({cost.note})", fontsize=9)
    axes.set_ylabel(f"{metric['split']} {metric['name']}", fontsize=9)
    _legend(figure, arms, looks, line=False)
    return style.save(figure, path)


def _range(costs: list[float]) -> tuple[float, float]:
    """From zero where the costs differ much, so that ratios can be seen; around them where they hardly differ."""
    low, high = min(costs), max(costs)
    if high - low < 0.02 * high:
        return low - 0.06 * high, high + 0.06 * high
    wide = high - low
    return (0, 1.08 * high) if low < 0.6 * high else (low - 0.15 * wide, high + 0.15 * wide)


def _point(axes: Axes, arm: Mapping[str, Any], cost: float, look: reading.Look) -> None:
    mean, low, high = (arm["quality"][key] for key in ("mean", "low", "high"))
    if low is not None and high is not None:
        axes.vlines(cost, low, high, color=look.color, linewidth=1, alpha=0.6)
    filled = "full" if arm["status"] == "finished" else "none"
    axes.plot(cost, mean, color=look.color, marker=look.marker, markersize=7, fillstyle=filled, zorder=3)


def _curves(results: Mapping[str, Any], path: Path) -> Path | None:
    splits, metric, looks = reading.curve_splits(results), results["metric"]["name"], reading.looks(results)
    for split in splits:
        arms = [arm for arm in results["arms"] if any(reading.curves(arm, split, metric))]
        if arms:
            break
    else:
        return None
    figure = style.new(10.5, 4)
    row = figure.subplots(1, len(AGAINST), sharey=True)
    for axes, (key, label) in zip(row, AGAINST.items(), strict=True):
        style.plain(axes)
        for arm in arms:
            look = looks[arm["name"]]
            for points in reading.curves(arm, split, metric):
                axes.plot(
                    [point[key] for point in points],
                    [point[metric] for point in points],
                    color=look.color,
                    linestyle=look.line,
                    linewidth=0.9,
                    marker=look.marker,
                    markersize=4,
                    markevery=[len(points) - 1] if points else None,
                    alpha=0.8,
                )
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(places=None, sep=" "))
        axes.set_xlabel(label, fontsize=9)
    row[0].set_ylabel(f"{split} {metric}, a line a seed", fontsize=9)
    _legend(figure, arms, looks, line=True)
    return style.save(figure, path)


def _legend(
    figure: Any, arms: list[Mapping[str, Any]], looks: Mapping[str, reading.Look], *, line: bool
) -> None:
    handles = [
        Line2D(
            [],
            [],
            color=looks[arm["name"]].color,
            marker=looks[arm["name"]].marker,
            linestyle=looks[arm["name"]].line if line else "none",
        )
        for arm in arms
    ]
    # A dollar sign begins mathematics, and a leading underscore hides an entry.
    names = [arm["name"].replace("$", r"\$") for arm in arms]
    labels = [f" {name}" if name.startswith("_") else name for name in names]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
