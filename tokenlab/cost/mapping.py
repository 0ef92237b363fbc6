"""What a mapping of a model onto devices sends between them in a training step, by formula: nothing is compiled.

Bytes that each device sends, by ring algorithms: of g devices an all-gather and a reduce-scatter pass on (g - 1) / g of
what is whole, an all-reduce twice that, an all-to-all (g - 1) / g of what a device has. Everything travels in the dtype
of computation.

Layers of experts. With n tokens that enter one on a device, K choices each, width D, forward:

    exchange   2 n K D (EP - 1) / EP       to the experts and back
    join       2 n D (J - 1) / J           devices that share experts and not tokens: tokens gathered, results scattered
    add up     2 n D (T - 1) / T           devices that share experts and tokens: results summed

and as much again backward. Layers that compute on buffers of places (`soft_moe`, `tokens_choice`, `experts_choice`,
MoMa) join, add up and gather those, K D a token in place of D; what they send to fill them from examples that are
split, along `sequence`, is not in the formulas. Where attention has the same tokens on s devices and a layer of
experts splits them, they are gathered behind it: n' D (s - 1) / s, n' the tokens of attention. Liu et al. 2025 (arXiv
2504.14960) gather and scatter choices, not tokens, over ETP, 2 n K D (ETP - 1) behind an exchange of 1 / ETP as many;
see docs/folding.md.

Parameters. Of W' numbers that a device computes with, f devices keep a part each and r keep the same part:

    parameters   2 W' (f - 1) / f                      gathered before the forward and before the backward pass
    gradients      W' (f - 1) / f + 2 W'/f (r - 1) / r   scattered to the f, and summed over the r

once for each microbatch. Where one axis reaches from slice to slice, what passes along it does so in two stages: within
each slice as above with the devices that are there, and of every part of that between the s slices, (s - 1) / s.

The formulas follow from how the axes are defined: Rajbhandari et al. 2020 (arXiv 1910.02054) for parameters and
gradients, Shoeybi et al. 2019 (arXiv 1909.08053) for tensor, Lepikhin et al. 2020 (arXiv 2006.16668) for the exchange.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tokenlab.sharding.axes import ROLES, attending, of_experts
from tokenlab.sharding.slices import far_axis

Sizes: TypeAlias = Mapping[str, int]
"""A mesh: axis -> devices along it; `tokenlab.sharding.plan.ParallelPlan.sizes` is one."""


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
      fed: tokens that its feed-forward layer gets; None for as many as come in.
      buffers: whether experts compute on buffers of places and not on sorted rows.
    """

    tokens: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    gated: bool = False
    choices: float = 0.0
    fed: int | None = None
    buffers: bool = False


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


@dataclass(frozen=True)
class Sent:
    """Bytes that a device sends in a step, by what for.

    Attributes:
      experts: tokens to experts and back, and what belongs to it.
      tensor: sums over heads and hidden units.
      sequence: keys and values.
      parameters: that fsdp gathers.
      gradients: scattered and summed.
      far: of all of these, what goes to other slices; it is not in the others.
    """

    experts: int = 0
    tensor: int = 0
    sequence: int = 0
    parameters: int = 0
    gradients: int = 0
    far: int = 0

    @property
    def near(self) -> int:
        """Bytes to devices of the same slice."""
        return self.experts + self.tensor + self.sequence + self.parameters + self.gradients


def ways(sizes: Sizes) -> dict[str, int]:
    """How many devices share what: "tp" heads, "cp" an example, "dp" the examples; "ep" experts, "etp" their units."""
    return {
        "tp": _size(sizes, attending(sizes, "tensor")),
        "cp": _size(sizes, attending(sizes, "sequence")),
        "dp": _size(sizes, attending(sizes, "data", "fsdp")),
        "ep": _size(sizes, of_experts(sizes, "expert")),
        "etp": _size(sizes, of_experts(sizes, "tensor")),
    }


def exchanged(
    sizes: Sizes, tokens: int, choices: float, width: int, *, buffers: bool = False
) -> dict[str, float]:
    """Numbers that a device sends forward in one layer of experts, by "exchange", "join", "add up" and "gather".

    Args:
      sizes: the mesh.
      tokens: over all devices.
      choices: K.
      width: D.
      buffers: whether places are joined and added up, and not tokens.
    """
    over, each = ways(sizes), choices if buffers else 1
    shared = of_experts(sizes, "tensor")
    joined = _size(sizes, (axis for axis in shared if ROLES[axis][0] != "tensor"))
    added = _size(sizes, (axis for axis in shared if ROLES[axis][0] == "tensor"))
    parted = _size(sizes, (axis for axis in attending(sizes, "tensor") if ROLES[axis][1] != "tensor"))
    n = tokens * joined * added / math.prod(sizes.values())
    attention = tokens / (over["dp"] * over["cp"])
    return {
        "exchange": 2 * n * choices * width * _ring(over["ep"]),
        "join": 2 * n * each * width * _ring(joined),
        "add up": 2 * n * each * width * _ring(added),
        "gather": attention * each * width * _ring(parted),
    }


