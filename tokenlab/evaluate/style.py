"""How figures look: one place for colours, sizes and for writing a file whole or not at all.

Figures are made without pyplot: nothing global is touched, no window system is asked for, nothing is left open.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart with every common form of colour blindness (Okabe and Ito 2008)."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

GREY = "#666666"


def new(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches, laid out so that nothing overlaps."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    """Two spines, a light grid behind the curves, small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def save(figure: Figure, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write a PNG so that at any moment the file is the old one or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", **options)
    temporary.replace(path)
    return path
