"""Where parameters live: parameter path -> names of its axes (the model's table) -> axes of the mesh (the rules).

Nothing is sharded by accident or left replicated in silence: a leaf that no row matches, a row that matches no leaf,
two dimensions on one mesh axis and a dimension that its mesh axis does not divide are errors.

The rules follow from the roles of a mesh's axes (`tokenlab.sharding.axes`). A configuration may have some of its own:
they are the name of a further axis of the mesh, of size 1 (`named`). A mesh is all that says where arrays lie, then,
and as jit keeps its programs by mesh none of them is taken for one with other rules.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tokenlab.core.errors import ShardingError, suggest
from tokenlab.sharding.axes import AXES, ROLES, attending, of_experts

LogicalAxes: TypeAlias = tuple[str | None, ...]
"""The name of each axis of an array; None for one that is never split."""

Table: TypeAlias = Mapping[str, LogicalAxes]
"""Parameter path or the end of one ("query/kernel") -> its logical axes."""

Rules: TypeAlias = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis -> the mesh axis or axes it is split over, None for none."""


def _of_roles(names: tuple[str, ...]) -> Rules:
    """What the roles of these axes say of every logical axis."""
    batch = attending(names, "data", "fsdp")
    sequence = attending(names, "sequence")
    tensor = attending(names, "tensor")
    inside = of_experts(
        names, "data", "expert"
    )  # each token of a layer of experts lies on one device along these
    rules = {
        "batch": batch,
        "sequence": sequence,
        "embed": attending(names, "fsdp"),
        "heads": tensor,
        "mlp": tensor,
        "vocab": tensor,
        "layers": (),
        # In layers of experts.
        "expert": of_experts(names, "expert"),
        "expert_embed": tuple(axis for axis in of_experts(names, "data") if ROLES[axis][0] == "fsdp"),
        "expert_mlp": of_experts(names, "tensor"),
        "expert_batch": tuple(axis for axis in batch if axis in inside),
        "expert_sequence": tuple(axis for axis in attending(names, "sequence", "tensor") if axis in inside),
        "group": tuple(axis for axis in batch if ROLES[axis][1] == "data"),
        "places": tuple(axis for axis in attending(names, "sequence", "tensor") if ROLES[axis][1] == "data"),
    }
    return MappingProxyType(
        {name: axes[0] if len(axes) == 1 else axes or None for name, axes in rules.items()}
    )


DEFAULT_RULES: Rules = _of_roles(AXES)
"""Of a mesh that has the axes `AXES` alone; `rules_of` has those of any.

Activations: "batch" and "sequence" of tokens [B, N, D], "heads", "mlp", "vocab". Parameters: "embed", "heads", "mlp",
"vocab", and "layers", the axis along which blocks are stacked. In a layer of experts: "expert", "expert_embed" and
"expert_mlp" of its parameters; "expert_batch" and "expert_sequence" of tokens on their way in, split over all devices
that do not share an expert; "group" and "places" of what the experts compute on, [E, B, C, D].
"""

_RULES = "rules"  # begins the name of the axis that says them; "-" and "." part it, which every parser of HLO takes


STACKED = ("blocks", "items")
"""Groups of parameters whose leaves are stacked over layers or items along a leading axis."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """A jax key path as text, for example "blocks/mlp/up/kernel"."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def named(rules: Rules) -> str:
    """The name of a mesh axis that says these rules: "rules-embed.data.fsdp-vocab"; see `rules_of`.

    Args:
      rules: logical axis -> mesh axes; those that are left out follow from the roles of the axes.

    Raises:
      ShardingError: an unknown logical axis or mesh axis, or one mesh axis twice in a rule.
    """
    said = [_RULES]
    for name, given in sorted(rules.items()):
        if name not in DEFAULT_RULES:
            raise ShardingError(
                f"rules: there is no logical axis {name!r}.{suggest(str(name), DEFAULT_RULES)}"
            )
        axes = _tuple(given)
        for axis in axes:
            if axis not in ROLES:
                raise ShardingError(
                    f"rule {name!r} -> {given!r}: there is no mesh axis {axis!r}.{suggest(str(axis), ROLES)}"
                )
        if len(set(axes)) < len(axes):
            raise ShardingError(f"rule {name!r} -> {given!r} names a mesh axis twice; name each once.")
        said.append(".".join((name, *axes)))
    return "-".join(said)


