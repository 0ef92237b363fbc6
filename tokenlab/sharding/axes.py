"""The axes of a mesh, and what each does in attention and dense layers, and in layers of experts.

The two kinds of layers may use the same devices in different ways. Where their mappings differ, the mesh has the axes
of their common refinement, and each axis is named by its two roles: `tensor_expert` splits heads and hidden units in
attention, and has different experts in a layer of experts. So whatever has to know how an array lies reads it off the
mesh, which is part of jit's cache key, and nothing has to be handed down.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

Attention: TypeAlias = Literal["data", "fsdp", "sequence", "tensor"]
"""In attention and dense layers: examples; examples, and parameters are split too; tokens of an example; heads and
hidden units."""

Experts: TypeAlias = Literal["data", "expert", "tensor"]
"""In layers of experts: tokens, every device with the same experts; other experts; hidden units of every expert."""

AXES = ("data", "fsdp", "tensor", "expert")
"""Those that every mesh has; the others are there where their size is above 1."""

SIZES = (*AXES, "sequence")
"""Those whose sizes a configuration says."""

ROLES: Mapping[str, tuple[Attention, Experts]] = MappingProxyType(
    {
        "data": ("data", "data"),
        "data_tensor": ("data", "tensor"),
        "fsdp": ("fsdp", "data"),
        "fsdp_tensor": ("fsdp", "tensor"),
        "fsdp_expert": ("fsdp", "expert"),
        "sequence": ("sequence", "data"),
        "sequence_tensor": ("sequence", "tensor"),
        "sequence_expert": ("sequence", "expert"),
        "tensor_data": ("tensor", "data"),
        "tensor": ("tensor", "tensor"),
        "tensor_expert": ("tensor", "expert"),
        "expert": ("data", "expert"),
    }
)
"""Axis -> its role in attention and dense layers, and in layers of experts; in the order they have in a mesh."""

NAMES: Mapping[tuple[Attention, Experts], str] = MappingProxyType(
    {both: axis for axis, both in ROLES.items()}
)
"""The two roles -> the axis."""

FAR_TO_NEAR = (
    "data", "expert", "data_tensor", "fsdp", "fsdp_expert", "fsdp_tensor", "sequence", "sequence_expert",
    "sequence_tensor", "tensor_data", "tensor_expert", "tensor",
)  # fmt: skip
"""In what order axes get devices that are neighbours, the last the nearest: tensor, then expert, then all others."""

_EXPERTS = ("expert", "fsdp_expert", "sequence_expert", "tensor_expert")  # the farthest devices first


def attending(names: Iterable[str], *roles: Attention) -> tuple[str, ...]:
    """The axes among `names` that have one of these roles in attention.

    Those on which experts lie come last, the farthest devices first: what is split over all of them passes to the
    experts by an exchange among devices that are neighbours in the array.
    """
    return _attending(frozenset(names), roles)


def of_experts(names: Iterable[str], *roles: Experts) -> tuple[str, ...]:
    """The axes among `names` that have one of these roles in layers of experts; those of experts as `attending` has."""
    return _of_experts(frozenset(names), roles)


# A search asks a million times of a few hundred meshes.


@functools.lru_cache(maxsize=4096)
def _attending(given: frozenset[str], roles: tuple[Attention, ...]) -> tuple[str, ...]:
    there = [axis for axis in ROLES if axis in given and ROLES[axis][0] in roles]
    others = tuple(axis for axis in there if axis not in _EXPERTS)
    return others + tuple(axis for axis in _EXPERTS if axis in there)


@functools.lru_cache(maxsize=4096)
def _of_experts(given: frozenset[str], roles: tuple[Experts, ...]) -> tuple[str, ...]:
    there = [axis for axis in ROLES if axis in given and ROLES[axis][1] in roles]
    return attending(there, "data", "fsdp", "sequence", "tensor")
