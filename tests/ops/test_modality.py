"""Lanes: the tokens of each modality, in order, with static shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.ops.modality import gather_lane, lanes, left_out, scatter_lane

IDS = jnp.asarray([[0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0]], jnp.int32)
VALID = jnp.asarray([[1, 1, 1, 1, 0, 1], [1, 0, 1, 1, 1, 1]], bool)
equal = np.testing.assert_array_equal


def test_lanes_hold_positions_in_order():
    text, image = lanes(IDS, (3, 4))
    equal(text.index, [[0, 3, 4], [4, 5, 6]])
    equal(image.index, [[1, 2, 5, 6], [0, 1, 2, 3]])
    equal(text.count, [3, 2])
    equal(image.there, [[1, 1, 1, 0], [1, 1, 1, 1]])
    equal(left_out((text, image)), [0, 0])


def test_padding_is_in_no_lane_and_not_counted():
    text, image = lanes(IDS, (6, 6), VALID)
    equal(text.index, [[0, 3, 6, 6, 6, 6], [4, 5, 6, 6, 6, 6]])
    equal(image.index, [[1, 2, 5, 6, 6, 6], [0, 2, 3, 6, 6, 6]])
    equal(left_out((text, image), VALID), [0, 0])


def test_what_is_beyond_a_bound_is_left_out_and_counted():
    text, image = lanes(IDS, (2, 3))
    equal(text.index, [[0, 3], [4, 5]])
    equal(image.index, [[1, 2, 5], [0, 1, 2]])
    equal(left_out((text, image)), [1, 1])


def test_unknown_ids_are_counted_where_they_cannot_be_seen():
    counted = jax.jit(lambda ids: left_out(lanes(ids, (6, 6))))(IDS.at[0, 0].set(7).at[1, 1].set(-1))
    equal(counted, [1, 1])


def test_scatter_after_gather_is_the_identity():
    x = jax.random.normal(jax.random.key(0), (2, 6, 3))
    back = jnp.full_like(x, jnp.nan)
    for lane in lanes(IDS, (5, 4)):
        back = scatter_lane(back, lane, gather_lane(x, lane))
    equal(back, x)


def test_gather_gives_zeros_behind_the_last_and_gradients_reach_each_token_once():
    x = jnp.ones((2, 6, 1))
    lane = lanes(IDS, (4, 4))[0]
    equal(gather_lane(x, lane)[..., 0], lane.there)
    grad = jax.grad(lambda x: gather_lane(x, lane).sum())(x)
    equal(grad[..., 0], IDS == 0)


@pytest.mark.parametrize(
    ("ids", "bounds", "valid", "error", "says"),
    [
        (IDS.astype(jnp.float32), (3, 4), None, ShapeError, "float32"),
        (IDS[0], (3, 4), None, ShapeError, r"\[B, N\]"),
        (IDS, (3, 4), VALID[:, :2], ShapeError, r"valid is bool\[2, 2\]"),
        (IDS, (3, 4), VALID.astype(jnp.int32), ShapeError, "valid is int32"),
        (IDS, (0, 4), None, TokenLabError, "lane 0 has room for 0"),
        (IDS, (3, 7), None, TokenLabError, "lane 1 has room for 7"),
        (IDS.at[0, 0].set(2), (3, 4), None, TokenLabError, "0..1; got numbers from 0 to 2"),
        (IDS.at[0, 0].set(-1), (3, 4), None, TokenLabError, "from -1 to 1"),
    ],
)
def test_bad_input(ids, bounds, valid, error, says):
    with pytest.raises(error, match=says):
        lanes(ids, bounds, valid)


def test_unknown_ids_in_padding_do_not_matter():
    found = lanes(IDS.at[0, 4].set(9), (3, 4), VALID)
    equal(found[0].index[0], [0, 3, 6])
