"""Layers of experts over a mesh: which device computes which tokens with which part of which experts.

Attention leaves tokens split over some axes of the mesh and whole along others. A layer of experts uses every axis by
its role there (`tokenlab.sharding.axes`):

    experts   the experts lie along it: each device sends tokens to those that hold their experts
    tensor    hidden units of every expert lie along it: those devices see the same tokens, and add up what they make
    data      other tokens

Tokens that attention has whole along an axis of experts or data are split over it first: none is computed twice.

Parameters that are split over data too (fsdp) are gathered just before they are used, in the dtype that they are used
in; so the backward pass sums their gradients in that dtype, and leaves each device the part that it holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh

from tokenlab.core.errors import ShapeError
from tokenlab.sharding.rules import LogicalAxes, axes_of, path_of


@dataclass(frozen=True)
class Bank:
    """Experts as functions of their weights.

    Attributes:
      params: tree of arrays, each [E, ...].
      buffers: (params, [E, B, C, D]) -> [E, B, C, D'].
      groups: (params, rows [M, D], sizes [E]) -> [M, D'].
      axes: path of each parameter -> logical axes behind E, as far as they are known.
      dtypes: path -> dtype, of parameters that are cast to it before anything else: they travel in it, and their
        gradients are summed in it. All others travel as they are.
      added: paths of the parameters that are to be added once, where results of parts are added up.
      part: of a number w, `buffers` for experts with one w-th of the units that `axes` calls "mlp", whose results add
        up; None where they do not.
    """

    params: Any
    buffers: Callable[[Any, Array], Array]
    groups: Callable[[Any, Array, Array], Array]
    axes: Mapping[str, LogicalAxes] = field(default_factory=dict)
    dtypes: Mapping[str, Any] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    part: Callable[[int], Callable[[Any, Array], Array]] | None = None


@dataclass(frozen=True)
class Spread:
    """How one layer of experts uses the mesh around it; axes of size 1 are left out.

    Attributes:
      batch, tokens: axes over which examples, and tokens of an example or places of a buffer, are split on the way in.
      experts: axes along which experts lie.
      tensor: axes along which hidden units lie and that are handled here, not by the compiler.
      embed: axes along which parameters lie that are gathered before they are used.
      sizes: devices along each.
    """

    batch: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    sizes: Mapping[str, int] | None = None

    def ways(self, axes: tuple[str, ...]) -> int:
        """Devices along these axes."""
        return math.prod((self.sizes or {})[axis] for axis in axes)

    @property
    def joined(self) -> tuple[str, ...]:
        """Axes along which devices have tokens of their own, and need each other's, as they share every expert."""
        return tuple(axis for axis in self.tensor if axis in self.batch + self.tokens)

    @property
    def manual(self) -> set[str]:
        """Axes that `shard_map` takes over: those used, and all where others split nothing (a smaller program)."""
        mesh = get_abstract_mesh()
        own = {*self.batch, *self.tokens, *self.experts, *self.tensor, *self.embed}
        others = {axis for axis in mesh.axis_names if axis not in own}
        return own if any(mesh.shape[axis] > 1 for axis in others) else own | others

    def spec(self, *before: None) -> PartitionSpec:
        """Of an array [..., B, N or C, D] on the way in and out."""
        return PartitionSpec(*before, self.batch or None, self.tokens or None)

    def check(self, experts: int, batch: int) -> None:
        """Raise ShapeError for experts or a batch that the mesh does not divide."""
        if experts % self.ways(self.experts):
            raise ShapeError(f"{experts} experts cannot be split over mesh {self.shown(self.experts)}.")
        if batch % self.ways(self.batch):
            raise ShapeError(
                f"a batch of {batch} cannot be split over mesh {self.shown(self.batch)}; take a multiple."
            )

    def shown(self, axes: tuple[str, ...]) -> str:
        """For messages: "data=2 x expert=4"."""
        return " x ".join(f"{axis}={(self.sizes or {})[axis]}" for axis in axes)

    def specs(self, bank: Bank) -> Any:
        """Of the bank's parameters: a tree like them."""

        def spec(path: Any, leaf: Array) -> PartitionSpec:
            split = self.gathered(bank, path_of(path), leaf.shape)
            parts = [self.tensor if name == "mlp" else () for name in bank.axes.get(path_of(path), ())]
            if split is not None:
                parts[split - 1] = self.embed
            return PartitionSpec(self.experts or None, *(part or None for part in parts))

        return jax.tree_util.tree_map_with_path(spec, bank.params)

    def gathered(self, bank: Bank, path: str, shape: tuple[int, ...]) -> int | None:
        """The dimension of a parameter [E, ...] that is split over `embed`; None where none is, or can be."""
        axes = bank.axes.get(path, ())
        if not self.embed or "embed" not in axes:
            return None
        found = 1 + axes.index("embed")
        return None if shape[found] % self.ways(self.embed) else found

    def sent(self, bank: Bank) -> Any:
        """The bank's parameters as they travel: cast before they are gathered, and before gradients are summed."""

        def cast(path: Any, leaf: Array) -> Array:
            return leaf.astype(bank.dtypes.get(path_of(path), leaf.dtype))

        return jax.tree_util.tree_map_with_path(cast, bank.params)

    def own(self, bank: Bank, params: Any) -> Any:
        """What one device computes with, of its parts of `sent`: whole along `embed`.

        The results of devices along `tensor` are to add up: each has a part of what is added.
        """

        def one(path: Any, whole: Array, leaf: Array) -> Array:
            split = self.gathered(bank, path_of(path), whole.shape)
            if split is not None:
                # Parts in front: in the last two dimensions the compiler for TPUs sums gradients whole, and cuts then.
                parts = jnp.moveaxis(lax.all_gather(leaf, self.embed), 0, split)
                leaf = parts.reshape(*leaf.shape[:split], -1, *leaf.shape[split + 1 :])
            return leaf / self.ways(self.tensor) if self.tensor and path_of(path) in bank.added else leaf

        return jax.tree_util.tree_map_with_path(one, bank.params, params)

    def join(self, x: Array, more: tuple[str, ...] = (), *, along: int = 0) -> Array:
        """x of one device, and behind it in one dimension those of all along `joined` and `more`."""
        axes = self.joined + more
        return lax.all_gather(x, axes, axis=along, tiled=True) if axes else x

    def add_up(self, y: Array, more: tuple[str, ...] = (), *, along: int = 0) -> Array:
        """The sum over `tensor` and `more`; of what `join` has put together each device gets its own part."""
        whole = tuple(axis for axis in self.tensor if axis not in self.joined)
        y = _sum_of(y, whole) if whole else y
        axes = self.joined + more
        return lax.psum_scatter(y, axes, scatter_dimension=along, tiled=True) if axes else y


def spread(bank: Bank, *, everywhere: bool = False) -> Spread:
    """How experts use the mesh around; those that every device holds (`everywhere`) leave tokens where they are."""
    mesh = get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return Spread(sizes={})
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def splitting(name: str) -> tuple[str, ...]:
        found = axes_of(name, mesh)
        return tuple(axis for axis in found if mesh.shape[axis] > 1 and kinds[axis] is AxisType.Auto)

    batch, tokens = splitting("batch"), splitting("sequence")
    sizes = dict(mesh.shape)
    if everywhere:
        return Spread(batch, tokens, embed=splitting("embed") if bank.axes else (), sizes=sizes)
    experts, units = splitting("expert"), splitting("expert_mlp")
    tensor = units if bank.part is not None else ()
    tokens += tuple(axis for axis in splitting("expert_sequence") if axis not in batch + tokens)
    mine = [axis for axis in units if axis not in tensor]  # the compiler's: it makes tokens whole along these
    embed = splitting("expert_embed") if bank.axes else ()
    return Spread(
        tuple(axis for axis in batch if axis not in mine),
        tuple(axis for axis in tokens if axis not in mine),
        experts,
        tensor,
        tuple(axis for axis in embed if axis not in (*experts, *units)),
        sizes,
    )


def through_experts(bank: Bank, buffers: Array, transport: str | None = None) -> Array:
    """What the experts make of buffers [E, B, C, D] that lie where their tokens are: [E, B, C, D'], at the same place.

    Args:
      bank: the experts.
      buffers: their places; C is a multiple of the devices that share them, see `places`.
      transport: dtype of what travels, None for that of the buffers.

    Raises: ShapeError for experts or a batch that the mesh does not divide.
    """
    over = spread(bank)
    if not over.batch and not over.tokens:
        return bank.buffers(bank.params, buffers)
    over.check(buffers.shape[0], buffers.shape[1])
    buffers = lax.with_sharding_constraint(buffers, over.spec(None))
    if not over.experts and not over.joined:
        return lax.with_sharding_constraint(bank.buffers(bank.params, buffers), over.spec(None))
    ways = over.ways(over.experts)
    compute = bank.part(over.ways(over.tensor)) if over.tensor and bank.part is not None else bank.buffers

    def local(params: Any, buffers: Array) -> Array:
        experts, dtype = buffers.shape[0] // ways, buffers.dtype
        x = over.join(buffers if transport is None else buffers.astype(transport), along=1)
        batch, places = x.shape[1:3]
        if ways > 1:  # [to, own experts, ...] -> [from, own experts, ...]
            x = lax.all_to_all(x.reshape(ways, experts, batch, places, -1), over.experts, 0, 0)
            x = jnp.moveaxis(x, 0, 1).reshape(experts, ways * batch, places, -1)
        y = compute(over.own(bank, params), x.astype(dtype))
        if ways > 1:
            back = y if transport is None else y.astype(transport)
            back = jnp.moveaxis(back.reshape(experts, ways, batch, places, -1), 1, 0)
            back = lax.all_to_all(back, over.experts, 0, 0)
            y = back.reshape(ways * experts, batch, places, -1).astype(y.dtype)
        return over.add_up(y, along=1)

    return jax.shard_map(
        local,
        in_specs=(over.specs(bank), over.spec(None)),
        out_specs=over.spec(None),
        axis_names=over.manual,
        check_vma=False,
    )(over.sent(bank), buffers)


def places(bank: Bank) -> int:
    """Devices that share the places of a buffer: so many must there be, or a multiple."""
    over = spread(bank)
    return over.ways(over.tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_of(y: Array, axes: tuple[str, ...]) -> Array:
    """The sum over devices, whose results are used alike on all of them.

    The transpose of `lax.psum` is another: what comes back is summed over devices that all have the same of it, an
    equal part each. It is multiplied instead, and nothing is sent.
    """
    return lax.psum(y, axes)


def _sum_forward(y: Array, axes: tuple[str, ...]) -> tuple[Array, None]:
    return lax.psum(y, axes), None


def _sum_backward(axes: tuple[str, ...], _: None, cotangent: Array) -> tuple[Array]:
    return (cotangent * lax.axis_size(axes),)


_sum_of.defvjp(_sum_forward, _sum_backward)
