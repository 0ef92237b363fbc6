"""What a transform text can do to an image: one small class an operation, its fields the parameters.

An operation takes an image [R, C, channels] and its share of the numbers drawn for this example, and returns an image;
`tokenlab.data.pixels` moves the pixels. It says beforehand what comes out (`after`), so that shapes are known before a
picture is read. An operation that changes values keeps uint8 images uint8; only `value_range` and `normalize` make them
float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np

from tokenlab.core.errors import DataError, suggest
from tokenlab.data.pixels import background, padded, resized, warped
from tokenlab.data.source import ENCODED

Kind: TypeAlias = tuple[tuple[int | None, ...], str]
"""(shape, dtype) of an image, as in a `Spec`."""

MOST_SIDE = 16_384
"""Pixels along a side of what an operation makes: more is a slip of the pen, and would end the process for memory."""

MOST_VALUE = 1e30
"""Size of a float32 value that is put into an image: differences of two such are finite still."""


class Operation:
    """Base of all operations.

    Attributes:
      random: numbers in [0, 1) it reads for each image; 0 for what is the same every time.
    """

    random: ClassVar[int] = 0

    def after(self, kind: Kind) -> Kind:
        """What comes out when `kind` goes in. Raises DataError for what the operation cannot take."""
        return kind

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The changed image.

        Args:
          image: [R, C, channels].
          draws: float32 [random], in [0, 1).
        """
        raise DataError(f"{type(self).__name__} is no operation of its own")


def require(condition: bool, name: str, parameter: str, value: object, expected: str) -> None:
    """Raise a DataError for a parameter out of range."""
    if not condition:
        raise DataError(f"{name} has {parameter}={value!r}; expected {expected}")


def whole(name: str, parameter: str, value: object, least: int = 1, most: int = MOST_SIDE) -> None:
    """Raise a DataError for a parameter that is no int from `least` to `most`."""
    inside = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    require(inside, name, parameter, value, f"an int from {least} to {most}")


def check_pixels(name: str, kind: Kind, dtypes: tuple[str, ...] = ("uint8", "float32")) -> None:
    """Raise a DataError for what is no image of one of `dtypes`."""
    shape, dtype = kind
    if dtype not in dtypes or len(shape) != 3:
        hint = "; put decode before it" if dtype == ENCODED else ""
        raise DataError(
            f"{name} takes images [R, C, channels] of {' or '.join(dtypes)}, not {dtype}{list(shape)}{hint}"
        )


def _check_fill(name: str, fill: float | None, kind: Kind) -> None:
    if fill is not None:
        low, high = (0, 255) if kind[1] == "uint8" else (-MOST_VALUE, MOST_VALUE)
        require(low <= fill <= high, name, "fill", fill, f"a number from {low} to {high} in {kind[1]} images")


def _check_sides(what: str, rows: int, columns: int) -> None:
    if max(rows, columns) > MOST_SIDE:
        raise DataError(
            f"{what} makes images of {rows} x {columns} pixels; expected at most {MOST_SIDE} along a side"
        )


# ---------------------------------------------------------------------------------------------------- from bytes


@dataclass(frozen=True)
class Decode(Operation):
    """Decode the bytes of a picture to uint8, grey or RGB as the data says."""

    def after(self, kind: Kind) -> Kind:
        """Bytes -> uint8 of the same shape."""
        if kind[1] != ENCODED:
            raise DataError(
                f"decode takes the bytes of a picture; the images are {kind[1]} already: leave decode out"
            )
        return kind[0], "uint8"


# ---------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Resize(Operation):
    """Resize to `rows` x `columns` (`rows` x `rows` without the latter), whatever the aspect was."""

    rows: int
    columns: int | None = None

    def __post_init__(self) -> None:
        whole("resize", "rows", self.rows)
        if self.columns is not None:
            whole("resize", "columns", self.columns)

    def after(self, kind: Kind) -> Kind:
        """A fixed size."""
        check_pixels("resize", kind)
        return (*self._size(), kind[0][2]), kind[1]

    def _size(self) -> tuple[int, int]:
        return self.rows, self.rows if self.columns is None else self.columns

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        return resized(image, *self._size())


@dataclass(frozen=True)
class ResizeSmall(Operation):
    """Resize so that the smaller side is `size`; the aspect stays."""

    size: int

    def __post_init__(self) -> None:
        whole("resize_small", "size", self.size)

    def after(self, kind: Kind) -> Kind:
        """Known where the size was known."""
        check_pixels("resize_small", kind)
        (rows, columns, channels), dtype = kind
        if rows is None or columns is None:
            return (None, None, channels), dtype
        return (*self._size(rows, columns), channels), dtype

    def _size(self, rows: int, columns: int) -> tuple[int, int]:
        small = min(rows, columns)
        size = round(rows * self.size / small), round(columns * self.size / small)
        _check_sides(f"resize_small({self.size}) of {rows} x {columns} pixels", *size)
        return size

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        return resized(image, *self._size(*image.shape[:2]))


