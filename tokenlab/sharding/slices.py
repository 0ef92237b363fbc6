"""Meshes over several slices: devices of one are joined by fast links, those of different ones by a slower network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from tokenlab.core.errors import ShardingError

FAR = ("data", "fsdp")
"""Axes that may reach from slice to slice, the best first: along "data" only gradients are summed, once a step."""


@dataclass(frozen=True)
class Slices:
    """One slice or several: `Slices.parse("v5e:16x16*2")`.

    Attributes:
      kind: of the devices, "v5e" or "H100 SXM".
      shape: devices along each axis of a slice's torus, or how many.
      count: of slices.
    """

    kind: str
    shape: tuple[int, ...]
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Slices:
        """Raises ShardingError for anything but kind, shape, and how many behind a *."""
        kind, _, rest = text.partition(":")
        shape, star, count = rest.partition("*")
        parts = [*shape.split("x"), *([count] if star else [])]
        if not kind or not all(part.isdecimal() and int(part) for part in parts):
            raise ShardingError(
                f"topology {text!r}: expected kind and shape, such as v5e:4x4, or v5e:16x16*2 for two slices."
            )
        return cls(kind, tuple(map(int, shape.split("x"))), int(count or 1))

    @property
    def one(self) -> str:
        """The text of one of them."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Over all slices."""
        return math.prod(self.shape) * self.count


def slices_of(devices: Sequence[Any]) -> int:
    """How many slices the devices belong to; 1 where they say nothing of slices."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def far_axis(sizes: Mapping[str, int], slices: int) -> str | None:
    """The axis of a mesh that reaches from slice to slice; None for one slice.

    Raises:
      ShardingError: there is none that can be shared out among them.
    """
    if slices == 1:
        return None
    for axis in FAR:
        if sizes.get(axis, 1) % slices == 0:
            return axis
    shown = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    raise ShardingError(
        f"mesh {shown} on {slices} slices: expected data or fsdp to be a multiple of {slices}, as one of them "
        "reaches from slice to slice."
    )


def dealt_to_slices(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices of several slices as an array with the axes of a mesh: one axis reaches from slice to slice.

    It is "data" where its size is a multiple of the number of slices, else "fsdp"; within a slice devices that are
    neighbours along an axis are neighbours of the torus, as in a mesh of one slice.

    Args:
      sizes: devices by axis, in the order of the mesh; their product is the number of devices.
      devices: as many of each slice.

    Raises:
      ShardingError: neither axis can be shared out among the slices.
    """
    count = slices_of(devices)
    far = far_axis(sizes, count)
    outer = [count if axis == far else 1 for axis in sizes]
    inner = [size // count if axis == far else size for axis, size in sizes.items()]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
