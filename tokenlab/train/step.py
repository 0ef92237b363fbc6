"""The train step and the evaluation step: one compiled function each, for every model and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import NamedSharding

from tokenlab.core.errors import ConfigError
from tokenlab.layers import statistics
from tokenlab.layers.program import ItemStep, steps_of
from tokenlab.train.optimizer import Optimizer, trained
from tokenlab.train.state import HOST, Health, Metrics, TrainState, base_key, checked_inputs

Batch = Mapping[str, Array]


@struct.dataclass
class Report:
    """What a step says of itself, beside the sums in the state; it stays on the device until someone asks.

    Attributes:
        loss: f32 scalar, loss of this step.
        learning_rate: f32 scalar, used in this step.
    """

    loss: Array
    learning_rate: Array


def loss_and_gradients(
    model: Any, task: Any, params: Any, batch: Batch, rng: Array, *, only: Sequence[str] = ()
) -> tuple[Array, Metrics, Any]:
    """Loss, metrics and gradients of one batch; what a training step costs is counted on this function.

    Args:
        model: from `models.build`.
        task: has `loss(model, params, batch, *, rng, train) -> (f32 scalar, {name: (sum, weight)})`.
        params: f32 parameters, with "statistics" beside them where the model has such.
        batch: name -> [B, ...].
        rng: typed key of this step.
        only: patterns of the parameters that are trained, see `tokenlab.train.optimizer.trained`; of the others the
            gradient is zero, and what would be needed for it alone is not computed.

    Returns:
        Loss (f32 scalar), metrics, gradients like `params` without statistics.
    """
    params, held = statistics.split(params)
    moving = trained(params, only)

    def loss(params: Any) -> tuple[Array, Metrics]:
        params = jax.tree.map(lambda leaf, own: leaf if own else jax.lax.stop_gradient(leaf), params, moving)
        return task.loss(model, statistics.join(params, held), batch, rng=rng, train=True)

    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return value, metrics, gradients


def accumulated(
    model: Any,
    task: Any,
    params: Any,
    batch: Batch,
    rng: Array,
    microbatches: int,
    pin: Callable[[Any], Any],
    only: Sequence[str] = (),
) -> tuple[Array, Metrics, Any]:
    """`loss_and_gradients`, one microbatch after the other, at the memory of one microbatch.

    With w_i the weight of metric "loss" in microbatch i, loss and gradients are sum_i w_i (.)_i / sum_i w_i, so a
    loss that is a weighted mean over the batch comes out as on the whole batch. Where nothing of the batch has weight,
    loss and gradients are 0. Random choices differ: microbatch i draws from fold_in(rng, i).

    Args:
        microbatches: A >= 2; it divides B. Microbatch i holds rows i, i + A, i + 2A, ..., which leaves each row on
            the device where it is.
        pin: constrains the sharding of the sum of gradients.
        only: as in `loss_and_gradients`.
    """
    parts = jax.tree.map(
        lambda leaf: jnp.moveaxis(
            leaf.reshape(leaf.shape[0] // microbatches, microbatches, *leaf.shape[1:]), 1, 0
        ),
        dict(batch),
    )

    def add(carry: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
        index, rows = part
        loss, metrics, gradients = loss_and_gradients(
            model, task, params, rows, jax.random.fold_in(rng, index), only=only
        )
        weight = metrics["loss"][1]
        weighted = (loss * weight, jax.tree.map(lambda leaf: leaf * weight, gradients))
        total = jax.tree.map(jnp.add, carry, (*weighted, metrics))
        return (total[0], pin(total[1]), total[2]), None

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(
        lambda p, rows, key: loss_and_gradients(model, task, p, rows, key), params, first, rng
    )
    loss, metrics, gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (loss, gradients, metrics), _ = jax.lax.scan(
        add, (loss, pin(gradients), metrics), (jnp.arange(microbatches), parts)
    )
    weight = metrics["loss"][1]
    weight = jnp.where(weight > 0, weight, 1.0)  # without any, what is divided is 0
    return loss / weight, metrics, jax.tree.map(lambda leaf: leaf / weight, gradients)


def metric_names(model: Any, task: Any, params: Any, batch: Batch) -> tuple[str, ...]:
    """Names of the metrics a train step sums, sorted; nothing is computed.

    Args:
        params, batch: arrays or ShapeDtypeStructs.

    Raises:
        ConfigError: the task returns no metric "loss", a loss that is no f32 scalar, nothing of a statistic that the
            model has, or not what an item of its stack expects.
    """
    key = jax.eval_shape(lambda: base_key(jnp.zeros((2,), jnp.uint32)))
    loss, metrics = jax.eval_shape(
        lambda p, b, k: task.loss(model, p, b, rng=k, train=True), params, batch, key
    )
    name = type(task).__name__
    metrics, said = statistics.taken_out(metrics)
    statistics.check_observed(model, said, name)
    if loss.shape != () or loss.dtype != jnp.float32:
        raise ConfigError(
            f"task {name} returns a loss of {loss.dtype}{list(loss.shape)}: expected a float32 scalar."
        )
    if "loss" not in metrics:
        raise ConfigError(
            f"task {name} returns metrics {sorted(metrics)}: expected 'loss' among them, as (sum, weight)."
        )
    for each in steps_of(model) if getattr(model, "program", None) is not None else ():
        expected = each.item.expects if isinstance(each, ItemStep) and each.active else ()
        if lacking := sorted(set(expected) - set(metrics)):
            raise ConfigError(
                f"{each.kind[1]} in the stack expects {lacking[0]!r} of the task, and {name} does not give it: expected"
                f" another config.task.name, such as {each.kind[1]!r}, or other arguments of {each.kind[1]}."
            )
    return tuple(sorted({*metrics, "grad_norm"}))


def _sum_of_squares(leaf: Array) -> Array:
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)))


def _check(health: Health, step: Array, squares: list[Array]) -> Health:
    """Keeps the first bad leaf of the first bad step; `squares` are in the order of `leaf_names`."""
    bad = ~jnp.isfinite(jnp.stack(squares))
    first = jnp.any(bad) & (health.step < 0)
    return Health(
        step=jnp.where(first, step + 1, health.step), leaf=jnp.where(first, jnp.argmax(bad), health.leaf)
    )


def train_step(
    model: Any,
    task: Any,
    optimizer: Optimizer,
    state: TrainState,
    batch: Batch,
    pin: Callable[[Any], Any] = lambda gradients: gradients,
) -> tuple[TrainState, Report]:
    """One step as a pure function: what `make_train_step` compiles.

    A sum of squares per leaf gives both the gradient norm and the health check: it is not finite where the leaf has
    a value that is not (or values beyond 1e19, which is no better). The check never reaches the host by itself.
    """
    rng = jax.random.fold_in(base_key(state.key), state.step)
    whole = statistics.join(state.params, state.statistics)
    if optimizer.accumulate == 1:
        loss, metrics, gradients = loss_and_gradients(model, task, whole, batch, rng, only=optimizer.only)
    else:
        loss, metrics, gradients = accumulated(
            model, task, whole, batch, rng, optimizer.accumulate, pin, optimizer.only
        )
    metrics, said = statistics.taken_out(metrics)
    known = statistics.updated(model, state.statistics, said)
    gradients = pin(gradients)
    squares = [_sum_of_squares(leaf) for leaf in jax.tree.leaves(gradients)]
    norm = jnp.sqrt(sum(squares))
    params, optimizer_state = optimizer.update(gradients, state.optimizer, state.params, norm)
    inputs = [_sum_of_squares(batch[name]) for name in checked_inputs(batch)]
    after = [_sum_of_squares(leaf) for leaf in jax.tree.leaves((params, known))]
    metrics = {**metrics, "grad_norm": (norm, jnp.ones((), jnp.float32))}
    state = TrainState(
        step=state.step + 1,
        key=state.key,
        params=params,
        optimizer=optimizer_state,
        ema=None if state.ema is None else optimizer.average(state.ema, params, state.step),
        metrics=jax.tree.map(lambda total, new: total + new.astype(jnp.float32), state.metrics, metrics),
        health=_check(state.health, state.step, [*inputs, loss, *squares, *after]),
        statistics=known,
    )
    rate = jnp.asarray(optimizer.schedule(state.step - 1), jnp.float32)
    return state, Report(loss=loss, learning_rate=rate)


def make_train_step(
    model: Any,
    task: Any,
    optimizer: Optimizer,
    *,
    shardings: TrainState | None = None,
    batch_sharding: NamedSharding | None = None,
    xla: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Report]]:
    """The compiled train step: (state, batch) -> (state, report). The state that goes in is donated.

    Args:
        model, task: any pair that fits `loss_and_gradients`.
        optimizer: from `tokenlab.train.optimizer.build`.
        shardings: of the state, in and out; None = wherever the arrays are (one device).
        batch_sharding: of every batch leaf, [B, ...] over its first axis; given with `shardings`.
        xla: options of the compiler, by its names for them.
    """

    def pin(gradients: Any) -> Any:
        return (
            gradients if shardings is None else jax.lax.with_sharding_constraint(gradients, shardings.params)
        )

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Report]:
        state = state.replace(optimizer=_moved(state.optimizer, shardings, jax.memory.Space.Device))
        state, report = train_step(model, task, optimizer, state, batch, pin)
        return state.replace(optimizer=_moved(state.optimizer, shardings, jax.memory.Space.Host)), report

    step.__name__ = "train_step"  # the program's name, which tells it from others in a trace
    if shardings is None:
        return jax.jit(step, donate_argnums=0, compiler_options=dict(xla or {}))
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding),
        out_shardings=(shardings, shardings.step),
        donate_argnums=0,
        compiler_options=dict(xla or {}),
    )


def _moved(optimizer: Any, shardings: TrainState | None, space: Any) -> Any:
    """An optimizer's state with what lies on the host between steps in the memory `space`."""
    if shardings is None:
        return optimizer
    return jax.tree.map(
        lambda leaf, place: jax.device_put(leaf, space) if place.memory_kind == HOST else leaf,
        optimizer,
        shardings.optimizer,
    )


def make_eval_step(
    model: Any,
    task: Any,
    *,
    params_shardings: Any = None,
    batch_sharding: NamedSharding | None = None,
    replicated: NamedSharding | None = None,
) -> Callable[[Any, Batch, Array], Metrics]:
    """The compiled evaluation step: (params, batch, index) -> {name: (sum, weight)} of this batch.

    Args:
        model: built with `train=False`.
        task: its metrics leave out rows whose `batch["mask"]` is 0.
        params_shardings, batch_sharding, replicated: as in `make_train_step`; all or none.

    `index` is the number of the batch (i32 scalar): random choices in the model are a function of it alone, so
    an evaluation repeats exactly.
    """

    def eval_step(params: Any, batch: Batch, index: Array) -> Metrics:
        rng = jax.random.fold_in(base_key(jnp.zeros((2,), jnp.uint32)), index)
        _, metrics = task.loss(model, params, batch, rng=rng, train=False)
        return metrics

    if params_shardings is None:
        return jax.jit(eval_step)
    return jax.jit(
        eval_step, in_shardings=(params_shardings, batch_sharding, replicated), out_shardings=replicated
    )
