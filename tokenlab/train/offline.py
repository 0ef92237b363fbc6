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
      state_bytes: of parameters, optimizer and batch, on each device.
      temporary_bytes: of what the step needs besides, on each device.
      fixed_bytes: of parameters, optimizer and whatever else is state, on each device: all but the batch.
      host_bytes: of the optimizer, in the host's memory for each device (`config.optimizer.offload`).
    """

    compiled: Any
    mesh: jax.sharding.Mesh
    seconds: float
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
    mesh: Mapping[str, int],
    *,
    xla: Mapping[str, Any] | None = None,
) -> Offline:
    """Compile the train step of `config` for `devices`, from shapes alone: no data is read and nothing is run.

    Args:
      config: of the run; its model is scanned, whose program is small, unless the configuration says otherwise.
      spec: key -> (shape, dtype) of one example, as data sources say it.
      num_outputs: logits.
      devices: of `tokenlab.sharding.topology.topology`, or real ones.
      mesh: devices per axis, see `tokenlab.sharding.mesh.make_mesh`.
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
    made = make_mesh(mesh, devices, rules=config.mesh.rules)
    places = states.shardings(shapes, model, made, offload=optimizer.offload)
    placed = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)
    assert_sharded(placed, made, config.mesh.unsharded)
    held = {False: 0, True: 0}  # on devices, on their hosts
    for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            size = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            held[place.memory_kind == states.HOST] += size
    rows = row_sharding(made)
    start = time.perf_counter()
    with jax.set_mesh(made):
        step = make_train_step(model, task, optimizer, shardings=places, batch_sharding=rows, xla=xla)
        compiled = step.lower(shapes, batch).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    sizes = (int(memory.argument_size_in_bytes), int(memory.temp_size_in_bytes))
    return Offline(compiled, made, seconds, *sizes, held[False], held[True])


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
