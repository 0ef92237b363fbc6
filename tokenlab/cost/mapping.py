"""What a mapping of a model onto devices sends between them in a training step, by formula: nothing is compiled.

Bytes that each device sends, by ring algorithms: of g devices an all-gather and a reduce-scatter pass on (g - 1) / g of
what is whole, an all-reduce twice that, an all-to-all (g - 1) / g of what a device has. Everything travels in the dtype
of computation. With n tokens that enter a layer of experts on a device, K choices each, width D, forward:

    exchange   2 n K D (EP - 1) / EP       to the experts and back
    join       2 n D (J - 1) / J           devices that share experts and not tokens: tokens gathered, results scattered
    add up     2 n D (T - 1) / T           devices that share experts and tokens: results summed

and as much again backward. Where attention has the same tokens on s devices and a layer of experts splits them, they
are gathered behind it: n' D (s - 1) / s, n' the tokens of attention. Liu et al. 2025 (arXiv 2504.14960) gather and
scatter choices, not tokens, over ETP, 2 n K D (ETP - 1) behind an exchange of 1 / ETP as many; see docs/folding.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tokenlab.sharding.axes import ROLES
from tokenlab.sharding.plan import ParallelPlan

PARTS = ("experts", "tensor", "sequence", "parameters", "gradients")
"""Of the traffic: tokens to experts and back and what belongs to it; sums over heads and hidden units; keys and values;
parameters that fsdp gathers; gradients."""


@dataclass(frozen=True)
class BlockSizes:
    """A block, as far as its traffic and memory depend on it.

    Attributes:
      tokens: N that come in.
      width: D.
      heads, kv_heads, head_dim: H, G, Dh of its attention.
      hidden: units of its feed-forward layer, F of each expert.
      gated: whether that has a gate.
      choices: experts that each token is computed by, K; 0 for a dense layer.
    """

    tokens: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    gated: bool = False
    choices: float = 0.0


@dataclass(frozen=True)
class Leaf:
    """A parameter on a mesh.

    Attributes:
      size: numbers in all.
      axes: mesh axes it is split over.
      expert: whether it belongs to a layer of experts, and lies by what the axes do there.
    """

    size: int
    axes: tuple[str, ...]
    expert: bool = False


def exchanged(plan: ParallelPlan, tokens: int, choices: float, width: int) -> dict[str, float]:
    """Numbers that a device sends forward in one layer of experts, by "exchange", "join", "add up" and "gather".

    Args:
      plan: the mapping.
      tokens: over all devices.
      choices: K.
      width: D.
    """
    over = plan.sizes
    shared = [axis for axis in over if ROLES[axis][1] == "tensor"]
    joined = _size(over, (axis for axis in shared if ROLES[axis][0] != "tensor"))
    added = _size(over, (axis for axis in shared if ROLES[axis][0] == "tensor"))
    parted = _size(over, (a for a in over if ROLES[a][0] == "tensor" and ROLES[a][1] != "tensor"))
    n = tokens * joined * added / plan.devices
    attention = tokens / (plan.dp * plan.cp)
    return {
        "exchange": 2 * n * choices * width * _ring(plan.ep),
        "join": 2 * n * width * _ring(joined),
        "add up": 2 * n * width * _ring(added),
        "gather": attention * width * _ring(parted),
    }


def step_bytes(
    plan: ParallelPlan, blocks: Iterable[BlockSizes], leaves: Iterable[Leaf], batch: int, itemsize: int
) -> dict[str, int]:
    """Bytes that a device sends in a training step, by part; see `PARTS`.

    Args:
      plan: the mapping, without pipeline stages.
      blocks: of the model.
      leaves: its parameters.
      batch: examples over all devices.
      itemsize: bytes of a number in the dtype of computation.
    """
    found: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for block in blocks:
        here = batch * block.tokens / (plan.dp * plan.cp)
        sums = 1 if block.choices else 2  # behind attention, and behind a dense layer
        found["tensor"] += 2 * sums * 2 * here * block.width * _ring(plan.tp)
        keys = 2 * block.kv_heads * block.head_dim / min(plan.tp, block.kv_heads)
        found["sequence"] += 2 * batch / plan.dp * block.tokens * keys * _ring(plan.cp)
        if block.choices:
            sent = exchanged(plan, batch * block.tokens, block.choices, block.width)
            found["experts"] += 2 * sum(sent.values())
    for leaf in leaves:
        whole = leaf.size / _size(plan.sizes, leaf.axes)
        shared = _gathered(leaf, plan)
        # Forward, backward, and the scattering of the gradient.
        found["parameters"] += 3 * whole * shared * _ring(shared)
        roles = {"data"} if leaf.expert else {"data", "fsdp", "sequence"}
        rest = (a for a in plan.sizes if a not in leaf.axes and ROLES[a][1 if leaf.expert else 0] in roles)
        found["gradients"] += 2 * whole * _ring(_size(plan.sizes, rest))
    return {part: round(itemsize * found[part]) for part in PARTS}


def activation_bytes(
    plan: ParallelPlan, blocks: Sequence[BlockSizes], batch: int, itemsize: int, *, outputs: int, remat: bool
) -> int:
    """About what a device keeps between the passes: each block's inputs, hidden units and attention map, and logits.

    An estimate to rank mappings by: with `remat` the inputs of all blocks and all of one; `tokenlab compile` asks the
    compiler.
    """
    kept, most = 0.0, 0.0
    for block in blocks:
        here = batch * block.tokens / (plan.dp * plan.cp)
        heads = (2 * block.heads + 2 * block.kv_heads) * block.head_dim / plan.tp
        maps = 2 * block.heads / plan.tp * block.tokens * 4 / itemsize
        units = block.hidden * (3 if block.gated else 2)
        own = 4 * block.width + heads + maps
        if block.choices:
            entering = plan.dp * plan.cp * (plan.etp or 1) / plan.devices
            own += block.choices * entering * (2 * block.width + units / (plan.etp or 1))
        else:
            own += units / plan.tp
        most = max(most, here * own)
        kept += here * (block.width if remat else own)
    last = blocks[-1].tokens if blocks else 1
    logits = 2 * batch * last * outputs / (plan.dp * plan.cp * plan.tp) * 4
    return round(itemsize * (kept + (most if remat else 0)) + logits)


def computed_with(leaf: Leaf, plan: ParallelPlan) -> float:
    """How much of a parameter a device computes with: its own part, and what fsdp gathers for it."""
    return leaf.size / _size(plan.sizes, leaf.axes) * _gathered(leaf, plan)


def _gathered(leaf: Leaf, plan: ParallelPlan) -> int:
    """Devices whose parts of a parameter are gathered before it is used; those of experts are not."""
    axes = (axis for axis in leaf.axes if ROLES[axis][0] == "fsdp")
    return _size(plan.sizes, (axis for axis in axes if not leaf.expert or ROLES[axis][1] == "data"))


def _size(sizes: Mapping[str, int], axes: Iterable[str]) -> int:
    return math.prod(sizes.get(axis, 1) for axis in axes)


def _ring(devices: int) -> float:
    return (devices - 1) / devices
