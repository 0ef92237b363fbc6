"""The one helper that says how an activation lies on the mesh."""

from __future__ import annotations

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh

from tokenlab.core.errors import ShardingError
from tokenlab.sharding.rules import Rules, rules_of, spec


def constrain(x: Array, *logical: str | None, rules: Rules | None = None) -> Array:
    """Keep `x` split over the mesh as its logical axes say: `constrain(x, "batch", None, None)` for [B, N, D].

    The mesh is the one of the surrounding `jax.set_mesh`. Without a mesh, or on one of a single device, there
    is nothing to split and `x` comes back as it is. Inside `jax.shard_map` the axes it has taken over are
    left alone.

    Args:
      x: an array of any dtype, with its global shape.
      logical: one name or None for each dimension; None means not split.
      rules: logical axis -> mesh axes; None for those of the mesh.

    Raises:
      ShardingError: as `tokenlab.sharding.rules.spec`, also without a mesh where the number of axes is wrong;
        or the mesh has Explicit axes.
    """
    what = f"constrain({', '.join(map(repr, logical))})"
    if len(logical) != x.ndim:
        raise ShardingError(f"{what}: {len(logical)} logical axes are given for an array of shape {x.shape}.")
    mesh = get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit in kinds.values():
        raise ShardingError(
            f"{what}: the mesh has Explicit axes; make it with tokenlab.sharding.mesh.make_mesh."
        )
    if all(kind is AxisType.Manual for kind in kinds.values()):
        return x
    manual = {axis for axis, kind in kinds.items() if kind is AxisType.Manual}
    local = {
        name: _without(axes, manual) for name, axes in (rules_of(mesh) if rules is None else rules).items()
    }
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec(logical, x.shape, mesh, local, what)))


def _without(axes: str | tuple[str, ...] | None, manual: set[str]) -> tuple[str, ...] | None:
    named = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in named if axis not in manual)
