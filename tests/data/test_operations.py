from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from tokenlab.core.errors import DataError
from tokenlab.data import operations
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

LARGEST = np.nextafter(np.float32(1), np.float32(0))
NONE = np.zeros(0, np.float32)


def image(rows: int = 8, columns: int = 8, channels: int = 1, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, columns, channels)).astype(np.float32)


def photo(rows: int = 12, columns: int = 9, channels: int = 3, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, channels), np.uint8)


def draws(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


class TestDecode:
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "WebP"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_as_pillow_does(self, kind: str, channels: int) -> None:
        pixels = photo(channels=channels)
        stream = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(stream, kind, **({"lossless": True} if kind == "WebP" else {}))
        given = operations.decode(stream.getvalue(), (None, 9, channels))
        np.testing.assert_array_equal(given, pixels)  # in this order of channels

    def test_jpeg_is_near_pillow(self) -> None:
        smooth = cv2.resize(photo(4, 4), (64, 48), interpolation=cv2.INTER_CUBIC)
        stream = io.BytesIO()
        Image.fromarray(smooth).save(stream, "JPEG", quality=95)
        given = operations.decode(stream.getvalue(), (48, 64, 3)).astype(int)
        wanted = np.asarray(Image.open(stream)).astype(int)
        assert np.abs(given - wanted).max() <= 4

    @pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n123"])
    def test_no_picture(self, data: bytes) -> None:
        with pytest.raises(DataError, match=f"its {len(data)} bytes"):
            operations.decode(data, (None, None, 3))

    @pytest.mark.parametrize("kind", [".jpg", ".png"])
    def test_cut_off(self, kind: str) -> None:
        data = cv2.imencode(kind, photo(64, 64))[1].tobytes()
        for part in (2, 3, 10):
            with pytest.raises(DataError):
                operations.decode(data[: len(data) - len(data) // part], (None, None, 3))

    def test_another_shape(self) -> None:
        data = cv2.imencode(".png", photo())[1].tobytes()
        with pytest.raises(DataError, match=r"decodes to \[12, 9, 3\]; the data says \[12, 12, 3\]"):
            operations.decode(data, (12, 12, 3))


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
        with pytest.raises(DataError, match="does not fit"):
            CentralCrop(8)(pixels, NONE)


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


class TestRandomResizedCrop:
    def test_area_and_aspect_are_as_asked(self) -> None:
        crop = RandomResizedCrop(8, min_area=0.2, max_area=0.5)
        rng = np.random.default_rng(0)
        parts = [crop._part(100, 140, rng.random(20).tolist()) for _ in range(2000)]
        area = np.array([rows * columns for rows, columns in parts]) / 14000
        aspect = np.array([columns / rows for rows, columns in parts])
        assert 0.19 < area.min() and area.max() < 0.51
        assert 0.73 < aspect.min() and aspect.max() < 1.36
        # Uniform in area: mean 0.35, standard error 0.002; and in the logarithm of the aspect: mean 0.
        assert abs(area.mean() - 0.35) < 0.01 and abs(np.log(aspect).mean()) < 0.02

    def test_where_nothing_fits_the_largest_central_part(self) -> None:
        assert RandomResizedCrop(8)._part(100, 10, [LARGEST, 0.5] * 10) == (13, 10)
        assert RandomResizedCrop(8)._part(10, 100, [LARGEST, 0.5] * 10) == (10, 13)

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
