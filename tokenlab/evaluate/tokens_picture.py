"""tokens.png: test images, and after every reduction of a stack which patches are kept, dropped and merged."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.patches import Patch

from tokenlab import data
from tokenlab.core.errors import ShapeError
from tokenlab.evaluate import paint, style
from tokenlab.evaluate.paint import Patches
from tokenlab.layers.program import BlockStep

ROWS = 6
"""Images shown."""

GAP = 14
"""Pixels between cells."""

WRONG = style.COLORS[1]


@dataclass(frozen=True)
class Column:
    """One reduction of a stack.

    Attributes:
      name: of the step, `keep_00`.
      after_block: how many blocks ran before it.
      patches: what became of the patches, an entry an image.
      tokens: (before, after): tokens without the protected ones; for a wrapper, after is what its body sees.
      inside: True for a wrapper's body.
    """

    name: str
    after_block: int
    patches: tuple[Patches, ...]
    tokens: tuple[int, int]
    inside: bool

    @property
    def title(self) -> str:
        """Name, place and token counts, on three lines."""
        place = f"after block {self.after_block}" if self.after_block else "before block 1"
        before, after = self.tokens
        counts = f"{after} of {before} in the body" if self.inside else f"{before} → {after} tokens"
        return f"{self.name}\n{place}\n{counts}"


@dataclass(frozen=True)
class Section:
    """The reductions of one stack on some images.

    Attributes:
      title: above its columns.
      columns: in the order of execution; none for a dense stack.
      grid: (rows, columns) of patches.
      predicted: class the model says of each image, or None where it does not classify.
    """

    title: str
    columns: tuple[Column, ...]
    grid: tuple[int, int]
    predicted: tuple[int, ...] | None


def examples(source: data.Source, split: str, rows: int = ROWS) -> data.Batch:
    """The first example of each class in order of label, or the first examples where there are no labels.

    Args:
      source: of images.
      split: of it.
      rows: how many at most.

    Raises:
      DataError: there is no such split.
    """
    records = source.split(split)
    first = records.batch(np.arange(min(len(records), 256)))
    chosen = np.arange(min(rows, len(records)))
    if "label" in first:
        labels, places = np.unique(first["label"], return_index=True)
        chosen = places[np.argsort(labels)][:rows]
    return {key: array[chosen] for key, array in first.items()}


def section(model: Any, params: Any, batch: Mapping[str, np.ndarray], *, title: str) -> Section:
    """Run a model on some images and read what every reduction of its stack does to their patches.

    Args:
      model: with `apply(..., record=True)`, `grid` and `program`, see `tokenlab.models.vit.ViT`.
      params: its weights.
      batch: "image" [B, H, W, C] and what else it reads.
      title: of the section.
    """
    points: list[tuple[str, bool, int]] = []

    @jax.jit
    def forward(params: Any, batch: Any) -> tuple[Any, list[Any]]:
        output = model.apply(params, batch, train=False, record=True)
        points[:] = [(point.name, point.inside, point.tokens.protected) for point in output.trace]
        return output.logits, [point.tokens.owner for point in output.trace]

    logits, owners = jax.device_get(forward(params, {"image": batch["image"]}))
    columns = read_trace(
        [(*point, owner) for point, owner in zip(points, owners, strict=True)],
        patches=model.grid[0] * model.grid[1],
        blocks=_blocks_before(model.program),
    )
    predicted = tuple(int(best) for best in np.argmax(logits, axis=-1)) if logits.ndim == 2 else None
    return Section(title, tuple(columns), model.grid, predicted)


def read_trace(
    trace: Sequence[tuple[str, bool, int, np.ndarray]], *, patches: int, blocks: Mapping[str, int]
) -> list[Column]:
    """Columns of a recorded forward pass.

    A wrapper is recorded twice: its body's tokens (`inside`) when it hands them in, and what goes on afterwards. The
    latter makes a column only if it differs from what was there before the wrapper.

    Args:
      trace: (name, inside, protected, owner [B, special + M]) of every point, in order; `owner` has for each original
        token the index of the token that carries it, -1 for none. Original tokens are CLS and registers, then patches.
      patches: M.
      blocks: name of the step -> blocks that ran before it.
    """
    columns: list[Column] = []
    if not trace:
        return columns
    batch, original = trace[0][3].shape
    special = original - patches
    if special < 0:
        raise ShapeError(f"tokens of {original} inputs were recorded, fewer than the {patches} patches.")
    now = np.broadcast_to(np.arange(original), (batch, original))
    outer: list[tuple[str, np.ndarray]] = []  # wrappers we are inside of, with the tokens before each
    for name, inside, protected, owner in trace:
        before = now
        if inside:
            outer.append((name, before))
        elif outer and outer[-1][0] == name:
            before = outer.pop()[1]
        now = np.asarray(owner)
        closes = not inside and columns and any(column.name == name for column in columns)
        if closes and np.array_equal(before, now):
            continue
        found = tuple(Patches(b[special:], a[special:], inside) for b, a in zip(before, now, strict=True))
        counts = tuple(_tokens(owners[0]) - protected for owners in (before, now))
        columns.append(Column(name, blocks.get(name, 0), found, counts, inside))
    return columns


def _tokens(owner: np.ndarray) -> int:
    """Tokens that carry something, in one example."""
    return len(np.unique(owner[owner >= 0]))


def _blocks_before(program: Any) -> dict[str, int]:
    """For every item of a program, the number of blocks that began before it."""
    found, blocks = {}, 0
    for step in program.flat():
        if isinstance(step, BlockStep):
            blocks += 1
        else:
            found[step.name] = blocks
    return found


def save(path: str | os.PathLike[str], batch: Mapping[str, np.ndarray], shown: Sequence[Section]) -> Path:
    """Draw a row an image: the image, then for each section what the model says of it and a column a reduction.

    Args:
      path: the PNG to write; replaced as a whole.
      batch: the images the sections were made of, with "label" where there is one.
      shown: sections; those without columns are left out.

    Returns:
      `path`.

    Raises:
      ShapeError: images of other than 1 or 3 channels, or nothing to show.
    """
    shown = [section for section in shown if section.columns]
    if not shown:
        raise ShapeError("tokens.png: no stack here reduces tokens, so there is nothing to draw.")
    images = batch["image"]
    pictures = [paint.image_to_rgb(image, float(images.min()), float(images.max())) for image in images]
    sheet = _Sheet(
        pictures, [section.title for section in shown], [len(section.columns) for section in shown]
    )
    sheet.headings()
    sheet.above(sheet.left, "image")
    for row, picture in enumerate(pictures):
        sheet.cell(row, sheet.left, paint.enlarge(picture, paint.factor_for(picture.shape[0])))
        if "label" in batch:
            sheet.beside(row, sheet.left, f"label {batch['label'][row]}", "black")
    for section, left in zip(shown, sheet.lefts, strict=True):
        for across, column in enumerate(section.columns):
            at = left + across * (sheet.width + GAP)
            sheet.above(at, column.title)
            for row, picture in enumerate(pictures):
                sheet.cell(row, at, paint.paint(picture, section.grid, column.patches[row]))
        for row, said in enumerate(section.predicted or ()):
            wrong = "label" in batch and said != batch["label"][row]
            sheet.beside(row, left, f"says {said}", WRONG if wrong else "black")
    columns = [column for section in shown for column in section.columns]
    sheet.legend(_legend(columns))
    return style.save(sheet.figure, path)


class _Sheet:
    """Cells at whole pixels, so that every patch is drawn as it was painted and rows line up.

    Args:
      pictures: uint8 [H, W, 3], all of one shape.
      titles: of the sections.
      counts: columns in each.
    """

    DPI = 150
    MARGIN, BESIDE, HEADING, TITLE, LEGEND = 12, 84, 26, 62, 66  # pixels

    def __init__(self, pictures: list[np.ndarray], titles: Sequence[str], counts: Sequence[int]) -> None:
        factor = paint.factor_for(pictures[0].shape[0])
        self.height, self.width = (side * factor for side in pictures[0].shape[:2])
        self.left = self.MARGIN + self.BESIDE
        self.lefts: list[int] = []
        self._counts = counts
        right = self.left + self.width
        for count in counts:
            self.lefts.append(right + 2 * GAP + self.BESIDE)
            right = self.lefts[-1] + count * (self.width + GAP) - GAP
        self._headings = [
            textwrap.wrap(title, max(20, round(self._span(count) / 9.5)))
            for title, count in zip(titles, counts, strict=True)
        ]
        self.top = self.MARGIN + self.HEADING * max(map(len, self._headings)) + self.TITLE
        self.total = (
            max(right + self.MARGIN, 660),
            self.top + len(pictures) * (self.height + GAP) + self.LEGEND,
        )
        self.figure = style.new(self.total[0] / self.DPI, self.total[1] / self.DPI)
        self.figure.set_layout_engine("none")

    def cell(self, row: int, left: int, picture: np.ndarray) -> None:
        """Put a painted image into a row."""
        bottom = self.total[1] - self.top - row * (self.height + GAP) - self.height
        box = (left, bottom, self.width, self.height)
        axes = self.figure.add_axes([side / self.total[i % 2] for i, side in enumerate(box)])
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def beside(self, row: int, left: int, text: str, color: str) -> None:
        """Write to the left of a cell."""
        middle = self.top + row * (self.height + GAP) + self.height / 2
        self._write(left - 8, middle, text, ha="right", va="center", color=color)

    def above(self, left: int, text: str) -> None:
        """Write above the first cell of a column."""
        self._write(left + self.width / 2, self.top - 5, text, ha="center", va="bottom")

    def headings(self) -> None:
        """Write the titles of the sections above their columns, wrapped to their width."""
        for lines, left, count in zip(self._headings, self.lefts, self._counts, strict=True):
            middle = left - self.BESIDE + self._span(count) / 2
            self._write(middle, self.MARGIN, "\n".join(lines), ha="center", va="top", weight="bold")

    def legend(self, handles: list[Patch]) -> None:
        """Explain colours below everything, in as many columns as fit."""
        columns = max(1, self.total[0] // 330)
        self.figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8)

    def _span(self, count: int) -> int:
        return self.BESIDE + count * (self.width + GAP) - GAP

    def _write(self, x: float, y: float, text: str, **looks: Any) -> None:
        self.figure.text(x / self.total[0], 1 - y / self.total[1], text, fontsize=8, **looks)


def _legend(columns: Sequence[Column]) -> list[Patch]:
    """What occurs in the picture and what it means."""
    every = [patches for column in columns for patches in column.patches]
    lost = [patches for patches in every if not patches.inside]
    bodies = [patches for patches in every if patches.inside]
    entries: list[Patch] = []

    def add(label: str, occurs: bool, face: Any, edge: Any, hatch: str = "") -> None:
        if occurs:
            entries.append(Patch(facecolor=face, edgecolor=edge, hatch=hatch, label=label, linewidth=1.5))

    grey, stripe = paint.DROPPED / 255, paint.STRIPE / 255
    add("dropped here", any(p.left.any() for p in lost), grey, stripe, "////")
    add(
        "gone before", any(p.gone.any() for p in every), paint.GONE / 255, paint.GONE_STRIPE / 255, "\\\\\\\\"
    )
    add(
        "merged into one token (one colour)",
        any(p.merged.any() for p in every),
        "white",
        paint.GROUPS[0] / 255,
    )
    add("passes through the body", bool(bodies), "white", paint.THROUGH / 255)
    add("goes around the body", any(p.left.any() for p in bodies), "#d9d9d9", "#d9d9d9")
    return entries
