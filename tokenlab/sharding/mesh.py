"""The device mesh: four named axes, over which XLA partitions programs by itself (Auto axes)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from tokenlab.core.errors import ShardingError, suggest

AXES = ("data", "fsdp", "tensor", "expert")


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor and expert, in this order; use it under `jax.set_mesh`.

    On a TPU every axis gets whole axes of the torus where that is possible, and parts of them where it is not.

    The axes are of type Auto: `jax.make_mesh` would make them Explicit, under which a sharding constraint is an
    assertion instead of a wish.

    Args:
      sizes: devices per axis, each >= 1, or -1 for at most one axis that takes what the others leave. Axes
        left out have size 1; None means {"data": -1}.
      devices: the devices to use; by default all of all processes.

    Raises:
      ShardingError: an unknown axis (with the nearest), a size that is not a whole number >= 1 or -1, more
        than one -1, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    wanted = {"data": -1} if sizes is None else dict(sizes)
    for axis, size in wanted.items():
        if axis not in AXES:
            raise ShardingError(f"mesh: there is no axis {axis!r}.{suggest(str(axis), AXES)}")
        if isinstance(size, bool) or not isinstance(size, int) or not (size >= 1 or size == -1):
            raise ShardingError(
                f"mesh.{axis} is {size!r}: expected a number of devices >= 1, or -1 for the rest."
            )
    shape = {axis: wanted.get(axis, 1) for axis in AXES}
    shown = " x ".join(f"{axis}={size}" for axis, size in shape.items())
    rest = [axis for axis, size in shape.items() if size == -1]
    known = math.prod(size for size in shape.values() if size != -1)
    if len(rest) > 1:
        raise ShardingError(f"mesh {shown}: at most one axis may be -1 (the rest).")
    if rest and len(devices) % known == 0:
        shape[rest[0]] = len(devices) // known
    elif rest:
        raise ShardingError(f"mesh {shown}: {len(devices)} devices cannot be split by {known}.")
    elif known != len(devices):
        raise ShardingError(
            f"mesh {shown} needs {known} devices, but there are {len(devices)}; make one axis -1 to take the rest."
        )
    each, kinds = tuple(shape.values()), (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(each, AXES, kinds, devices=devices)
    except NotImplementedError:  # no axis of the TPU's torus, nor a product of them, has that many chips
        split = mesh_utils.create_device_mesh(each, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=kinds)