@dataclass(frozen=True)
class CentralCrop(Operation):
    """Cut a `size` x `size` square out of the middle."""

    size: int

    def __post_init__(self) -> None:
        whole("central_crop", "size", self.size)

    def after(self, kind: Kind) -> Kind:
        """A fixed size."""
        check_pixels("central_crop", kind)
        _check_fits(f"central_crop({self.size})", self.size, kind[0])
        return (self.size, self.size, kind[0][2]), kind[1]

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        _check_fits(f"central_crop({self.size})", self.size, image.shape)
        top, left = (image.shape[0] - self.size) // 2, (image.shape[1] - self.size) // 2
        return image[top : top + self.size, left : left + self.size]


def _check_fits(what: str, size: int, shape: tuple[int | None, ...], pad: int = 0) -> None:
    for side in shape[:2]:
        if side is not None and side + 2 * pad < size:
            raise DataError(f"{what} does not fit images of {list(shape[:2])}; resize them first")


@dataclass(frozen=True)
class RandomCrop(Operation):
    """Cut a `size` x `size` square out of a random place, after `pad` pixels of `fill` were put around the image."""

    size: int
    pad: int = 0
    fill: float | None = None

    random: ClassVar[int] = 2

    def __post_init__(self) -> None:
        whole("random_crop", "size", self.size)
        whole("random_crop", "pad", self.pad, 0)

    def after(self, kind: Kind) -> Kind:
        """A fixed size."""
        check_pixels("random_crop", kind)
        _check_fill("random_crop", self.fill, kind)
        self._check(kind[0])
        return (self.size, self.size, kind[0][2]), kind[1]

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        self._check(image.shape)
        image = padded(image, self.pad, background(image, self.fill))
        free = (image.shape[0] - self.size + 1, image.shape[1] - self.size + 1)
        top, left = (int(draw * places) for draw, places in zip(draws.tolist(), free, strict=True))
        return image[top : top + self.size, left : left + self.size]

    def _check(self, shape: tuple[int | None, ...]) -> None:
        what = f"random_crop({self.size}, pad={self.pad})" if self.pad else f"random_crop({self.size})"
        _check_fits(what, self.size, shape, self.pad)
        if self.pad:
            _check_sides(f"the padding of {what}", *((side or 0) + 2 * self.pad for side in shape[:2]))


@dataclass(frozen=True)
class RandomResizedCrop(Operation):
    """Cut out a random part of the area with a random aspect and resize it to `size` x `size`.

    A part of `min_area` to `max_area` of the image with an aspect (columns over rows) of `min_aspect` to `max_aspect`,
    uniform in its logarithm; the first of ten tries that fits, else the largest central part with the nearest aspect.

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.
    """

    size: int
    min_area: float = 0.08
    max_area: float = 1.0
    min_aspect: float = 3 / 4
    max_aspect: float = 4 / 3

    TRIES: ClassVar[int] = 10
    random: ClassVar[int] = 2 * TRIES + 2

    def __post_init__(self) -> None:
        name = "random_resized_crop"
        whole(name, "size", self.size)
        require(
            0 < self.min_area <= self.max_area <= 1,
            name,
            "min_area",
            self.min_area,
            "0 < min_area <= max_area <= 1",
        )
        ordered = 0 < self.min_aspect <= self.max_aspect
        require(ordered, name, "min_aspect", self.min_aspect, "0 < min_aspect <= max_aspect")

    def after(self, kind: Kind) -> Kind:
        """A fixed size."""
        check_pixels("random_resized_crop", kind)
        return (self.size, self.size, kind[0][2]), kind[1]

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        *shapes, down, across = draws.tolist()
        part = self._part(*image.shape[:2], shapes)
        if part is None:
            part, down, across = self._largest(*image.shape[:2]), 0.5, 0.5
        rows, columns = part
        top, left = int(down * (image.shape[0] - rows + 1)), int(across * (image.shape[1] - columns + 1))
        return resized(image[top : top + rows, left : left + columns], self.size, self.size)

    def _part(self, rows: int, columns: int, draws: list[float]) -> tuple[int, int] | None:
        """Rows and columns of the first try that fits, if one does."""
        low, high = math.log(self.min_aspect), math.log(self.max_aspect)
        for area, place in zip(draws[::2], draws[1::2], strict=True):
            area = rows * columns * (self.min_area + area * (self.max_area - self.min_area))
            aspect = math.exp(low + place * (high - low))
            down, across = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < down <= rows and 0 < across <= columns:
                return down, across
        return None

    def _largest(self, rows: int, columns: int) -> tuple[int, int]:
        aspect = min(max(columns / rows, self.min_aspect), self.max_aspect)
        return min(rows, max(1, round(columns / aspect))), min(columns, max(1, round(rows * aspect)))


