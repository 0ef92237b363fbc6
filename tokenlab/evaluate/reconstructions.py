"""reconstructions.png: pictures beside what their codes give."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np

from tokenlab import data
from tokenlab.evaluate import paint, style
from tokenlab.evaluate.sheet import LINE, Sheet, class_name, wrap
from tokenlab.evaluate.tokens_picture import examples
from tokenlab.evaluate.trained import Trained
from tokenlab.tasks.reconstruct import psnr

PAIRS, ACROSS = 12, 4
"""Pictures shown, and how many of them in a line."""

GAP, APART, MARGIN = 4, 24, 16  # pixels between a pair, between pairs, around everything


def draw(path: str | os.PathLike[str], trained: Trained, split: str, title: str) -> Path:
    """Draw the first pictures of each class, or of the split, each with its reconstruction at its right.

    Args:
      path: the PNG to write; replaced as a whole.
      trained: a run of `vq_image`.
      split: of its data.
      title: above everything.

    Returns:
      `path`.

    Raises:
      ShapeError: pictures of other than 1 or 3 channels. DataError: there is no such split.
    """
    model, value_range = trained.model, trained.task.settings.value_range
    batch = examples(trained.source, split, PAIRS)
    images = batch["image"]
    again = np.asarray(jax.jit(lambda p, x: model.decode(p, model.encode(p, x)))(trained.params, images))
    factor = paint.factor_for(images.shape[1])
    height, width = (side * factor for side in images.shape[1:3])
    step = 2 * width + GAP + APART
    names = getattr(trained.source, "class_names", None)
    captions = [
        [
            *_called(batch, row, step - APART, names),
            f"{psnr(float(np.mean((a - b) ** 2)), value_range):.1f} dB",
        ]
        for row, (a, b) in enumerate(zip(images, again, strict=True))
    ]
    down = height + LINE * max(map(len, captions)) + GAP + 8
    across = min(ACROSS, len(images))
    total = 2 * MARGIN + across * step - APART
    heading = wrap(f"{title}: pictures (left) and what their codes give (right)", (total - 2 * MARGIN) / 1.2)
    top = MARGIN + 26 * len(heading)
    sheet = Sheet(total, top + -(-len(images) // across) * down + MARGIN)
    sheet.write(MARGIN, MARGIN, "\n".join(heading), va="top", fontsize=9, weight="bold")
    for row, lines in enumerate(captions):
        line, column = divmod(row, across)
        left, upper = MARGIN + column * step, top + line * down
        for place, picture in enumerate((images[row], again[row])):
            drawn = paint.enlarge(paint.image_to_rgb(picture, *value_range), factor)
            sheet.picture(left + place * (width + GAP), upper, drawn)
        sheet.write(left, upper + height + 4, "\n".join(lines), va="top")
    return style.save(sheet.figure, path)


def _called(batch: data.Batch, row: int, room: int, names: tuple[str, ...] | None) -> list[str]:
    """The class of a picture, in lines; nothing where there are none."""
    return wrap(class_name(int(batch["label"][row]), names), room) if "label" in batch else []
