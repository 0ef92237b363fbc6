"""Where everything of a train step lies on a mesh, as lines of text: parameters, optimizer, constrained activations.

From shapes alone: nothing is computed or compiled, and the model may be of any size. Tests keep such texts of the
recipes of configs/sharding/, so that a change of a rule, a table or a constraint is seen in all that it touches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokenlab import models, tasks
from tokenlab.layers.statistics import join
from tokenlab.sharding.constrain import recorded
from tokenlab.sharding.rules import logical_of, path_of, sizes_of
from tokenlab.train import optimizer as optimizers
from tokenlab.train import schedule
from tokenlab.train import state as states
from tokenlab.train.config import TrainConfig
from tokenlab.train.costs import Spec, batch_shapes
from tokenlab.train.step import metric_names

_FREE = PartitionSpec.UNCONSTRAINED


def layout(config: TrainConfig, spec: Spec, num_outputs: int, mesh: Mesh) -> list[str]:
    """One line a leaf: "path  dtype[shape]  (logical axes)  PartitionSpec  bytes a device".

    First the mesh, then parameters and statistics, the optimizer's state and averages, and last what
    `tokenlab.sharding.constrain` is asked for in a forward pass of training, each kind of it once: of a model that is
    scanned, once for the blocks of a loop.

    Args:
      config: of the run; a model that leaves it open is scanned.
      spec: key -> (shape, dtype) of one example.
      num_outputs: logits.
      mesh: of devices that are there, as many as it takes.

    Raises:
      TokenLabError: what does not fit.
    """
    settings = dict(config.model)
    if settings.get("execution", "auto") == "auto":
        settings["execution"] = "scan"
    values = schedule.stack_vars(config.stack_vars, config.steps).at(0)
    model = models.build(settings, spec=spec, num_outputs=num_outputs, stack_vars=values)
    task, optimizer = tasks.build(config.task), optimizers.build(config.optimizer, config.steps)
    batch = batch_shapes(spec, config.batch_size)
    names = metric_names(model, task, model.abstract_state(), batch)
    shapes = jax.eval_shape(lambda: states.create(model, optimizer, names, 0))
    places = states.shardings(shapes, model, mesh, offload=optimizer.offload)
    table = model.logical_axes()
    lines = ["mesh " + " ".join(f"{axis}={size}" for axis, size in sizes_of(mesh).items() if size > 1)]
    for part in ("params", "statistics", "optimizer", "ema"):
        leaves = jax.tree_util.tree_leaves_with_path(getattr(shapes, part))
        for (key_path, leaf), place in zip(leaves, jax.tree.leaves(getattr(places, part)), strict=True):
            path = path_of(key_path)
            lines.append(_line(f"{part}/{path}", leaf, _logical(path, leaf.shape, table), place))
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh), recorded() as found:
        jax.eval_shape(
            lambda params, batch, key: task.loss(model, params, batch, rng=key, train=True),
            join(shapes.params, shapes.statistics),
            batch,
            key,
        )
    for each in dict.fromkeys(found):
        leaf = jax.ShapeDtypeStruct(each.shape, jnp.dtype(each.dtype))
        place = NamedSharding(mesh, each.spec)
        lines.append(_line(f"activation {each.scope or '(a loop of blocks)'}", leaf, each.logical, place))
    return lines


def _line(what: str, leaf: Any, logical: Sequence[Any] | None, place: NamedSharding) -> str:
    """One array; the bytes of dimensions that are the compiler's to split are whole."""
    shape = ",".join(map(str, leaf.shape))
    fixed = NamedSharding(
        place.mesh, PartitionSpec(*(None if part is _FREE else part for part in place.spec))
    )
    size = math.prod(fixed.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    names = ("..." if name is ... else name or "-" for name in logical or ())
    axes = "-" if logical is None else f"({', '.join(names)})"
    where = "" if place.memory_kind in (None, "device") else f" in {place.memory_kind}"
    return f"{what}  {leaf.dtype.name}[{shape}]  {axes}  {_spec(place.spec)}{where}  {size}"


def _spec(spec: PartitionSpec) -> str:
    """A PartitionSpec without jax's ways of printing it."""
    parts = []
    for part in spec:
        if part is None or part is _FREE:
            parts.append("-" if part is None else "...")
        else:
            parts.append(part if isinstance(part, str) else "+".join(part))
    return f"P({', '.join(parts)})"


def _logical(path: str, shape: tuple[int, ...], table: Any) -> tuple[str | None, ...] | None:
    """The logical axes of a parameter, or of what the optimizer has of one; None of anything else."""
    axes = logical_of(path, shape, table)
    return axes if axes is not None and len(axes) == len(shape) else None
