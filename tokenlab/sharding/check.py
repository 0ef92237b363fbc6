"""What a compiled program moves between devices, and what lies whole on each of them.

Two questions that a sharded program must answer before it is run on many devices: does any collective move
activations across the batch (a batched `top_k` or an indexed scatter quietly gathers the whole batch), and is any
large leaf of the state replicated? Both are answered from the compiled program and the shardings; nothing is run.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tokenlab.core.errors import ShardingError
from tokenlab.sharding.rules import DEFAULT_RULES, path_of, sizes_of

REDUCTIONS = ("all-reduce", "reduce-scatter")
KINDS = (
    *REDUCTIONS,
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BATCH_AXES = tuple(DEFAULT_RULES["batch"] or ())
WHOLE_ALONG = ("data", "sequence")
"""Mesh axes along which every device holds all parameters."""

Shape = tuple[int, ...]

_INSTRUCTION = re.compile(r"^\s*(?:ROOT\s+)?%?(?P<name>[\w.\-]+)\s*=\s*")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d\w*)\[([\d,<=]*)\]")
_MESH = re.compile(
    r"^@?mesh\s*[\[<](?P<sizes>[^\]>]*)[\]>]\s*(?:,\s*device_ids=\((?P<order>[^()]*(?:\([^)]*\))?)\))?\s*,?\s*"
)
_IOTA = re.compile(r"^\[(?P<groups>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<turn>[\d,]+)\))?")


@dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program, as it stands in the text (a loop's body stands there once).

    Attributes:
      kind: one of `KINDS`, without "-start".
      name: the instruction's name in the program.
      dtypes: of the results, by HLO's names ("f32").
      shapes: of the results, on each device.
      operand_shapes: of the operands, on each device.
      bytes: of the results, on each device.
      groups: the devices that take part together, by their index in the mesh's flattened device array; for a
        collective-permute its (source, target) pairs; None when all devices do.
      source: what of the traced program it came from ("jit(step)/.../top_k"), "" if not known.
    """

    kind: str
    name: str
    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    operand_shapes: tuple[Shape, ...]
    bytes: int
    groups: tuple[tuple[int, ...], ...] | None
    source: str

    def __str__(self) -> str:
        arrays = ", ".join(
            f"{dtype}[{','.join(map(str, shape))}]"
            for dtype, shape in zip(self.dtypes, self.shapes, strict=True)
        )
        return f"{self.kind} {arrays} ({self.bytes} bytes) from {self.source or self.name}"

    def crosses(self, mesh: Mesh, axes: tuple[str, ...]) -> bool:
        """Whether devices that differ along one of the mesh axes `axes` take part together."""
        shape = tuple(mesh.shape.values())
        watched = [mesh.axis_names.index(axis) for axis in axes]
        groups = (tuple(range(mesh.size)),) if self.groups is None else self.groups
        for size in {len(group) for group in groups}:
            alike = np.asarray([group for group in groups if len(group) == size])
            places = np.stack(np.unravel_index(alike, shape))[watched]
            if (places != places[..., :1]).any():
                return True
        return False


