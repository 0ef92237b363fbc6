"""A figure laid out in whole pixels, so that images are drawn as they are and rows line up."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from tokenlab.evaluate import style

DPI = 150
LETTER = 9.5
"""About the width of a letter in pixels, in text as `Sheet.write` writes it."""

LINE = 20
"""Height of a line of it."""


class Sheet:
    """An empty sheet; (0, 0) is its top left corner.

    Args:
      width, height: in pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.figure = style.new(width / DPI, height / DPI)
        self.figure.set_layout_engine("none")

    def picture(self, left: int, top: int, pixels: np.ndarray) -> None:
        """Put an image uint8 [H, W, 3] where its top left corner is to be, a pixel a pixel."""
        width, height = self.size
        rows, columns = pixels.shape[:2]
        box = (left / width, 1 - (top + rows) / height, columns / width, rows / height)
        axes = self.figure.add_axes(box)
        axes.imshow(pixels, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def write(self, x: float, y: float, text: str, **looks: Any) -> None:
        """Write at a place."""
        width, height = self.size
        self.figure.text(x / width, 1 - y / height, text, parse_math=False, **{"fontsize": 8, **looks})


def class_name(number: int, names: tuple[str, ...] | None) -> str:
    """What to call a class."""
    return names[number] if names is not None else str(number)


def wrap(text: str, pixels: float) -> list[str]:
    """Lines of text that are about so wide."""
    return textwrap.wrap(text, max(4, int(pixels / LETTER))) or [""]
