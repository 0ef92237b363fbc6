"""Random changes to training images, written as one line: `"shift(1)|rotate(10)"`.

Operations run from left to right on a whole batch at once, in numpy. What happens to an image depends on (seed, step,
row in the global batch) alone, so a process that holds some of the rows changes them as one process would that holds
them all, and a run that goes on repeats nothing and leaves nothing out.

An operation is a function `(images, draws, *parameters) -> images` in `OPERATIONS`, with how many random numbers it
draws for each image.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from tokenlab.core.errors import DataError, suggest
from tokenlab.data.draws import Purpose, check_seed, uniform
from tokenlab.data.source import Batch, Spec

MAX_CHARACTERS = 1_000


def shift(images: np.ndarray, draws: np.ndarray, pixels: int, fill: float = -1.0) -> np.ndarray:
    """Move each image by whole pixels, between -pixels and +pixels along rows and along columns alike.

    Args:
      images: float32 [B, R, C, channels].
      draws: float32 [B, 2] in [0, 1).
      pixels: the largest distance, 0 <= pixels < min(R, C).
      fill: value of what comes in at the border; -1 is the paper of digits, black in photographs.
    """
    inside = isinstance(pixels, int) and 0 <= pixels < min(images.shape[1:3])
    _require("shift", "pixels", pixels, inside, f"an int from 0 to {min(images.shape[1:3]) - 1}")
    batch, rows, columns, channels = images.shape
    padded = np.full((batch, rows + 2 * pixels, columns + 2 * pixels, channels), fill, dtype=images.dtype)
    padded[:, pixels : pixels + rows, pixels : pixels + columns] = images
    start = np.floor(draws * (2 * pixels + 1)).astype(np.intp)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (rows, columns), axis=(1, 2))
    moved = windows[np.arange(batch), start[:, 0], start[:, 1]]  # [B, channels, R, C]
    return np.ascontiguousarray(np.moveaxis(moved, 1, -1))


def rotate(images: np.ndarray, draws: np.ndarray, degrees: float, fill: float = -1.0) -> np.ndarray:
    """Turn each image about its centre by an angle between -degrees and +degrees, with bilinear interpolation.

    Args:
      images: float32 [B, R, C, channels].
      draws: float32 [B, 1] in [0, 1).
      degrees: the largest angle, 0 to 180.
      fill: value of what comes in at the border.
    """
    _require("rotate", "degrees", degrees, 0 <= degrees <= 180, "an angle from 0 to 180")
    angle = np.deg2rad(np.float32(degrees)) * (2 * draws[:, 0] - 1)
    cosine, sine = np.cos(angle), np.sin(angle)
    return _sample(images, cosine, -sine, sine, cosine, fill)


def scale(images: np.ndarray, draws: np.ndarray, fraction: float, fill: float = -1.0) -> np.ndarray:
    """Enlarge each image about its centre by a factor between 1 - fraction and 1 + fraction, rows and columns alike.

    Args:
      images: float32 [B, R, C, channels].
      draws: float32 [B, 1] in [0, 1).
      fraction: the largest change, 0 <= fraction < 1.
      fill: value of what comes in at the border.
    """
    _require("scale", "fraction", fraction, 0 <= fraction < 1, "a number in [0, 1)")
    inverse = 1 / (1 + np.float32(fraction) * (2 * draws[:, 0] - 1))
    zero = np.zeros_like(inverse)
    return _sample(images, inverse, zero, zero, inverse, fill)


OPERATIONS: Mapping[str, tuple[Callable[..., np.ndarray], int]] = {
    "shift": (shift, 2),
    "rotate": (rotate, 1),
    "scale": (scale, 1),
}
"""Name -> the operation and how many random numbers it draws for each image."""


@dataclass(frozen=True)
class Step:
    """One operation of an augmentation with its parameters."""

    name: str
    parameters: Mapping[str, int | float]


class Augment:
    """A parsed augmentation.

    Args:
      text: operations joined by "|", for example "shift(1)|rotate(degrees=10)"; "" changes nothing.
      spec: of the source's examples; an augmentation needs a key "image", float32 [R, C, channels].

    Raises:
      DataError: the text is not of this form, an operation or parameter is unknown or out of range, or the spec has
        no such image. Where the text is at fault the message has a caret under the place.
    """

    def __init__(self, text: str, spec: Spec):
        self.text = text
        self.steps = parse(text)
        self._draws = sum(OPERATIONS[step.name][1] for step in self.steps)
        if self.steps:
            shape, dtype = spec.get("image", ((), "no"))
            if len(shape) != 3 or dtype != "float32":
                raise DataError(
                    f"augment {text!r} needs image float32[R, C, channels]; the source has {dict(spec)}"
                )
            # Parameters out of range must not wait for the first step of a run.
            self._run(np.zeros((1, *shape), np.float32), np.zeros((1, self._draws), np.float32))

    def __call__(self, batch: Batch, *, seed: int, step: int, rows: range, global_batch: int) -> Batch:
        """The batch with its images changed; other keys are passed on.

        Args:
          batch: arrays [B, ...]: rows `rows` of the global batch of this step.
          seed: of the run.
          step: of the run.
          rows: which rows of the global batch these are, len(rows) == B.
          global_batch: rows of the batch over all processes.
        """
        if not self.steps:
            return batch
        draws = uniform(check_seed(seed), Purpose.AUGMENT, step, (global_batch, self._draws))
        return {**batch, "image": self._run(batch["image"], draws[rows.start : rows.stop])}

    def _run(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        for step in self.steps:
            operation, count = OPERATIONS[step.name]
            mine, draws = draws[:, :count], draws[:, count:]
            images = operation(images, mine, **step.parameters)
        return images


def parse(text: str) -> tuple[Step, ...]:
    """The operations of an augmentation text, in order; parsed with `ast`, never evaluated.

    Raises:
      DataError: with a caret under the place that is wrong.
    """
    if len(text) > MAX_CHARACTERS or not text.isascii():
        raise DataError(f"augment has {len(text)} characters; expected at most {MAX_CHARACTERS}, plain ASCII")
    if "\n" in text:
        raise DataError(f"augment {text!r} has a line break; expected one line")
    if not text.strip():
        return ()
    if text != text.strip():
        return parse(text.strip())
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = (getattr(error, "offset", None) or 1) - 1
        _fail(text, column, column + 1, 'not of the form "name(number)|name(number)"')
    nodes: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        nodes.append(tree.right)
        tree = tree.left
    return tuple(_step(text, node) for node in [tree, *reversed(nodes)])


def _step(text: str, node: ast.expr) -> Step:
    start, end = node.col_offset, node.end_col_offset or node.col_offset
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        _fail(text, start, end, 'expected an operation such as "shift(1)"')
    name = node.func.id
    if name not in OPERATIONS:
        _fail(text, start, start + len(name), f"unknown operation {name!r}.{suggest(name, OPERATIONS)}")
    positional = [_number(text, value) for value in node.args]
    named = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in named:
            _fail(
                text,
                keyword.col_offset,
                keyword.col_offset + 1,
                f"{name} takes each parameter once, by its name",
            )
        named[keyword.arg] = _number(text, keyword.value)
    parameters = list(inspect.signature(OPERATIONS[name][0]).parameters.values())[2:]
    try:
        bound = inspect.Signature(parameters).bind(*positional, **named)
    except TypeError as error:
        required = inspect.Parameter.empty
        usage = ", ".join(p.name if p.default is required else f"{p.name}={p.default}" for p in parameters)
        _fail(text, start, end, f"{error}; expected {name}({usage})")
    return Step(name, bound.arguments)


def _number(text: str, node: ast.expr) -> int | float:
    sign, value = 1, node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, value = -1, node.operand
    if (
        not isinstance(value, ast.Constant)
        or type(value.value) not in (int, float)
        or not math.isfinite(value.value)
    ):
        _fail(text, node.col_offset, node.end_col_offset or node.col_offset, "expected a finite number")
    return sign * value.value


def _fail(text: str, start: int, end: int, message: str) -> NoReturn:
    start = min(start, len(text))
    mark = " " * start + "^" * max(1, min(end, len(text)) - start)
    raise DataError(f"augment: {message}\n  {text}\n  {mark}")


def _require(operation: str, parameter: str, value: object, condition: bool, expected: str) -> None:
    if not condition:
        raise DataError(f"augment: {operation} has {parameter}={value!r}; expected {expected}")


def _sample(
    images: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray, fill: float
) -> np.ndarray:
    """Bilinear samples: output pixel (y, x), measured from the centre, reads the input at (a y + b x, c y + d x).

    Args:
      images: float32 [B, R, C, channels].
      a, b, c, d: float32 [B], one linear map for each image.
      fill: value outside the image.
    """
    batch, rows, columns, channels = images.shape
    y = np.arange(rows, dtype=np.float32) - (rows - 1) / 2
    x = np.arange(columns, dtype=np.float32) - (columns - 1) / 2
    y, x = np.repeat(y, columns), np.tile(x, rows)
    # The image gets a ring of `fill` (two deep at the far sides, for the neighbour to the right and below); positions
    # beyond the ring are moved onto it, where only `fill` has weight.
    source_y = np.clip(np.outer(a, y) + np.outer(b, x) + (rows + 1) / 2, 0, rows + 1)
    source_x = np.clip(np.outer(c, y) + np.outer(d, x) + (columns + 1) / 2, 0, columns + 1)
    padded = np.full((batch, rows + 3, columns + 3, channels), fill, dtype=images.dtype)
    padded[:, 1 : rows + 1, 1 : columns + 1] = images
    top, left = np.floor(source_y), np.floor(source_x)
    down, right = (source_y - top)[..., None], (source_x - left)[..., None]
    width = columns + 3
    offset = (np.arange(batch) * ((rows + 3) * width))[:, None]
    index = offset + top.astype(np.intp) * width + left.astype(np.intp)
    flat = padded.reshape(-1, channels)
    upper = _mix(flat.take(index, axis=0), flat.take(index + 1, axis=0), right)
    lower = _mix(flat.take(index + width, axis=0), flat.take(index + width + 1, axis=0), right)
    return _mix(upper, lower, down).reshape(images.shape)


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return first + (second - first) * weight
