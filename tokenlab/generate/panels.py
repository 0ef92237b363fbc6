"""Pictures with text above them, on one sheet: what a model draws of captions and says of pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import font_manager

from tokenlab.evaluate import paint, style
from tokenlab.evaluate.sheet import LINE, Sheet, wrap

GAP, APART, MARGIN, HEADING = 4, 24, 16, 30
"""Pixels: between pictures of a panel, between panels, around everything, a line of a heading."""

SIDE, LEAST, WIDEST = 96, 240, 1320
"""Pixels: height that pictures are brought to in whole numbers, width of a panel at least, and of the sheet about."""


@dataclass(frozen=True, eq=False)
class Panel:
    """Pictures that belong together.

    Attributes:
      lines: above them; a long one is wrapped.
      pictures: float32 [n, H, W, C] in [-1, 1], n >= 1, C 1 or 3.
    """

    lines: tuple[str, ...]
    pictures: np.ndarray


@dataclass(frozen=True, eq=False)
class Section:
    """Panels under a heading; all their pictures have one size."""

    heading: str
    panels: Sequence[Panel]


def draw(path: str | os.PathLike[str], sections: Sequence[Section]) -> Path:
    """Draw sections, each with its panels in as many columns as fit.

    Args:
      path: the PNG to write; replaced as a whole or not at all.
      sections: one or more, each with a panel or more.

    Returns:
      `path`.

    Raises:
      ShapeError: pictures of other than 1 or 3 channels.
    """
    placed = [_Placed(section) for section in sections]
    sheet = Sheet(
        2 * MARGIN + max(each.width for each in placed), 2 * MARGIN + sum(each.height for each in placed)
    )
    top = MARGIN
    for each in placed:
        each.onto(sheet, top)
        top += each.height
    return style.save(sheet.figure, path)


def drawable(text: str) -> str:
    """The text with what is no character of the font, or does not print, as Python would escape it."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))

    def shown(character: str) -> str:
        fits = character.isprintable() and font.get_char_index(ord(character))
        return character if fits else character.encode("unicode_escape").decode()

    return "".join(map(shown, text))


class _Placed:
    """A section laid out: `width` and `height` in pixels."""

    def __init__(self, section: Section) -> None:
        self._panels = section.panels
        height, width = section.panels[0].pictures.shape[1:3]
        self._factor = max(1, round(SIDE / height))
        self._side = (height * self._factor, width * self._factor)
        most = max(len(panel.pictures) for panel in section.panels)
        self._panel = max(LEAST, most * (self._side[1] + GAP) - GAP)
        self._across = min(len(section.panels), max(1, (WIDEST + APART) // (self._panel + APART)))
        self._lines = [
            [part for line in panel.lines for part in wrap(drawable(line), self._panel)]
            for panel in self._panels
        ]
        self._text = LINE * max(map(len, self._lines)) + GAP
        self._down = self._text + self._side[0] + APART
        self.width = self._across * (self._panel + APART) - APART
        self._heading = wrap(section.heading, self.width / 1.2)
        self.height = HEADING * len(self._heading) + -(-len(self._panels) // self._across) * self._down

    def onto(self, sheet: Sheet, top: int) -> None:
        sheet.write(MARGIN, top, "\n".join(self._heading), va="top", fontsize=9, weight="bold")
        top += HEADING * len(self._heading)
        for number, (panel, lines) in enumerate(zip(self._panels, self._lines, strict=True)):
            row, column = divmod(number, self._across)
            left, upper = MARGIN + column * (self._panel + APART), top + row * self._down
            sheet.write(left, upper, "\n".join(lines), va="top")
            for place, picture in enumerate(panel.pictures):
                shown = paint.enlarge(paint.image_to_rgb(picture, -1.0, 1.0), self._factor)
                sheet.picture(left + place * (self._side[1] + GAP), upper + self._text, shown)
