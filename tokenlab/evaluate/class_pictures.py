"""predictions.png, calibration.png and confusion.png of a model that classifies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenlab.evaluate import metrics, paint, style
from tokenlab.evaluate.predictions import Predictions
from tokenlab.evaluate.sheet import LETTER, LINE, Sheet, class_name, wrap

ACROSS, DOWN = 6, 2
"""Images in a row, and rows of right answers and of mistakes."""

MOST_CLASSES, NUMBERED = 50, 20
"""Classes a confusion matrix is drawn for at most, and with its counts written into it."""

GAP, MARGIN, NARROWEST = 16, 16, 128  # pixels


@dataclass(frozen=True)
class Chosen:
    """Examples to show.

    Attributes:
      index: place in the split of the right ones, then of the mistakes, [r + w].
      right: r.
      labels, predicted: [r + w] int.
      confidence: probability of the predicted class, [r + w].
      mistakes: how many there are in all.
      examples: how many examples there are in all.
    """

    index: np.ndarray
    right: int
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    mistakes: int
    examples: int


def choose(said: Predictions, across: int = ACROSS, down: int = DOWN) -> Chosen:
    """The first right example of each class in order of class, and then the most confident mistakes.

    Args:
      said: of a split, with labels.
      across, down: at most across * down of either.
    """
    predicted = said.logits.argmax(axis=1)
    confidence = np.exp(metrics.log_probabilities(said.logits).max(axis=1))
    hits = np.flatnonzero(predicted == said.labels)
    right = hits[np.unique(said.labels[hits], return_index=True)[1]][: across * down]
    wrong = np.flatnonzero(predicted != said.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][: across * down]
    rows = np.concatenate([right, worst])
    return Chosen(
        said.index[rows],
        len(right),
        said.labels[rows],
        predicted[rows],
        confidence[rows],
        len(wrong),
        len(said),
    )


def predictions(
    path: str | os.PathLike[str],
    chosen: Chosen,
    images: np.ndarray,
    names: tuple[str, ...] | None,
    title: str,
) -> Path:
    """Draw images with their class, what the model says and how sure it is: right ones above, mistakes below.

    Args:
      path: the PNG to write; replaced as a whole.
      chosen: from `choose`.
      images: of its examples, [r + w, H, W, C].
      names: of the classes; None writes their numbers.
      title: above everything.

    Raises:
      ShapeError: images of other than 1 or 3 channels.
    """
    scale = paint.factor_for(images.shape[1])
    pictures = [
        paint.enlarge(paint.image_to_rgb(image, *paint.pixel_range(images)), scale) for image in images
    ]
    rows, columns = pictures[0].shape[:2]
    step = max(columns, NARROWEST) + GAP
    texts = [
        [
            wrap(class_name(int(label), names), step - GAP),
            wrap(f"says {class_name(int(said), names)} ({share:.2f})", step - GAP),
        ]
        for label, said, share in zip(chosen.labels, chosen.predicted, chosen.confidence, strict=True)
    ]
    height = rows + GAP + LINE * max(len(true) + len(says) for true, says in texts)
    right, wrong = chosen.right, len(pictures) - chosen.right
    parts = [
        (f"right: the first of each of {right} classes" if right else "right: none", range(right), "black"),
        (
            f"wrong: the {wrong} most confident of {chosen.mistakes} mistakes in {chosen.examples} examples"
            if wrong
            else f"wrong: none of {chosen.examples} examples",
            range(right, right + wrong),
            style.COLORS[1],
        ),
    ]
    heading = 2 * LINE
    lines = [-(-len(which) // ACROSS) for _, which, _ in parts]
    width = 2 * MARGIN + ACROSS * step - GAP
    titles = wrap(title, (width - 2 * MARGIN) / 1.2)
    top = MARGIN + 26 * len(titles)
    sheet = Sheet(width, top + sum(heading + count * height for count in lines) + MARGIN)
    sheet.write(MARGIN, MARGIN, "\n".join(titles), va="top", fontsize=9, weight="bold")
    for (text, which, color), count in zip(parts, lines, strict=True):
        sheet.write(MARGIN, top + heading - 10, text, va="bottom", weight="bold", color=color)
        for place, number in enumerate(which):
            down, across = divmod(place, ACROSS)
            left, upper = MARGIN + across * step, top + heading + down * height
            sheet.picture(left, upper, pictures[number])
            true, says = texts[number]
            sheet.write(left, upper + rows + 4, "\n".join(true), va="top")
            below = upper + rows + 4 + LINE * len(true)
            sheet.write(left, below, "\n".join(says), va="top", color=color)
        top += heading + count * height
    return style.save(sheet.figure, path)


def calibration(path: str | os.PathLike[str], curves: Sequence[tuple[str, metrics.Calibration]]) -> Path:
    """Draw a reliability diagram for each stack: accuracy against confidence, and how many examples are in each bin.

    Args:
      path: the PNG to write; replaced as a whole.
      curves: (title, calibration) of each.
    """
    figure = style.new(0.6 + 3.6 * len(curves), 5.2)
    grid = figure.subplots(
        2, len(curves), sharex=True, sharey="row", squeeze=False, gridspec_kw={"height_ratios": (3, 1)}
    )
    for (title, found), upper, lower in zip(curves, *grid, strict=True):
        used = [each for each in found.bins if each.count]
        left, width = [each.low for each in used], [each.high - each.low for each in used]
        for axes in (upper, lower):
            style.plain(axes)
            axes.set_xlim(0, 1)
        upper.plot([0, 1], [0, 1], color=style.GREY, linewidth=1, linestyle="--", label="perfect")
        bars = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
        upper.bar(
            left, [each.accuracy for each in used], width, color=style.COLORS[0], label="accuracy", **bars
        )
        upper.plot(
            [each.confidence for each in used],
            [each.accuracy for each in used],
            linestyle="none",
            marker=".",
            color=style.COLORS[1],
            label="at the mean confidence of the bin",
            clip_on=False,
            zorder=3,
        )
        upper.set_ylim(0, 1)
        lower.bar(left, [each.count for each in used], width, color=style.GREY, **bars)
        lower.set_xlabel("confidence")
        heading = "\n".join([*wrap(title, 470), f"ECE {found.ece:.4f}"])
        upper.set_title(heading, fontsize=9, parse_math=False)
    grid[0][0].set_ylabel("accuracy")
    grid[1][0].set_ylabel("examples")
    grid[0][0].legend(frameon=False, fontsize=7, loc="upper left")
    return style.save(figure, path)


def confusion(
    path: str | os.PathLike[str],
    matrices: Sequence[tuple[str, np.ndarray]],
    names: tuple[str, ...] | None,
) -> Path:
    """Draw a confusion matrix for each stack: shares of the true class as shades, counts where there is room.

    Args:
      path: the PNG to write; replaced as a whole.
      matrices: (title, int [C, C], true class by predicted class) of each; C at most `MOST_CLASSES`.
      names: of the classes; None writes their numbers.
    """
    count = len(matrices[0][1])
    labels = [class_name(number, names) for number in range(count)]
    side = max(2.4, (0.42 if count <= NUMBERED else 0.2) * count)
    longest = max(map(len, labels)) * LETTER / 150
    down, across = (1, len(matrices)) if count <= NUMBERED else (len(matrices), 1)
    figure = style.new(across * (side + longest + 0.8), down * (side + longest + 1.0))
    grid = figure.subplots(down, across, squeeze=False)
    for (title, matrix), axes in zip(matrices, grid.flat, strict=True):
        share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(count), labels, fontsize=7, rotation=90 if names else 0, parse_math=False)
        axes.set_yticks(range(count), labels, fontsize=7, parse_math=False)
        axes.set_xlabel("predicted", fontsize=8)
        axes.set_ylabel("true", fontsize=8)
        heading = "\n".join(wrap(title, 150 * (side + longest)))
        axes.set_title(heading, fontsize=9, parse_math=False)
        if count <= NUMBERED:
            for (i, j), value in np.ndenumerate(matrix):
                if value:
                    color = "white" if share[i, j] > 0.5 else "black"
                    axes.text(j, i, str(value), ha="center", va="center", fontsize=6, color=color)
    return style.save(figure, path)
