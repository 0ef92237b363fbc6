"""`tokenlab compile --search`: every legal mapping of a configuration onto a number of devices, ranked by the roofline.

Nothing is compiled: FLOPs are counted once, and what a mapping sends is taken from `tokenlab.cost.mapping`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections.config_dict import ConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tokenlab import models, tasks
from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import ConfigError, CostError, ShardingError
from tokenlab.cost import Roofline, lookup, pretty
from tokenlab.cost.hardware import Hardware
from tokenlab.cost.mapping import BlockSizes, Leaf, activation_bytes, computed_with, step_bytes
from tokenlab.data.outline import outline
from tokenlab.layers.program import BlockStep, steps_of
from tokenlab.layers.statistics import split
from tokenlab.sharding import rules
from tokenlab.sharding.axes import AXES
from tokenlab.sharding.plan import ParallelPlan, every_plan
from tokenlab.train import hardware as hardware_rules
from tokenlab.train import optimizer as optimizers
from tokenlab.train import schedule
from tokenlab.train.config import TrainConfig
from tokenlab.train.costs import train_cost

SHOWN = 15
"""Mappings in the table of a terminal."""

_PIPE_WIDTH = 140


@dataclass(frozen=True)
class Ranked:
    """A mapping, and what is estimated of it.

    Attributes:
      plan: the mapping.
      sent: bytes that a device sends in a step, by part (`tokenlab.cost.mapping.PARTS`).
      least: the roofline of a step.
      state_bytes: of parameters, gradients and optimizer on a device.
      bytes_per_device: with activations.
      fits: whether that is at most the chip's memory.
    """

    plan: ParallelPlan
    sent: Mapping[str, int]
    least: Roofline
    state_bytes: int
    bytes_per_device: int
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """Everything, with the mesh by axis."""
        return {
            **dataclasses.asdict(self.plan),
            "mesh": dict(self.plan.sizes),
            "folded": self.plan.folded,
            "collective_bytes": dict(self.sent),
            "step_seconds_bound": self.least.seconds,
            "bound": self.least.bound,
            "seconds_by_resource": dataclasses.asdict(self.least),
            "state_bytes": self.state_bytes,
            "bytes_per_device": self.bytes_per_device,
            "fits": self.fits,
        }


def rank(
    config: Mapping[str, Any] | ConfigDict | TrainConfig,
    devices: int,
    chip: Hardware,
    *,
    num_outputs: int | None = None,
) -> list[Ranked]:
    """All legal mappings of a configuration onto so many devices of a chip, the best first.

    First those that fit, then by the least time of a step; of equal ones that which needs its links for less time, then
    that of less memory. `config.mesh` is not looked at, but for its rules.

    Args:
      config: of a run, of a model with a stack of blocks.
      devices: how many.
      chip: a datasheet with a `link_bandwidth`.
      num_outputs: logits, where the data is not here and does not say them.

    Raises:
      CostError: nothing is known of the chip's links.
      ConfigError: a model without blocks, or no legal mapping.
    """
    config = to_dataclass(TrainConfig, config)
    if not chip.link_bandwidth:
        raise CostError(
            f"{chip.name}: no bandwidth of its links is stated, so mappings cannot be ranked on it."
        )
    facts, task = outline(config.data), tasks.build(config.task)
    outputs = task.num_outputs(facts) if num_outputs is None else num_outputs
    first = schedule.stack_vars(config.stack_vars, config.steps).usual(0)
    model = models.build(config.model, spec=facts.spec, num_outputs=outputs, stack_vars=first)
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(f"compile: model {config.model.get('name')!r} has no stack of blocks to map.")
    dtype = config.model.get("dtype", "float32")
    itemsize = jnp.dtype(dtype).itemsize
    rows = config.batch_size // config.optimizer.accumulate
    # What is read of weights does not grow with the batch; what one and two examples cost tells the two apart.
    one, two = (train_cost(model, task, facts.spec, rows, config.optimizer.only) for rows in (1, 2))
    flops, each_bytes = one.flops * config.batch_size, two.bytes - one.bytes
    peaks = chip.peaks(dtype)
    params, table = model.abstract_state(), model.logical_axes()
    optimizer = optimizers.build(config.optimizer, config.steps)
    state = jax.eval_shape(optimizer.init, split(params)[0])
    # Parameter and gradient, the optimizer's arrays, and an average: all float32 and as large as the parameters.
    moments = 0 if optimizer.offload else _numbers(state) / _numbers(params)
    copies = 2 + moments + (config.optimizer.ema is not None)
    has_experts = any(block.choices for block in blocks)
    found = []
    for plan in every_plan(devices, fsdp=True):
        if not has_experts and (plan.ep > 1 or plan.etp != plan.tp):
            continue
        try:
            if blocks[0].tokens < 16 * plan.cp * plan.tp:  # of fewer, padding would be much
                plan.validate(seq=blocks[0].tokens)
            leaves = leaves_of(params, table, plan, config.mesh.rules)
        except ShardingError:
            continue
        if rows % plan.dp or any(block.kv_heads % plan.tp for block in blocks):
            continue
        sent = step_bytes(plan, blocks, leaves, config.batch_size, itemsize)
        held = round(4 * copies * sum(leaf.size / _ways(plan, leaf.axes) for leaf in leaves))
        remat = config.model.get("remat", "none") != "none"
        kept = activation_bytes(plan, blocks, rows, itemsize, outputs=outputs, remat=remat)
        met = sum(computed_with(leaf, plan) for leaf in leaves) / sum(leaf.size for leaf in leaves)
        moved = (one.bytes - each_bytes) * met * config.optimizer.accumulate
        moved += each_bytes * config.batch_size / devices
        least = Roofline(
            compute_seconds=flops / devices / peaks.flops,
            memory_seconds=moved / peaks.bandwidth,
            collective_seconds=sum(sent.values()) / chip.link_bandwidth,
        )
        found.append(Ranked(plan, sent, least, held, held + kept, held + kept <= chip.hbm_bytes))
    if not found:
        raise ConfigError(
            f"compile: no mapping of {devices} devices divides the model and config.batch_size={config.batch_size}."
        )
    return sorted(
        found,
        key=lambda each: (
            not each.fits, each.least.seconds, each.least.collective_seconds, each.bytes_per_device
        ),
    )  # fmt: skip


def slice_of(topology: str) -> tuple[int, Hardware]:
    """How many devices, and which: of "v5e:16x16", or "H100 SXM:8".

    Raises: ConfigError for other text, CostError for a chip of which nothing is known.
    """
    kind, _, shape = topology.partition(":")
    if not shape or not all(part.isdigit() and int(part) for part in shape.split("x")):
        raise ConfigError(
            f"compile: --topology={topology!r}: --search takes kind and shape, such as v5e:4x4."
        )
    count = math.prod(map(int, shape.split("x")))
    try:
        return count, lookup(f"TPU {kind}")
    except CostError:
        return count, lookup(kind)


def command(
    config: Any, name: str, topology: str, *, outputs: int | None = None, json_file: str | None = None
) -> int:
    """`tokenlab compile --search`: print the ranking, and write all of it as JSON; 3 when no mapping fits."""
    devices, chip = slice_of(topology)
    given = hardware_rules.without_mesh(to_dataclass(TrainConfig, config))
    given, rule = hardware_rules.applied(given, chip.name, devices)
    found = rank(given, devices, chip, num_outputs=outputs)
    if json_file is not None:
        told = {
            "config": name,
            "topology": topology,
            "devices": devices,
            "chip": chip.name,
            "mappings": [each.to_json() for each in found],
        }
        Path(json_file).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    if rule is not None:
        console.print(str(rule), markup=False, highlight=False, soft_wrap=True)
    console.print(to_rich(found, f"{name} on {topology}: {min(SHOWN, len(found))} of {len(found)} mappings"))
    for what, folded in (("folded", True), ("unfolded", False)):
        best = next((each for each in found if each.plan.folded == folded), None)
        if best is not None:
            links = 1e3 * best.least.collective_seconds
            console.print(
                f"best {what}: {best.plan}, {1e3 * best.least.seconds:.3g} ms, {links:.3g} ms of links"
            )
    return 0 if found[0].fits else 3


def to_rich(found: list[Ranked], title: str) -> Table:
    """The best of them, for a terminal."""
    shown = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for column in (
        "attention | experts",
        "least ms",
        "bound",
        "links ms",
        "sent a device",
        "memory a device",
        "fits",
    ):
        shown.add_column(
            column, justify="left" if column in ("attention | experts", "bound", "fits") else "right"
        )
    for each in found[:SHOWN]:
        shown.add_row(
            str(each.plan),
            f"{1e3 * each.least.seconds:.3g}",
            each.least.bound,
            f"{1e3 * each.least.collective_seconds:.3g}",
            f"{pretty(sum(each.sent.values()))}B",
            f"{pretty(each.bytes_per_device)}B",
            "yes" if each.fits else "no",
        )
    return shown


def blocks_of(model: Any) -> list[BlockSizes]:
    """The blocks of a model with a stack, as their traffic and memory see them."""
    shapes, _ = split(model.abstract_state())
    found = []
    for step in steps_of(model):
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
            )
        )
    return found


def leaves_of(params: Any, table: rules.Table, plan: ParallelPlan, own: rules.Rules) -> list[Leaf]:
    """Where the parameters lie under a plan. Raises ShardingError where they cannot."""
    sizes = dict.fromkeys(AXES, 1) | plan.sizes | ({rules.named(own): 1} if own else {})
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    placed = jax.tree.leaves(rules.shardings(params, table, mesh))
    found = []
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(params), placed, strict=True):
        axes = [axis for part in place.spec if part for axis in ((part,) if isinstance(part, str) else part)]
        logical = rules.logical_of(rules.path_of(path), leaf.shape, table) or ()
        found.append(Leaf(math.prod(leaf.shape), tuple(axes), "expert" in logical))
    return found


def _ways(plan: ParallelPlan, axes: tuple[str, ...]) -> int:
    return math.prod(plan.sizes.get(axis, 1) for axis in axes)


def _numbers(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