def rules_of(mesh: Mesh | AbstractMesh) -> Rules:
    """The rules of a mesh: what the roles of its axes say, and in its place what the mesh itself says (`named`)."""
    return _rules_of(tuple(map(str, mesh.axis_names)))


@functools.lru_cache(maxsize=256)
def _rules_of(names: tuple[str, ...]) -> Rules:
    found = dict(_of_roles(names))
    for name in names:
        first, *said = name.split("-")
        if first == _RULES:
            for rule in said:
                logical, *axes = rule.split(".")
                found[logical] = tuple(axes)
    return MappingProxyType(found)


def sizes_of(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Devices by axis, without the axis of size 1 that says rules."""
    return {axis: size for axis, size in mesh.shape.items() if str(axis).split("-")[0] != _RULES}


def axes_of(name: str, mesh: Mesh | AbstractMesh, rules: Rules | None = None) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over, those of size 1 too, in the order of its parts."""
    return _mesh_axes(name, mesh, rules_of(mesh) if rules is None else rules, "axes_of")


def ways(name: str, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a logical axis is split."""
    return math.prod(mesh.shape[axis] for axis in axes_of(name, mesh))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch [B, ...]: its rows over the axes of "batch", whatever follows whole on every device."""
    return NamedSharding(mesh, PartitionSpec(axes_of("batch", mesh)))


def spec(
    logical: LogicalAxes,
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Rules | None = None,
    what: str = "array",
    uneven: tuple[str, ...] = (),
) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes and shape.

    Mesh axes of size 1 split nothing and are left out.

    Args:
      logical: one name or None for each dimension.
      shape: of the whole (global) array.
      mesh: its axes and their sizes.
      rules: logical axis -> mesh axes; None for those of the mesh.
      what: the array's name, for messages.
      uneven: logical axes of which the last devices may get less, or nothing.

    Raises:
      ShardingError: another number of axes than dimensions, an unknown logical axis or mesh axis, two
        dimensions on one mesh axis of size > 1, or a dimension that its mesh axes do not divide.
    """
    if len(logical) != len(shape):
        raise ShardingError(
            f"{what} has shape {shape}, but {len(logical)} logical axes {logical} are given for it."
        )
    rules = rules_of(mesh) if rules is None else rules
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
        if size % ways and name not in uneven:
            raise ShardingError(
                f"{what} {shape}: dimension {dim} ({name}) of size {size} is not divisible by mesh "
                f"{' x '.join(f'{axis}={mesh.shape[axis]}' for axis in axes)}."
            )
        parts.append(axes[0] if len(axes) == 1 else axes or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def shardings(parameters: Any, table: Table, mesh: Mesh, rules: Rules | None = None) -> Any:
    """The sharding of every parameter.

    A row serves every leaf whose path ends with it; where several do, the longest one. Rows for leaves under
    `blocks/` and `items/` name the trailing dimensions: the leading, stacked one is added as "layers". A
    scalar that no row names is replicated.

    Args:
      parameters: tree of arrays or ShapeDtypeStructs: parameters, or a tree of the same shape such as their
        average. For an optimizer's state use `shardings_like`.
      table: rows of path (or its end) -> logical axes.
      mesh: from `make_mesh`.
      rules: logical axis -> mesh axes; None for those of the mesh.

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
        logical = logical_of(path, shape, table)
        if row is None or logical is None:
            if not shape:
                return NamedSharding(mesh, PartitionSpec())
            raise ShardingError(
                f"{path} {shape}: no row of the sharding table matches this leaf; add {path!r}."
            )
        unused.discard(row)
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


def logical_of(path: str, shape: tuple[int, ...], table: Table) -> LogicalAxes | None:
    """The logical axes of a leaf, of its stacked axis too; see `shardings`. None where no row matches."""
    row = _longest_end(path, table)
    if row is None:
        return None
    logical = tuple(table[row])
    stacked = len(shape) == len(logical) + 1 and not set(STACKED).isdisjoint(path.split("/"))
    return ("layers", *logical) if stacked else logical


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
    axes = _tuple(rules[name])
    for axis in axes:
        if axis not in mesh.shape and axis not in ROLES:
            near = suggest(str(axis), mesh.axis_names)
            raise ShardingError(
                f"{what}: rule {name!r} -> {axes} names mesh axis {axis!r}, which does not exist.{near}"
            )
    return tuple(axis for axis in axes if axis in mesh.shape)


def _tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
