"""report.png of a run: loss and metric against steps, counted training FLOPs and seconds of training."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from tokenlab import tasks
from tokenlab.core.errors import DataError
from tokenlab.cost import pretty
from tokenlab.evaluate import style
from tokenlab.train.records import read_config, read_metrics, read_run

AGAINST = {"step": "steps", "flops": "counted training FLOPs", "seconds": "seconds of training"}
"""Key of a record -> label of the axis."""


def report(workdir: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Draw the curves of a run: two rows (loss, the task's metric) by three columns (`AGAINST`).

    Args:
      workdir: of a training run, finished or not.
      path: the PNG to write; replaced as a whole.

    Returns:
      `path`.

    Raises:
      ConfigError, DataError: the workdir has no configuration, or no records that can be read.
    """
    config, run = read_config(workdir), read_run(workdir)
    records = read_metrics(workdir)
    if not records:
        raise DataError(
            f"{Path(workdir) / 'metrics.jsonl'} holds no record yet: expected a run that has logged."
        )
    metric = tasks.build(config.task).primary
    figure = style.new(10.5, 5.6)
    grid = figure.subplots(2, len(AGAINST), sharey="row", sharex="col")
    for row, name in zip(grid, ("loss", metric), strict=True):
        for axes, key in zip(row, AGAINST, strict=True):
            _curves(axes, records, name, key)
        row[0].set_ylabel(name)
    for axes, (key, label) in zip(grid[-1], AGAINST.items(), strict=True):
        axes.set_xlabel(label)
        if key == "flops":
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(EngFormatter(places=None, sep=" "))
    figure.legend(
        *_legend(grid[1][0], grid[0][0]), loc="outside lower center", ncols=6, frameon=False, fontsize=9
    )
    figure.suptitle("\n".join(textwrap.wrap(_title(config, run, records, metric), 120)), fontsize=11)
    return style.save(figure, path)


def splits(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the splits in the order of drawing: train first, the others as they come."""
    found = list(dict.fromkeys(record["split"] for record in records))
    return sorted(found, key=lambda split: split != "train")


def _curves(axes: Axes, records: Sequence[Mapping[str, Any]], name: str, key: str) -> None:
    """One line a split; a split with a single record is a point."""
    style.plain(axes)
    for split, color, marker in zip(splits(records), style.COLORS, style.MARKERS, strict=False):
        points = [(r[key], r[name]) for r in records if r["split"] == split and r.get(name) is not None]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        looks = (
            {"linewidth": 1.2} if split == "train" else {"linewidth": 1.4, "marker": marker, "markersize": 4}
        )
        if len(points) == 1:
            looks = {"linestyle": "none", "marker": marker, "markersize": 7}
        axes.plot(x, y, color=color, label=f"{split} ({len(points)} records)", **looks)
    axes.set_xlim(left=0)
    if name == "accuracy":
        axes.set_ylim(top=1.0)


def _legend(*panels: Axes) -> tuple[list[Any], list[str]]:
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label.partition(" (")[0], handle)
    return list(entries.values()), list(entries)


def _title(
    config: Mapping[str, Any], run: Mapping[str, Any], records: Sequence[Mapping[str, Any]], metric: str
) -> str:
    last = {record["split"]: record for record in records}
    ends = [
        f"{split} {metric} {record[metric]:.3f}"
        for split, record in last.items()
        if record.get(metric) is not None
    ]
    size = f"{pretty(run['parameters'])} parameters" if "parameters" in run else ""
    parts = [
        str(run.get("stack", "")),
        f"{config.data.name}, {size}" if size else config.data.name,
        *ends[1:],
    ]
    return "   |   ".join(part for part in parts if part)
