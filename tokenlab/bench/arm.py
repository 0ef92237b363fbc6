"""Arms: one stack each, compiled as a train step or as a forward pass and ready to be timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from tokenlab import models
from tokenlab.cost import Cost, count
from tokenlab.sharding import rules
from tokenlab.sharding.rules import path_of, row_sharding
from tokenlab.train import compilation, hardware, state, step
from tokenlab.train.experiment import peak_bytes
from tokenlab.train.optimizer import Optimizer

Mode: TypeAlias = Literal["train", "inference"]
MODES: tuple[Mode, ...] = ("train", "inference")

EXECUTIONS = ("scan", "unroll")


@dataclass(frozen=True, eq=False)
class Setting:
    """What all arms of a benchmark have in common.

    Attributes:
      model: `config.model`; each arm brings its own stack.
      spec: key -> (shape of one example, dtype).
      num_outputs: logits.
      task, optimizer: of the train step.
      mesh: the devices.
      batch: name -> [B, ...] on the devices.
      rule: of the rules for devices the one that holds; its options for the compiler are of train steps.
    """

    model: Mapping[str, Any]
    spec: Mapping[str, tuple[tuple[int, ...], str]]
    num_outputs: int
    task: Any
    optimizer: Optimizer
    mesh: Mesh
    batch: Mapping[str, Array]
    rule: hardware.Applied | None = None

    @property
    def batch_size(self) -> int:
        """B, examples a step."""
        return len(self.batch["mask"])

    @property
    def rows(self) -> NamedSharding:
        """Rows over the batch axes."""
        return batch_sharding(self.mesh)

    def build(self, stack: str | None, mode: Mode, execution: str) -> Any:
        """The model over a stack; inference leaves `train_only` items out."""
        return models.build(
            {**self.model, "execution": execution},
            spec=self.spec,
            num_outputs=self.num_outputs,
            stack=stack,
            train=mode == "train",
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch go."""
    return row_sharding(mesh)


class Shelf:
    """Weights (and what is trained with them) by their shapes.

    Arms whose weights have the same shapes use the same ones in turn, so that memory holds one set and not one an arm.
    """

    def __init__(self) -> None:
        self._slots: dict[Any, Slot] = {}

    def slot(self, create: Callable[[], Any], shardings: Any) -> Slot:
        """The place of what `create` makes; it is made when first asked for."""
        leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(create))
        key = tuple((path_of(path), leaf.shape, leaf.dtype) for path, leaf in leaves)
        if key not in self._slots:
            self._slots[key] = Slot(jax.jit(create, out_shardings=shardings)())
        return self._slots[key]


@dataclass(eq=False)
class Slot:
    """One tree of arrays; a step that consumes it puts the next one in its place."""

    value: Any


@dataclass(frozen=True, eq=False)
class Arm:
    """A compiled program that can be run and has been counted.

    Attributes:
      model: whose.
      mode: "train" (forward, backward and optimizer) or "inference" (forward).
      execution: "scan" or "unroll".
      cost: counted, of one step; the optimizer is not in it.
      compiled: the program.
      compile_seconds: tracing and compiling, without the persistent cache.
      once: starts one step; returns an array that is ready when it is done. A step waits for the one before it.
    """

    model: Any
    mode: Mode
    execution: str
    cost: Cost
    compiled: jax.stages.Compiled
    compile_seconds: float
    once: Callable[[], Array]

    def run(self, times: int) -> None:
        """Does so many steps and waits for the last."""
        for _ in range(times):
            last = self.once()
        last.block_until_ready()

    @property
    def peak_bytes(self) -> int | None:
        """Memory of one device that the program needs at once; see `tokenlab.train.experiment.peak_bytes`."""
        return peak_bytes(self.compiled)


def prepare_each(
    setting: Setting, stack: str | None, mode: Mode, shelf: Shelf, note: Callable[[str], None]
) -> dict[str, Arm]:
    """An arm for each of the `ways` that a stack can be run.

    Args:
      setting: what it shares with other arms.
      stack: None for the one in the settings.
      mode: what is compiled.
      shelf: of the weights.
      note: is told of each way that was compiled, in a line.

    Raises:
      ConfigError, StackError, NameLookupError, ShapeError, CostError, ShardingError: what does not fit.
    """
    arms: dict[str, Arm] = {}
    for how in ways(setting, stack, mode):
        arms[how] = prepare(setting, stack, mode, how, shelf)
        note(f"{arms[how].model.stack_text} ({mode}, {how}): compiled in {arms[how].compile_seconds:.1f} s")
    return arms


