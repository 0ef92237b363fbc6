"""depth_to_space against a loop in numpy."""

from __future__ import annotations

import numpy as np

from tokenlab.layers.conv import depth_to_space


def test_the_four_of_a_place_are_its_pixels_in_reading_order() -> None:
    h, w, channels = 2, 3, 5
    x = np.arange(2 * h * w * 4 * channels, dtype=np.float32).reshape(2, h, w, 4 * channels)
    found = np.asarray(depth_to_space(x))
    assert found.shape == (2, 2 * h, 2 * w, channels)
    for b, row, column in np.ndindex(2, 2 * h, 2 * w):
        first = channels * (2 * (row % 2) + column % 2)
        wanted = x[b, row // 2, column // 2, first : first + channels]
        np.testing.assert_array_equal(found[b, row, column], wanted)
