"""The training step of a configuration, compiled for devices that need not be there."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from tokenlab import models, tasks
from tokenlab.sharding.check import assert_sharded
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import row_sharding
from tokenlab.train import optimizer as optimizers
from tokenlab.train import schedule, token_clock
from tokenlab.train import state as states
from tokenlab.train.config import TrainConfig
from tokenlab.train.costs import Spec, batch_shapes
from tokenlab.train.step import make_train_step, metric_names


@dataclass(frozen=True)
class Offline:
    """A compiled step.

    Attributes:
      compiled: of `jax.jit(...).lower(...).compile()`; `tokenlab.sharding.check` reads it.
      mesh: it was compiled for.
      seconds: that compiling took.
      cpu_seconds: of processors, which is what it takes on one that does nothing else.
      state_bytes: of parameters, optimizer and batch (whatever the step takes), on each device.
      temporary_bytes: of what the step needs besides, on each device.
      fixed_bytes: of parameters, optimizer and whatever else is state, on each device: all but the batch.
      host_bytes: of the optimizer, in the host's memory for each device (`config.optimizer.offload`).
    """

    compiled: Any
    mesh: jax.sharding.Mesh
    seconds: float
    cpu_seconds: float
    state_bytes: int
    temporary_bytes: int
    fixed_bytes: int
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Memory that a device needs."""
        return self.state_bytes + self.temporary_bytes


def compile_step(
    config: TrainConfig,
    spec: Spec,
    num_outputs: int,
    devices: Sequence[Any],
    mesh: Mapping[str, int] | None,
    *,
    xla: Mapping[str, Any] | None = None,
) -> Offline:
    """Compile the train step of `config` for `devices`, from shapes alone: no data is read and nothing is run.

    Args:
      config: of the run; its model is scanned, whose program is small, unless the configuration says otherwise.
      spec: key -> (shape, dtype) of one example, as data sources say it.
      num_outputs: logits.
      devices: of `tokenlab.sharding.topology.topology`, or real ones.
      mesh: devices per axis, see `tokenlab.sharding.mesh.make_mesh`; None for that of the configuration.
      xla: options of the compiler, by its names for them.

    Raises:
      TokenLabError: what does not fit. What the compiler raises, such as too little memory, passes through.
    """
    settings = dict(config.model)
    if settings.get("execution", "auto") == "auto":
        settings["execution"] = "scan"
    first = schedule.stack_vars(config.stack_vars, config.steps).at(0)
    model = models.build(settings, spec=spec, num_outputs=num_outputs, stack_vars=first)
    task = tasks.build(config.task)
    optimizer = optimizers.build(config.optimizer, config.steps, _clock(config, settings, spec, num_outputs))
    batch = batch_shapes(spec, config.batch_size)
    names = metric_names(model, task, model.abstract_state(), batch)
    shapes = jax.eval_shape(lambda: states.create(model, optimizer, names, config.seed))
    made = mesh_of(config, devices, mesh)
    places = states.shardings(shapes, model, made, offload=optimizer.offload)
    placed = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)
    assert_sharded(placed, made, config.mesh.unsharded)
    held = {False: 0, True: 0}  # on devices, on their hosts
    for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            size = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            held[place.memory_kind == states.HOST] += size
    rows = row_sharding(made)
    step = make_train_step(model, task, optimizer, shardings=places, batch_sharding=rows, xla=xla)
    return lowered(step, (shapes, batch), made, held[False], held[True])


def mesh_of(
    config: TrainConfig, devices: Sequence[Any], sizes: Mapping[str, int] | None
) -> jax.sharding.Mesh:
    """The mesh of these sizes with the rules of a configuration; None: the one that a run of it has."""
    if sizes is None:
        return config.mesh.build(devices)
    return make_mesh(sizes, devices, rules=config.mesh.rules)


def lowered(
    step: Any, inputs: Sequence[Any], mesh: jax.sharding.Mesh, fixed: int, on_host: int = 0
) -> Offline:
    """A jitted function compiled for a mesh.

    Args:
      step: of `jax.jit`, with the shardings of what it takes.
      inputs: trees of ShapeDtypeStructs.
      mesh: of devices that need not be there.
      fixed, on_host: `Offline.fixed_bytes` and `Offline.host_bytes`.
    """
    start, used = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        compiled = step.lower(*inputs).compile()
    seconds, used = time.perf_counter() - start, time.process_time() - used
    memory = compiled.memory_analysis()
    new = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)  # in no input's place
    state, temporary = int(memory.argument_size_in_bytes), int(memory.temp_size_in_bytes + new)
    return Offline(compiled, mesh, seconds, used, state, temporary, fixed, on_host)


def _clock(
    config: TrainConfig, settings: Mapping[str, Any], spec: Mapping[str, Any], num_outputs: int
) -> schedule.Clock | None:
    """The clock of the learning rate; the models that it needs are built and not compiled."""
    name = config.optimizer.schedule.clock
    if name == "steps":
        return None
    variables = schedule.stack_vars(config.stack_vars, config.steps)
    built = {
        schedule.values_key(values): models.build(
            settings, spec=spec, num_outputs=num_outputs, stack_vars=values
        )
        for values in variables.distinct(config.steps)
    }
    return token_clock.build(name, variables, built, config.steps)
