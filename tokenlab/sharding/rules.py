"""Where parameters live: parameter path -> names of its axes (the model's table) -> axes of the mesh (the rules).

Nothing is sharded by accident or left replicated in silence: a leaf that no row matches, a row that matches no leaf,
two dimensions on one mesh axis and a dimension that its mesh axis does not divide are errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tokenlab.core.errors import ShardingError, suggest

LogicalAxes: TypeAlias = tuple[str | None, ...]
"""The name of each axis of an array; None for one that is never split."""

Table: TypeAlias = Mapping[str, LogicalAxes]
"""Parameter path or the end of one ("query/kernel") -> its logical axes."""

Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis -> the mesh axis or axes it is split over, None for none."""

DEFAULT_RULES: Rules = MappingProxyType(
    {
        "batch": ("data", "fsdp", "expert"),
        "group": ("data", "fsdp"),
        "embed": "fsdp",
        "heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
        "expert": "expert",
        "layers": None,
    }
)

STACKED = ("blocks", "items")
"""Groups of parameters whose leaves are stacked over layers or items along a leading axis."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """A jax key path as text, for example "blocks/mlp/up/kernel"."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def spec(
    logical: LogicalAxes,
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Rules = DEFAULT_RULES,
    what: str = "array",
) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes and shape.

    Mesh axes of size 1 split nothing and are left out.

    Args:
      logical: one name or None for each dimension.
      shape: of the whole (global) array.
      mesh: its axes and their sizes.
      rules: logical axis -> mesh axes.
      what: the array's name, for messages.

    Raises:
      ShardingError: another number of axes than dimensions, an unknown logical axis or mesh axis, two
        dimensions on one mesh axis of size > 1, or a dimension that its mesh axes do not divide.
    """
    if len(logical) != len(shape):
        raise ShardingError(
            f"{what} has shape {shape}, but {len(logical)} logical axes {logical} are given for it."
        )
    used: dict[str, int] = {}
    parts: list[str | tuple[str, ...] | None] = []
    for dim, (name, size) in enumerate(zip(logical, shape, strict=True)):
        axes = tuple(axis for axis in _mesh_axes(name, mesh, rules, what) if mesh.shape[axis] > 1)
        for axis in axes:
            if axis in used:
                first = used[axis]
                raise ShardingError(
                    f"{what} {shape}: dimensions {first} ({logical[first]}) and {dim} ({name}) are both to be split "
                    f"over mesh axis {axis!r} of size {mesh.shape[axis]}; name one of them None."
                )
            used[axis] = dim
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            raise ShardingError(
                f"{what} {shape}: dimension {dim} ({name}) of size {size} is not divisible by mesh "
                f"{' x '.join(f'{axis}={mesh.shape[axis]}' for axis in axes)}."
            )
        parts.append(axes[0] if len(axes) == 1 else axes or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def shardings(parameters: Any, table: Table, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """The sharding of every parameter.

    A row serves every leaf whose path ends with it; where several do, the longest one. Rows for leaves under
    `blocks/` and `items/` name the trailing dimensions: the leading, stacked one is added as "layers". A
    scalar that no row names is replicated.

    Args:
      parameters: tree of arrays or ShapeDtypeStructs: parameters, or a tree of the same shape such as their
        average. For an optimizer's state use `shardings_like`.
      table: rows of path (or its end) -> logical axes.
      mesh: from `make_mesh`.
      rules: logical axis -> mesh axes.

    Returns:
      A tree of NamedSharding like `parameters`.

    Raises:
      ShardingError: a leaf that no row matches, a row that matches no leaf, or what `spec` raises.
    """
    unused = set(table)
    paths = []

    def place(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path, shape = path_of(key_path), tuple(leaf.shape)
        paths.append(path)
        row = _longest_end(path, table)
        if row is None:
            if not shape:
                return NamedSharding(mesh, PartitionSpec())
            raise ShardingError(
                f"{path} {shape}: no row of the sharding table matches this leaf; add {path!r}."
            )
        unused.discard(row)
        logical = tuple(table[row])
        if len(shape) == len(logical) + 1 and not set(STACKED).isdisjoint(path.split("/")):
            logical = ("layers", *logical)
        return NamedSharding(mesh, spec(logical, shape, mesh, rules, path))

    placed = jax.tree_util.tree_map_with_path(place, parameters)
    for row in sorted(unused):
        ends = {"/".join(path.split("/")[-row.count("/") - 1 :]) for path in paths}
        near = suggest(row, ends)
        raise ShardingError(f"sharding table: row {row!r} matches no leaf.{near if 'mean' in near else ''}")
    return placed


def shardings_like(state: Any, parameters: Any, parameter_shardings: Any, mesh: Mesh) -> Any:
    """The sharding of a state that holds trees shaped like the parameters, such as an optimizer's.

    A leaf whose path ends with the full path of a parameter and that has its shape (a moment, an average, a
    gradient) lies where that parameter lies. All others (step counts, factored moments) are replicated;
    `tokenlab.sharding.check.unsharded` lists those that are large.

    Args:
      state: tree of arrays or ShapeDtypeStructs, for example an optax state.
      parameters: tree of arrays or ShapeDtypeStructs.
      parameter_shardings: what `shardings` gave for them.
      mesh: from `make_mesh`.

    Returns:
      A tree of NamedSharding like `state`.
    """
    shapes = {
        path_of(key_path): tuple(leaf.shape)
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(parameters)
    }
    places = dict(zip(shapes, jax.tree.leaves(parameter_shardings), strict=True))
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parameter = _longest_end(path_of(key_path), shapes)
        if parameter is None or shapes[parameter] != tuple(leaf.shape):
            return replicated
        return places[parameter]

    return jax.tree_util.tree_map_with_path(place, state)


def _longest_end(path: str, names: Mapping[str, Any]) -> str | None:
    """The longest of `names` that `path` ends with, by whole components."""
    parts = path.split("/")
    for start in range(len(parts)):
        end = "/".join(parts[start:])
        if end in names:
            return end
    return None


def _mesh_axes(name: str | None, mesh: Mesh | AbstractMesh, rules: Rules, what: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over."""
    if name is None:
        return ()
    if name not in rules:
        raise ShardingError(
            f"{what}: there is no rule for the logical axis {name!r}.{suggest(str(name), rules)}"
        )
    axes = rules[name]
    axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in axes:
        if axis not in mesh.shape:
            near = suggest(str(axis), mesh.axis_names)
            raise ShardingError(
                f"{what}: rule {name!r} -> {axes} names mesh axis {axis!r}, which does not exist.{near}"
            )
    return axes
