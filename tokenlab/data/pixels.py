"""Pixels as OpenCV moves them: pictures decoded, resized, padded and warped, with any number of channels."""

from __future__ import annotations

import re
from collections.abc import Callable

import cv2
import numpy as np

from tokenlab.core.errors import DataError

# Threads are ours (config.data.threads); OpenCV's own would only compete with them.
cv2.setNumThreads(0)
# What is wrong with a picture is told by an error; OpenCV's own lines about it would only stand between ours.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""A JPEG marker that begins a segment or ends the picture; in the coded data between segments there is none."""


def decode(data: bytes, shape: tuple[int | None, ...]) -> np.ndarray:
    """The picture in `data`, uint8 [R, C, channels] of `shape` (None for any size).

    Raises:
      DataError: it is no picture OpenCV reads, it is cut off, or it has another shape.
    """
    if data[:2] == b"\xff\xd8" and not _has_end(data):
        # The decoder may fill what is missing with grey and say nothing.
        raise DataError(f"its {len(data)} bytes are a JPEG that is cut off")
    flag = cv2.IMREAD_GRAYSCALE if shape[2] == 1 else cv2.IMREAD_COLOR_RGB
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag) if len(data) else None
    except cv2.error as error:
        raise DataError(f"its {len(data)} bytes cannot be decoded: {' '.join(str(error).split())}") from None
    if image is None:
        raise DataError(
            f"its {len(data)} bytes are no picture that can be decoded (JPEG, PNG, WebP, BMP, ...)"
        )
    image = image.reshape(*image.shape[:2], -1)
    if any(want is not None and want != have for want, have in zip(shape, image.shape, strict=True)):
        raise DataError(f"it decodes to {list(image.shape)}; the data says {list(shape)}")
    return image


def _has_end(data: bytes) -> bool:
    """Whether a JPEG comes to its end marker, whatever follows that; the end of a thumbnail in a segment is none."""
    place = 2
    while found := _MARKER.search(data, place):
        if found[0] == b"\xff\xd9":
            return True
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    return False


def resized(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`image` at another size: averaged over areas along a side that shrinks, bilinear along one that grows."""
    if image.shape[:2] == (rows, columns):
        return image

    def change(part: np.ndarray) -> np.ndarray:
        # One after the other: OpenCV averages only where no side grows.
        down, across = min(rows, part.shape[0]), min(columns, part.shape[1])
        if (down, across) != part.shape[:2]:
            part = cv2.resize(part, (across, down), interpolation=cv2.INTER_AREA)
        if (down, across) != (rows, columns):
            part = cv2.resize(part, (columns, rows), interpolation=cv2.INTER_LINEAR)
        return part.reshape(rows, columns, -1)

    return _in_fours(change, image)


def background(image: np.ndarray, fill: float | None) -> float:
    """What comes in from outside an image: `fill`, or its darkest value, 0 for uint8 and -1 for float32."""
    if fill is not None:
        return fill
    return 0.0 if image.dtype == np.uint8 else -1.0


def padded(image: np.ndarray, pixels: int, fill: float) -> np.ndarray:
    """`image` with `pixels` of `fill` on all four sides."""
    if not pixels:
        return image
    sides = (pixels, pixels, pixels, pixels)

    def change(part: np.ndarray) -> np.ndarray:
        result = cv2.copyMakeBorder(part, *sides, cv2.BORDER_CONSTANT, value=[fill] * 4)
        return result.reshape(*result.shape[:2], -1)

    return _in_fours(change, image)


def warped(
    image: np.ndarray,
    matrix: tuple[float, float, float, float],
    fill: float,
    offset: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """Bilinear samples: output pixel (x, y), from the centre, reads the input at (a x + b y, c x + d y) + offset.

    Args:
      image: [R, C, channels], uint8 or float32.
      matrix: a, b, c, d; x runs along columns, y along rows.
      fill: value outside the image.
      offset: in pixels, (along columns, along rows).
    """
    rows, columns = image.shape[:2]
    a, b, c, d = matrix
    x, y = (columns - 1) / 2, (rows - 1) / 2
    inverse = np.array([[a, b, x - a * x - b * y + offset[0]], [c, d, y - c * x - d * y + offset[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP

    def change(part: np.ndarray) -> np.ndarray:
        result = cv2.warpAffine(
            part,
            inverse,
            (columns, rows),
            flags=flags,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=[fill] * 4,
        )
        return result.reshape(rows, columns, -1)

    return _in_fours(change, image)


def _in_fours(change: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """`change(image)`, four channels at a time: not all of OpenCV takes more."""
    if image.shape[2] <= 4:
        return change(image)
    parts = [np.ascontiguousarray(image[..., first : first + 4]) for first in range(0, image.shape[2], 4)]
    return np.concatenate([change(part) for part in parts], axis=2)
