"""`tokenlab compile`: would this configuration run on those devices, and how fast could it be at best?

The train step, or one of what a trained model does, is compiled for devices that need not be there, from shapes alone:
neither they nor the data are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from ml_collections.config_dict import ConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokenlab import models, tasks
from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import CostError, ShardingError
from tokenlab.cost import Cost, Roofline, lookup, pretty, roofline
from tokenlab.data.outline import outline
from tokenlab.sharding import rules
from tokenlab.sharding.axes import of_experts
from tokenlab.sharding.check import Collective
from tokenlab.sharding.topology import check_compiler, other_libtpu, topology
from tokenlab.sharding.traffic import Traffic, executed, summed
from tokenlab.train import hardware as hardware_rules
from tokenlab.train import offline_serving, schedule
from tokenlab.train.compilation import cache_folder
from tokenlab.train.config import TrainConfig
from tokenlab.train.costs import train_cost
from tokenlab.train.offline import compile_step

HERE = "here"
"""The topology that is the devices of this process."""

NEW = 256
"""Tokens behind a prompt, where nobody says how many."""

_GATHERED = ("embed", "expert_embed")
_OVER = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class CompileReport:
    """What is known of a train step on devices before it runs.

    Attributes:
      config: that was compiled, as the command names it.
      topology: of the devices, such as "v5e:16x16".
      mesh: devices by axis.
      step: what was compiled: "train", or one of `tokenlab.train.offline_serving.SERVING`.
      batch_size: examples a step, over all devices.
      devices: how many.
      chip: their kind.
      bytes_per_device: memory that each needs at once.
      state_bytes: of it, what does not depend on the batch: parameters and, in training, optimizer and averages.
      hbm_bytes: memory that each has; None where it is not known.
      fits: whether the one is at most the other; None where the other is not known.
      flops_per_device: counted, of loss and gradients with what is computed again, shared evenly.
      collectives: what each device sends in a step, by kind; None where that is not known.
      across_expert: of them, those between devices that hold different experts; None as above, or without an axis
        "expert".
      collectives_unknown: why they are None; None where they are known.
      roofline: the least time of a step; None where the chip's figures or the collectives are not known.
      batch_that_fits: about the largest batch that would fit, a multiple of the devices that share it; None as above.
      compile_seconds: that compiling took.
      compile_cpu_seconds: of processors, which is what it takes on one that does nothing else.
      rule: the rule of `config.hardware` that holds there, in one line; None of a configuration without rules.
    """

    config: str
    topology: str
    mesh: Mapping[str, int]
    step: str
    batch_size: int
    devices: int
    chip: str
    bytes_per_device: int
    state_bytes: int
    hbm_bytes: int | None
    fits: bool | None
    flops_per_device: int
    collectives: tuple[Traffic, ...] | None
    across_expert: tuple[Traffic, ...] | None
    collectives_unknown: str | None
    roofline: Roofline | None
    batch_that_fits: int | None
    compile_seconds: float
    compile_cpu_seconds: float
    rule: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, with bytes and FLOPs as integers, and seconds."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "roofline"}
        found["mesh"] = dict(self.mesh)
        for name, keys in (
            ("collectives", ("kind", "count", "bytes")),
            ("across_expert", ("kind", "count", "bytes", "largest")),
        ):
            kinds = found[name]
            found[name] = (
                None if kinds is None else [{key: getattr(each, key) for key in keys} for each in kinds]
            )
        least = self.roofline
        found["step_seconds_bound"] = None if least is None else least.seconds
        found["bound"] = None if least is None else least.bound
        found["seconds_by_resource"] = None if least is None else dataclasses.asdict(least)
        return found

    def to_rich(self) -> RenderableType:
        """For a terminal."""
        shown = Table(
            box=SIMPLE_HEAD,
            show_header=False,
            title=f"{self.config} on {self.topology}, {self.step} step",
            title_justify="left",
        )
        shown.add_column()
        shown.add_column()
        axes = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        shown.add_row("devices", f"{self.devices} x {self.chip}: {axes}")
        shown.add_row("batch", f"{self.batch_size:,} examples")
        shown.add_row("memory a device", self._memory())
        if self.batch_that_fits is not None:
            shown.add_row("batch that would fit", f"about {self.batch_that_fits:,}")
        shown.add_row("counted FLOPs a device", pretty(self.flops_per_device))
        if self.collectives is None:
            shown.add_row("collectives", f"not known: {self.collectives_unknown}")
        for each in self.collectives or ():
            shown.add_row(f"{each.kind} a step", f"{each.count:,}, {pretty(each.bytes)}B sent by a device")
        if self.roofline is not None:
            shown.add_row("least time of a step", self._time(self.roofline))
        spent = f"{self.compile_seconds:.0f} s, {self.compile_cpu_seconds:.0f} s of processors"
        shown.add_row("compiled in", spent)
        return Group(shown, *([] if self.rule is None else [Text(self.rule)]), Text(self.verdict))

    @property
    def verdict(self) -> str:
        """One line."""
        if self.fits is None:
            return f"no memory size is known for {self.chip}: whether it fits cannot be told"
        if self.fits:
            return "it fits"
        return (
            f"it does NOT fit: {pretty(self.bytes_per_device - (self.hbm_bytes or 0))}B too much a device. What "
            "helps: a smaller config.batch_size, more of fsdp in the mesh, config.model.remat='full', or "
            "config.optimizer.accumulate."
        )

    def _memory(self) -> str:
        rest = self.bytes_per_device - self.state_bytes
        text = (
            f"{pretty(self.bytes_per_device)}B: {pretty(self.state_bytes)}B of state, {pretty(rest)}B besides"
        )
        return text if self.hbm_bytes is None else f"{text}, of {pretty(self.hbm_bytes)}B"

    @staticmethod
    def _time(least: Roofline) -> str:
        resources = {
            "compute": least.compute_seconds,
            "memory": least.memory_seconds,
            "links": least.collective_seconds,
        }
        each = ", ".join(f"{what} {1e3 * seconds:.3g} ms" for what, seconds in resources.items())
        return f"{1e3 * least.seconds:.3g} ms, bound by {least.bound} ({each})"


def compile_report(
    config: Mapping[str, Any] | ConfigDict | TrainConfig,
    name: str,
    where: str,
    *,
    mesh: Mapping[str, int] | None = None,
    num_outputs: int | None = None,
    step: str = "train",
    new: int = NEW,
) -> CompileReport:
    """Compile a step of a configuration for devices, and say what it would take there.

    Args:
      config: of a run.
      name: what to call it.
      where: kind and shape of a TPU slice, such as "v5e:16x16", or "here" for the devices of this process.
      mesh: devices per axis; None for that of the configuration.
      num_outputs: logits, where the data is not here and does not say them.
      step: "train", or what a trained model does, see `tokenlab.train.offline_serving.served`.
      new: tokens that memories have room for behind a prompt, in "decode".

    Raises:
      ShardingError: no libtpu, no such slice, or a mesh that does not fit it.
      TokenLabError: what is wrong with the configuration, or data that is not here and that nothing describes.
    """
    config = to_dataclass(TrainConfig, config)
    if mesh:
        config = hardware_rules.without_mesh(config)
    config, rule = hardware_rules.on(config) if where == HERE else hardware_rules.at(config, where)
    facts, task = outline(config.data), tasks.build(config.task)
    outputs = task.num_outputs(facts) if num_outputs is None else num_outputs
    if step == "train":
        first = schedule.stack_vars(config.stack_vars, config.steps).usual(0)
        model = models.build(config.model, spec=facts.spec, num_outputs=outputs, stack_vars=first)

        def counts(size: int) -> Cost:
            only = config.optimizer.only
            return train_cost(model, task, facts.spec, size, only, execution="scan")

        options = None if rule is None else rule.xla
        compiles = partial(compile_step, config, facts.spec, outputs, xla=options)
    else:
        function = offline_serving.served(config, facts.spec, outputs, step, new)
        model, counts = function.model, function.cost
        compiles = partial(offline_serving.compile_serving, config, function)
    if where != HERE:
        check_compiler(where)  # which nobody has to wait for
    with contextlib.nullcontext() if where == HERE else one_at_a_time():
        devices: Sequence[Any] = jax.devices() if where == HERE else topology(where)
        sizes = _whole(mesh, len(devices)) if mesh else config.mesh.sizes(len(devices))
        made, over = None, None
        try:
            with hardware_rules.told(rule):
                made = compiles(devices, mesh and sizes)
        except jax.errors.JaxRuntimeError as error:
            if (over := used_bytes(str(error))) is None:
                raise
    one, two = counts(1), counts(2)
    cost = one * config.batch_size
    chip = devices[0].device_kind
    hardware = _datasheet(chip)
    ran, reason = None, None if over is None else "no program was made"
    if made is not None:
        said = _executed(made.compiled)
        ran, reason = (None, said) if isinstance(said, str) else (said, None)
    least = None
    if made is not None and hardware is not None and ran is not None:
        each = two.bytes - one.bytes  # what is left does not grow with the batch: weights and gradients
        shared = weights_read(model, made.mesh) * (one.bytes - each)
        moved = round(each * config.batch_size / len(devices) + shared)
        share = dataclasses.replace(cost, flops=cost.flops // len(devices), bytes=moved)
        least = _roofline(share, config, hardware, summed(ran, len(devices)))
    crossing = None
    if made is not None and ran is not None and (axes := expert_axes(made.mesh)):
        over_experts = [(each, times) for each, times in ran if each.crosses(made.mesh, axes)]
        crossing = tuple(summed(over_experts, len(devices)))
    needed = over if made is None else made.peak_bytes
    memory = None if hardware is None else int(hardware.hbm_bytes)
    return CompileReport(
        config=name,
        topology=where,
        mesh=sizes,
        step=step,
        batch_size=config.batch_size,
        devices=len(devices),
        chip=chip,
        bytes_per_device=int(needed or 0),
        state_bytes=0 if made is None else made.fixed_bytes,
        hbm_bytes=memory,
        fits=None if memory is None else made is not None and made.peak_bytes <= memory,
        flops_per_device=cost.flops // len(devices),
        collectives=None if ran is None else tuple(summed(ran, len(devices))),
        across_expert=crossing,
        collectives_unknown=reason,
        roofline=least,
        batch_that_fits=_largest(made, memory, config.batch_size),
        compile_seconds=0.0 if made is None else made.seconds,
        compile_cpu_seconds=0.0 if made is None else made.cpu_seconds,
        rule=None if rule is None else str(rule),
    )


def weights_read(model: Any, mesh: jax.sharding.Mesh) -> float:
    """The share of a model's weights that one device computes with: all but what other devices hold for good.

    What is split along "embed" is brought together first; along other axes parts stay where they are.
    """
    whole = model.abstract_state()
    table = {
        path: tuple(None if axis in _GATHERED else axis for axis in axes)
        for path, axes in model.logical_axes().items()
    }
    places = rules.shardings(whole, table, mesh)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(whole))
    read = sum(
        math.prod(place.shard_shape(leaf.shape))
        for leaf, place in zip(jax.tree.leaves(whole), jax.tree.leaves(places), strict=True)
    )
    return read / total


def expert_axes(mesh: jax.sharding.Mesh) -> tuple[str, ...]:
    """Axes of a mesh along which devices hold different experts."""
    return of_experts((axis for axis, size in mesh.shape.items() if size > 1), "expert")


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Waits until no other process of this user compiles for a TPU: libtpu is made for one process a machine."""
    folder = cache_folder().parent
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "compile.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.pread(handle, 100, 0).decode(errors="replace").strip() or "another process"
            print(f"waiting for {other}, which compiles for a TPU", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)  # which unlocks it, as the end of the process would


