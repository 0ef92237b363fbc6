from __future__ import annotations

import warnings

import cv2
import numpy as np
import pytest

from tokenlab.core.errors import DataError
from tokenlab.data.draws import Purpose, uniform
from tokenlab.data.operations import Resize, Rotate, Shift
from tokenlab.data.transform import OPERATIONS, Transform, default, parse

SPEC = {"image": ((8, 8, 1), "float32"), "label": ((), "int32")}
PIXELS = {"image": ((8, 8, 1), "uint8"), "label": ((), "int32")}
PHOTOS = {"image": ((None, None, 3), "encoded"), "label": ((), "int32")}


def kinds(text: str) -> list[object]:
    return [operation for operation, _, _ in parse(text)]


class TestParse:
    def test_forms(self) -> None:
        assert parse("") == parse("  ") == []
        assert kinds(" shift(1) | rotate(degrees=10, fill=-0.5) |resize(4)") == [
            Shift(1),
            Rotate(10, -0.5),
            Resize(4),
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("shfit(1)", "unknown operation 'shfit'. Did you mean 'shift'?\n  shfit(1)\n  ^^^^^"),
            ("shift(1)|zzz", "  shift(1)|zzz\n           ^^^"),
            (
                "shift",
                "missing a required argument: 'pixels'; expected shift(pixels, [fill])\n  shift\n  ^^^^^",
            ),
            ("shift()", "missing a required argument"),
            ("shift(1, 2, 3)", "too many positional arguments"),
            ("shift(1, pixel=2)", "unexpected keyword argument 'pixel'"),
            ("shift(pixels=1, pixels=2)", "each parameter once, by its name"),
            ("shift(**1)", "each parameter once, by its name"),
            ("shift(one)", "shift has pixels=one; expected a number\n  shift(one)\n  ^^^^^^^^^^"),
            ("rotate(one)", "rotate has degrees=one; expected a number"),
            ("shift(True)", "expected a finite number"),
            ("shift(1e999)", "expected a finite number"),
            ("shift(1+1)", "expected a finite number"),
            ("shift('1')", "expected a finite number"),
            ("shift(1)|", "not of the form"),
            ("shift(1", "not of the form"),
            ("shift(1);rotate(1)", "not of the form"),
            ("shift(1)+rotate(1)", "expected an operation such as"),
            ("shift(1)|(rotate(1)|scale(0.1))", "expected an operation"),
            ("a.shift(1)", "expected an operation"),
            ("3", "expected an operation"),
            ("shift(1)\n|rotate(1)", "has a line break"),
            ("shift(1)|" * 200, "characters; expected at most 1000"),
            ("shift(1)|rotäte(1)", "plain ASCII"),
            ("(" * 500, "not of the form"),
            ("shift(-1)", "shift has pixels=-1; expected an int from 0 to 16384\n  shift(-1)\n  ^^^^^^^^^"),
            ("shift(0.5)", "expected an int"),
            ("rotate(181)", "degrees=181; expected an angle from 0 to 180"),
            ("scale(1)", "fraction=1; expected a number in [0, 1)"),
            ("resize(0)", "rows=0; expected an int from 1 to 16384"),
            ("resize(32, 0)", "resize has columns=0; expected an int from 1 to 16384"),
            ("resize(32, 16385)", "resize has columns=16385; expected an int from 1 to 16384"),
            ("resize_small(20000)", "resize_small has size=20000; expected an int from 1 to 16384"),
            ("random_crop(8, pad=20000)", "random_crop has pad=20000; expected an int from 0 to 16384"),
            (f"resize({'9' * 400})", "expected a finite number or a name\n  resize(999"),
            ("resize(-1e400)", "expected a finite number"),
            ("resize(1or 2)", "expected a finite number"),
            ("resize()", "expected resize(rows, [columns])"),
            ("randaugment(90000000, 9)", "count=90000000; expected an int from 0 to 100"),
            ("value_range(-1e308, 1e308)", "low=-1e+308; expected a number from -1e+30 to 1e+30"),
            ("value_range(0, 1e40)", "high=1e+40; expected a number from"),
            ("random_crop(8, pad=-1)", "pad=-1"),
            ("random_resized_crop(8, min_area=2)", "min_area=2; expected 0 < min_area <= max_area <= 1"),
            ("random_resized_crop(8, min_aspect=2)", "min_aspect=2"),
            ("randaugment(1.5, 9)", "count=1.5"),
            ("randaugment(2, 11)", "magnitude=11; expected a number from 0 to 10"),
            ("value_range(1, 1)", "low=1; expected low < high"),
            ("normalize(imagenot)", "knows no statistics 'imagenot'. Did you mean 'imagenet'?"),
            ("normalize(0)", "knows no statistics 0"),
        ],
    )
    def test_bad_text(self, text: str, message: str) -> None:
        with pytest.raises(DataError) as error:
            parse(text, key="config.data.transform")
        assert message in str(error.value) and str(error.value).startswith("config.data.transform")

    def test_python_is_not_heard(self) -> None:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            with pytest.raises(DataError):
                parse("resize(1or 2)")
        assert not heard


