"""The training state: everything that a step reads and writes and that a checkpoint must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tokenlab.core.errors import NonFiniteError, ShardingError
from tokenlab.layers.statistics import STATISTICS, join, split
from tokenlab.sharding import rules
from tokenlab.sharding.rules import path_of
from tokenlab.train.optimizer import Optimizer

Metrics = Mapping[str, tuple[Array, Array]]
"""name -> (sum, weight), f32 scalars; a record shows sum / weight."""

# The generator is named, so that a seed means the same whatever the default of the installation.
KEY_IMPLEMENTATION = "threefry2x32"


@struct.dataclass
class Health:
    """The first value that was not finite, found on the device without asking the host.

    Attributes:
        step: i32 scalar, number of the first bad step (the first step of a run is 1); -1 = none so far.
        leaf: i32 scalar, index in `leaf_names` of its first bad leaf; -1 = none so far.
    """

    step: Array
    leaf: Array

    @classmethod
    def good(cls) -> Health:
        """Nothing bad so far."""
        return cls(step=jnp.full((), -1, jnp.int32), leaf=jnp.full((), -1, jnp.int32))


@struct.dataclass
class TrainState:
    """What one step hands to the next.

    Attributes:
        step: i32 scalar, steps done.
        key: u32 [2], data of the base random key; step t uses fold_in(key, t).
        params: parameters, plain nested dicts of f32 arrays.
        optimizer: state of the optax transformation.
        ema: moving average of `params`, or None when none is kept.
        metrics: sums since the last training record; here so that a run killed between two records goes on with
            the same sums.
        health: the first non-finite value.
        statistics: what the model knows that training updates and the optimizer does not, by name, see
            `tokenlab.layers.statistics`; None for a model without.
    """

    step: Array
    key: Array
    params: Any
    optimizer: Any
    ema: Any
    metrics: Metrics
    health: Health
    statistics: Any = None


def base_key(data: Array) -> Array:
    """The typed key of key data u32 [2]."""
    return jax.random.wrap_key_data(data, impl=KEY_IMPLEMENTATION)


def zero_metrics(names: tuple[str, ...]) -> Metrics:
    """Empty sums for every name."""
    return {name: (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)) for name in names}


def create(model: Any, optimizer: Optimizer, metric_names: tuple[str, ...], seed: int | Array) -> TrainState:
    """The state before the first step. Pure in `seed`; run it under `jax.jit` to make it sharded.

    Args:
        model: has `init(key) -> params`.
        optimizer: from `tokenlab.train.optimizer.build`.
        metric_names: names the train step will sum.
        seed: int in [0, 2**32), or u32 scalar; the same state either way.
    """
    init_key, step_key = jax.random.split(jax.random.key(seed, impl=KEY_IMPLEMENTATION))
    return wrap(model.init(init_key), optimizer, metric_names, jax.random.key_data(step_key))


def wrap(params: Any, optimizer: Optimizer, metric_names: tuple[str, ...], key: Array) -> TrainState:
    """A state at step 0 around given parameters and, beside them, statistics; `key` is key data u32 [2]."""
    params, statistics = split(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        optimizer=optimizer.init(params),
        # A copy: the same buffer twice in a donated argument is an error.
        ema=None if optimizer.ema_decay is None else jax.tree.map(jnp.copy, params),
        metrics=zero_metrics(metric_names),
        health=Health.good(),
        statistics=statistics,
    )


HOST = "pinned_host"
"""The kind of memory that is the host's, in pages that its devices read and write by themselves."""


def shardings(abstract: TrainState, model: Any, mesh: Mesh, *, offload: bool = False) -> TrainState:
    """Where every leaf of the state lives: parameters, their averages and moments by the model's logical axes.

    Args:
        abstract: the state as ShapeDtypeStructs, from `jax.eval_shape(create, ...)`.
        model: has `logical_axes()`.
        mesh: axes data, fsdp, tensor, expert.
        offload: what the optimizer remembers of each parameter lies in the host's memory (`Optimizer.offload`).

    Returns:
        A TrainState of NamedSharding; scalars, the key, the metric sums and statistics are replicated.

    Raises:
        ShardingError: a leaf no rule matches, an axis that does not divide, or devices that cannot reach their host's
            memory.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    whole = rules.shardings(join(abstract.params, abstract.statistics), model.logical_axes(), mesh)
    params, statistics = split(whole)
    moments = jax.tree.map(_on_host, params) if offload else params
    return jax.tree.map(lambda _: replicated, abstract).replace(
        params=params,
        optimizer=rules.shardings_like(abstract.optimizer, abstract.params, moments, mesh),
        ema=None if abstract.ema is None else params,
        statistics=statistics,
    )


def _on_host(place: NamedSharding) -> NamedSharding:
    try:
        return place.with_memory_kind(HOST)
    except ValueError as error:
        raise ShardingError(
            f"config.optimizer.offload: {error}; expected devices that have {HOST} memory, or False."
        ) from error


def evaluation_params(state: TrainState) -> Any:
    """What evaluation uses: the moving average of the parameters where one is kept, and the statistics."""
    return join(state.params if state.ema is None else state.ema, state.statistics)


def leaf_names(batch: Mapping[str, Any], params: Any, statistics: Any = None) -> tuple[str, ...]:
    """What `Health.leaf` counts through, in the order in which one bad value causes the next.

    Batch leaves (those of a floating dtype), the loss, gradients, then parameters and statistics after the update.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return (
        *(f"batch/{name}" for name in checked_inputs(batch)),
        "loss",
        *(f"gradient of {path}" for path in paths),
        *(f"{path} after the update" for path in paths),
        *(f"{STATISTICS}/{name} after the update" for name in sorted(statistics or ())),
    )


def checked_inputs(batch: Mapping[str, Any]) -> list[str]:
    """Names of the batch leaves that can hold a value that is not finite, sorted."""
    return sorted(name for name, leaf in batch.items() if jnp.issubdtype(leaf.dtype, jnp.floating))


def check_health(health: Health, names: tuple[str, ...]) -> None:
    """Stops a run that has met a value that is not finite.

    Args:
        health: fetched to the host.
        names: `leaf_names` of this run.

    Raises:
        NonFiniteError: naming step and leaf.
    """
    if int(health.step) >= 0:
        raise NonFiniteError(
            f"step {int(health.step)}: {names[int(health.leaf)]} is not finite. Nothing from that step on was saved; "
            "look at the data of that step, or try a smaller config.optimizer.learning_rate, a longer warm-up or "
            "config.optimizer.clip."
        )
