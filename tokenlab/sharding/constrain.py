"""The one helper that says how an activation lies on the mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import EllipsisType
from typing import NamedTuple

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh

from tokenlab.core.errors import ShardingError
from tokenlab.sharding import runtime
from tokenlab.sharding.rules import Rules, axes_of, rules_of, spec

UNEVEN = ("sequence",)
"""Logical axes of which the last devices may get less: how many tokens there are is the stack's business."""


class Constrained(NamedTuple):
    """An activation that was constrained: the scope it is in, shape, dtype, logical axes and where it lies."""

    scope: str
    shape: tuple[int, ...]
    dtype: str
    logical: tuple[str | EllipsisType | None, ...]
    spec: PartitionSpec


_record: list[Constrained] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Constrained]]:
    """Collects what is constrained while its block is traced; what jax has traced before is not traced again."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def is_recording() -> bool:
    """Whether somebody collects what is constrained, so that all must be traced that is used."""
    return _record is not None


def constrain(x: Array, *logical: str | EllipsisType | None, rules: Rules | None = None) -> Array:
    """Keep `x` split over the mesh as its logical axes say: `constrain(x, "batch", "sequence", None)` for [B, N, D].

    The mesh is the one of the surrounding `jax.set_mesh`. Without a mesh, or on one of a single device, there
    is nothing to split and `x` comes back as it is. Inside `jax.shard_map` the axes it has taken over are
    left alone.

    Args:
      x: an array of any dtype, with its global shape.
      logical: one name, None or ... for each dimension; None means not split, ... as the compiler likes.
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
    place = spec(tuple(None if name is ... else name for name in logical), x.shape, mesh, local, what, UNEVEN)
    if ... in logical:
        whole = (*place, *[None] * (x.ndim - len(place)))
        free = PartitionSpec.UNCONSTRAINED
        place = PartitionSpec(
            *(free if name is ... else part for name, part in zip(logical, whole, strict=True))
        )
    if _record is not None:
        _record.append(Constrained(runtime.scope(), tuple(x.shape), x.dtype.name, logical, place))
    return jax.lax.with_sharding_constraint(x, place)


def splits(name: str) -> bool:
    """Whether the mesh around splits this logical axis, by axes that no `jax.shard_map` has taken over."""
    mesh = get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    found = axes_of(name, mesh) if kinds else ()
    return any(mesh.shape[axis] > 1 and kinds[axis] is AxisType.Auto for axis in found)


def _without(axes: str | tuple[str, ...] | None, manual: set[str]) -> tuple[str, ...] | None:
    named = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in named if axis not in manual)