def ways(setting: Setting, stack: str | None, mode: Mode) -> tuple[str, ...]:
    """Ways of running a stack that can differ: the one that the settings ask for, else all.

    A stack in which no equal steps follow each other has nothing to scan over, so it is only unrolled.
    """
    wanted = setting.model.get("execution", "auto")
    if wanted != "auto":
        return (wanted,)
    program = setting.build(stack, mode, "auto").program
    folded, flat = ([step.signature() for step in steps] for steps in (program.folded(), program.steps))
    return EXECUTIONS if folded != flat else ("unroll",)


def prepare(setting: Setting, stack: str | None, mode: Mode, execution: str, shelf: Shelf) -> Arm:
    """Counts and compiles one stack in one way of running it. Arguments and errors as `prepare_each`."""
    model = setting.build(stack, mode, execution)
    return (_train if mode == "train" else _inference)(setting, model, execution, shelf)


def _train(setting: Setting, model: Any, execution: str, shelf: Shelf) -> Arm:
    task, optimizer, batch = setting.task, setting.optimizer, setting.batch
    weights = model.abstract_state()
    key = jax.eval_shape(lambda: jax.random.key(0))
    cost = count(partial(step.loss_and_gradients, model, task), weights, batch, key)
    metrics = step.metric_names(model, task, weights, batch)

    def create() -> state.TrainState:
        return state.create(model, optimizer, metrics, seed=0)

    places = state.shardings(jax.eval_shape(create), model, setting.mesh, offload=optimizer.offload)
    slot = shelf.slot(create, places)
    rule = setting.rule
    xla = None if rule is None else rule.xla
    jitted = step.make_train_step(
        model, task, optimizer, shardings=places, batch_sharding=setting.rows, xla=xla
    )
    with hardware.told(rule):
        compiled, seconds = _compile(jitted, setting.mesh, slot.value, batch)

    def once() -> Array:
        slot.value, report = compiled(slot.value, batch)
        return report.loss

    return Arm(model, "train", execution, cost, compiled, seconds, once)


def _inference(setting: Setting, model: Any, execution: str, shelf: Shelf) -> Arm:
    batch, rows = setting.batch, setting.rows

    def forward(params: Any, batch: Any) -> Array:
        return model.apply(params, batch, train=False).logits

    def following(params: Any, batch: Any, before: Array) -> Array:
        # The logits before are not read. They are an argument so that calls follow each other, as steps do.
        del before
        return forward(params, batch)

    cost = count(forward, model.abstract_state(), batch)
    places = rules.shardings(model.abstract_state(), model.logical_axes(), setting.mesh)
    slot = shelf.slot(lambda: model.init(jax.random.key(0)), places)
    jitted = jax.jit(
        following,
        in_shardings=(places, rows, rows),
        out_shardings=rows,
        donate_argnums=2,
        keep_unused=True,
    )
    shape = jax.eval_shape(forward, slot.value, batch)
    logits = Slot(jax.device_put(jnp.zeros(shape.shape, shape.dtype), rows))
    compiled, seconds = _compile(jitted, setting.mesh, slot.value, batch, logits.value)

    def once() -> Array:
        logits.value = compiled(slot.value, batch, logits.value)
        return logits.value

    return Arm(model, "inference", execution, cost, compiled, seconds, once)


def _compile(jitted: Any, mesh: Mesh, *args: Any) -> tuple[jax.stages.Compiled, float]:
    """The program and the seconds it took to make."""
    with _without_cache(), jax.set_mesh(mesh):
        started = time.perf_counter()
        compiled = jitted.lower(*args).compile()
        return compiled, time.perf_counter() - started


@contextmanager
def _without_cache() -> Iterator[None]:
    """Compile times are those of a first compilation."""
    folder, was_on = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    compilation.use_cache(False)
    try:
        yield
    finally:
        if was_on:
            compilation.use_cache(folder or False)
