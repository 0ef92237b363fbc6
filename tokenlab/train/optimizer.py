"""Optimizers by their name in optax, with weight decay of kernels only, clipping and a moving average."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokenlab.core.errors import ConfigError, NameLookupError, suggest
from tokenlab.core.patterns import fits
from tokenlab.sharding.rules import STACKED, path_of
from tokenlab.train import schedule as schedules
from tokenlab.train.config import OptimizerConfig

# Factories of optax that are not offered, and why.
_UNFIT = {
    "lbfgs": "needs more than a gradient at each step",
    "polyak_sgd": "needs more than a gradient at each step",
    "noisy_sgd": "needs a random key of its own",
    "optimistic_adam": "gave way to optimistic_adam_v2",
    "rprop": "takes no learning-rate schedule",
    "sm3": "takes no learning-rate schedule",
}

# Set by fields of their own in the configuration, so not through `options`.
_OWN_FIELDS = ("learning_rate", "weight_decay", "weight_decay_rate", "mask", "weight_decay_mask")

# Parameters that stay free of weight decay whatever their rank: norms, offsets, positions, learned tokens and codes.
NOT_DECAYED = (
    "scale",
    "bias",
    "layer_scale",
    "norm",
    "position",
    "cls",
    "registers",
    "mask_token",
    "temperature",
    "codebook",
)


def names() -> list[str]:
    """Names that `config.optimizer.name` may have: optax factories of a complete optimizer, sorted."""
    found = []
    for name in dir(optax):
        factory = getattr(optax, name)
        if name.startswith(("_", "scale_by")) or name in _UNFIT or not inspect.isfunction(factory):
            continue
        signature = inspect.signature(factory)
        if "learning_rate" in signature.parameters and "GradientTransformation" in str(
            signature.return_annotation
        ):
            found.append(name)
    return found


def decayed(path: str, rank: int) -> bool:
    """Whether weight decay applies to the parameter at `path` with `rank` axes (the stacked axis included).

    It does to kernels: rank >= 2 without the axis over which leaves under blocks/ and items/ are stacked, and no part
    of the path in `NOT_DECAYED`.
    """
    parts = path.split("/")
    if any(part in STACKED for part in parts):
        rank -= 1
    return rank >= 2 and not any(part in NOT_DECAYED for part in parts)


def decay_mask(params: Any) -> Any:
    """`decayed` for every leaf: a tree of bools shaped like `params` (arrays or ShapeDtypeStructs)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: decayed(path_of(path), len(leaf.shape)), params
    )


def decays(params: Any, decay: float, others: Mapping[str, float]) -> Any:
    """The weight decay of every leaf: `decay` for kernels, 0 for the rest, and what `others` says by path.

    Raises:
        ConfigError: a path in `others` under which there is no parameter.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for given in others:
        if not any(_under(path, given) for path in paths):
            tops = {"/".join(path.split("/")[:depth]) for path in paths for depth in (1, 2, 3, 4)}
            raise ConfigError(
                f"config.optimizer.decays has {given!r}, which is no parameter.{suggest(given, tops)}"
            )

    def of(path: Any, leaf: Any) -> float:
        name = path_of(path)
        found = [given for given in others if _under(name, given)]
        if found:
            return float(others[max(found, key=len)])
        return decay if decayed(name, len(leaf.shape)) else 0.0

    return jax.tree_util.tree_map_with_path(of, params)


def trained(params: Any, only: Sequence[str]) -> Any:
    """Whether each parameter is trained: a tree of bools shaped like `params` (arrays or ShapeDtypeStructs).

    Args:
        only: patterns of whole paths, where * stands for any text and nothing else is special; a parameter is trained
            when one of them fits. None of them: all are.

    Raises:
        ConfigError: a pattern that fits no parameter.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in only:
        if not any(fits(path, pattern) for path in paths):
            raise ConfigError(
                f"config.optimizer.only has {pattern!r}, which fits no parameter; expected patterns of paths, of which "
                f"there are {', '.join(sorted(paths)[:4])}, ..., with * for any text.{suggest(pattern, paths)}"
            )

    def of(path: Any, leaf: Any) -> bool:
        del leaf
        return not only or any(fits(path_of(path), pattern) for pattern in only)

    return jax.tree_util.tree_map_with_path(of, params)


