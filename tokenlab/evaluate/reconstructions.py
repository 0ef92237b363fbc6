"""reconstructions.png: pictures beside what their codes give, or what a masked autoencoder makes of a part of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokenlab import data
from tokenlab.evaluate import paint, style
from tokenlab.evaluate.sheet import LINE, Sheet, class_name, wrap
from tokenlab.evaluate.tokens_picture import examples
from tokenlab.evaluate.trained import Trained
from tokenlab.models.mae import MAE
from tokenlab.tasks.reconstruct import psnr

PAIRS, ACROSS = 12, 4
"""Pictures shown, and how many of them in a line."""

GAP, APART, MARGIN = 4, 24, 16  # pixels between a pair, between pairs, around everything


def draw(path: str | os.PathLike[str], trained: Trained, split: str, title: str) -> Path:
    """Draw the first pictures of each class, or of the split, each with what the model makes of it at its right.

    Args:
      path: the PNG to write; replaced as a whole.
      trained: a run of `vq_image`, or of `mae`: then what the encoder saw stands between the two.
      split: of its data.
      title: above everything.

    Returns:
      `path`.

    Raises:
      ShapeError: pictures of other than 1 or 3 channels. DataError: there is no such split.
    """
    batch = examples(trained.source, split, PAIRS)
    images = batch["image"]
    shown, what = _masked(trained, images) if masks(trained) else _coded(trained, images)
    value_range = trained.task.settings.value_range
    factor = paint.factor_for(images.shape[1])
    height, width = (side * factor for side in images.shape[1:3])
    step = len(shown) * (width + GAP) - GAP + APART
    names = getattr(trained.source, "class_names", None)
    captions = [
        [
            *_called(batch, row, step - APART, names),
            f"{psnr(float(np.mean((a - b) ** 2)), value_range):.1f} dB",
        ]
        for row, (a, b) in enumerate(zip(images, shown[-1], strict=True))
    ]
    down = height + LINE * max(map(len, captions)) + GAP + 8
    across = min(ACROSS, len(images))
    total = 2 * MARGIN + across * step - APART
    heading = wrap(f"{title}: {what}", (total - 2 * MARGIN) / 1.2)
    top = MARGIN + 26 * len(heading)
    sheet = Sheet(total, top + -(-len(images) // across) * down + MARGIN)
    sheet.write(MARGIN, MARGIN, "\n".join(heading), va="top", fontsize=9, weight="bold")
    for row, lines in enumerate(captions):
        line, column = divmod(row, across)
        left, upper = MARGIN + column * step, top + line * down
        for place, pictures in enumerate(shown):
            drawn = paint.enlarge(paint.image_to_rgb(pictures[row], *value_range), factor)
            sheet.picture(left + place * (width + GAP), upper, drawn)
        sheet.write(left, upper + height + 4, "\n".join(lines), va="top")
    return style.save(sheet.figure, path)


def masks(trained: Trained) -> bool:
    """Whether the model is a masked autoencoder."""
    return isinstance(trained.model, MAE)


def _coded(trained: Trained, images: np.ndarray) -> tuple[list[np.ndarray], str]:
    """The pictures, and what their codes give."""
    model = trained.model
    again = jax.jit(lambda p, x: model.decode(p, model.encode(p, x)))(trained.params, images)
    return [images, np.asarray(again)], "pictures (left) and what their codes give (right)"


def _masked(trained: Trained, images: np.ndarray) -> tuple[list[np.ndarray], str]:
    """The pictures, the patches of each that the encoder saw, and these with all others predicted."""
    model, task = trained.model, trained.task

    @jax.jit
    def both(params: Any, images: jax.Array) -> Any:
        output = model.apply(params, {"image": images})
        return task.pictures(model, output, images)

    seen, again = jax.device_get(both(trained.params, images))
    heading = f"pictures, the {model.kept} of {model.patches} patches that the encoder saw, and the others predicted"
    return [images, seen, again], heading


def _called(batch: data.Batch, row: int, room: int, names: tuple[str, ...] | None) -> list[str]:
    """The class of a picture, in lines; nothing where there are none."""
    return wrap(class_name(int(batch["label"][row]), names), room) if "label" in batch else []
