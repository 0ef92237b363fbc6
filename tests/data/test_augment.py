from __future__ import annotations

import numpy as np
import pytest

from tokenlab.core.errors import DataError
from tokenlab.data.augment import OPERATIONS, Augment, parse, rotate, scale, shift
from tokenlab.data.draws import Purpose, uniform

SPEC = {"image": ((8, 8, 1), "float32"), "label": ((), "int32")}


def images(batch: int = 5, rows: int = 8, columns: int = 8, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (batch, rows, columns, channels)).astype(np.float32)


def drawn(batch: int, count: int) -> np.ndarray:
    return np.random.default_rng(2).random((batch, count), np.float32)


def constant(batch: int, count: int, value: float) -> np.ndarray:
    return np.full((batch, count), value, np.float32)


class TestParse:
    def test_forms(self) -> None:
        assert parse("") == parse("  ") == ()
        one, two = parse(" shift(1) | rotate(degrees=10, fill=-0.5) ")
        assert (one.name, dict(one.parameters)) == ("shift", {"pixels": 1})
        assert (two.name, dict(two.parameters)) == ("rotate", {"degrees": 10, "fill": -0.5})

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("shfit(1)", "unknown operation 'shfit'. Did you mean 'shift'?\n  shfit(1)\n  ^^^^^"),
            (
                "shift(1)|zzz",
                "unknown operation 'zzz'. Known: rotate, scale, shift.\n  shift(1)|zzz\n           ^^^",
            ),
            (
                "shift",
                "missing a required argument: 'pixels'; expected shift(pixels, fill=-1.0)\n  shift\n  ^^^^^",
            ),
            ("shift()", "missing a required argument"),
            ("shift(1, 2, 3)", "too many positional arguments"),
            ("shift(1, pixel=2)", "unexpected keyword argument 'pixel'"),
            ("shift(pixels=1, pixels=2)", "each parameter once, by its name"),
            ("shift(**1)", "each parameter once, by its name"),
            ("shift(one)", "expected a finite number\n  shift(one)\n        ^^^"),
            ("shift(True)", "expected a finite number"),
            ("shift(1e999)", "expected a finite number"),
            ("shift(1+1)", "expected a finite number"),
            ("shift('1')", "expected a finite number"),
            ("shift(1)|", "not of the form"),
            ("shift(1", "not of the form"),
            ("shift(1);rotate(1)", "not of the form"),
            ("shift(1)+rotate(1)", 'expected an operation such as "shift(1)"'),
            ("shift(1)|(rotate(1)|scale(0.1))", "expected an operation"),
            ("a.shift(1)", "expected an operation"),
            ("3", "expected an operation"),
            ("shift(1)\n|rotate(1)", "has a line break"),
            ("shift(1)|" * 200, "characters; expected at most 1000"),
            ("shift(1)|rotäte(1)", "plain ASCII"),
            ("(" * 500, "not of the form"),
        ],
    )
    def test_bad_text(self, text: str, message: str) -> None:
        with pytest.raises(DataError) as error:
            parse(text)
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("shift(-1)", "shift has pixels=-1; expected an int from 0 to 7"),
            ("shift(8)", "expected an int from 0 to 7"),
            ("shift(0.5)", "expected an int"),
            ("rotate(181)", "degrees=181; expected an angle from 0 to 180"),
            ("rotate(-1)", "expected an angle"),
            ("scale(1)", r"fraction=1; expected a number in [0, 1)"),
            ("scale(-0.1)", "expected a number"),
        ],
    )
    def test_out_of_range_is_found_when_made(self, text: str, message: str) -> None:
        with pytest.raises(DataError) as error:
            Augment(text, SPEC)
        assert message in str(error.value)

    @pytest.mark.parametrize(
        "spec",
        [{"tokens": ((16,), "int32")}, {"image": ((8, 8), "float32")}, {"image": ((8, 8, 1), "uint8")}],
    )
    def test_a_source_without_fitting_images(self, spec: dict[str, tuple[tuple[int, ...], str]]) -> None:
        with pytest.raises(DataError, match="needs image float32"):
            Augment("shift(1)", spec)
        Augment("", spec)