def used_bytes(message: str) -> int | None:
    """The memory that a program would have used, of a compiler's complaint that it is too much; None of any other."""
    found = _OVER.search(message)
    return int(float(found[1]) * _UNITS[found[2].upper()]) if found else None


def _whole(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Sizes of a mesh with -1 worked out, where that can be done."""
    rest = devices // max(1, math.prod(size for size in sizes.values() if size > 0))
    return {axis: rest if size == -1 else size for axis, size in sizes.items()}


def _datasheet(chip: str) -> Any:
    try:
        return lookup(chip)
    except CostError:
        return None


def _executed(compiled: Any) -> list[tuple[Collective, int]] | str:
    """What is sent, or why that is not known: this jaxlib may be unable to read what another libtpu has made."""
    try:
        return executed(compiled)
    except jax.errors.JaxRuntimeError as error:
        return other_libtpu() or f"jaxlib cannot read the program: {str(error).strip().splitlines()[0]}"
    except ShardingError as error:
        return str(error)


def _roofline(cost: Cost, config: TrainConfig, hardware: Any, sent: list[Traffic]) -> Roofline:
    """The least time of what one device computes, moves and sends."""
    total = sum(each.bytes for each in sent) if hardware.link_bandwidth else 0
    peaks = hardware.peaks(config.model.get("dtype", "float32"))
    return roofline(cost, peaks, collective_bytes=total, link_bandwidth=hardware.link_bandwidth)


def _largest(made: Any, memory: int | None, batch: int) -> int | None:
    """About the largest batch: what is not state grows with it."""
    if made is None or memory is None:
        return None
    each = (made.peak_bytes - made.fixed_bytes) / batch
    ways = rules.ways("batch", made.mesh)
    return max(0, int((memory - made.fixed_bytes) / each) // ways * ways) if each > 0 else None
