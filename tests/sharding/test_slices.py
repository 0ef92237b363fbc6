"""Meshes over slices: one axis reaches from slice to slice, all others stay within one."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from tokenlab.core.errors import ShardingError
from tokenlab.sharding.slices import Slices, dealt_to_slices, slices_of


@dataclass(frozen=True)
class Chip:
    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


CHIPS = [Chip(number, number // 8) for number in range(16)]


def slice_of(found: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda chip: chip.slice_index)(found)


@pytest.mark.parametrize(
    ("sizes", "far"),
    [
        ({"data": 2, "fsdp": 4, "tensor": 1, "expert": 2}, 0),
        ({"data": 4, "fsdp": 2, "tensor": 2, "expert": 1}, 0),
        ({"data": 1, "fsdp": 4, "tensor": 4, "expert": 1}, 1),
    ],
)
def test_one_axis_reaches_from_slice_to_slice(sizes, far: int) -> None:
    found = dealt_to_slices(sizes, CHIPS)
    assert found.shape == tuple(sizes.values()) and len(set(found.flat)) == 16
    where = np.moveaxis(slice_of(found), far, 0)
    half = len(where) // 2
    assert (where[:half] == 0).all() and (where[half:] == 1).all()


def test_what_cannot_be_shared_out() -> None:
    with pytest.raises(ShardingError, match="data=1 x fsdp=1 x expert=16 on 2 slices: expected data or fsdp"):
        dealt_to_slices({"data": 1, "fsdp": 1, "expert": 16}, CHIPS)


def test_devices_that_are_here_are_of_one_slice() -> None:
    assert slices_of(jax.devices()) == 1 and slices_of(CHIPS) == 2


def test_what_is_typed():
    assert (
        Slices.parse("v5e:16x16*2") == Slices("v5e", (16, 16), 2)
        and Slices.parse("v5e:16x16*2").devices == 512
    )
    assert (
        Slices.parse("H100 SXM:8") == Slices("H100 SXM", (8,))
        and Slices.parse("v5p:2x2x4*3").one == "v5p:2x2x4"
    )
    for text in ("here", "v5e:", "v5e:4x", "v5e:4x4*", "v5e:4x4*0", ":4x4", "v5e:4x-4", "v5e:4 x4"):
        with pytest.raises(ShardingError, match=r"expected kind and shape, such as v5e:4x4, or v5e:16x16\*2"):
            Slices.parse(text)