def collectives(compiled: Any) -> list[Collective]:
    """The collective operations of a program, asynchronous ones ("-start") too, in the order of its text.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` gives, or HLO text.

    Raises:
      ShardingError: replica groups in a form that is not known.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    types: dict[str, list[tuple[str, Shape]]] = {}
    found = []
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        end = _end_of_type(line, match.end())
        result = _arrays(line[match.end() : end])
        types[match["name"]] = result
        opcode, _, rest = line[end:].strip().partition("(")
        kind = opcode.strip().removesuffix("-start")
        if kind in KINDS:
            close = _closing(rest, 0)
            found.append(_collective(kind, match["name"], result, rest[:close], rest[close + 1 :], types))
    return found


def activation_collectives(
    compiled: Any, batch: int, mesh: Mesh, *, parameters: Any = None, axes: tuple[str, ...] = BATCH_AXES
) -> list[Collective]:
    """The collectives that move activations between devices holding different examples.

    Those whose groups lie within one part of the batch (tensor parallelism) are none. Of the others

    * an all-gather, all-reduce or reduce-scatter is one when an operand or result carries examples: when one of its
      dimensions is a multiple of the examples per device, b = batch / (devices along `axes`). XLA merges dimensions
      ([B * N, D]), hence a multiple. Parameters gathered under fsdp, and gradients and scalars summed over the
      batch, carry none.
    * an all-to-all, a collective-permute or a broadcast is one whatever its shape, since a shift of a split batch sends
      a few rows only, in which b does not show; but for one that moves exactly the part of a parameter that a device
      holds, which is how XLA deals parameters out along another mesh axis.

    So choose b unlike any other size: a prime such as 11 or 13 that divides no dimension of a parameter.

    Args:
      compiled: compiled program or HLO text.
      batch: the global batch size B.
      mesh: the mesh it was compiled for.
      parameters: tree of arrays or ShapeDtypeStructs with their shardings (and gradients' shapes, which are the same).
        b is checked against their dimensions, and their parts are known by their shapes.
      axes: mesh axes that the batch is split over.

    Raises:
      ShardingError: the batch is not split evenly, or b is 1 or divides a dimension of a parameter.
    """
    ways = math.prod(mesh.shape[axis] for axis in axes)
    if ways == 1:
        raise ShardingError(f"the batch is not split: mesh axes {axes} have size 1 each.")
    if batch % ways or batch == ways:
        raise ShardingError(f"batch {batch} on {ways} devices: expected a multiple of {ways} larger than it.")
    each = batch // ways
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        if any(size % each == 0 for size in leaf.shape):
            raise ShardingError(
                f"{path_of(key_path)} has shape {tuple(leaf.shape)}, in which {each} examples per device divide a "
                "dimension: choose a batch of a prime per device that divides none."
            )
    parts = _parts(parameters)

    def is_move(collective: Collective) -> bool:
        if collective.kind in (*REDUCTIONS, "all-gather"):
            shapes = collective.shapes + collective.operand_shapes
            return any(size and size % each == 0 for shape in shapes for size in shape)
        return not all(_without_order(shape) in parts for shape in collective.shapes)

    return [found for found in collectives(compiled) if is_move(found) and found.crosses(mesh, axes)]


def _parts(parameters: Any) -> set[Shape]:
    """Sizes of what one device holds of each split parameter, of the whole stack and of one layer of it."""
    parts = set()
    for leaf in jax.tree.leaves(parameters):
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None and not sharding.is_fully_replicated:
            part = sharding.shard_shape(tuple(leaf.shape))
            parts |= {_without_order(part), _without_order(part[1:])}
    return parts


def _without_order(shape: Shape) -> Shape:
    """The sizes other than 1, sorted: XLA transposes freely."""
    return tuple(sorted(size for size in shape if size != 1))


def assert_no_activation_collective(
    compiled: Any, batch: int, mesh: Mesh, *, parameters: Any = None, axes: tuple[str, ...] = BATCH_AXES
) -> None:
    """Raise a ShardingError that lists them if `activation_collectives` finds any; see there."""
    found = activation_collectives(compiled, batch, mesh, parameters=parameters, axes=axes)
    if found:
        listed = "; ".join(map(str, found))
        raise ShardingError(f"{len(found)} collectives move activations across the batch: {listed}.")


def unsharded(state: Any, threshold: int = 1 << 20) -> list[str]:
    """Large leaves that every device of a mesh holds whole, one line "path dtype[shape] bytes" each, largest first.

    Args:
      state: tree of arrays, or of ShapeDtypeStructs with shardings. On a single device nothing counts.
      threshold: bytes from which a leaf is large.
    """
    found = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(state):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        sharding = getattr(leaf, "sharding", None)
        if sharding is None or sharding.num_devices == 1 or size < threshold:
            continue
        if sharding.is_fully_replicated:
            shape = ",".join(map(str, leaf.shape))
            found.append((-size, f"{path_of(key_path)} {leaf.dtype.name}[{shape}] {size} bytes"))
    return [line for _, line in sorted(found)]


def assert_sharded(state: Any, mesh: Mesh, share: float, threshold: int = 1 << 20) -> None:
    """Raise a ShardingError when too much of a state lies whole on every device of a mesh that could split it.

    A mesh whose axes split no parameter, such as one of `data` alone, holds everything whole, and that is what it says.

    Args:
      state: tree of arrays, or of ShapeDtypeStructs with shardings.
      mesh: they lie on.
      share: of the state's bytes that may lie whole on every device, in [0, 1].
      threshold: bytes below which a leaf does not count as whole.
    """
    splits = any(size > 1 and axis not in WHOLE_ALONG for axis, size in sizes_of(mesh).items())
    found = unsharded(state, threshold)
    if not splits or not found:
        return
    whole = sum(int(line.split()[-2]) for line in found)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    if whole > share * total:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise ShardingError(
            f"{whole / total:.1%} of the state's {total:,} bytes lie whole on each of {mesh.size} devices: "
            f"{'; '.join(found[:3])}{more}. Expected at most {share:.1%}: split them (a mesh with more of fsdp, "
            "config.mesh.rules), or allow it with config.mesh.unsharded."
        )


def _collective(
    kind: str,
    name: str,
    result: list[tuple[str, Shape]],
    operands: str,
    attributes: str,
    types: dict[str, list[tuple[str, Shape]]],
) -> Collective:
    # Operands are printed as names, with their types before them or not.
    given = _arrays(operands)
    if not given:
        given = [
            array for operand in re.findall(r"%?([\w.\-]+)", operands) for array in types.get(operand, [])
        ]
    # The asynchronous forms give back (operands, results, contexts); a plain one and all-reduce-start the
    # results.
    count = len(given)
    if count and len(result) >= 2 * count and result[:count] == given:
        result = result[count : 2 * count]
    source = re.search(r'op_name="([^"]*)"', attributes)
    return Collective(
        kind=kind,
        name=name,
        dtypes=tuple(dtype for dtype, _ in result),
        shapes=tuple(shape for _, shape in result),
        operand_shapes=tuple(shape for _, shape in given),
        bytes=sum(_bytes(dtype, shape) for dtype, shape in result),
        groups=_groups(attributes),
        source=source[1] if source else "",
    )


def _groups(attributes: str) -> tuple[tuple[int, ...], ...] | None:
    """Replica groups or source-target pairs in any of the forms that XLA prints."""
    match = re.search(r"\b(?:replica_groups|source_target_pairs)=", attributes)
    if not match:
        return None
    text = attributes[match.end() :]
    if iota := _IOTA.match(text):
        devices = _turned(iota["dims"], iota["turn"])
        return _rows(devices.reshape(_ints(iota["groups"])))
    if mesh := _MESH.match(text):
        return _mesh_groups(mesh["sizes"], mesh["order"], text[mesh.end() :])
    if text.startswith("{"):
        listed = text[: _closing(text, 1) + 1]
        groups = re.findall(r"\{([\d,\s]+)\}", listed)
        return tuple(_ints(group) for group in groups) or None
    raise ShardingError(f"replica groups of an unknown form: {text[:80]!r}.")


def _mesh_groups(sizes: str, order: str | None, rest: str) -> tuple[tuple[int, ...], ...]:
    """Groups written as a mesh and some of its axes: mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}."""
    axes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", sizes)}
    if order is None:
        devices = np.arange(math.prod(axes.values()))
    elif turned := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        devices = _turned(turned[1], turned[2])
    else:
        devices = np.asarray(_ints(order))
    close = _closing(rest, 1)
    # An axis may be taken in part: 'b':(2)2 is the middle of 'b' read as [2, 2, the rest].
    shape, grouped = [], []
    taken = {
        name: (pre, part)
        for name, pre, part in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", rest[1:close])
    }
    if unknown := set(taken) - set(axes):
        raise ShardingError(f"replica groups over axes {sorted(unknown)} of a mesh that has {sorted(axes)}.")
    for name, size in axes.items():
        pre, part = taken.get(name, ("", ""))
        parts = [int(pre), int(part), size // (int(pre) * int(part))] if part else [size]
        if name in taken:
            grouped.append(len(shape) + (1 if part else 0))
        shape += parts
    kept = [axis for axis in range(len(shape)) if axis not in grouped]
    size = math.prod(shape[axis] for axis in grouped)
    return _rows(devices.reshape(shape).transpose(*kept, *grouped).reshape(-1, size))


def _turned(dims: str, turn: str | None) -> np.ndarray:
    """Device numbers 0, 1, ... laid out as `dims`, transposed, and flat again."""
    shape = _ints(dims)
    devices = np.arange(math.prod(shape)).reshape(shape)
    return (devices.transpose(_ints(turn)) if turn else devices).reshape(-1)


def _rows(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(device) for device in group) for group in groups)


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def _arrays(text: str) -> list[tuple[str, Shape]]:
    """(dtype, shape) of every array type in a piece of HLO text, tuples flattened."""
    return [(dtype, _ints(dims)) for dtype, dims in _ARRAY.findall(text)]


def _bytes(dtype: str, shape: Shape) -> int:
    bits = 8 if dtype in ("pred", "token") else int(re.search(r"\d+", dtype)[0])
    return 0 if dtype == "token" else -(-math.prod(shape) * bits // 8)


def _end_of_type(line: str, start: int) -> int:
    """Where the type that begins at `start` ends: at a blank, or where the brackets of a tuple close."""
    if line.startswith("(", start):
        return _closing(line, start + 1) + 1
    end = line.find(" ", start)
    return len(line) if end < 0 else end


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes one opened just before `start`."""
    depth = 1
    for index in range(start, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return len(text)
