"""What devices would send to each other on meshes of any size, by formula, and the least time of a step there.

For one step and one device, with f, t, e devices along fsdp, tensor and expert, and a weight of which a device
computes with W' elements (all of them over t, and over e where it is an expert's):

    gathered   2 W' b (f - 1)/f          before the forward and before the backward pass, b bytes a number, 2 in
                                         bfloat16, in which XLA sends weights and gradients too
    reduced      W' b (f - 1)/f          its gradient, to the device that keeps that part
   summed     2 W'/f b (r - 1)/r        the rest of its gradient, over the r devices that keep the same part
    exchanged    P x b (e - 1)/e         tokens to experts and back, x elements a device in each of P passes: two in the
                                         forward pass, two in the backward, two more where the forward runs again
    tensor       P 2 y b (t - 1)/t       sums over heads and over hidden units, y elements of a device's tokens

All are rings, as `tokenlab.sharding.traffic.sent` counts a compiled program. Where r devices lie in s slices, sums are
made in two stages: within each slice as above with r / s, and of every part of that between slices, 2 W'/(f r/s) b
(s - 1)/s. Other axes lie within a slice.

The source of the formulas is how these axes are defined (Rajbhandari et al. 2020, arXiv 1910.02054, for gathered and
reduced; Shoeybi et al. 2019, arXiv 1909.08053, for tensor; Lepikhin et al. 2020, arXiv 2006.16668, for exchanged).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from tokenlab import models, tasks
from tokenlab.core.errors import ShardingError
from tokenlab.cost import Cost, Hardware
from tokenlab.data.outline import outline
from tokenlab.layers.program import BlockStep, steps_of
from tokenlab.sharding import rules
from tokenlab.train import schedule
from tokenlab.train.config import TrainConfig
from tokenlab.train.costs import train_cost

_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Sent:
    """Bytes that a device sends in a step, by what for; `far` of them go to other slices."""

    gathered: float
    reduced: float
    summed: float
    exchanged: float
    tensor: float
    far: float

    @property
    def near(self) -> float:
        """Bytes to devices of the same slice."""
        return self.gathered + self.reduced + self.summed + self.exchanged + self.tensor


class Least(NamedTuple):
    """Seconds of a step that each resource needs at its peak rate.

    Attributes:
      compute, memory: as in `tokenlab.cost.roofline`.
      near, far: of links within a slice, and of the network between slices.
    """

    compute: float
    memory: float
    near: float
    far: float

    @property
    def overlapped(self) -> float:
        """The longest of all: everything at once."""
        return max(self)

    @property
    def in_turn(self) -> float:
        """What computes, and then all that is sent."""
        return max(self.compute, self.memory) + self.near + self.far

    @property
    def bound(self) -> str:
        """What takes longest: "compute", "memory", "links" or "network"."""
        return ("compute", "memory", "links", "network")[self.index(self.overlapped)]


class Scaling:
    """The formulas for one configuration.

    Args:
      config: of a run.
      num_outputs: logits, where the data does not say them.
    """

    def __init__(self, config: TrainConfig, num_outputs: int | None = None) -> None:
        facts, self._task = outline(config.data), tasks.build(config.task)
        outputs = self._task.num_outputs(facts) if num_outputs is None else num_outputs
        values = schedule.stack_vars(config.stack_vars, config.steps).usual(0)
        self.config, self._spec = config, facts.spec
        self.model = models.build(config.model, spec=facts.spec, num_outputs=outputs, stack_vars=values)

    @cached_property
    def cost(self) -> tuple[Cost, Cost]:
        """Of one example and of two, counted."""
        only = self.config.optimizer.only
        found = partial(train_cost, self.model, self._task, self._spec, only=only, execution="scan")
        return found(1), found(2)

    def sent(self, mesh: Mapping[str, int], batch: int, slices: int = 1) -> Sent:
        """What a device sends.

        Args:
          mesh: devices by axis.
          batch: examples of a step, over all devices.
          slices: over which "data" is spread; it must be a multiple.

        Raises:
          ShardingError: slices that do not share "data" out, or a mesh that the weights do not fit.
        """
        sizes = {axis: mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "expert")}
        if sizes["data"] % slices:
            raise ShardingError(f"mesh.data={sizes['data']} cannot be spread over {slices} slices.")
        abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        examples = batch / (math.prod(sizes.values()) / sizes["tensor"])
        gathered = reduced = summed = far = 0.0
        for size, axes in self._weights(abstract):
            split = sizes["fsdp"] if "fsdp" in axes else 1
            own = size / math.prod(sizes[axis] for axis in axes if axis != "fsdp")
            gathered += 2 * own * self._bytes * (split - 1) / split
            reduced += own * self._bytes * (split - 1) / split
            alike = math.prod(sizes[axis] for axis in ("data", "fsdp", "expert") if axis not in axes)
            inside = alike // slices
            summed += 2 * own / split * self._bytes * (inside - 1) / inside
            far += 2 * own / split / inside * self._bytes * (slices - 1) / slices
        ways = sizes["expert"]
        exchanged = self._passes * examples * self._to_experts * self._bytes * (ways - 1) / ways
        ways = sizes["tensor"]
        tensor = self._passes * 2 * examples * self._blocks * self._bytes * (ways - 1) / ways
        return Sent(gathered, reduced, summed, exchanged, tensor, far)

    def least(self, mesh: Mapping[str, int], batch: int, chip: Hardware, slices: int = 1) -> Least:
        """The least time of a step on chips of one kind; arguments as `sent`."""
        one, two = self.cost
        devices, sent = math.prod(mesh.values()), self.sent(mesh, batch, slices)
        each = two.bytes - one.bytes
        stay = {axis: size for axis, size in mesh.items() if axis not in ("data", "fsdp")}
        abstract = AbstractMesh(tuple(stay.values()) or (1,), tuple(stay) or ("expert",))
        whole = list(self._weights(abstract))
        kept = sum(size / math.prod(abstract.shape[axis] for axis in axes) for size, axes in whole)
        moved = each * batch / devices + (one.bytes - each) * kept / sum(size for size, _ in whole)
        peaks = chip.peaks(self.config.model.get("dtype", "float32"))
        return Least(
            one.flops * batch / devices / peaks.flops,
            moved / peaks.bandwidth,
            sent.near / chip.link_bandwidth if chip.link_bandwidth else math.inf,
            sent.far / chip.far_bandwidth if chip.far_bandwidth else math.inf if sent.far else 0.0,
        )

    def _weights(self, mesh: AbstractMesh) -> Any:
        """(elements, axes it is split over) of every parameter."""
        known = {**rules.DEFAULT_RULES}
        for name, axes in known.items():
            axes = (axes,) if isinstance(axes, str) else axes or ()
            known[name] = tuple(axis for axis in axes if axis in mesh.shape)
        whole = self.model.abstract_state()
        placed = rules.shardings(whole, self.model.logical_axes(), mesh, known)
        for leaf, place in zip(jax.tree.leaves(whole), jax.tree.leaves(placed), strict=True):
            parts = [(part,) if isinstance(part, str) else part for part in place.spec if part]
            yield math.prod(leaf.shape), tuple(axis for part in parts for axis in part)

    @property
    def _bytes(self) -> int:
        return _BYTES[self.config.model.get("dtype", "float32")]

    @cached_property
    def _passes(self) -> int:
        return 4 if self.config.model.get("remat", "none") == "none" else 6

    @cached_property
    def _to_experts(self) -> float:
        """Elements of one example that travel to experts, over all blocks."""
        found = 0.0
        for step in steps_of(self.model):
            if isinstance(step, BlockStep) and hasattr(step.block.ffn, "num_experts"):
                found += step.block.ffn.experts_per_token(step.fed) * step.fed * self._width
        return found

    @cached_property
    def _blocks(self) -> float:
        """Elements of one example's tokens, over all blocks."""
        blocks = (step for step in steps_of(self.model) if isinstance(step, BlockStep))
        return sum(step.present for step in blocks) * self._width

    @property
    def _width(self) -> int:
        return self.model.settings.dims()[0]
