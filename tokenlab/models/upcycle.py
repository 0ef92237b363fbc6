"""Upcycling: a dense model's weights as the start of one with experts (Komatsuzaki et al. 2023, arXiv 2212.05055).

Every expert of block k begins as a copy of the dense feed-forward layer of block k, with noise if asked for; routers
and shared experts begin anew; all else is taken as it is. A rule on the state alone: what the experts of a kind look
like says which dense layer they come from.

A layer with a single expert for each modality (`moma(text=1, image=1)`) is a dense layer for each: more experts of a
modality begin as copies of its one (Lin et al. 2024, arXiv 2407.21770, section 3.5).

Copies compute what the dense layer computes, times the weights that the router gives them: Soft MoE mixes tokens first,
and hard routers multiply by gates below 1. So the model starts near the dense one, not at it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tokenlab.core.errors import CheckpointError
from tokenlab.layers.program import Program
from tokenlab.models.state import flat

BANK = "experts"
"""What the names of the parameters of a bank begin with under its layer."""


def upcycle(
    saved: Any,
    program: Program,
    wanted: Any,
    *,
    noise: float = 0.0,
    seed: int = 0,
    source: str = "the checkpoint",
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """A dense model's weights laid out for a stack with experts.

    Args:
      saved: nested dicts of arrays, the weights of a stack of as many blocks without experts.
      program: the stack to start.
      wanted: nested dicts of anything with `shape`, as `model.abstract_state()` gives them.
      noise: standard deviation of what is added to every expert, relative to that of the leaf; >= 0.
      seed: of the noise.
      source: where `saved` is from, for messages.

    Returns:
      path -> array, the leaves that `saved` gives; the paths that must begin anew.

    Raises:
      CheckpointError: the stack has no experts, there is no one dense layer that theirs could be copies of, or noise
        is no number >= 0.
    """
    if not 0 <= noise < math.inf:
        raise CheckpointError(f"upcycle: noise must be a number at least 0; got {noise}.")
    have, want = flat(saved), flat(wanted)
    kinds = {
        name: [each.index for each in found]
        for (group, name), found in program.kinds.items()
        if group == "blocks"
    }
    layers = {path.split("/")[1] for path in want if path.startswith("blocks/") and f"/{BANK}" in path}
    if not layers:
        raise CheckpointError(
            f"config.init_from.upcycle: the stack {program.stack.text!r} has no experts; leave it out."
        )
    single = {name for name in layers if _single(name, want, have)}
    dense = {name: _source(name, want, have, program.depth, source) for name in layers - single}
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    fresh: list[str] = []
    for path, leaf in want.items():
        parts = path.split("/")
        kind = parts[1] if parts[0] == "blocks" else ""
        if kind in layers:
            if not parts[2].startswith(BANK):
                fresh.append(path)
                continue
            if kind in single:
                old = np.asarray(have[path])
            else:
                old = np.asarray(have["/".join(["blocks", dense[kind], *parts[3:]])])[kinds[kind]][:, None]
            copies = np.broadcast_to(old, tuple(leaf.shape)).copy()
            if noise:
                copies += noise * old.std() * rng.standard_normal(copies.shape).astype(copies.dtype)
            made[path] = copies
        elif kind in dense.values():  # the blocks that stay dense
            made[path] = np.asarray(have[path])[kinds[kind]]
        elif path in have:
            made[path] = have[path]
    used = {
        *want,
        *(path for path in have if path.split("/")[:2] in [["blocks", name] for name in dense.values()]),
    }
    made |= {path: leaf for path, leaf in have.items() if path not in used}  # told as left over
    return made, tuple(fresh)


def _single(layer: str, want: Mapping[str, Any], have: Mapping[str, Any]) -> bool:
    """Whether the same layer is there with one expert in each of its banks, in as many blocks."""
    start = f"blocks/{layer}/{BANK}"
    banks = {path: tuple(leaf.shape) for path, leaf in want.items() if path.startswith(start)}
    return all(
        path in have and tuple(have[path].shape) == (shape[0], 1, *shape[2:]) for path, shape in banks.items()
    )


def _source(layer: str, want: Mapping[str, Any], have: Mapping[str, Any], depth: int, source: str) -> str:
    """The dense layer, one in every block, whose parameters have the shapes of this layer's experts."""
    start = f"blocks/{layer}/{BANK}"
    shapes = {
        path.removeprefix(start).partition("/")[2]: tuple(leaf.shape[2:])
        for path, leaf in want.items()
        if path.startswith(start)
    }
    candidates: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in have.items():
        group, _, rest = path.partition("/")
        name, _, inner = rest.partition("/")
        if group == "blocks" and leaf.shape[0] == depth:
            candidates.setdefault(name, {})[inner] = tuple(leaf.shape[1:])
    found = [name for name, given in candidates.items() if given == shapes]
    if len(found) != 1:
        listed = ", ".join(f"{path} {shape}" for path, shape in sorted(shapes.items()))
        raise CheckpointError(
            f"config.init_from.upcycle: an expert of {layer} has the parameters {listed}; {source} has "
            f"{'no' if not found else 'more than one'} layer like that in each of its {depth} blocks. Give experts the "
            "shape of its dense layer, as expert=mlp(hidden=...)."
        )
    return found[0]
