"""From a configuration to everything a run needs, with every check that can be made before anything is written."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections.config_dict import ConfigDict

from tokenlab import data, models, tasks
from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import ConfigError, StackError
from tokenlab.core.stack import parse
from tokenlab.cost import flops
from tokenlab.layers.program import BlockStep, steps_of
from tokenlab.layers.statistics import join
from tokenlab.sharding import agree
from tokenlab.sharding.check import assert_sharded
from tokenlab.sharding.rows import RowLayout
from tokenlab.sharding.rules import axes_of, path_of, row_sharding, sizes_of
from tokenlab.train import costs, hardware, initialize, schedule, state, step, token_clock
from tokenlab.train import optimizer as optimizers
from tokenlab.train.config import TrainConfig
from tokenlab.train.evaluation import Evaluated, Evaluator, place
from tokenlab.train.optimizer import Optimizer
from tokenlab.train.state import TrainState

TRAIN_SPLIT = "train"


@dataclass(frozen=True, eq=False)
class CompiledStep:
    """A train step as an executable.

    Attributes:
        run: (state, batch) -> (state, report); the state that goes in is donated.
        flops: counted model FLOPs of one step.
        seconds: it took to compile.
        peak_bytes: memory on each device that it needs at once, as the compiler plans it; None where it does not say.
    """

    run: Callable[..., tuple[TrainState, step.Report]]
    flops: int
    seconds: float
    peak_bytes: int | None


def peak_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Arguments, results and temporary memory of a program on one device, in bytes, counting donated ones once."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return int(sum(sizes) - found.alias_size_in_bytes)


@dataclass(frozen=True, eq=False)
class Experiment:
    """A run that has been checked and not begun: nothing here touches the workdir or computes on a device.

    Attributes:
        config: the configuration.
        source: of the data.
        stream: training batches by step.
        task: the objective.
        mesh: devices by axis.
        optimizer: with schedule, clipping and averaging.
        stack_vars: numbers in the stack by step.
        models: training model for each set of numbers, by `schedule.values_key`.
        metric_names: what a train step sums.
        hardware: which of the configuration's rules for devices holds; None of one without rules.
        skipped: records of this process's training rows that could not be read, as they turn up.
    """

    config: TrainConfig
    source: data.Dataset
    stream: data.TrainStream
    task: Any
    mesh: Mesh
    optimizer: Optimizer
    stack_vars: schedule.StackVars
    models: Mapping[str, Any]
    metric_names: tuple[str, ...]
    hardware: hardware.Applied | None = None
    skipped: set[int] = field(default_factory=set)
    _eval_models: dict[str, Any] = field(default_factory=dict, repr=False)
    _evaluators: dict[Any, Evaluator] = field(default_factory=dict, repr=False)
    _steps: dict[str, Callable[..., Any]] = field(default_factory=dict, repr=False)
    _compiled: dict[str, CompiledStep] = field(default_factory=dict, repr=False)
    _costs: dict[str, flops.Cost] = field(default_factory=dict, repr=False)
    _tables: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def with_seed(self, seed: int) -> Experiment:
        """The same run from another seed. The two share what they compile: nothing compiled depends on the seed."""
        config = dataclasses.replace(self.config, seed=seed)
        stream = _stream(config, self.source, self.row_layout.local)
        return dataclasses.replace(self, config=config, stream=stream, skipped=set())

    # ------------------------------------------------------------------------------------------ models

    def values(self, at: int) -> str:
        """Key of the numbers in the stack at train step `at` (steps done)."""
        return schedule.values_key(self.stack_vars.at(at))

    @property
    def model(self) -> Any:
        """The model of the first step."""
        return self.models[self.values(0)]

    @property
    def usual_model(self) -> Any:
        """The model of the first step, but where numbers alternate of the steps between."""
        return self.models.get(schedule.values_key(self.stack_vars.usual(0)), self.model)

    def eval_model(self, at: int) -> Any:
        """The model that evaluation uses after `at` steps: `config.eval.stack`, or the stack of the last step.

        Numbers that alternate have the value of most steps.
        """
        values = self.stack_vars.usual(max(at - 1, 0))
        key = schedule.values_key(values)
        if key not in self._eval_models:
            self._eval_models[key] = _eval_model(self.config, self.task, self.source, values)
        return self._eval_models[key]

    # ------------------------------------------------------------------------------------------ shapes and shardings

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """Rows over the batch axes."""
        return row_sharding(self.mesh)

    @cached_property
    def abstract_state(self) -> TrainState:
        """The train state as ShapeDtypeStructs that carry their shardings."""
        shapes = jax.eval_shape(self._create, jax.ShapeDtypeStruct((), np.uint32))
        places = state.shardings(shapes, self.model, self.mesh, offload=self.optimizer.offload)
        return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, places)

    @property
    def state_shardings(self) -> TrainState:
        """Shardings of the train state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A global training batch as ShapeDtypeStructs."""
        return costs.batch_shapes(self.source.spec, self.config.batch_size)

    def leaf_names(self) -> tuple[str, ...]:
        """Names of what the health check looks at; see `state.leaf_names`."""
        abstract = self.abstract_state
        return state.leaf_names(self.batch_shapes, abstract.params, abstract.statistics)

    @cached_property
    def row_layout(self) -> RowLayout:
        """Which rows of a training batch are on which of this process's devices."""
        return _row_layout(self.config, self.mesh)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """This process's rows of a batch onto the devices, as one global array a leaf."""
        return self.row_layout.put(batch)

    # ------------------------------------------------------------------------------------------ functions

    def _create(self, seed: Array) -> TrainState:
        return state.create(self.model, self.optimizer, self.metric_names, seed)

    def init(self, loaded: Mapping[str, np.ndarray] | None = None) -> TrainState:
        """The state before the first step, made where it lives.

        Args:
            loaded: parameters by path that replace the initialised ones; see `initialize.load`.
        """
        create = self._steps.setdefault("init", jax.jit(self._create, out_shardings=self.state_shardings))
        fresh = create(place({"seed": np.uint32(self.config.seed)}, self.replicated)["seed"])
        if not loaded:
            return fresh
        params = initialize.merge(join(fresh.params, fresh.statistics), loaded)
        wrap = partial(state.wrap, optimizer=self.optimizer, metric_names=self.metric_names)
        return jax.jit(lambda params, key: wrap(params, key=key), out_shardings=self.state_shardings)(
            params, fresh.key
        )

    def zero_metrics(self) -> state.Metrics:
        """Empty sums on the devices, to begin the next record with."""
        zeros = {name: (np.float32(0), np.float32(0)) for name in self.metric_names}
        return place(zeros, self.replicated)

    def left_out(self, here: Iterable[int]) -> list[int]:
        """Records that could not be read: those of all processes, ascending, given this one's."""
        if self.source.config.corrupt != "skip":
            return []
        return sorted({record for records in agree.gather(sorted(here)) for record in records})

    def batches(self, start: int) -> data.Prefetch[dict[str, Array]]:
        """Training batches on the devices from step `start` to the last, made ahead as `config.data.prefetch` says."""
        how, steps = self.source.config, itertools.count(start)

        def put(batch: Mapping[str, np.ndarray]) -> dict[str, Array]:  # in the order of steps
            step = next(steps)
            if not batch["mask"].all():
                self.skipped.update(self.stream.indices(step)[batch["mask"] == 0].tolist())
            return self.put(batch)

        return data.Prefetch(
            self.stream.batch,
            start,
            stop=self.config.steps,
            depth=how.prefetch,
            threads=how.threads,
            workers=how.workers,
            put=put,
        )

    def train_step(self, at: int) -> Callable[..., tuple[TrainState, step.Report]]:
        """The compiled step for step `at`; one for each set of numbers in the stack."""
        name = f"train {self.values(at)}"
        if name not in self._steps:
            self._steps[name] = step.make_train_step(
                self.models[self.values(at)],
                self.task,
                self.optimizer,
                shardings=self.state_shardings,
                batch_sharding=self.batch_sharding,
                xla=None if self.hardware is None else self.hardware.xla,
            )
        return self._steps[name]

    def is_compiled(self, at: int) -> bool:
        """Whether `compiled_step` has its answer already."""
        return self.values(at) in self._compiled

    def compiled_step(self, at: int, state: TrainState, batch: Mapping[str, Array]) -> CompiledStep:
        """The step for step `at` as an executable, compiled when it is first asked for, and what is known of it."""
        key = self.values(at)
        if key not in self._compiled:
            started = time.perf_counter()
            with jax.set_mesh(self.mesh), hardware.told(self.hardware):
                run = self.train_step(at).lower(state, batch).compile()
            seconds = time.perf_counter() - started
            self._compiled[key] = CompiledStep(run, self.step_cost(at).model_flops, seconds, peak_bytes(run))
        return self._compiled[key]

    def evaluate(self, params: Any, split: str, at: int) -> Evaluated:
        """Metrics over a whole split, each example counted once.

        Args:
            params: `state.evaluation_params` of the train state.
            split: of the source.
            at: steps done.

        Returns:
            See `Evaluator`.
        """
        model = self.eval_model(at)
        if model not in self._evaluators:
            places = state.evaluation_params(self.state_shardings)
            self._evaluators[model] = Evaluator(model, self.task, self.mesh, places)
        return self._evaluators[model](params, self.source, split, self.config.eval.batch_size)

    def evaluated(self, at: int) -> tuple[str, ...]:
        """Names of the metrics of an evaluation after `at` steps, sorted, those that the task derives among them.

        Nothing is computed. A metric that has no weight in a whole split is left out of that evaluation.
        """
        model = self.eval_model(at)
        batch = costs.batch_shapes(self.source.spec, self.config.eval.batch_size)
        key = jax.eval_shape(lambda: jax.random.key(0))
        function = partial(self.task.loss, model, train=False)
        _, found = jax.eval_shape(lambda p, b, k: function(p, b, rng=k), model.abstract_state(), batch, key)
        derived = getattr(self.task, "derived", lambda means: {})
        return tuple(sorted({*found, *derived(dict.fromkeys(found, 1.0))}))

    def step_cost(self, at: int) -> flops.Cost:
        """Counted cost of one train step: loss and gradients of one batch, without the optimizer."""
        name = self.values(at)
        if name not in self._costs:
            abstract = self.abstract_state
            self._costs[name] = flops.count(
                partial(step.loss_and_gradients, self.models[name], self.task, only=self.optimizer.only),
                join(abstract.params, abstract.statistics),
                self.batch_shapes,
                jax.eval_shape(lambda: jax.random.key(0)),
            )
        return self._costs[name]

    def facts(self) -> dict[str, Any]:
        """What run.json says of this run, beside its environment; of JSON values."""
        params = jax.tree.leaves(self.abstract_state.params)
        if not self._tables:  # the same for every seed
            table = costs.cost_table(self.usual_model, self.task, self.source.spec, only=self.optimizer.only)
            self._tables.append(table.to_json())
        return {
            "parameters": sum(math.prod(leaf.shape) for leaf in params),
            "stack": self.usual_model.stack_text,
            **self._planned(),
            "eval_stack": self.eval_model(0).stack_text,
            "tokens_per_example": self.model.tokens_per_example,
            "grid": list(getattr(self.model, "grid", ())) or None,
            "optimizer": self.optimizer.description,
            "mesh": sizes_of(self.mesh),
            **({} if self.hardware is None else {"hardware": self.hardware.facts()}),
            "cost_table": self._tables[0],
        }

    def _planned(self) -> dict[str, Any]:
        """Of a model with a stack: tokens that will enter its blocks, and steps with each set of numbers in it."""
        steps = self.config.steps
        if not (whole := self.layer_tokens(steps)):
            return {}
        dense = self.config.batch_size * self.model.dense_layer_tokens * steps
        found = {"layer_tokens": whole, "layer_tokens_dense": dense}
        if self.stack_vars.pieces:
            counts = self.stack_vars.counts(steps)
            found["steps_by_stack_vars"] = {schedule.values_key(one.values): one.count for one in counts}
        return found

    def layer_tokens_per_step(self, at: int) -> int:
        """Tokens that enter blocks in train step `at`, summed over blocks and examples."""
        return self.config.batch_size * token_clock.tokens_in_layers(self.models[self.values(at)], self.task)

    def layer_tokens(self, steps: int) -> int:
        """The same of the first `steps` steps of the run together."""
        found = self.stack_vars.counts(steps) if steps else []
        return sum(segment.count * self.layer_tokens_per_step(segment.first) for segment in found)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that enter the model in one step."""
        return self.config.batch_size * self.model.tokens_per_example * getattr(self.model, "sequences", 1)


def build(
    config: Mapping[str, Any] | ConfigDict | TrainConfig, *, source: data.Dataset | None = None
) -> Experiment:
    """Checks a configuration as far as it can be checked and makes the run's parts.

    Args:
        config: the run.
        source: what `config.data` describes, where that has been built already; None builds it.

    Raises:
        TokenLabError: the first thing that is wrong, in one line; nothing was written anywhere.
    """
    config, rule = hardware.on(to_dataclass(TrainConfig, config))
    task = tasks.build(config.task)
    by_tokens = config.optimizer.schedule.clock != "steps"
    optimizer = None if by_tokens else optimizers.build(config.optimizer, config.steps)
    variables = schedule.stack_vars(config.stack_vars, config.steps)
    mesh = config.mesh.build()
    source = data.build(config.data) if source is None else source
    _check_rows(config, mesh)
    stream = _stream(config, source, _row_layout(config, mesh).local)
    for split in (config.eval.split, config.eval.final_split):
        if split is not None:
            data.num_eval_batches(source, split, config.eval.batch_size)
    built = {
        schedule.values_key(values): _model(config, task, source, values)
        for values in variables.distinct(config.steps)
    }
    if optimizer is None:
        clock = token_clock.build(config.optimizer.schedule.clock, variables, built, config.steps, task)
        optimizer = optimizers.build(config.optimizer, config.steps, clock)
    experiment = Experiment(config, source, stream, task, mesh, optimizer, variables, built, (), rule)
    batch = experiment.batch_shapes
    for model in built.values():
        _check_together(model, *_train_rows(config), mesh, train=True)
    experiment = dataclasses.replace(experiment, metric_names=_metric_names(built, task, batch))
    for start in variables.changes(config.steps):
        used = experiment.eval_model(start + 1)
        _check_eval_model(used, experiment.model)
        _check_together(used, "config.eval.batch_size", config.eval.batch_size, mesh, train=False)
    # A leaf without a sharding rule is said here.
    assert_sharded(experiment.abstract_state, mesh, config.mesh.unsharded)
    return experiment


def _row_layout(config: TrainConfig, mesh: Mesh) -> RowLayout:
    return RowLayout(row_sharding(mesh), config.batch_size)


def _stream(config: TrainConfig, source: data.Dataset, rows: np.ndarray) -> data.TrainStream:
    return data.TrainStream(source, TRAIN_SPLIT, config.batch_size, seed=config.seed, rows=rows)


def _model(config: TrainConfig, task: Any, source: data.Source, values: Mapping[str, int | float]) -> Any:
    outputs = task.num_outputs(source)
    try:
        return models.build(
            config.model, spec=source.spec, num_outputs=outputs, stack_vars=values, train=True
        )
    except StackError as error:
        if not values:
            raise
        raise StackError(f"with {schedule.values_key(values)} of config.stack_vars: {error}") from None


def _metric_names(built: Mapping[str, Any], task: Any, batch: Mapping[str, Any]) -> tuple[str, ...]:
    """The metrics of a train step; every model must agree on them and on the parameters, as they share one state."""
    (first, model), *others = built.items()
    shapes = _shapes(model.abstract_state())
    names = step.metric_names(model, task, model.abstract_state(), batch)
    for key, other in others:
        params = other.abstract_state()
        if _shapes(params) != shapes or step.metric_names(other, task, params, batch) != names:
            raise ConfigError(
                f"config.stack_vars: the stack has other parameters or metrics with {key} than with {first}; a number "
                "that changes during a run may only change how many tokens are kept."
            )
    return names


def _eval_model(
    config: TrainConfig, task: Any, source: data.Source, values: Mapping[str, int | float]
) -> Any:
    if config.eval.stack is not None:
        used = parse(config.eval.stack, values).used
        values = {name: value for name, value in values.items() if name in used}
    return models.build(
        config.model,
        spec=source.spec,
        num_outputs=task.num_outputs(source),
        stack=config.eval.stack,
        stack_vars=values,
        train=False,
    )


def _shapes(tree: Any) -> dict[str, Any]:
    return {path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _check_eval_model(model: Any, trained: Any) -> None:
    """The evaluation model may use fewer parameters than are trained, never others."""
    have = _shapes(trained.abstract_state())
    for path, shape in _shapes(model.abstract_state()).items():
        if have.get(path) != shape:
            found = f"has it as {have[path]}" if path in have else "does not have it"
            raise ConfigError(
                f"config.eval.stack needs {path} of shape {shape}, and the training stack {found}: "
                "evaluate a stack of as many blocks whose learned items are trained too."
            )


def _train_rows(config: TrainConfig) -> tuple[str, int]:
    """What a train step computes at once: how it is set, and how many rows."""
    what = "config.batch_size" + (" / config.optimizer.accumulate" if config.optimizer.accumulate > 1 else "")
    return what, config.batch_size // config.optimizer.accumulate


def _shards(mesh: Mesh) -> tuple[int, str]:
    """How many devices share a batch, and along which axes."""
    axes = {axis: mesh.shape[axis] for axis in axes_of("batch", mesh)}
    return math.prod(axes.values()), ", ".join(f"{axis}={size}" for axis, size in axes.items())


def _check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Every device gets as many rows of every batch."""
    shards, axes = _shards(mesh)
    for name, size in (_train_rows(config), ("config.eval.batch_size", config.eval.batch_size)):
        if size % shards:
            raise ConfigError(
                f"{name} is {size}: expected a multiple of {shards}, the devices that share it ({axes})."
            )


def _check_together(model: Any, name: str, rows: int, mesh: Mesh, *, train: bool) -> None:
    """Examples whose tokens a layer ranks together lie on one device."""
    shards, axes = _shards(mesh)
    for each in steps_of(model):
        layer = each.block.ffn if isinstance(each, BlockStep) else None
        together = layer.together(train=train) if hasattr(layer, "together") else 1
        if rows % (together * shards):
            raise ConfigError(
                f"{name} is {rows}, and {each.block.ffn_name} ranks the tokens of sequences={together} examples "
                f"together: expected a multiple of {together * shards}, whole groups for each of the {shards} devices "
                f"that share a batch ({axes}). Set it so, or take fewer sequences or devices."
            )
