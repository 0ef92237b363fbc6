from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from tokenlab.core.errors import DataError
from tokenlab.data import pixels


def photo(rows: int = 12, columns: int = 9, channels: int = 3, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, channels), np.uint8)


class TestDecode:
    @pytest.mark.parametrize("kind", ["PNG", "BMP", "WebP"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_as_pillow_does(self, kind: str, channels: int) -> None:
        wanted = photo(channels=channels)
        stream = io.BytesIO()
        Image.fromarray(wanted.squeeze()).save(stream, kind, **({"lossless": True} if kind == "WebP" else {}))
        given = pixels.decode(stream.getvalue(), (None, 9, channels))
        np.testing.assert_array_equal(given, wanted)  # in this order of channels

    def test_jpeg_is_near_pillow(self) -> None:
        smooth = cv2.resize(photo(4, 4), (64, 48), interpolation=cv2.INTER_CUBIC)
        stream = io.BytesIO()
        Image.fromarray(smooth).save(stream, "JPEG", quality=95)
        given = pixels.decode(stream.getvalue(), (48, 64, 3)).astype(int)
        wanted = np.asarray(Image.open(stream)).astype(int)
        assert np.abs(given - wanted).max() <= 4

    @pytest.mark.parametrize("data", [b"", b"no picture", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n123"])
    def test_no_picture(self, data: bytes) -> None:
        with pytest.raises(DataError, match=f"its {len(data)} bytes"):
            pixels.decode(data, (None, None, 3))

    @pytest.mark.parametrize("kind", [".jpg", ".png"])
    def test_cut_off(self, kind: str) -> None:
        data = cv2.imencode(kind, photo(64, 64))[1].tobytes()
        for part in (2, 3, 10):
            with pytest.raises(DataError):
                pixels.decode(data[: len(data) - len(data) // part], (None, None, 3))

    def test_another_shape(self) -> None:
        data = cv2.imencode(".png", photo())[1].tobytes()
        with pytest.raises(DataError, match=r"decodes to \[12, 9, 3\]; the data says \[12, 12, 3\]"):
            pixels.decode(data, (12, 12, 3))

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
    def test_a_jpeg_with_a_trailer_is_whole_until_it_is_cut(self, options: dict[str, int]) -> None:
        stream = io.BytesIO()
        Image.fromarray(photo(64, 64)).save(stream, "JPEG", quality=90, **options)
        data = stream.getvalue()
        wanted = pixels.decode(data, (64, 64, 3))
        for trailer in (bytes(200), b"\xff\xd9" + b"\xff" * 500):
            np.testing.assert_array_equal(pixels.decode(data + trailer, (64, 64, 3)), wanted)
        with pytest.raises(DataError, match="cut off"):
            pixels.decode(data[:-2], (64, 64, 3))

    def test_the_end_of_a_thumbnail_is_not_the_end(self) -> None:
        data = cv2.imencode(".jpg", photo(64, 64))[1].tobytes()
        segment = b"\xff\xe1" + (2 + len(data)).to_bytes(2, "big") + data  # as Exif keeps one
        whole = data[:2] + segment + data[2:]
        np.testing.assert_array_equal(pixels.decode(whole, (64, 64, 3)), pixels.decode(data, (64, 64, 3)))
        with pytest.raises(DataError, match="cut off"):
            pixels.decode(whole[:-500], (None, None, 3))

    @pytest.mark.parametrize("kind", [".bmp", ".png"])
    def test_nothing_is_written_beside_the_error(self, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
        data = cv2.imencode(kind, photo(64, 64))[1].tobytes()
        with pytest.raises(DataError):
            pixels.decode(data[: len(data) // 2], (None, None, 3))
        assert capfd.readouterr() == ("", "")


class TestResized:
    @pytest.mark.parametrize("turned", [False, True])
    def test_a_side_that_shrinks_is_averaged_while_the_other_grows(self, turned: bool) -> None:
        stripes = np.broadcast_to((np.arange(1000) % 2 * 200).astype(np.uint8)[:, None, None], (1000, 20, 1))
        given = pixels.resized(stripes.swapaxes(0, 1) if turned else stripes, 32, 32)
        assert given.shape == (32, 32, 1) and 90 <= given.min() and given.max() <= 110

    def test_both_sides_at_once_as_opencv_does(self) -> None:
        given = photo(20, 24)
        for size, way in (((10, 7), cv2.INTER_AREA), ((30, 24), cv2.INTER_LINEAR), ((20, 9), cv2.INTER_AREA)):
            wanted = cv2.resize(given, size[::-1], interpolation=way)
            np.testing.assert_array_equal(pixels.resized(given, *size), wanted)


@pytest.mark.parametrize("channels", [2, 5, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_any_number_of_channels(channels: int, dtype: type) -> None:
    given = photo(20, 24, channels).astype(dtype)
    for change in (
        lambda image: pixels.resized(image, 8, 6),
        lambda image: pixels.resized(image, 40, 6),
        lambda image: pixels.padded(image, 3, 200),
        lambda image: pixels.warped(image, (0.9, 0.2, -0.2, 0.9), 200, (3, 1)),
    ):
        wanted = np.concatenate([change(given[..., i : i + 1]) for i in range(channels)], axis=2)
        np.testing.assert_allclose(change(given), wanted, atol=5)  # samples may lie on a grid of 1/32 pixel
