"""What a trained model does, compiled for devices that need not be there: an evaluation, a prompt, one more token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokenlab import models, tasks
from tokenlab.core.errors import ConfigError
from tokenlab.cost import Cost, count
from tokenlab.models.decoder_lm import DecoderLM, Generation
from tokenlab.ops.cache import KVCache
from tokenlab.sharding import rules
from tokenlab.sharding.rules import row_sharding
from tokenlab.train import schedule
from tokenlab.train.config import TrainConfig
from tokenlab.train.costs import Spec, batch_shapes, forward_cost
from tokenlab.train.offline import Offline, lowered, mesh_of
from tokenlab.train.step import make_eval_step

Serving: TypeAlias = Literal["evaluate", "prefill", "decode"]
SERVING: tuple[Serving, ...] = ("evaluate", "prefill", "decode")


@dataclass(frozen=True)
class Served:
    """A function of a trained model, and the shapes of what it takes.

    Attributes:
      run: what is compiled.
      inputs: its arguments; the weights come first.
      places: (mesh) -> the shardings of the arguments.
      donated: the argument whose memory the result takes, or None.
      cost: (examples) -> what they cost together, counted.
      model: whose it is.
    """

    run: Callable[..., Any]
    inputs: tuple[Any, ...]
    places: Callable[[Mesh], tuple[Any, ...]]
    donated: int | None
    cost: Callable[[int], Cost]
    model: Any


def served(config: TrainConfig, spec: Spec, num_outputs: int, step: Serving, new: int) -> Served:
    """The function that `step` names, of the model of a configuration, on `config.batch_size` examples.

    Args:
      config: of the run; its model is scanned unless it says otherwise, with `config.eval.stack` where that is given.
      spec: key -> (shape, dtype) of one example, as data sources say it.
      num_outputs: logits.
      step: "evaluate", the evaluation step of any model; of a decoder, "prefill" reads prompts as long as the sequences
        it trains on and "decode" one more token, with memories that have room for the prompt and `new` tokens.
      new: tokens that may follow a prompt, at least 1.

    Raises:
      ConfigError: an unknown step, or a model that does not generate.
      TokenLabError: what does not fit.
    """
    if step not in SERVING:
        raise ConfigError(f"compile: step {step!r} is unknown; expected train, {', '.join(SERVING)}.")
    settings = dict(config.model)
    if settings.get("execution", "auto") == "auto":
        settings["execution"] = "scan"
    if config.eval.stack is not None:
        settings["stack"] = config.eval.stack
    values = schedule.stack_vars(config.stack_vars, config.steps).usual(0)
    model = models.build(settings, spec=spec, num_outputs=num_outputs, stack_vars=values, train=False)
    if step == "evaluate":
        return _evaluation(model, tasks.build(config.task), spec, config.batch_size)
    if not isinstance(model, DecoderLM):
        name = settings.get("name", "vit")
        raise ConfigError(f"compile: {name} does not generate, so it has no step {step!r}; take evaluate.")
    return _generation(model, model.generation(model.length, new), step, config.batch_size)


def compile_serving(
    config: TrainConfig,
    made: Served,
    devices: Sequence[Any],
    mesh: Mapping[str, int] | None,
) -> Offline:
    """Compile it for `devices`, from shapes alone; see `tokenlab.train.offline.compile_step`."""
    there = mesh_of(config, devices, mesh)
    places = made.places(there)
    donated = () if made.donated is None else (made.donated,)
    fixed = sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(made.inputs[0]), jax.tree.leaves(places[0]), strict=True)
    )
    step = jax.jit(made.run, in_shardings=places, donate_argnums=donated)
    return lowered(step, made.inputs, there, fixed)


def _evaluation(model: Any, task: Any, spec: Spec, batch_size: int) -> Served:
    index = jax.ShapeDtypeStruct((), jnp.int32)
    inputs = (model.abstract_state(), batch_shapes(spec, batch_size), index)

    def places(mesh: Mesh) -> tuple[Any, ...]:
        return _weights(model, mesh), row_sharding(mesh), _whole(mesh)

    return Served(
        make_eval_step(model, task), inputs, places, None, partial(forward_cost, model, task, spec), model
    )


def _generation(model: DecoderLM, functions: Generation, step: Serving, batch_size: int) -> Served:
    """Weights are read as they are trained, in float32, and laid out for the loop within the program."""

    def prefill(state: Any, ids: Any, length: Any, more: Any) -> Any:
        return functions.prefill(functions.prepare(state), ids, length, **more)

    def decode(state: Any, ids: Any, memory: Any, more: Any) -> Any:
        return functions.step(functions.prepare(state), ids, memory, **more)

    def inputs(batch: int, step: Serving) -> tuple[Any, ...]:
        one = jax.ShapeDtypeStruct((batch,), jnp.int32)
        prompt = jax.ShapeDtypeStruct((batch, functions.prompt), jnp.int32)
        before = (model.abstract_state(), prompt, one, {"modality": prompt} if model.modal else {})
        if step == "prefill":
            return before
        memory = jax.eval_shape(prefill, *before)[1]
        return model.abstract_state(), one, memory, {"modality": one} if model.modal else {}

    def places(mesh: Mesh) -> tuple[Any, ...]:
        _, ids, other, more = inputs(batch_size, step)
        rows = row_sharding(mesh)
        held = rows
        if step == "decode":
            held = jax.tree.map(
                partial(_of_memory, mesh), other, is_leaf=lambda leaf: isinstance(leaf, KVCache)
            )
        return _weights(model, mesh), rows, held, jax.tree.map(lambda _: rows, more)

    run = prefill if step == "prefill" else decode
    run.__name__ = f"{step}_step"
    donated = 2 if step == "decode" else None
    return Served(
        run, inputs(batch_size, step), places, donated, lambda size: count(run, *inputs(size, step)), model
    )


def _of_memory(mesh: Mesh, leaf: Any) -> Any:
    """A memory along the batch, and by heads too where they can be shared out."""

    def place(part: Any, *logical: str | None) -> NamedSharding:
        names = (*((None,) if part.ndim > len(logical) else ()), *logical)  # of a stack: [layers, B, ...]
        return NamedSharding(mesh, rules.spec(names, tuple(part.shape), mesh, what="a memory"))

    if not isinstance(leaf, KVCache):
        return place(leaf, "batch")
    heads = "heads" if leaf.key.shape[-3] % rules.ways("heads", mesh) == 0 else None
    rows = place(leaf.key, "batch", heads, None, None)
    one = place(leaf.used, "batch")
    return KVCache(rows, rows, place(leaf.position, "batch", None), one, one)


def _weights(model: Any, mesh: Mesh) -> Any:
    return rules.shardings(model.abstract_state(), model.logical_axes(), mesh)


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
