"""tokens.png: test images, and after every reduction of a stack which patches are kept, dropped and merged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.patches import Patch

from tokenlab import data
from tokenlab.core.errors import ShapeError
from tokenlab.evaluate import paint, style
from tokenlab.evaluate.paint import Patches
from tokenlab.evaluate.sheet import LETTER, Sheet, wrap
from tokenlab.layers.program import BlockStep

ROWS = 6
"""Images shown."""

LOOKED_AT = 256
"""Examples they are chosen from."""

GAP = 14
"""Pixels between cells."""

MARGIN, HEADING, TITLE, NAME = 12, 26, 62, 140
"""Pixels: around everything, a line of a section's title, the three lines above a column, the name of a class."""

WIDEST = 2000
"""Pixels that sections may take side by side."""

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

    Of the first `LOOKED_AT` examples of the split, so that a large one need not be read.

    Args:
      source: of images.
      split: of it.
      rows: how many at most.

    Raises:
      DataError: there is no such split.
    """
    seen: list[data.Batch] = []
    for batch in data.eval_batches(source, split, LOOKED_AT // 4):
        real = np.flatnonzero(batch["mask"] > 0)
        seen.append({key: array[real] for key, array in batch.items() if key != "mask"})
        if sum(len(part["image"]) for part in seen) >= LOOKED_AT:
            break
    first = {key: np.concatenate([part[key] for part in seen]) for key in seen[0]}
    chosen = np.arange(min(rows, len(first["image"])))
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


def save(
    path: str | os.PathLike[str],
    batch: Mapping[str, np.ndarray],
    shown: Sequence[Section],
    names: tuple[str, ...] | None = None,
) -> Path:
    """Draw a row an image: the image, then for each section what the model says of it and a column a reduction.

    Sections stand side by side as far as `WIDEST` goes, and below each other from there on.

    Args:
      path: the PNG to write; replaced as a whole.
      batch: the images the sections were made of, with "label" where there is one.
      shown: sections; those without columns are left out.
      names: of the classes; None writes their numbers.

    Returns:
      `path`.

    Raises:
      ShapeError: images of other than 1 or 3 channels, or nothing to show.
    """
    shown = [section for section in shown if section.columns]
    if not shown:
        raise ShapeError("tokens.png: no stack here reduces tokens, so there is nothing to draw.")
    images = batch["image"]
    pictures = [paint.image_to_rgb(image, *paint.pixel_range(images)) for image in images]
    layout = _Layout(pictures, _labels(batch, shown, names))
    bands = layout.bands(shown)
    columns = [column for section in shown for column in section.columns]
    width = max(660, *map(layout.right, bands))
    handles = _legend(columns)
    entries = max(1, width // 330)
    legend = 30 * -(-len(handles) // entries) + MARGIN
    sheet = Sheet(width, sum(map(layout.height, bands)) + legend)
    top = 0
    for band in bands:
        layout.draw(sheet, top, band, batch, names)
        top += layout.height(band)
    sheet.figure.legend(handles=handles, loc="lower center", ncols=entries, frameon=False, fontsize=8)
    return style.save(sheet.figure, path)


def _labels(
    batch: Mapping[str, np.ndarray], shown: Sequence[Section], names: tuple[str, ...] | None
) -> list[list[str]]:
    """Everything that will stand beside an image, in lines."""
    found = [_true(int(label), names) for label in batch.get("label", ())]
    return found + [_said(said, names) for section in shown for said in section.predicted or ()]


def _true(label: int, names: tuple[str, ...] | None) -> list[str]:
    return [f"label {label}"] if names is None else wrap(names[label], NAME)


def _said(label: int, names: tuple[str, ...] | None) -> list[str]:
    return [f"says {label}"] if names is None else ["says", *wrap(names[label], NAME)]


class _Layout:
    """Where things stand in a band: a line of sections with the images at its left, all of one height.

    Args:
      pictures: uint8 [H, W, 3], all of one shape.
      labels: what will stand beside them.
    """

    def __init__(self, pictures: list[np.ndarray], labels: list[list[str]]) -> None:
        self.pictures = pictures
        self.factor = paint.factor_for(pictures[0].shape[0])
        self.rows, self.columns = (side * self.factor for side in pictures[0].shape[:2])
        longest = max((len(line) for lines in labels for line in lines), default=0)
        self.beside = max(84, round(longest * LETTER) + 14)
        self.left = MARGIN + self.beside

    def span(self, count: int) -> int:
        """Width of a section, from what stands beside it."""
        return self.beside + count * (self.columns + GAP) - GAP

    def lefts(self, band: Sequence[Section]) -> list[int]:
        """Where the first column of each section begins; one more, for a section that would come next."""
        found = [self.left + self.columns + 2 * GAP + self.beside]
        for section in band:
            found.append(found[-1] + self.span(len(section.columns)) + 2 * GAP)
        return found

    def right(self, band: Sequence[Section]) -> int:
        """Width of a band."""
        return self.lefts(band)[-1] - 2 * GAP - self.beside + MARGIN

    def headings(self, band: Sequence[Section]) -> list[list[str]]:
        """The title of each section, wrapped to its width."""
        return [wrap(section.title, max(190, self.span(len(section.columns)))) for section in band]

    def top(self, band: Sequence[Section]) -> int:
        """Pixels above the images of a band: the titles of its sections, and three lines above each column."""
        return MARGIN + HEADING * max(map(len, self.headings(band))) + TITLE

    def height(self, band: Sequence[Section]) -> int:
        """Of a band."""
        return self.top(band) + len(self.pictures) * (self.rows + GAP)

    def bands(self, shown: Sequence[Section]) -> list[list[Section]]:
        """Sections in lines no wider than `WIDEST`; one that is too wide for a line goes on in the next."""
        room = WIDEST - self.lefts([])[0] - MARGIN + GAP
        most = max(1, room // (self.columns + GAP))
        parts = []
        for section in shown:
            for first in range(0, len(section.columns), most):
                title = f"{section.title} (continued)" if first else section.title
                parts.append(replace(section, title=title, columns=section.columns[first : first + most]))
        found: list[list[Section]] = [[]]
        for part in parts:
            if found[-1] and self.right([*found[-1], part]) > WIDEST:
                found.append([])
            found[-1].append(part)
        return found

    def draw(
        self,
        sheet: Sheet,
        offset: int,
        band: Sequence[Section],
        batch: Mapping[str, np.ndarray],
        names: tuple[str, ...] | None,
    ) -> None:
        """Draw a band whose upper edge is at `offset`."""
        top = offset + self.top(band)

        def beside(row: int, left: int, lines: list[str], color: str) -> None:
            middle = top + row * (self.rows + GAP) + self.rows / 2
            sheet.write(left - 8, middle, "\n".join(lines), ha="right", va="center", color=color)

        def above(left: int, text: str) -> None:
            sheet.write(left + self.columns / 2, top - 5, text, ha="center", va="bottom")

        def tops() -> Iterator[tuple[int, int, np.ndarray]]:
            for row, picture in enumerate(self.pictures):
                yield row, top + row * (self.rows + GAP), picture

        above(self.left, "image")
        for row, y, picture in tops():
            sheet.picture(self.left, y, paint.enlarge(picture, self.factor))
            if "label" in batch:
                beside(row, self.left, _true(int(batch["label"][row]), names), "black")
        for section, left, lines in zip(band, self.lefts(band), self.headings(band), strict=False):
            middle = left - self.beside + self.span(len(section.columns)) / 2
            sheet.write(middle, offset + MARGIN, "\n".join(lines), ha="center", va="top", weight="bold")
            for across, column in enumerate(section.columns):
                at = left + across * (self.columns + GAP)
                above(at, column.title)
                for row, y, picture in tops():
                    sheet.picture(at, y, paint.paint(picture, section.grid, column.patches[row]))
            for row, said in enumerate(section.predicted or ()):
                wrong = "label" in batch and said != batch["label"][row]
                beside(row, left, _said(said, names), WRONG if wrong else "black")


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