def step_bytes(
    sizes: Sizes,
    blocks: Iterable[BlockSizes],
    leaves: Iterable[Leaf],
    batch: int,
    itemsize: int,
    *,
    remat: str = "none",
    accumulate: int = 1,
    slices: int = 1,
) -> Sent:
    """Bytes that a device sends in a training step.

    Args:
      sizes: the mesh.
      blocks: of the model.
      leaves: its parameters, as they lie there.
      batch: examples over all devices.
      itemsize: bytes of a number in the dtype of computation.
      remat: of the model. What it computes again it sends again: keys, values and tokens for experts; with "full" also
        the sums over heads; but not what ends a block, which nothing in it needs.
      accumulate: microbatches; parameters are gathered, and gradients summed, for each.
      slices: over which one axis reaches (`tokenlab.sharding.slices`).

    Raises: ShardingError where no axis can.
    """
    over, far = ways(sizes), far_axis(sizes, slices)
    passes = 2 if remat == "none" else 3
    experts = tensor = sequence = parameters = gradients = away = 0.0

    def inside(axes: Iterable[str]) -> tuple[int, int]:
        """Devices along the axes in one slice, and how many slices those reach."""
        found = tuple(axes)
        there = slices if far in found else 1
        return _size(sizes, found) // there, there

    for block, times in Counter(blocks).items():  # nearly all are alike
        here = batch * block.tokens / (over["dp"] * over["cp"])
        fed = block.tokens if block.fed is None else block.fed
        sums = 2 + (remat == "full")  # behind attention: forward, backward, and forward once more
        tensor += times * sums * 2 * here * block.width * _ring(over["tp"])
        keys = 2 * block.kv_heads * block.head_dim / min(over["tp"], block.kv_heads)
        sequence += times * passes * batch / over["dp"] * block.tokens * keys * _ring(over["cp"])
        if block.choices:
            each = exchanged(sizes, batch * fed, block.choices, block.width, buffers=block.buffers)
            experts += times * 2 * sum(each.values())
            if remat != "none":
                experts += times * (each["exchange"] + each["join"] / (1 if block.buffers else 2))
                experts += times * (each["add up"] if block.buffers else 0)
        else:
            behind = batch * fed / (over["dp"] * over["cp"])
            tensor += times * 2 * 2 * behind * block.width * _ring(over["tp"])
    for leaf in leaves:
        whole = leaf.size / _size(sizes, leaf.axes)  # what a device keeps
        shared, of_slices = inside(_gathered(leaf, sizes))
        used = whole * shared * of_slices
        parameters += 2 * used * _ring(shared)
        gradients += used * _ring(shared)
        away += 3 * used / shared * _ring(of_slices)
        alike, of_slices = inside(axis for axis in _apart(leaf, sizes) if axis not in leaf.axes)
        gradients += 2 * whole * _ring(alike)
        away += 2 * whole / alike * _ring(of_slices)
    each = (experts, tensor, sequence, accumulate * parameters, accumulate * gradients, accumulate * away)
    return Sent(*(round(itemsize * numbers) for numbers in each))


def activation_bytes(
    sizes: Sizes, blocks: Sequence[BlockSizes], batch: int, itemsize: int, *, outputs: int, remat: bool
) -> int:
    """About what a device keeps between the passes: each block's inputs, hidden units and attention map, and logits.

    An estimate to rank mappings by: with `remat` the inputs of all blocks and all of one; `tokenlab compile` asks the
    compiler.
    """
    over, kept, most = ways(sizes), 0.0, 0.0
    devices = over["dp"] * over["cp"] * over["tp"]
    for block, times in Counter(blocks).items():
        here = batch * block.tokens / (over["dp"] * over["cp"])
        heads = (2 * block.heads + 2 * block.kv_heads) * block.head_dim / over["tp"]
        maps = 2 * block.heads / over["tp"] * block.tokens * 4 / itemsize
        units = block.hidden * (3 if block.gated else 2)
        own = 4 * block.width + heads + maps
        if block.choices:
            entering = over["dp"] * over["cp"] * over["etp"] / devices
            own += block.choices * entering * (2 * block.width + units / over["etp"])
        else:
            own += units / over["tp"]
        most = max(most, here * own)
        kept += times * here * (block.width if remat else own)
    last = blocks[-1].tokens if blocks else 1
    logits = 2 * batch * last * outputs / devices * 4
    return round(itemsize * (kept + (most if remat else 0)) + logits)


def computed_with(leaf: Leaf, sizes: Sizes) -> float:
    """How much of a parameter a device computes with: its own part, and what fsdp gathers for it."""
    return leaf.size / _size(sizes, leaf.axes) * _size(sizes, _gathered(leaf, sizes))


def _gathered(leaf: Leaf, sizes: Sizes) -> tuple[str, ...]:
    """Axes along which parts of a parameter are gathered before it is used: devices have tokens of their own there."""
    return tuple(axis for axis in leaf.axes if axis in _apart(leaf, sizes))


def _apart(leaf: Leaf, sizes: Sizes) -> tuple[str, ...]:
    """Axes along which devices use all of a parameter for tokens of their own, and sum its gradients."""
    if not leaf.expert:
        return tuple(axis for axis in sizes if ROLES[axis][0] in ("data", "fsdp", "sequence"))
    # Along an axis of experts other experts are used, unless a rule leaves them whole there.
    whole = () if any(ROLES[axis][1] == "expert" for axis in leaf.axes) else ("expert",)
    return tuple(axis for axis in sizes if ROLES[axis][1] in ("data", *whole))


def _size(sizes: Sizes, axes: Iterable[str]) -> int:
    return math.prod(sizes.get(axis, 1) for axis in axes)


def _ring(devices: int) -> float:
    return (devices - 1) / devices
