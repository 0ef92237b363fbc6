"""What a transform text can do to an image: one small class an operation, its fields the parameters.

An operation takes an image [R, C, channels] and its share of the numbers drawn for this example, and returns an image;
pixels are moved by OpenCV. It says beforehand what comes out (`after`), so that shapes are known before a picture is
read. An operation that changes values keeps uint8 images uint8; only `value_range` and `normalize` make them float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import cv2
import numpy as np

from tokenlab.core.errors import DataError, suggest
from tokenlab.data.source import ENCODED

Kind: TypeAlias = tuple[tuple[int | None, ...], str]
"""(shape, dtype) of an image, as in a `Spec`."""

# Threads are ours (config.data.threads); OpenCV's own would only compete with them.
cv2.setNumThreads(0)


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


def _whole(name: str, parameter: str, value: object, least: int = 1) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, name, parameter, value, f"an int of at least {least}")


def _pixels(name: str, kind: Kind, dtypes: tuple[str, ...] = ("uint8", "float32")) -> None:
    shape, dtype = kind
    if dtype not in dtypes or len(shape) != 3:
        hint = "; put decode before it" if dtype == ENCODED else ""
        raise DataError(
            f"{name} takes images [R, C, channels] of {' or '.join(dtypes)}, not {dtype}{list(shape)}{hint}"
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


def decode(data: bytes, shape: tuple[int | None, ...]) -> np.ndarray:
    """The picture in `data`, uint8 [R, C, channels] of `shape` (None for any size).

    Raises:
      DataError: it is no picture OpenCV reads, it is cut off, or it has another shape.
    """
    flag = cv2.IMREAD_GRAYSCALE if shape[2] == 1 else cv2.IMREAD_COLOR_RGB
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag) if len(data) else None
    except cv2.error as error:
        raise DataError(f"its {len(data)} bytes cannot be decoded: {' '.join(str(error).split())}") from None
    if image is None:
        raise DataError(
            f"its {len(data)} bytes are no picture that can be decoded (JPEG, PNG, WebP, BMP, ...)"
        )
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-64:]:
        # The decoder fills what is missing with grey and says nothing.
        raise DataError(f"its {len(data)} bytes are a JPEG that is cut off")
    image = image.reshape(*image.shape[:2], -1)
    if any(want is not None and want != have for want, have in zip(shape, image.shape, strict=True)):
        raise DataError(f"it decodes to {list(image.shape)}; the data says {list(shape)}")
    return image


# ---------------------------------------------------------------------------------------------------- sizes


def resized(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`image` at another size: averaged over areas where it shrinks, bilinear where it grows."""
    if image.shape[:2] == (rows, columns):
        return image
    shrinks = rows < image.shape[0] or columns < image.shape[1]
    way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (columns, rows), interpolation=way).reshape(rows, columns, -1)


@dataclass(frozen=True)
class Resize(Operation):
    """Resize to `rows` x `columns` (`rows` x `rows` without the latter), whatever the aspect was."""

    rows: int
    columns: int | None = None

    def __post_init__(self) -> None:
        _whole("resize", "rows", self.rows)
        _whole("resize", "columns", self.columns or self.rows)

    def after(self, kind: Kind) -> Kind:
        """A fixed size."""
        _pixels("resize", kind)
        return (self.rows, self.columns or self.rows, kind[0][2]), kind[1]

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        return resized(image, self.rows, self.columns or self.rows)


@dataclass(frozen=True)
class ResizeSmall(Operation):
    """Resize so that the smaller side is `size`; the aspect stays."""

    size: int

    def __post_init__(self) -> None:
        _whole("resize_small", "size", self.size)

    def after(self, kind: Kind) -> Kind:
        """Known where the size was known."""
        _pixels("resize_small", kind)
        (rows, columns, channels), dtype = kind
        if rows is None or columns is None:
            return (None, None, channels), dtype
        return (*self._size(rows, columns), channels), dtype

    def _size(self, rows: int, columns: int) -> tuple[int, int]:
        small = min(rows, columns)
        return round(rows * self.size / small), round(columns * self.size / small)

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        return resized(image, *self._size(*image.shape[:2]))


@dataclass(frozen=True)
class CentralCrop(Operation):
    """Cut a `size` x `size` square out of the middle."""

    size: int

    def __post_init__(self) -> None:
        _whole("central_crop", "size", self.size)

    def after(self, kind: Kind) -> Kind:
        """A fixed size."""
        _pixels("central_crop", kind)
        _fits("central_crop", self.size, kind)
        return (self.size, self.size, kind[0][2]), kind[1]

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        _fits("central_crop", self.size, (image.shape, str(image.dtype)))
        top, left = (image.shape[0] - self.size) // 2, (image.shape[1] - self.size) // 2
        return image[top : top + self.size, left : left + self.size]


