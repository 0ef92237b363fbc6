"""Upcycling: a dense model's weights as the start of one with experts (Komatsuzaki et al. 2023, arXiv 2212.05055).

Every expert of block k begins as a copy of the dense feed-forward layer of block k, with noise if asked for; routers
and shared experts begin anew; all else is taken as it is. What the experts of a kind look like says which layer of
the same block they come from; the stack that the weights were trained with says in which blocks a layer stood.

A layer with a single expert for each modality (`moma(text=1, image=1)`) is a dense layer for each: more experts of a
modality begin as copies of its one (Lin et al. 2024, arXiv 2407.21770, section 3.5).

Copies compute what the dense layer computes, times the weights that the router gives them: Soft MoE mixes tokens first,
and hard routers multiply by gates below 1. So the model starts near the dense one, not at it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenlab.core.errors import CheckpointError
from tokenlab.layers.program import Program
from tokenlab.models.state import flat

BANK = "experts"
"""What the names of the parameters of a bank begin with under its layer."""


class Seed(NamedTuple):
    """What the experts of one block begin as.

    Attributes:
      kind: the layer among the saved weights.
      row: its place there.
      single: whether it is one expert for each modality, and not a dense layer.
    """

    kind: str
    row: int
    single: bool


def upcycle(
    saved: Any,
    program: Program,
    wanted: Any,
    *,
    origin: Program | None = None,
    noise: float = 0.0,
    seed: int = 0,
    source: str = "the checkpoint",
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """A dense model's weights laid out for a stack with experts.

    Args:
      saved: nested dicts of arrays, the weights of a stack of as many blocks without experts.
      program: the stack to start.
      wanted: nested dicts of anything with `shape`, as `model.abstract_state()` gives them.
      origin: the stack that `saved` was trained with, which says in which blocks a layer stood. None: it is not known,
        and only layers of every block can be used.
      noise: standard deviation of what is added to every expert, relative to that of the leaf; >= 0.
      seed: of the noise.
      source: where `saved` is from, for messages.

    Returns:
      path -> array, the leaves that `saved` gives; the paths that must begin anew.

    Raises:
      CheckpointError: the stack has no experts, a block of `saved` has no one layer that its experts could be copies
        of, another block has another layer than there, or noise is no number >= 0.
    """
    if not 0 <= noise < math.inf:
        raise CheckpointError(f"upcycle: noise must be a number at least 0; got {noise}.")
    have, want = flat(saved), flat(wanted)
    blocks = {
        name: [each.index for each in found]
        for (group, name), found in program.kinds.items()
        if group == "blocks"
    }
    layers = {path.split("/")[1] for path in want if path.startswith("blocks/") and f"/{BANK}" in path}
    if not layers:
        raise CheckpointError(
            f"config.init_from.upcycle: the stack {program.stack.text!r} has no experts; leave it out."
        )
    places = _places(have, origin, program.depth)
    seeds = {name: _seeds(name, blocks[name], want, have, places, source) for name in layers}
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    fresh: list[str] = []
    for path, leaf in want.items():
        group, kind, *inner = path.split("/")
        if group == "blocks" and kind in layers:
            if not inner[0].startswith(BANK):
                fresh.append(path)
                continue
            old = np.stack([_of_seed(each, inner, have) for each in seeds[kind]])
            copies = np.broadcast_to(old, tuple(leaf.shape)).copy()
            if noise:
                copies += noise * old.std() * rng.standard_normal(copies.shape).astype(copies.dtype)
            made[path] = copies
        elif path in have and group == "blocks":
            made[path] = np.asarray(have[path])[_rows(kind, blocks[kind], places, source)]
        elif path in have:
            made[path] = have[path]
    copied = {each.kind for found in seeds.values() for each in found}
    used = {*want, *(path for path in have if path.startswith("blocks/") and path.split("/")[1] in copied)}
    made |= {path: leaf for path, leaf in have.items() if path not in used}  # told as left over
    return made, tuple(fresh)


def _places(have: Mapping[str, Any], origin: Program | None, depth: int) -> dict[str, Sequence[int]]:
    """Kind of saved layer -> the blocks that its rows are of, for those of which that is known."""
    rows = {path.split("/")[1]: leaf.shape[0] for path, leaf in have.items() if path.startswith("blocks/")}
    found: dict[str, Sequence[int]] = {}
    for kind, count in rows.items():
        stood = [each.index for each in origin.kinds.get(("blocks", kind), ())] if origin else range(depth)
        if len(stood) == count:
            found[kind] = stood
    return found


def _rows(kind: str, blocks: Sequence[int], places: Mapping[str, Sequence[int]], source: str) -> list[int]:
    """Where the saved layer of a kind has those of some blocks."""
    stood = places.get(kind, ())
    for block in blocks:
        if block not in stood:
            raise CheckpointError(
                f"config.init_from.upcycle: block {block} of the stack has {kind}, and {source} has it in "
                f"{_listed(stood)}: leave every block without experts as it was."
            )
    return [stood.index(block) for block in blocks]


def _listed(blocks: Sequence[int]) -> str:
    if not blocks:
        return "blocks that are not known (run.json in its workdir names them)"
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


def _of_seed(seed: Seed, inner: Sequence[str], have: Mapping[str, Any]) -> np.ndarray:
    """One expert's leaf, [1, ...]; `inner` is its path under the layer, the name of the bank first."""
    if seed.single:
        return np.asarray(have["/".join(["blocks", seed.kind, *inner])])[seed.row]
    return np.asarray(have["/".join(["blocks", seed.kind, *inner[1:]])])[seed.row][None]


def _seeds(
    layer: str,
    blocks: Sequence[int],
    want: Mapping[str, Any],
    have: Mapping[str, Any],
    places: Mapping[str, Sequence[int]],
    source: str,
) -> list[Seed]:
    """For each block of a layer with experts what stood there: one expert of each bank, or a dense layer alike."""
    start = f"blocks/{layer}/"
    banks = {
        path.removeprefix(start): tuple(leaf.shape[2:])
        for path, leaf in want.items()
        if path.startswith(f"{start}{BANK}")
    }
    dense = {path.partition("/")[2]: shape for path, shape in banks.items()}
    single = {path: (1, *shape) for path, shape in banks.items()}
    given: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, leaf in have.items():
        group, _, rest = path.partition("/")
        kind, _, inner = rest.partition("/")
        if group == "blocks" and kind in places:
            given.setdefault(kind, {})[inner] = tuple(leaf.shape[1:])
    seeds = []
    for block in blocks:
        found = [
            Seed(kind, places[kind].index(block), shapes == single)
            for kind, shapes in given.items()
            if block in places[kind] and shapes in (dense, single)
        ]
        if len(found) != 1:
            listed = ", ".join(f"{path} {shape}" for path, shape in sorted(dense.items()))
            raise CheckpointError(
                f"config.init_from.upcycle: an expert of {layer} has the parameters {listed}; {source} has "
                f"{'no' if not found else 'more than one'} layer like that in block {block}. Give experts the shape of "
                "the dense layer of their block, as expert=mlp(hidden=...)."
            )
        seeds += found
    return seeds
