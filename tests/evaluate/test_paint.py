"""Every region of a painted image against the patches it stands for."""

from __future__ import annotations

import numpy as np
import pytest

from tokenlab.core.errors import ShapeError
from tokenlab.evaluate import paint
from tokenlab.evaluate.paint import Patches


def patch_of(picture: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """The pixels of a patch, cut out by its own arithmetic."""
    height, width = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    row, column = patch // grid[1], patch % grid[1]
    return picture[row * height : (row + 1) * height, column * width : (column + 1) * width]


def image(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def enlarged(picture: np.ndarray) -> np.ndarray:
    return paint.enlarge(picture, paint.factor_for(picture.shape[0]))


def owner(*tokens: int) -> np.ndarray:
    return np.array(tokens)


EVERY = np.arange(16)


@pytest.mark.parametrize(("shape", "grid"), [((8, 8), (4, 4)), ((16, 8), (8, 2)), ((224, 224), (4, 4))])
def test_kept_patches_are_untouched_and_dropped_ones_show_nothing_of_the_image(
    shape: tuple[int, int], grid: tuple[int, int]
) -> None:
    kept = {0, 3, 5, 6, 12, 15}
    after = np.array([sorted(kept).index(i) if i in kept else -1 for i in range(16)])
    shown = image(*shape)
    picture = paint.paint(shown, grid, Patches(EVERY, after))
    plain = enlarged(shown)
    assert picture.shape == plain.shape and picture.dtype == np.uint8
    colors = {tuple(paint.DROPPED), tuple(paint.STRIPE)}
    for patch in range(16):
        cell = patch_of(picture, grid, patch)
        if patch in kept:
            np.testing.assert_array_equal(cell, patch_of(plain, grid, patch))
        else:
            assert {tuple(pixel) for pixel in cell.reshape(-1, 3)} == colors


def test_what_was_gone_before_differs_from_what_is_dropped_here() -> None:
    shown, before = image(8, 8), np.where(EVERY < 8, EVERY, -1)
    picture = paint.paint(shown, (4, 4), Patches(before, np.where(EVERY < 4, EVERY, -1)))
    for patch, colors in ((5, (paint.DROPPED, paint.STRIPE)), (10, (paint.GONE, paint.GONE_STRIPE))):
        found = {tuple(pixel) for pixel in patch_of(picture, (4, 4), patch).reshape(-1, 3)}
        assert found == {tuple(color) for color in colors}
    np.testing.assert_array_equal(patch_of(picture, (4, 4), 1), patch_of(enlarged(shown), (4, 4), 1))


def test_around_a_body_patches_fade_and_those_inside_are_outlined() -> None:
    shown, inside = image(8, 8), [1, 6, 11]
    after = np.full(16, -1)
    after[inside] = range(3)
    picture = paint.paint(shown, (4, 4), Patches(EVERY, after, inside=True))
    plain = enlarged(shown)
    for patch in range(16):
        cell, original = patch_of(picture, (4, 4), patch), patch_of(plain, (4, 4), patch)
        if patch in inside:
            width = cell.shape[0] // 8
            assert np.all(cell[0] == paint.THROUGH) and np.all(cell[:, -1] == paint.THROUGH)
            np.testing.assert_array_equal(
                cell[width:-width, width:-width], original[width:-width, width:-width]
            )
        else:
            np.testing.assert_allclose(cell, original * (1 - paint.AROUND) + 255 * paint.AROUND, atol=0.51)


def test_merged_patches_show_their_average_within_one_outline() -> None:
    # 0 and 1 touch, 4 is below 0: one group of three; 10 and 15 are apart; the rest are alone.
    after = owner(0, 0, 1, 2, 0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 8)
    shown = image(8, 8)
    patches = Patches(EVERY, after)
    assert [members.tolist() for members in patches.groups()] == [[0, 1, 4], [10, 15]]
    assert patches.merged.tolist() == [i in (0, 1, 4, 10, 15) for i in range(16)]
    picture, plain = paint.paint(shown, (4, 4), patches), enlarged(shown)
    outlines = []
    for members in ([0, 1, 4], [10, 15]):
        average = np.mean([patch_of(plain, (4, 4), i) for i in members], axis=(0, 1, 2))
        for member in members:
            cell = patch_of(picture, (4, 4), member)
            middle = cell.shape[0] // 2
            np.testing.assert_allclose(cell[middle, middle], average, atol=0.51)
        outlines.append(tuple(patch_of(picture, (4, 4), members[0])[0, 0]))
    assert len(set(outlines)) == 2 and set(outlines) <= {tuple(color) for color in paint.GROUPS}
    first, second, below = (patch_of(picture, (4, 4), i) for i in (0, 1, 4))
    middle = first.shape[0] // 2
    outline = np.array(outlines[0])
    assert np.all(first[0] == outline) and np.all(first[middle, 0] == outline)
    # No outline between members that touch, one towards everything else.
    assert np.all(first[middle, -1] != outline) and np.all(second[middle, 0] != outline)
    assert np.all(first[-1, middle] != outline) and np.all(below[0, middle] != outline)
    assert np.all(second[-1, middle] == outline) and np.all(below[middle, -1] == outline)
    for alone in (2, 3, 5, 9, 14):
        np.testing.assert_array_equal(patch_of(picture, (4, 4), alone), patch_of(plain, (4, 4), alone))


def test_groups_that_touch_have_different_colours() -> None:
    rng = np.random.default_rng(3)
    after = rng.integers(0, 20, 64)
    patches = Patches(np.arange(64), after)
    picture = paint.paint(image(8, 8), (8, 8), patches)
    colors: dict[int, tuple[int, ...]] = {}
    for members in patches.groups():
        corners = {tuple(patch_of(picture, (8, 8), i)[0, 0]) for i in members} & {
            tuple(c) for c in paint.GROUPS
        }
        colors[int(after[members[0]])] = corners.pop()
        assert not corners
    grid = after.reshape(8, 8)
    touching = 0
    for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
        for one, other in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
            if one != other and one in colors and other in colors:
                touching += 1
                assert colors[one] != colors[other]
    assert touching > 20


def test_grey_and_colour_images_become_rgb() -> None:
    grey = np.array([[[-1.0], [0.0], [1.0]]])
    np.testing.assert_array_equal(paint.image_to_rgb(grey, -1, 1)[0], [[0] * 3, [128] * 3, [255] * 3])
    color = np.array([[[0.0, 0.5, 2.0]]])
    np.testing.assert_array_equal(paint.image_to_rgb(color, 0, 1)[0, 0], [0, 128, 255])
    np.testing.assert_array_equal(paint.image_to_rgb(np.full((2, 2, 1), 7.0), 7, 7), np.zeros((2, 2, 3)))


def test_wrong_shapes_are_told() -> None:
    with pytest.raises(ShapeError, match=r"\[8, 8, 2\]"):
        paint.image_to_rgb(np.zeros((8, 8, 2)), 0, 1)
    with pytest.raises(ShapeError, match="cannot show 16 patches"):
        paint.paint(image(8, 8), (2, 4), Patches(EVERY, EVERY))
    with pytest.raises(ShapeError, match="does not divide"):
        paint.cells(image(9, 8), (4, 4))


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0.1, 0.9, (0, 1)), (-0.2, 0.9, (-1, 1)), (3, 200, (0, 255)), (-2.1, 2.6, (-2.1, 2.6))],
)
def test_the_range_of_pixels_does_not_depend_on_what_is_in_them(low, high, wanted) -> None:
    assert paint.pixel_range(np.array([low, high])) == pytest.approx(wanted)
