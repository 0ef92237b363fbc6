"""RandAugment: `count` operations in a row, each drawn evenly from fourteen, all at one magnitude.

Source: Cubuk et al., "RandAugment: practical automated data augmentation with a reduced search space", CVPR workshops
2020 (arXiv 1909.13719), section 3. Magnitudes run from 0 (nothing, or next to it) to 10; the strength at 10 is
the authors':

    rotate        30 degrees         shear_x, shear_y          0.3
    solarize      from 256 to 0      translate_x, translate_y  150/331 of the side
    posterize     8 to 4 bits        color, contrast, brightness, sharpness   1 -/+ 0.9

Solarize and posterize grow stronger with the magnitude, as in torchvision; in the authors' first code they weaken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np

from tokenlab.core.errors import DataError
from tokenlab.data.operations import Kind, Operation, check_pixels, require, whole
from tokenlab.data.pixels import warped

MOST = 10
MOST_CHANGES = 100
"""Changes of an image; each reads two random numbers, so that a million would end the process for memory."""

SHEAR, TRANSLATE, DEGREES, ENHANCE = 0.3, 150 / 331, 30.0, 0.9

Change: TypeAlias = Callable[[np.ndarray, float], np.ndarray]
"""(uint8 image [R, C, channels], strength in [-1, 1]) -> the changed image; what has no direction takes |strength|."""


def autocontrast(image: np.ndarray, strength: float) -> np.ndarray:
    """Stretch every channel to 0 .. 255; a channel of one value stays."""
    low, high = image.min((0, 1)).astype(np.float32), image.max((0, 1)).astype(np.float32)
    spread = high - low
    scale = np.where(spread > 0, 255 / np.maximum(spread, 1), 1).astype(np.float32)
    levels = np.arange(256, dtype=np.float32)[:, None]
    table = np.clip((levels - np.where(spread > 0, low, 0)) * scale, 0, 255)
    return _look_up(image, table.astype(np.uint8))


def equalize(image: np.ndarray, strength: float) -> np.ndarray:
    """Flatten the histogram of every channel; a channel of one value stays."""
    tables = []
    for channel in range(image.shape[2]):
        counts = np.bincount(image[..., channel].ravel(), minlength=256)
        used = counts[counts > 0]
        step = (counts.sum() - used[-1]) // 255
        before = np.cumsum(counts) - counts
        flat = np.clip((before + step // 2) // max(step, 1), 0, 255)
        tables.append(flat if len(used) > 1 and step else np.arange(256))
    return _look_up(image, np.stack(tables, axis=1).astype(np.uint8))


def solarize(image: np.ndarray, strength: float) -> np.ndarray:
    """Invert values from 256 (1 - |strength|) up."""
    return np.where(image < 256 * (1 - abs(strength)), image, 255 - image)


def posterize(image: np.ndarray, strength: float) -> np.ndarray:
    """Keep the 8 - round(4 |strength|) highest bits."""
    return image & np.uint8(0xFF << round(4 * abs(strength)) & 0xFF)


def color(image: np.ndarray, strength: float) -> np.ndarray:
    """Away from grey or towards it; a grey image stays."""
    if image.shape[2] == 1:
        return image
    return _blend(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], image, 1 + ENHANCE * strength)


def contrast(image: np.ndarray, strength: float) -> np.ndarray:
    """Away from the mean grey or towards it."""
    grey = image if image.shape[2] == 1 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return _blend(np.float32(int(grey.mean() + 0.5)), image, 1 + ENHANCE * strength)


def brightness(image: np.ndarray, strength: float) -> np.ndarray:
    """Away from black or towards it."""
    return _blend(np.float32(0), image, 1 + ENHANCE * strength)


def sharpness(image: np.ndarray, strength: float) -> np.ndarray:
    """Away from a smoothed image or towards it; the outermost pixels stay."""
    smooth = image.copy()
    if min(image.shape[:2]) > 2:
        kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
        inner = cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE).reshape(image.shape)
        smooth[1:-1, 1:-1] = inner[1:-1, 1:-1]
    return _blend(smooth, image, 1 + ENHANCE * strength)


def rotate(image: np.ndarray, strength: float) -> np.ndarray:
    """Turn about the centre; black comes in."""
    angle = np.deg2rad(DEGREES * strength)
    cosine, sine = float(np.cos(angle)), float(np.sin(angle))
    return warped(image, (cosine, sine, -sine, cosine), 0)


def shear_x(image: np.ndarray, strength: float) -> np.ndarray:
    """Slant along columns."""
    return warped(image, (1, SHEAR * strength, 0, 1), 0)


def shear_y(image: np.ndarray, strength: float) -> np.ndarray:
    """Slant along rows."""
    return warped(image, (1, 0, SHEAR * strength, 1), 0)


def translate_x(image: np.ndarray, strength: float) -> np.ndarray:
    """Move along columns."""
    return warped(image, (1, 0, 0, 1), 0, (TRANSLATE * image.shape[1] * strength, 0))


def translate_y(image: np.ndarray, strength: float) -> np.ndarray:
    """Move along rows."""
    return warped(image, (1, 0, 0, 1), 0, (0, TRANSLATE * image.shape[0] * strength))


def identity(image: np.ndarray, strength: float) -> np.ndarray:
    """Nothing."""
    return image


CHANGES: tuple[Change, ...] = (
    identity,
    autocontrast,
    equalize,
    rotate,
    solarize,
    color,
    posterize,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)
"""The fourteen of the paper, table 6 and section 3."""


@dataclass(frozen=True)
class RandAugment(Operation):
    """`count` random changes in a row, of fourteen, at `magnitude` 0 to 10 (Cubuk et al. 2020)."""

    count: int
    magnitude: float

    def __post_init__(self) -> None:
        whole("randaugment", "count", self.count, 0, MOST_CHANGES)
        inside = 0 <= self.magnitude <= MOST
        require(inside, "randaugment", "magnitude", self.magnitude, f"a number from 0 to {MOST}")

    @property
    def random(self) -> int:
        """Which change, and in which direction."""
        return 2 * self.count

    def after(self, kind: Kind) -> Kind:
        """The same."""
        if kind[1] != "uint8":
            raise DataError(
                f"randaugment takes uint8 images, not {kind[1]}; put it after decode and before value_range"
            )
        check_pixels("randaugment", kind)
        if kind[0][2] not in (1, 3):
            raise DataError(
                f"randaugment takes images of 1 (grey) or 3 channels (RGB); these have {kind[0][2]}: leave it out"
            )
        return kind

    def __call__(self, image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """See `Operation`."""
        level = self.magnitude / MOST
        for which, sign in zip(draws[::2].tolist(), draws[1::2].tolist(), strict=True):
            change = CHANGES[int(which * len(CHANGES))]
            image = change(np.ascontiguousarray(image), level if sign < 0.5 else -level)
        return image


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table[value, channel] for every value; table uint8 [256, channels]."""
    return cv2.LUT(image, table[None]).reshape(image.shape)


def _blend(base: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """base + factor (image - base), rounded down into 0 .. 255; a factor above 1 goes beyond the image."""
    mixed = base + np.float32(factor) * (image.astype(np.float32) - base)
    return np.clip(mixed, 0, 255).astype(np.uint8)