class TestShift:
    def test_every_shift(self) -> None:
        image = images(1, 4, 5, 2)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                # Draws in the middle of the third that stands for this distance.
                draws = np.array([[(1 - dy + 0.5) / 3, (1 - dx + 0.5) / 3]], np.float32)
                expected = np.full_like(image, -1)
                for y in range(4):
                    for x in range(5):
                        if 0 <= y - dy < 4 and 0 <= x - dx < 5:
                            expected[0, y, x] = image[0, y - dy, x - dx]
                np.testing.assert_array_equal(shift(image, draws, 1), expected)

    def test_all_shifts_come_equally_often(self) -> None:
        image = np.full((9000, 3, 3, 1), -1, np.float32)
        image[:, 1, 1] = 1
        moved = shift(image, drawn(9000, 2), 1)[..., 0]
        assert (moved.sum((1, 2)) == -7).all()
        # Expected 1,000 at each of nine places, standard deviation 30.
        assert np.abs((moved == 1).sum(0) - 1000).max() < 150

    def test_zero_is_the_identity(self) -> None:
        image = images()
        np.testing.assert_array_equal(shift(image, drawn(5, 2), 0), image)

    def test_largest_draw_stays_inside(self) -> None:
        largest = np.nextafter(np.float32(1), np.float32(0))
        image = images(3)
        expected = np.full_like(image, 0.25)
        expected[:, :-3, :-3] = image[:, 3:, 3:]
        np.testing.assert_array_equal(shift(image, constant(3, 2, largest), 3, fill=0.25), expected)


class TestResampling:
    @pytest.mark.parametrize("shape", [(8, 8), (7, 5), (1, 3)])
    def test_no_turn_and_no_scaling_are_the_identity(self, shape: tuple[int, int]) -> None:
        image = images(4, *shape, 3)
        np.testing.assert_allclose(rotate(image, constant(4, 1, 0.5), 30), image, atol=1e-6)
        np.testing.assert_allclose(scale(image, constant(4, 1, 0.5), 0.5), image, atol=1e-6)

    def test_quarter_and_half_turns_permute_pixels(self) -> None:
        image = images(2, 6, 6, 2)
        np.testing.assert_allclose(
            rotate(image, constant(2, 1, 0), 90), np.rot90(image, 1, (1, 2)), atol=1e-5
        )
        np.testing.assert_allclose(rotate(image, constant(2, 1, 0), 180), image[:, ::-1, ::-1], atol=1e-5)

    def test_against_a_loop(self) -> None:
        image = images(3, 5, 6, 1)
        draws = drawn(3, 1)
        turned, zoomed = rotate(image, draws, 40, fill=0.3), scale(image, draws, 0.4, fill=0.3)
        for b in range(3):
            angle = np.deg2rad(40) * (2 * draws[b, 0] - 1)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            zoom = np.eye(2) / (1 + 0.4 * (2 * draws[b, 0] - 1))
            for matrix, result in ((turn, turned), (zoom, zoomed)):
                for y in range(5):
                    for x in range(6):
                        at = matrix @ np.array([y - 2, x - 2.5]) + np.array([2, 2.5])
                        assert result[b, y, x, 0] == pytest.approx(
                            bilinear(image[b, :, :, 0], at, 0.3), abs=1e-4
                        )

    def test_far_outside_is_fill(self) -> None:
        shrunk = scale(images(1), constant(1, 1, 0), 0.9, fill=0.5)  # a tenth of the size
        assert (shrunk[0, 0] == 0.5).all() and (shrunk[0, :, -1] == 0.5).all()

    @pytest.mark.parametrize("operation", [rotate, scale])
    def test_stays_within_the_range_of_values(self, operation: object) -> None:
        result = operation(images(200), drawn(200, 1), 0.8)
        assert result.min() >= -1 and result.max() <= 1
        assert result.dtype == np.float32 and result.flags.c_contiguous