class TestWhatFits:
    @pytest.mark.parametrize(
        ("text", "spec", "message"),
        [
            ("shift(8)", SPEC, "pixels=8; expected an int from 0 to 7"),
            ("central_crop(9)", SPEC, "central_crop(9) does not fit images of [8, 8]"),
            ("random_crop(9)", SPEC, "random_crop(9) does not fit images of [8, 8]"),
            ("random_crop(40, 2)", SPEC, "random_crop(40, pad=2) does not fit images of [8, 8]"),
            ("random_crop(8, 9000)", SPEC, "makes images of 18008 x 18008 pixels; expected at most 16384"),
            ("resize_small(9000)", {"image": ((1, 9, 3), "uint8")}, "makes images of 9000 x 81000 pixels"),
            ("shift(1, 300)", PIXELS, "shift has fill=300; expected a number from 0 to 255 in uint8 images"),
            (
                "random_crop(8, 1, fill=-5)",
                PIXELS,
                "random_crop has fill=-5; expected a number from 0 to 255",
            ),
            ("rotate(9, fill=256)", PIXELS, "rotate has fill=256"),
            ("scale(0.1, fill=-1)", PIXELS, "scale has fill=-1"),
            ("scale(0.1, fill=1e39)", SPEC, "fill=1e+39; expected a number from -1e+30 to 1e+30 in float32"),
            ("randaugment(2, 9)", {"image": ((8, 8, 2), "uint8")}, "(RGB); these have 2: leave it out"),
            ("randaugment(2, 9)", {"image": ((8, 8), "uint8")}, "takes images [R, C, channels]"),
            ("decode", SPEC, "leave decode out"),
            ("value_range(-1, 1)", SPEC, "not float32[8, 8, 1]"),
            ("randaugment(2, 9)", SPEC, "put it after decode and before value_range"),
            (
                "resize(8)",
                PHOTOS,
                "not encoded[None, None, 3]; put decode before it\n  resize(8)\n  ^^^^^^^^^",
            ),
            ("decode|normalize(imagenet)", {"image": ((8, 8, 1), "encoded")}, "takes 3 channels"),
            ("flip_lr", {"tokens": ((16,), "int32")}, "needs an image; the data has tokens"),
            ("flip_lr", {"image": ((8, 8), "float32")}, "takes images [R, C, channels]"),
        ],
    )
    def test_what_does_not(self, text: str, spec: dict[str, object], message: str) -> None:
        with pytest.raises(DataError) as error:
            Transform(text, spec)
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("text", "kind"),
        [
            ("decode", ((None, None, 3), "uint8")),
            ("decode|resize_small(20)", ((None, None, 3), "uint8")),
            ("decode|resize_small(20)|central_crop(16)|normalize(clip)", ((16, 16, 3), "float32")),
            ("decode|resize(8, 6)|resize_small(3)", ((4, 3, 3), "uint8")),
            ("decode|random_resized_crop(5)|value_range(0, 1)", ((5, 5, 3), "float32")),
        ],
    )
    def test_what_comes_out_is_known_and_true(self, text: str, kind: tuple[object, str]) -> None:
        transform = Transform(text, PHOTOS)
        assert transform.spec == {"image": kind, "label": ((), "int32")}
        picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        data = cv2.imencode(".png", picture)[1].tobytes()
        given = transform(data, np.full(transform.draws, 0.5, np.float32))
        assert given.dtype.name == kind[1]
        assert all(want in (None, have) for want, have in zip(kind[0], given.shape, strict=True))
        decoded = transform(transform.decode(data), np.full(transform.draws, 0.5, np.float32), decoded=True)
        np.testing.assert_array_equal(decoded, given)

    def test_the_default_is_what_the_images_need(self) -> None:
        assert default(PHOTOS) == "decode|value_range(-1, 1)"
        assert default({"image": ((8, 8, 1), "uint8")}) == "value_range(-1, 1)"
        assert default(SPEC) == default({"tokens": ((16,), "int32")}) == ""


class TestDraws:
    def test_operations_draw_numbers_of_their_own(self) -> None:
        image = np.random.default_rng(0).uniform(-1, 1, (8, 8, 1)).astype(np.float32)
        transform = Transform("rotate(20)|shift(2)|rotate(20)", SPEC)
        assert transform.draws == 4
        draws = uniform(0, Purpose.AUGMENT, 0, (1, 4))[0]
        one = Rotate(20)(Shift(2)(Rotate(20)(image, draws[:1]), draws[1:3]), draws[3:])
        np.testing.assert_array_equal(transform(image, draws), one)

    def test_input_stays_as_it_was(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
        before = pixels.copy()
        spec = {"image": ((8, 8, 3), "uint8")}
        examples = {
            "decode": "",
            "resize": "resize(8)|resize(4)",
            "resize_small": "resize_small(4)",
            "central_crop": "central_crop(4)",
            "random_crop": "random_crop(8, pad=1)",
            "random_resized_crop": "random_resized_crop(8)",
            "flip_lr": "flip_lr",
            "shift": "shift(1)",
            "rotate": "rotate(10)",
            "scale": "scale(0.1)",
            "randaugment": "randaugment(3, 9)",
            "value_range": "value_range(-1, 1)",
            "normalize": "normalize(imagenet)",
        }
        assert examples.keys() == OPERATIONS.keys()
        for text in examples.values():
            transform = Transform(text, spec)
            for seed in range(5):
                transform(pixels, uniform(seed, Purpose.AUGMENT, 0, (transform.draws,)))
            np.testing.assert_array_equal(pixels, before, err_msg=text)