def _fits(name: str, size: int, kind: Kind) -> None:
    for side in kind[0][:2]:
        if side is not None and side < size:
            raise DataError(f"{name}({size}) does not fit images of {list(kind[0][:2])}; resize them first")


@dataclass(frozen=True)
class RandomCrop(Operation):
    """Cut a `size` x `size` square out of a random place, after `pad` pixels of `fill` were put around the image."""

    size: int
    pad: int = 0
    fill: float | None = None

    random: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _whole("random_crop", "size", self.size)
        _whole("random_crop", "pad", self.pad, 0)

    def after(self, kind: Kind) -> Kind:
        """A fixed size."""
        _pixels("random_crop", kind)
        _fits("random_crop", self.size - 2 * self.pad, kind)
        return (self.size, self.size, kind[0][2]), kind[1]

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        image = padded(image, self.pad, background(image, self.fill))
        _fits("random_crop", self.size, (image.shape, str(image.dtype)))
        free = (image.shape[0] - self.size + 1, image.shape[1] - self.size + 1)
        top, left = (int(draw * places) for draw, places in zip(draws.tolist(), free, strict=True))
        return image[top : top + self.size, left : left + self.size]


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
        _whole(name, "size", self.size)
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
        _pixels("random_resized_crop", kind)
        return (self.size, self.size, kind[0][2]), kind[1]

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        *shapes, down, across = draws.tolist()
        rows, columns = self._part(*image.shape[:2], shapes)
        top, left = int(down * (image.shape[0] - rows + 1)), int(across * (image.shape[1] - columns + 1))
        return resized(image[top : top + rows, left : left + columns], self.size, self.size)

    def _part(self, rows: int, columns: int, draws: list[float]) -> tuple[int, int]:
        low, high = math.log(self.min_aspect), math.log(self.max_aspect)
        for area, place in zip(draws[::2], draws[1::2], strict=True):
            area = rows * columns * (self.min_area + area * (self.max_area - self.min_area))
            aspect = math.exp(low + place * (high - low))
            down, across = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < down <= rows and 0 < across <= columns:
                return down, across
        aspect = min(max(columns / rows, self.min_aspect), self.max_aspect)
        return min(rows, max(1, round(columns / aspect))), min(columns, max(1, round(rows * aspect)))


# ---------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class FlipLR(Operation):
    """Mirror left and right with a probability of one half."""

    random: ClassVar[int] = 1

    def after(self, kind: Kind) -> Kind:
        """The same."""
        _pixels("flip_lr", kind)
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
        _whole("shift", "pixels", self.pixels, 0)

    def after(self, kind: Kind) -> Kind:
        """The same."""
        _pixels("shift", kind)
        side = min((side for side in kind[0][:2] if side is not None), default=self.pixels + 1)
        require(self.pixels < side, "shift", "pixels", self.pixels, f"an int from 0 to {side - 1}")
        return kind

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        rows, columns = image.shape[:2]
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
        _pixels("rotate", kind)
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
        _pixels("scale", kind)
        return kind

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        inverse = 1 / (1 + self.fraction * (2 * float(draws[0]) - 1))
        return warped(image, (inverse, 0.0, 0.0, inverse), background(image, self.fill))


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
    result = cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=[fill] * 4)
    return result.reshape(*result.shape[:2], -1)


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
    result = cv2.warpAffine(
        image, inverse, (columns, rows), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=[fill] * 4
    )
    return result.reshape(rows, columns, -1)


# ---------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class ValueRange(Operation):
    """Map uint8 values 0 to 255 to float32 values `low` to `high`."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        require(self.low < self.high, "value_range", "low", self.low, "low < high")

    def after(self, kind: Kind) -> Kind:
        """float32."""
        _pixels("value_range", kind, ("uint8",))
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
        _pixels("normalize", kind, ("uint8",))
        if kind[0][2] != 3:
            raise DataError(f"normalize({self.statistics}) takes 3 channels; the images have {kind[0][2]}")
        return kind[0], "float32"

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        mean, deviation = (np.array(values, np.float32) for values in STATISTICS[self.statistics])
        return image * (1 / (255 * deviation)) - mean / deviation
