"""Meshes over several slices: devices of one are joined by fast links, those of different ones by a slower network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from tokenlab.core.errors import ShardingError

FAR = ("data", "fsdp")
"""Axes that may reach from slice to slice, the best first: along "data" only gradients are summed, once a step."""


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
