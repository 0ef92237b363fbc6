from __future__ import annotations

import numpy as np
import pytest

from tokenlab.core.errors import DataError
from tokenlab.data.operations import (
    CentralCrop,
    FlipLR,
    Normalize,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    ResizeSmall,
    Rotate,
    Scale,
    Shift,
    ValueRange,
)
from tokenlab.data.pixels import resized

LARGEST = np.nextafter(np.float32(1), np.float32(0))
NONE = np.zeros(0, np.float32)


def image(rows: int = 8, columns: int = 8, channels: int = 1, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, columns, channels)).astype(np.float32)


def photo(rows: int = 12, columns: int = 9, channels: int = 3, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, channels), np.uint8)


def draws(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


class TestSizes:
    def test_shrinking_averages(self) -> None:
        pixels = image(6, 8, 3)
        given = Resize(3, 4)(pixels, NONE)
        np.testing.assert_allclose(given, pixels.reshape(3, 2, 4, 2, 3).mean((1, 3)), atol=1e-6)

    def test_growing_and_one_channel(self) -> None:
        given = Resize(16)(np.full((4, 4, 1), 7, np.uint8), NONE)
        assert given.shape == (16, 16, 1) and (given == 7).all()

    @pytest.mark.parametrize(
        ("shape", "wanted"), [((20, 30), (10, 15)), ((30, 20), (15, 10)), ((7, 7), (10, 10))]
    )
    def test_the_smaller_side(self, shape: tuple[int, int], wanted: tuple[int, int]) -> None:
        assert ResizeSmall(10)(photo(*shape), NONE).shape == (*wanted, 3)
        assert ResizeSmall(10).after(((*shape, 3), "uint8")) == ((*wanted, 3), "uint8")

    def test_the_middle(self) -> None:
        pixels = photo(7, 9)
        np.testing.assert_array_equal(CentralCrop(5)(pixels, NONE), pixels[1:6, 2:7])
        with pytest.raises(DataError, match=r"central_crop\(8\) does not fit images of \[7, 9\]"):
            CentralCrop(8)(pixels, NONE)

    def test_more_than_memory_holds_is_refused_for_the_record(self) -> None:
        sliver = np.zeros((1, 30_000, 1), np.uint8)
        with pytest.raises(DataError, match=r"64\) of 1 x 30000 pixels makes images of 64 x 1920000 pixels"):
            ResizeSmall(64)(sliver, NONE)
        with pytest.raises(DataError, match=r"crop\(8, pad=10000\) makes images of 20001 x 50000 pixels"):
            RandomCrop(8, pad=10_000)(sliver, draws(0, 0))
        with pytest.raises(DataError, match=r"shift\(9000\) makes images of 18001 x 48000 pixels"):
            Shift(9_000)(sliver, draws(0, 0))


class TestRandomCrop:
    def test_every_place_and_the_border(self) -> None:
        pixels = image(4, 4)
        wide = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=-1)
        for top in range(3):
            for left in range(3):
                given = RandomCrop(4, pad=1)(pixels, draws((top + 0.5) / 3, (left + 0.5) / 3))
                np.testing.assert_array_equal(given, wide[top : top + 4, left : left + 4])
        np.testing.assert_array_equal(RandomCrop(4, pad=1)(pixels, draws(LARGEST, LARGEST)), wide[2:, 2:])

    def test_black_comes_into_photographs(self) -> None:
        given = RandomCrop(12, pad=12)(np.full((12, 12, 3), 200, np.uint8), draws(0, 0))
        assert (given == 0).all()

    def test_what_does_not_fit_is_told_as_it_was_given(self) -> None:
        with pytest.raises(DataError, match=r"random_crop\(40, pad=2\) does not fit images of \[28, 28\]"):
            RandomCrop(40, pad=2)(photo(28, 28), draws(0, 0))


