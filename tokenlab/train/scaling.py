"""One configuration on meshes of any size, by formula: what devices send, what they hold, the least time of a step.

Nothing is compiled and no device is needed. FLOPs and bytes of memory are counted from the traced program, what is sent
is by the formulas of `tokenlab.cost.mapping`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from tokenlab import models, tasks
from tokenlab.core.errors import CostError
from tokenlab.cost import Cost, Hardware, Roofline
from tokenlab.cost.mapping import BlockSizes, Leaf, Sent, activation_bytes, computed_with, step_bytes, ways
from tokenlab.data.outline import outline
from tokenlab.layers.program import BlockStep, steps_of
from tokenlab.layers.statistics import split
from tokenlab.sharding import rules
from tokenlab.sharding.axes import AXES
from tokenlab.train import optimizer as optimizers
from tokenlab.train import schedule
from tokenlab.train.config import TrainConfig
from tokenlab.train.costs import train_cost


class Scaling:
    """The formulas for one configuration.

    A mesh is given as its axes and the devices along each, `ParallelPlan.sizes` or such as {"data": 2, "expert": 8}.

    Args:
      config: of a run. Of `config.mesh` its rules alone are looked at.
      num_outputs: logits, where the data does not say them.
    """

    def __init__(self, config: TrainConfig, num_outputs: int | None = None) -> None:
        facts, self._task = outline(config.data), tasks.build(config.task)
        self._outputs = self._task.num_outputs(facts) if num_outputs is None else num_outputs
        values = schedule.stack_vars(config.stack_vars, config.steps).usual(0)
        self.config, self._spec = config, facts.spec
        self.model = models.build(config.model, spec=facts.spec, num_outputs=self._outputs, stack_vars=values)
        self._dtype = config.model.get("dtype", "float32")
        self._itemsize = jnp.dtype(self._dtype).itemsize
        self._remat = config.model.get("remat", "none")
        self._last: tuple[tuple[tuple[str, int], ...], list[Leaf]] | None = None  # the mesh asked for last

    @cached_property
    def cost(self) -> tuple[Cost, Cost]:
        """Of a step with one example, and with two: what is read of weights does not grow with the batch."""
        only = self.config.optimizer.only
        found = partial(train_cost, self.model, self._task, self._spec, only=only, execution="scan")
        return found(1), found(2)

    @cached_property
    def blocks(self) -> list[BlockSizes]:
        """The blocks of a model with a stack, as their traffic and memory see them; none of another."""
        shapes, _ = split(self._params)
        found = []
        for step in steps_of(self.model):
            if not isinstance(step, BlockStep):
                continue
            own = {slot: shapes[kind[0]][kind[1]] for slot, kind in step.kinds if kind[0] in shapes}
            query = own["attention"]["query"]["kernel"].shape
            keys = own["attention"]["key"]["kernel"].shape
            layer = step.block.ffn
            banks = {name: bank for name, bank in own["ffn"].items() if name.startswith("experts")}
            experts = hasattr(layer, "num_experts")
            first = next(iter(banks.values())) if banks else own["ffn"]
            units = first["up"]["kernel"].shape[-1] if "up" in first else query[-3]
            found.append(
                BlockSizes(
                    tokens=step.present,
                    width=query[-3],
                    heads=query[-2],
                    kv_heads=keys[-2],
                    head_dim=query[-1],
                    hidden=units,
                    gated="gate" in first,
                    choices=float(layer.experts_per_token(step.fed)) if experts else 0.0,
                    fed=step.fed,
                    buffers=experts
                    and not hasattr(layer, "exchange"),  # which rows have, and buffers have not
                )
            )
        return found

    def leaves(self, sizes: Mapping[str, int]) -> list[Leaf]:
        """Where the parameters lie on a mesh. Raises ShardingError where they cannot."""
        asked = tuple(sizes.items())
        if self._last is None or self._last[0] != asked:
            own = self.config.mesh.rules
            self._last = asked, leaves_of(self._params, self.model.logical_axes(), sizes, own)
        return self._last[1]

    def sent(self, sizes: Mapping[str, int], batch: int, slices: int = 1) -> Sent:
        """What a device sends in a step.

        Args:
          sizes: the mesh.
          batch: examples of a step, over all devices.
          slices: over which one axis of the mesh reaches, see `tokenlab.sharding.slices`.

        Raises:
          ShardingError: slices that no axis can be spread over, or a mesh that the weights do not fit.
        """
        return step_bytes(
            sizes,
            self.blocks,
            self.leaves(sizes),
            batch,
            self._itemsize,
            remat=self._remat,
            accumulate=self.config.optimizer.accumulate,
            slices=slices,
        )

    def least(self, sizes: Mapping[str, int], batch: int, chip: Hardware, slices: int = 1) -> Roofline:
        """The least time of a step on chips of one kind; arguments as `sent`.

        Raises:
          CostError: nothing is known of links that are needed.
        """
        one, two = self.cost
        devices, sent = math.prod(sizes.values()), self.sent(sizes, batch, slices)
        leaves = self.leaves(sizes)
        met = sum(computed_with(leaf, sizes) for leaf in leaves) / sum(leaf.size for leaf in leaves)
        each = two.bytes - one.bytes
        moved = (one.bytes - each) * met * self.config.optimizer.accumulate + each * batch / devices
        peaks = chip.peaks(self._dtype)
        return Roofline(
            compute_seconds=one.flops * batch / devices / peaks.flops,
            memory_seconds=moved / peaks.bandwidth,
            collective_seconds=_seconds(sent.near, chip.link_bandwidth, f"{chip.name}: its links"),
            network_seconds=_seconds(
                sent.far, chip.far_bandwidth, f"{chip.name}: the network between slices"
            ),
        )

    def held(self, sizes: Mapping[str, int], batch: int) -> tuple[int, int]:
        """Bytes of parameters, gradients and optimizer on a device, and about those of activations."""
        leaves = self.leaves(sizes)
        state = round(4 * self._copies * sum(leaf.size / _ways(sizes, leaf.axes) for leaf in leaves))
        rows, remat = batch // self.config.optimizer.accumulate, self._remat != "none"
        kept = activation_bytes(sizes, self.blocks, rows, self._itemsize, outputs=self._outputs, remat=remat)
        return state, kept

    def divides(self, sizes: Mapping[str, int], batch: int) -> bool:
        """Whether the mesh divides the batch and the heads of attention."""
        over, rows = ways(sizes), batch // self.config.optimizer.accumulate
        return rows % over["dp"] == 0 and all(block.kv_heads % over["tp"] == 0 for block in self.blocks)

    @cached_property
    def _params(self) -> Any:
        return self.model.abstract_state()

    @cached_property
    def _copies(self) -> float:
        """Parameter and gradient, the optimizer's arrays, and an average: float32 and as large as the parameters."""
        optimizer = optimizers.build(self.config.optimizer, self.config.steps)
        state = jax.eval_shape(optimizer.init, split(self._params)[0])
        moments = 0.0 if optimizer.offload else _numbers(state) / _numbers(self._params)
        return 2 + moments + (self.config.optimizer.ema is not None)


def leaves_of(params: Any, table: rules.Table, sizes: Mapping[str, int], own: rules.Rules) -> list[Leaf]:
    """Where parameters lie on a mesh, by their logical axes and rules of one's own.

    Raises: ShardingError where they cannot.
    """
    sizes = dict.fromkeys(AXES, 1) | dict(sizes) | ({rules.named(own): 1} if own else {})
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    placed = jax.tree.leaves(rules.shardings(params, table, mesh))
    found = []
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(params), placed, strict=True):
        axes = [axis for part in place.spec if part for axis in ((part,) if isinstance(part, str) else part)]
        logical = rules.logical_of(rules.path_of(path), leaf.shape, table) or ()
        found.append(Leaf(math.prod(leaf.shape), tuple(axes), "expert" in logical))
    return found


def _seconds(size: int, bandwidth: float | None, what: str) -> float:
    if size and not bandwidth:
        raise CostError(f"{what}: no bandwidth is stated, so the time to send {size:,} bytes is not known.")
    return size / bandwidth if bandwidth else 0.0


def _ways(sizes: Mapping[str, int], axes: tuple[str, ...]) -> int:
    return math.prod(sizes.get(axis, 1) for axis in axes)


def _numbers(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
