"""`tokenlab compile --search`: every legal mapping of a configuration onto a number of devices, ranked by the roofline.

Nothing is compiled: FLOPs are counted once, and what a mapping sends is taken from `tokenlab.cost.mapping`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections.config_dict import ConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import ConfigError, CostError, ShardingError
from tokenlab.cost import Roofline, lookup, pretty
from tokenlab.cost.hardware import Hardware
from tokenlab.cost.mapping import Sent
from tokenlab.sharding.plan import ParallelPlan, every_plan
from tokenlab.sharding.slices import Slices
from tokenlab.train import hardware as hardware_rules
from tokenlab.train.config import MeshConfig, TrainConfig
from tokenlab.train.records import write_atomic
from tokenlab.train.scaling import Scaling

SHOWN = 15
"""Mappings in the table of a terminal."""

_PIPE_WIDTH = 140


@dataclass(frozen=True)
class Ranked:
    """A mapping, and what is estimated of it.

    Attributes:
      plan: the mapping.
      sent: bytes that a device sends in a step, by what for.
      least: the roofline of a step.
      state_bytes: of parameters, gradients and optimizer on a device.
      bytes_per_device: with activations.
      fits: whether that is at most the chip's memory.
    """

    plan: ParallelPlan
    sent: Sent
    least: Roofline
    state_bytes: int
    bytes_per_device: int
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """Everything, with the mesh by axis, and the values of `config.mesh` that make it."""
        return {
            **dataclasses.asdict(self.plan),
            "mesh": dict(self.plan.sizes),
            "settings": self.plan.settings,
            "folded": self.plan.folded,
            "collective_bytes": dataclasses.asdict(self.sent),
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
    slices: int = 1,
    num_outputs: int | None = None,
) -> list[Ranked]:
    """All legal mappings of a configuration onto so many devices of a chip, the best first.

    First those that fit, then by the least time of a step; of those within a hundredth that which takes less where
    nothing overlaps, then that of less memory. `config.mesh` is not looked at, but for its rules.

    Args:
      config: of a run, of a model with a stack of blocks.
      devices: how many, over all slices.
      chip: a datasheet with a `link_bandwidth`, and with a `far_bandwidth` for several slices.
      slices: in how many the devices lie, as many in each.
      num_outputs: logits, where the data is not here and does not say them.

    Raises:
      CostError: nothing is known of the chip's links.
      ConfigError: a model without blocks, or no legal mapping.
    """
    config = to_dataclass(TrainConfig, config)
    for bandwidth, what in (
        (chip.link_bandwidth, "its links"),
        (chip.far_bandwidth, "the network of slices"),
    ):
        if not bandwidth and (slices > 1 or what == "its links"):
            raise CostError(
                f"{chip.name}: no bandwidth of {what} is stated, so mappings cannot be ranked on it."
            )
    scaling, batch = Scaling(config, num_outputs), config.batch_size
    if not scaling.blocks:
        raise ConfigError(f"compile: model {config.model.get('name')!r} has no stack of blocks to map.")
    has_experts, tokens = any(block.choices for block in scaling.blocks), scaling.blocks[0].tokens
    found = []
    for plan in every_plan(devices, fsdp=True, beyond=True):
        if not has_experts and (plan.ep > 1 or plan.etp != plan.tp):
            continue
        if not scaling.divides(plan.sizes, batch):
            continue
        try:
            if tokens < 16 * plan.cp * plan.tp:  # of fewer, padding would be much
                plan.validate(seq=tokens)
            sent = scaling.sent(plan.sizes, batch, slices)
        except ShardingError:
            continue
        least = scaling.least(plan.sizes, batch, chip, slices)
        state, kept = scaling.held(plan.sizes, batch)
        found.append(Ranked(plan, sent, least, state, state + kept, state + kept <= chip.hbm_bytes))
    if not found:
        raise ConfigError(
            f"compile: no mapping of {devices} devices divides the model and config.batch_size={batch}"
            + (f", with data or fsdp a multiple of {slices} slices." if slices > 1 else ".")
        )
    best = min(each.least.seconds for each in found)
    return sorted(
        found,
        key=lambda each: (
            not each.fits,
            round(math.log(each.least.seconds / best) / math.log(1.01)),
            each.least.in_turn,
            each.bytes_per_device,
        ),
    )


def chip_of(asked: Slices) -> Hardware:
    """The datasheet of a kind of TPU, or of another device. Raises CostError where there is none."""
    try:
        return lookup(f"TPU {asked.kind}")
    except CostError:
        return lookup(asked.kind)


def command(
    config: Any, name: str, topology: str, *, outputs: int | None = None, json_file: str | None = None
) -> int:
    """`tokenlab compile --search`: print the ranking, and write all of it as JSON; 3 when no mapping fits."""
    asked = Slices.parse(topology)
    chip, devices, slices = chip_of(asked), asked.devices, asked.count
    given = hardware_rules.without_mesh(to_dataclass(TrainConfig, config))
    given, rule = hardware_rules.applied(given, chip.name, devices)
    found = rank(given, devices, chip, slices=slices, num_outputs=outputs)
    if json_file is not None:
        told = {
            "config": name,
            "topology": topology,
            "devices": devices,
            "slices": slices,
            "chip": chip.name,
            "mappings": [each.to_json() for each in found],
        }
        write_atomic(json_file, json.dumps(told, indent=2) + "\n")
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH)
    if rule is not None:
        console.print(str(rule), markup=False, highlight=False, soft_wrap=True)
    console.print(to_rich(found, f"{name} on {topology}: {min(SHOWN, len(found))} of {len(found)} mappings"))
    for what, folded in (("folded", True), ("unfolded", False)):
        best = next((each for each in found if each.plan.folded == folded), None)
        if best is not None:
            console.print(
                f"best {what}: {best.plan}, {1e3 * best.least.seconds:.4g} ms, {1e3 * best.least.in_turn:.4g} ms if "
                f"nothing overlaps{'' if best.fits else '; it does not fit'}\n  {typed(best.plan, given.mesh)}",
                highlight=False,
                soft_wrap=True,
            )
    return 0 if found[0].fits else 3


def typed(plan: ParallelPlan, mesh: MeshConfig) -> str:
    """The words that make a run use a plan, in place of what its configuration says of the mesh."""
    settings: dict[str, Any] = {}
    for before, usual, prefix in (
        (mesh, MeshConfig(), ""),
        (mesh.experts, MeshConfig().experts, "experts."),
    ):
        for entry in dataclasses.fields(usual):
            value = getattr(usual, entry.name)
            plain = isinstance(value, int | str | None) and entry.name != "unsharded"
            if plain and getattr(before, entry.name) != value:
                settings[prefix + entry.name] = value
    settings |= plan.settings
    return " ".join(shlex.quote(f"--config.mesh.{name}={value}") for name, value in settings.items())


def to_rich(found: list[Ranked], title: str) -> Table:
    """The best of them, for a terminal."""
    shown = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    right = ("least ms", "in turn ms", "links ms", "network ms", "sent a device", "memory a device")
    for column in ("attention | experts", "least ms", "bound", *right[1:], "fits"):
        shown.add_column(column, justify="right" if column in right else "left")
    for each in found[:SHOWN]:
        least = each.least
        shown.add_row(
            str(each.plan),
            f"{1e3 * least.seconds:.4g}",
            least.bound,
            f"{1e3 * least.in_turn:.4g}",
            f"{1e3 * least.collective_seconds:.3g}",
            f"{1e3 * least.network_seconds:.3g}",
            f"{pretty(each.sent.near + each.sent.far)}B",
            f"{pretty(each.bytes_per_device)}B",
            "yes" if each.fits else "no",
        )
    return shown
