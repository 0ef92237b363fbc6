"""RandAugment against Pillow, whose operations the paper's are."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tokenlab.data import randaugment
from tokenlab.data.randaugment import CHANGES, RandAugment


def photo(channels: int = 3, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(20, 200, (5, 6, channels), np.uint8)
    smooth = cv2.resize(coarse, (40, 32), interpolation=cv2.INTER_CUBIC)
    return smooth.reshape(32, 40, channels)


def pillow(name: str, pixels: np.ndarray, strength: float) -> np.ndarray:
    picture = Image.fromarray(pixels.squeeze())
    factor = 1 + 0.9 * strength
    changed = {
        "identity": lambda: picture,
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "solarize": lambda: ImageOps.solarize(picture, 256 * (1 - abs(strength))),
        "posterize": lambda: ImageOps.posterize(picture, 8 - round(4 * abs(strength))),
        "color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "rotate": lambda: picture.rotate(-30 * strength, Image.Resampling.BILINEAR),
    }
    return np.asarray(changed[name]()).reshape(pixels.shape)


VALUES = (
    "identity",
    "autocontrast",
    "equalize",
    "solarize",
    "posterize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", VALUES)
def test_values_are_pillows(name: str, strength: float, channels: int) -> None:
    if name == "color" and channels == 1:
        np.testing.assert_array_equal(randaugment.color(photo(1), strength), photo(1))
        return
    pixels = photo(channels)
    given = getattr(randaugment, name)(pixels, strength)
    assert given.dtype == np.uint8 and given.shape == pixels.shape
    # Greys and smoothed pixels may round another way; a factor of 1.9 carries that on.
    assert np.abs(given.astype(int) - pillow(name, pixels, strength).astype(int)).max() <= 2


@pytest.mark.parametrize("strength", [-1.0, 0.4])
def test_turns_as_pillow_does(strength: float) -> None:
    pixels = photo()
    given, wanted = (
        randaugment.rotate(pixels, strength).astype(int),
        pillow("rotate", pixels, strength).astype(int),
    )
    inner = np.abs(given - wanted)[10:22, 14:26]  # at the border Pillow does not blend with black
    assert inner.max() <= 6


def test_moves() -> None:
    pixels = photo()
    np.testing.assert_array_equal(randaugment.translate_x(pixels, 0.0), pixels)
    shift = 8 / (40 * 150 / 331)  # eight whole pixels
    np.testing.assert_array_equal(randaugment.translate_x(pixels, shift)[:, :-8], pixels[:, 8:])
    assert (randaugment.translate_x(pixels, shift)[:, -8:] == 0).all()
    np.testing.assert_array_equal(randaugment.translate_y(pixels, -shift * 40 / 32)[8:], pixels[:-8])
    slanted = randaugment.shear_x(pixels, 1.0)
    assert (slanted[15:17] == 0).mean() < 0.05 < (slanted[[0, -1]] == 0).mean()
    other = randaugment.shear_x(pixels.swapaxes(0, 1), 0.5).swapaxes(0, 1)
    np.testing.assert_allclose(randaugment.shear_y(pixels, 0.5).astype(int), other, atol=1)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("flat", [0, 77, 255])
def test_flat_images_and_single_pixels(change: randaugment.Change, flat: int) -> None:
    for shape in ((1, 1, 3), (2, 5, 1), (6, 6, 3)):
        pixels = np.full(shape, flat, np.uint8)
        given = change(pixels, 0.7)
        assert given.shape == shape and given.dtype == np.uint8


def test_each_change_comes_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []

    def recorder(number: int) -> randaugment.Change:
        return lambda image, strength: seen.append((number, strength)) or image

    monkeypatch.setattr(randaugment, "CHANGES", tuple(recorder(number) for number in range(len(CHANGES))))
    draws = np.random.default_rng(0).random((7000, 4)).astype(np.float32)
    for row in draws:
        RandAugment(2, 5)(photo(1), row)
    counts = np.bincount([number for number, _ in seen], minlength=14)
    assert len(seen) == 14_000 and np.abs(counts - 1000).max() < 150
    strengths = np.array([strength for _, strength in seen])
    assert set(strengths) == {0.5, -0.5} and abs(strengths.mean()) < 0.02


def test_none_of_them() -> None:
    assert RandAugment(0, 9).random == 0
    pixels = photo()
    np.testing.assert_array_equal(RandAugment(0, 9)(pixels, np.zeros(0, np.float32)), pixels)