class TestRandomResizedCrop:
    def test_area_and_aspect_are_as_asked(self) -> None:
        crop = RandomResizedCrop(8, min_area=0.2, max_area=0.5)
        rng = np.random.default_rng(0)
        found = [crop._part(100, 140, rng.random(20).tolist()) for _ in range(2000)]
        parts = [part for part in found if part is not None]
        assert len(parts) == 2000
        area = np.array([rows * columns for rows, columns in parts]) / 14000
        aspect = np.array([columns / rows for rows, columns in parts])
        assert 0.19 < area.min() and area.max() < 0.51
        assert 0.73 < aspect.min() and aspect.max() < 1.36
        # Uniform in area: mean 0.35, standard error 0.002; and in the logarithm of the aspect: mean 0.
        assert abs(area.mean() - 0.35) < 0.01 and abs(np.log(aspect).mean()) < 0.02

    @pytest.mark.parametrize(("shape", "part"), [((100, 11), (15, 11)), ((10, 1000), (10, 13))])
    def test_where_nothing_fits_the_largest_central_part(
        self, shape: tuple[int, int], part: tuple[int, int]
    ) -> None:
        pixels = photo(*shape)
        top, left = (round((side - cut) / 2 + 0.01) for side, cut in zip(shape, part, strict=True))
        wanted = resized(pixels[top : top + part[0], left : left + part[1]], 8, 8)
        for place in (0, 0.5, LARGEST):
            given = RandomResizedCrop(8)(pixels, draws(*[LARGEST, 0.5] * 10, place, place))
            np.testing.assert_array_equal(given, wanted)

    def test_stays_inside(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(200):
            pixels = np.full((int(rng.integers(1, 20)), int(rng.integers(1, 20)), 1), 9, np.uint8)
            assert (RandomResizedCrop(5)(pixels, rng.random(22).astype(np.float32)) == 9).all()

    def test_the_whole_image(self) -> None:
        pixels = photo(6, 6)
        whole = RandomResizedCrop(6, min_area=1, min_aspect=1, max_aspect=1)
        np.testing.assert_array_equal(whole(pixels, np.full(22, 0.3, np.float32)), pixels)


class TestPlaces:
    def test_flip(self) -> None:
        pixels = photo()
        np.testing.assert_array_equal(FlipLR()(pixels, draws(0.49)), pixels[:, ::-1])
        np.testing.assert_array_equal(FlipLR()(pixels, draws(0.5)), pixels)

    def test_every_shift(self) -> None:
        pixels = image(4, 5, 2)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                expected = np.full_like(pixels, -1)
                for y in range(4):
                    for x in range(5):
                        if 0 <= y - dy < 4 and 0 <= x - dx < 5:
                            expected[y, x] = pixels[y - dy, x - dx]
                given = Shift(1)(pixels, draws((1 - dy + 0.5) / 3, (1 - dx + 0.5) / 3))
                np.testing.assert_array_equal(given, expected)
        np.testing.assert_array_equal(Shift(0)(pixels, draws(0.1, 0.9)), pixels)
        largest = Shift(3, fill=0.25)(pixels, draws(LARGEST, LARGEST))
        np.testing.assert_array_equal(largest[:-3, :-3], pixels[3:, 3:])
        assert (largest[-3:] == 0.25).all() and (largest[:, -3:] == 0.25).all()

    @pytest.mark.parametrize("shape", [(8, 8, 1), (7, 5, 3), (1, 3, 3)])
    def test_no_turn_and_no_scaling_are_the_identity(self, shape: tuple[int, int, int]) -> None:
        for pixels in (image(*shape), photo(*shape)):
            np.testing.assert_array_equal(Rotate(30)(pixels, draws(0.5)), pixels)
            np.testing.assert_array_equal(Scale(0.5)(pixels, draws(0.5)), pixels)

    def test_quarter_and_half_turns_permute_pixels(self) -> None:
        pixels = image(6, 6, 2)
        np.testing.assert_allclose(Rotate(90)(pixels, draws(0)), np.rot90(pixels), atol=1e-5)
        np.testing.assert_allclose(Rotate(180)(pixels, draws(0)), pixels[::-1, ::-1], atol=1e-5)

    @pytest.mark.parametrize("draw", [0.03, 0.4, 0.9])
    def test_against_a_loop(self, draw: float) -> None:
        pixels = image(5, 6, 1)
        angle = np.deg2rad(40) * (2 * draw - 1)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        zoom = np.eye(2) / (1 + 0.4 * (2 * draw - 1))
        for matrix, operation in ((turn, Rotate(40, fill=0.3)), (zoom, Scale(0.4, fill=0.3))):
            given = operation(pixels, draws(draw))[..., 0]
            wanted = [
                [
                    bilinear(pixels[..., 0], matrix @ [y - 2, x - 2.5] + np.array([2, 2.5]), 0.3)
                    for x in range(6)
                ]
                for y in range(5)
            ]
            # OpenCV may place samples on a grid of 1/32 pixel.
            np.testing.assert_allclose(given, wanted, atol=0.08)

    def test_far_outside_is_fill(self) -> None:
        shrunk = Scale(0.9, fill=0.5)(image(), draws(0))  # a tenth of the size
        assert (shrunk[0] == 0.5).all() and (shrunk[:, -1] == 0.5).all()


def bilinear(pixels: np.ndarray, at: np.ndarray, fill: float) -> float:
    top, left = np.floor(at).astype(int)
    value = 0.0
    for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        inside = 0 <= y < pixels.shape[0] and 0 <= x < pixels.shape[1]
        value += (1 - abs(at[0] - y)) * (1 - abs(at[1] - x)) * (pixels[y, x] if inside else fill)
    return value


class TestValues:
    def test_value_range(self) -> None:
        levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
        given = ValueRange(-1, 1)(levels, NONE)
        assert given.dtype == np.float32
        np.testing.assert_allclose(given.ravel(), np.linspace(-1, 1, 256), atol=1e-6)

    def test_normalize(self) -> None:
        pixels = photo()
        given = Normalize("imagenet")(pixels, NONE)
        wanted = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        assert given.dtype == np.float32
        np.testing.assert_allclose(given, wanted, atol=1e-5)