def _check_decays(params: Any, own: Any, others: Mapping[str, float]) -> None:
    """Raise a ConfigError for a path in `others` under which there are parameters and none is trained."""
    trains = {path_of(path): each for path, each in jax.tree_util.tree_leaves_with_path(own)}
    decays(params, 0.0, others)
    for given in others:
        if not any(each for path, each in trains.items() if _under(path, given)):
            raise ConfigError(
                f"config.optimizer.decays has {given!r}, which is not trained: no pattern of config.optimizer.only "
                "fits a parameter there. Leave it out of the decays, or add a pattern for it."
            )


def layer_scales(params: Any, decay: float) -> Any:
    """By what the learning rate of each parameter is multiplied, see `OptimizerConfig.layer_decay`.

    Returns:
        A tree like `params`: floats, and of what is stacked over blocks f32 [L, 1, ...].

    Raises:
        ConfigError: there are no blocks, or a kind of weights that only some of them have, of which nobody knows here
            which they are.
    """
    leaves = [(path_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    counts = {path: leaf.shape[0] for path, leaf in leaves if path.startswith("blocks/")}
    depth = max(counts.values(), default=0)
    for path, count in counts.items():
        if count != depth:
            raise ConfigError(
                f"config.optimizer.layer_decay: {'/'.join(path.split('/')[:2])} is of {count} of {depth} blocks; "
                "expected blocks that are all alike, or None."
            )
    if not depth:
        raise ConfigError("config.optimizer.layer_decay: this model has no blocks; expected None.")

    def scale(key_path: Any, leaf: Any) -> Any:
        group = path_of(key_path).partition("/")[0]
        if group == "blocks":
            powers = decay ** (depth - np.arange(depth, dtype=np.float64))
            return jnp.asarray(powers.reshape(-1, *[1] * (len(leaf.shape) - 1)), jnp.float32)
        return decay ** (depth + 1) if group == "embed" else 1.0

    return jax.tree_util.tree_map_with_path(scale, params)


def _scaled_by_layer(decay: float) -> optax.GradientTransformation:
    """Multiplies updates by `layer_scales`."""

    def init(params: Any) -> optax.EmptyState:
        layer_scales(params, decay)  # what does not fit is told before the first step
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        scales = layer_scales(params, decay)
        return jax.tree.map(lambda update, scale: update * scale, updates, scales), state

    return optax.GradientTransformation(init, update)


def _under(path: str, name: str) -> bool:
    return f"{path}/".startswith(f"{name.strip('/')}/")


def _decoupled_decay(
    schedule: optax.Schedule, decay: float, others: Mapping[str, float]
) -> optax.GradientTransformation:
    """Adds -learning_rate * decay * parameter to the updates, after the optimizer has scaled them; see `decays`.

    Source: Loshchilov and Hutter 2019 (Decoupled Weight Decay Regularization), algorithm 1, line 9.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        decays(params, decay, others)  # a path that fits nothing is told before the first step
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        rate = schedule(state.count)
        updates = jax.tree.map(
            lambda update, param, own: update - rate * own * param if own else update,
            updates,
            params,
            decays(params, decay, others),
        )
        return updates, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


@dataclass(frozen=True)
class Optimizer:
    """What turns gradients into new parameters; made by `build`.

    Attributes:
        transform: the optax chain; its state is what checkpoints hold.
        schedule: learning rate as a function of the steps already done.
        clip: largest global gradient norm, or None.
        accumulate: microbatches per step.
        ema_decay: decay of the moving average of parameters, or None.
        description: one line for people.
        only: patterns of the parameters that are trained, see `trained`.
        offload: its state lies in the memory of the host, see `tokenlab.train.state.shardings`.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    clip: float | None
    accumulate: int
    ema_decay: float | None
    description: str
    only: tuple[str, ...] = ()
    offload: bool = False

    def init(self, params: Any) -> Any:
        """Optimizer state of `params` (works under `jax.eval_shape`)."""
        return self.transform.init(params)

    def update(self, gradients: Any, state: Any, params: Any, norm: jax.Array) -> tuple[Any, Any]:
        """New parameters and optimizer state.

        Args:
            gradients: like `params`, f32.
            state: what `init` or the last `update` gave.
            params: parameters the gradients were taken at.
            norm: f32 scalar, the global norm of `gradients`.
        """
        if self.clip is not None:
            # min(1, clip / norm): a factor of exactly 1 leaves unclipped gradients bit for bit as they were.
            factor = jnp.where(norm > self.clip, self.clip / norm, 1.0)
            gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
        updates, state = self.transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def average(self, ema: Any, params: Any, step: jax.Array) -> Any:
        """The moving average after this step: d * ema + (1 - d) * params with d = min(decay, (1 + t) / (10 + t)).

        The second term keeps the initial weights from dominating a short run. `step` is t, the steps done before.

        Source: the schedule of tf.train.ExponentialMovingAverage(num_updates=t).
        """
        decay = jnp.minimum(self.ema_decay, (1.0 + step) / (10.0 + step))
        return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)


def build(config: OptimizerConfig, steps: int, clock: schedules.Clock | None = None) -> Optimizer:
    """The optimizer that the configuration names, for a run of `steps` steps.

    Weight decay goes to the factory where it takes a decay with a mask (adamw, lion, lamb, lars, ...); behind any
    other (sgd, adam, adafactor, ...) the decoupled decay is added, so that it means the same everywhere: each step
    takes learning_rate * weight_decay of a kernel away.

    `clock` is what `config.schedule.clock` names, from `tokenlab.train.token_clock.build`; None for "steps".

    Raises:
        NameLookupError: optax has no such optimizer.
        ConfigError: an option that the factory does not take, or a schedule that does not fit.
    """
    known = names()
    if config.name not in known:
        why = f", which {_UNFIT[config.name]}" if config.name in _UNFIT else ""
        hint = suggest(config.name, known)
        raise NameLookupError(
            f"config.optimizer.name is {config.name!r}{why}: expected an optimizer of optax.{hint}"
        )
    factory = getattr(optax, config.name)
    accepted = inspect.signature(factory).parameters
    for option in config.options:
        if option in _OWN_FIELDS:
            raise ConfigError(
                f"config.optimizer.options has {option!r}: give learning_rate and weight_decay as fields of "
                "config.optimizer; the mask follows from parameter names."
            )
        if option not in accepted:
            hint = suggest(option, [name for name in accepted if name not in _OWN_FIELDS])
            raise ConfigError(
                f"config.optimizer.options has {option!r}, which optax.{config.name} does not take.{hint}"
            )
    schedule = schedules.build(config.schedule, config.learning_rate, steps, clock)
    options = dict(config.options)
    mask = next((name for name in ("mask", "weight_decay_mask") if name in accepted), None)
    takes = mask is not None and "weight_decay" in accepted
    native = takes and not config.decays
    if takes and config.decays:
        options |= {"weight_decay": 0.0}
    if native:
        options |= {"weight_decay": config.weight_decay, mask: decay_mask}
    try:
        transform = factory(learning_rate=schedule, **options)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"optax.{config.name} does not accept config.optimizer.options: {reason}"
        ) from error
    if (config.weight_decay or config.decays) and not native:
        transform = optax.chain(transform, _decoupled_decay(schedule, config.weight_decay, config.decays))
    if config.only:

        def labels(params: Any) -> Any:
            own = trained(params, config.only)
            _check_decays(params, own, config.decays)
            return jax.tree.map(lambda own: "trained" if own else "still", own)

        transform = optax.multi_transform({"trained": transform, "still": optax.set_to_zero()}, labels)
    if config.layer_decay is not None:
        transform = optax.chain(transform, _scaled_by_layer(config.layer_decay))
    parts = [config.name, schedules.describe(config.schedule, config.learning_rate, steps, clock)]
    parts += [f"weight decay {config.weight_decay:g}"] if config.weight_decay else []
    parts += [f"{decay:g} of {path}" for path, decay in config.decays.items()]
    parts += [f"only {', '.join(config.only)}"] if config.only else []
    parts += [f"{config.layer_decay:g} a layer"] if config.layer_decay is not None else []
    parts += [f"clipped at {config.clip:g}"] if config.clip is not None else []
    parts += [f"{config.accumulate} microbatches"] if config.accumulate > 1 else []
    parts += [f"moving average {config.ema:g}"] if config.ema is not None else []
    parts += ["state in host memory"] if config.offload else []
    return Optimizer(
        transform,
        schedule,
        config.clip,
        config.accumulate,
        config.ema,
        "; ".join(parts),
        tuple(config.only),
        config.offload,
    )