def bilinear(image: np.ndarray, at: np.ndarray, fill: float) -> float:
    top, left = np.floor(at).astype(int)
    value = 0.0
    for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        inside = 0 <= y < image.shape[0] and 0 <= x < image.shape[1]
        weight = (1 - abs(at[0] - y)) * (1 - abs(at[1] - x))
        value += weight * (image[y, x] if inside else fill)
    return value


class TestAugment:
    text = "shift(1)|rotate(10)|scale(0.1)"

    def apply(self, batch: dict[str, np.ndarray], rows: range, *, seed: int = 3, step: int = 7) -> np.ndarray:
        part = {key: array[rows.start : rows.stop] for key, array in batch.items()}
        augment = Augment(self.text, SPEC)
        return augment(part, seed=seed, step=step, rows=rows, global_batch=12)["image"]

    def test_deterministic_in_seed_step_and_row(self) -> None:
        batch = {"image": np.repeat(images(1), 12, axis=0), "label": np.zeros(12, np.int32)}
        first = self.apply(batch, range(12))
        np.testing.assert_array_equal(first, self.apply(batch, range(12)))
        for other in (self.apply(batch, range(12), seed=4), self.apply(batch, range(12), step=8)):
            assert not np.isclose(first, other).all(axis=(1, 2, 3)).any()
        # The same picture in every row, and every row changed in its own way.
        assert len({row.tobytes() for row in first}) == 12

    def test_processes_do_as_one_would(self) -> None:
        batch = {"image": images(12), "label": np.zeros(12, np.int32)}
        whole = self.apply(batch, range(12))
        parts = [self.apply(batch, range(start, start + 3)) for start in range(0, 12, 3)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)

    def test_leaves_its_input_and_other_keys_alone(self) -> None:
        batch = {"image": images(12), "label": np.arange(12, dtype=np.int32)}
        before = batch["image"].copy()
        augmented = Augment(self.text, SPEC)(batch, seed=0, step=0, rows=range(12), global_batch=12)
        np.testing.assert_array_equal(batch["image"], before)
        assert augmented["label"] is batch["label"]
        assert not np.array_equal(augmented["image"], before)

    def test_operations_draw_numbers_of_their_own(self) -> None:
        # Were the draws shared, the angle would follow from the shift.
        batch = {"image": images(12), "label": np.zeros(12, np.int32)}
        text = "rotate(20)|rotate(20)"
        twice = Augment(text, SPEC)(batch, seed=0, step=0, rows=range(12), global_batch=12)["image"]
        draws = uniform(0, Purpose.AUGMENT, 0, (12, 2))
        expected = rotate(rotate(batch["image"], draws[:, :1], 20), draws[:, 1:], 20)
        np.testing.assert_array_equal(twice, expected)
        assert abs(np.corrcoef(draws.T)[0, 1]) < 0.9

    def test_empty_changes_nothing(self) -> None:
        batch = {"image": images(4)}
        assert Augment("", SPEC)(batch, seed=0, step=0, rows=range(4), global_batch=4) is batch

    def test_every_operation_keeps_shape_and_dtype(self) -> None:
        examples = {"shift": "shift(1)", "rotate": "rotate(10)", "scale": "scale(0.1)"}
        assert examples.keys() == OPERATIONS.keys()
        for text in examples.values():
            spec = {"image": ((6, 9, 3), "float32")}
            image = images(4, 6, 9, 3)
            result = Augment(text, spec)({"image": image}, seed=0, step=0, rows=range(4), global_batch=4)[
                "image"
            ]
            assert result.shape == image.shape and result.dtype == np.float32
            assert not np.array_equal(result, image)