# ---------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class FlipLR(Operation):
    """Mirror left and right with a probability of one half."""

    random: ClassVar[int] = 1

    def after(self, kind: Kind) -> Kind:
        """The same."""
        check_pixels("flip_lr", kind)
        return kind

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        return image[:, ::-1] if draws[0] < 0.5 else image


@dataclass(frozen=True)
class Shift(Operation):
    """Move by whole pixels, from -`pixels` to `pixels` along rows and along columns alike."""

    pixels: int
    fill: float | None = None

    random: ClassVar[int] = 2

    def __post_init__(self) -> None:
        whole("shift", "pixels", self.pixels, 0)

    def after(self, kind: Kind) -> Kind:
        """The same."""
        check_pixels("shift", kind)
        _check_fill("shift", self.fill, kind)
        side = min((side for side in kind[0][:2] if side is not None), default=self.pixels + 1)
        require(self.pixels < side, "shift", "pixels", self.pixels, f"an int from 0 to {side - 1}")
        return kind

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        rows, columns = image.shape[:2]
        _check_sides(
            f"the padding of shift({self.pixels})", rows + 2 * self.pixels, columns + 2 * self.pixels
        )
        image = padded(image, self.pixels, background(image, self.fill))
        top, left = (int(draw * (2 * self.pixels + 1)) for draw in draws.tolist())
        return image[top : top + rows, left : left + columns]


@dataclass(frozen=True)
class Rotate(Operation):
    """Turn about the centre by an angle from -`degrees` to `degrees`, bilinear."""

    degrees: float
    fill: float | None = None

    random: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require(0 <= self.degrees <= 180, "rotate", "degrees", self.degrees, "an angle from 0 to 180")

    def after(self, kind: Kind) -> Kind:
        """The same."""
        check_pixels("rotate", kind)
        _check_fill("rotate", self.fill, kind)
        return kind

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        angle = math.radians(self.degrees) * (2 * float(draws[0]) - 1)
        cosine, sine = math.cos(angle), math.sin(angle)
        return warped(image, (cosine, sine, -sine, cosine), background(image, self.fill))


@dataclass(frozen=True)
class Scale(Operation):
    """Enlarge about the centre by a factor from 1 - `fraction` to 1 + `fraction`, bilinear; the size stays."""

    fraction: float
    fill: float | None = None

    random: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require(0 <= self.fraction < 1, "scale", "fraction", self.fraction, "a number in [0, 1)")

    def after(self, kind: Kind) -> Kind:
        """The same."""
        check_pixels("scale", kind)
        _check_fill("scale", self.fill, kind)
        return kind

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        inverse = 1 / (1 + self.fraction * (2 * float(draws[0]) - 1))
        return warped(image, (inverse, 0.0, 0.0, inverse), background(image, self.fill))


# ---------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class ValueRange(Operation):
    """Map uint8 values 0 to 255 to float32 values `low` to `high`."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        require(self.low < self.high, "value_range", "low", self.low, "low < high")
        for parameter, value in (("low", self.low), ("high", self.high)):
            inside = -MOST_VALUE <= value <= MOST_VALUE
            require(inside, "value_range", parameter, value, f"a number from {-MOST_VALUE} to {MOST_VALUE}")

    def after(self, kind: Kind) -> Kind:
        """float32."""
        check_pixels("value_range", kind, ("uint8",))
        return kind[0], "float32"

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        scaled = image * np.float32((self.high - self.low) / 255)
        return scaled + np.float32(self.low)


STATISTICS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # name: mean and standard deviation of each channel, of values in [0, 1]
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""imagenet as in torchvision's models and DINOv2, clip as in Radford et al. 2021."""


@dataclass(frozen=True)
class Normalize(Operation):
    """Map uint8 RGB to float32 (value / 255 - mean) / deviation with the channel statistics of `imagenet` or `clip`."""

    statistics: str

    def __post_init__(self) -> None:
        if self.statistics not in STATISTICS:
            known = suggest(str(self.statistics), STATISTICS)
            raise DataError(f"normalize knows no statistics {self.statistics!r}.{known}")

    def after(self, kind: Kind) -> Kind:
        """float32."""
        check_pixels("normalize", kind, ("uint8",))
        if kind[0][2] != 3:
            raise DataError(f"normalize({self.statistics}) takes 3 channels; the images have {kind[0][2]}")
        return kind[0], "float32"

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        mean, deviation = (np.array(values, np.float32) for values in STATISTICS[self.statistics])
        return image * (1 / (255 * deviation)) - mean / deviation
