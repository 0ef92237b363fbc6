"""The device mesh: named axes, over which XLA partitions programs by itself (Auto axes)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from tokenlab.core.errors import ShardingError, suggest
from tokenlab.sharding.axes import AXES, FAR_TO_NEAR, ROLES
from tokenlab.sharding.rules import Rules, named
from tokenlab.sharding.slices import dealt_to_slices, slices_of

__all__ = ["AXES", "make_mesh"]


def make_mesh(
    sizes: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    rules: Rules | None = None,
    order: Sequence[str] | None = None,
) -> Mesh:
    """A mesh with the axes data, fsdp, tensor and expert, and others that are wanted; use it under `jax.set_mesh`.

    Axes that are wanted beside the four (`tokenlab.sharding.axes.ROLES` has them all) stand where they have a size
    above 1. On a TPU every axis gets whole axes of the torus where that is possible, and parts of them where it is not.
    Of several slices one axis reaches from slice to slice, see `tokenlab.sharding.slices.dealt_to_slices`.

    The axes are of type Auto: `jax.make_mesh` would make them Explicit, under which a sharding constraint is an
    assertion instead of a wish.

    Args:
      sizes: devices per axis, each >= 1, or -1 for at most one axis that takes what the others leave. Axes
        left out have size 1; None means {"data": -1}.
      devices: the devices to use; by default all of all processes.
      rules: logical axis -> mesh axes, in place of what follows from the roles of the axes; see
        `tokenlab.sharding.rules.named`.
      order: axes by which the devices are dealt out, the one of the farthest devices first; None for the order of the
        mesh, or `FAR_TO_NEAR` where there are others than the four.

    Raises:
      ShardingError: what `named` raises, an unknown axis (with the nearest), a size that is not a whole number >= 1 or
        -1, more than one -1, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    wanted = {"data": -1} if sizes is None else dict(sizes)
    for axis, size in wanted.items():
        if axis not in ROLES:
            raise ShardingError(f"mesh: there is no axis {axis!r}.{suggest(str(axis), ROLES)}")
        if isinstance(size, bool) or not isinstance(size, int) or not (size >= 1 or size == -1):
            raise ShardingError(
                f"mesh.{axis} is {size!r}: expected a number of devices >= 1, or -1 for the rest."
            )
    axes = [axis for axis in ROLES if axis in AXES or wanted.get(axis, 1) != 1]
    shape = {axis: wanted.get(axis, 1) for axis in axes}
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
    shape = {axis: size for axis, size in shape.items() if axis in AXES or size > 1}
    if order is None:
        order = AXES if set(shape) == set(AXES) else FAR_TO_NEAR
    by = tuple(axis for axis in order if axis in shape)
    made = _made(tuple(shape[axis] for axis in by), by, devices)
    said = (named(rules),) if rules else ()
    names = (*shape, *said)
    if made.axis_names == names:
        return made
    dealt = made.devices.transpose([by.index(axis) for axis in shape])
    dealt = dealt.reshape(*dealt.shape, *(1 for _ in said))
    return Mesh(dealt, names, axis_types=(AxisType.Auto,) * len(names))


def _made(sizes: tuple[int, ...], axes: tuple[str, ...], devices: Sequence[jax.Device]) -> Mesh:
    kinds = (AxisType.Auto,) * len(axes)
    if slices_of(devices) > 1:
        return Mesh(dealt_to_slices(dict(zip(axes, sizes, strict=True)), devices), axes, axis_types=kinds)
    try:
        return jax.make_mesh(sizes, axes, kinds, devices=devices)
    except NotImplementedError:  # no axis of the TPU's torus, nor a product of them, has that many chips
        split = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(split, axes, axis_types=kinds)
