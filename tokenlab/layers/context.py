"""What flows beside the tokens: the context that goes in, and the losses and metrics that come out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

Mode: TypeAlias = Literal["full", "prefill", "step"]


@struct.dataclass
class Context:
    """What every block and item may read that is not a token.

    Attributes:
      rng: key of this step; blocks and items fold their own index into it, so that what they draw does not depend
        on how the stack is executed.
      train: True while training (drop path, router noise). Static.
      mode: "full": whole sequences; "prefill": prompts, whose keys and values are remembered; "step": tokens that
        follow, one a sequence, and see what is remembered. Static.
    """

    rng: Array
    train: bool = struct.field(pytree_node=False, default=False)
    mode: Mode = struct.field(pytree_node=False, default="full")

    def key(self, name: str, index: Array | int) -> Array:
        """The key of occurrence `index` of `name`."""
        return jax.random.fold_in(jax.random.fold_in(self.rng, name_seed(name)), index)


@struct.dataclass
class Aux:
    """Losses and metrics a part of the model returns; never hidden in side channels.

    Attributes:
      losses: name -> scalar, already weighted; added to the task's loss as they are.
      metrics: name -> (sum, count) scalars; reported as sum / count.
      load: [E], the share of work of each expert of this very layer; None elsewhere. It does not add up over layers.
    """

    losses: Mapping[str, Array] = struct.field(default_factory=dict)
    metrics: Mapping[str, tuple[Array, Array]] = struct.field(default_factory=dict)
    load: Array | None = None

    def __add__(self, other: Aux) -> Aux:
        losses = dict(self.losses)
        for name, value in other.losses.items():
            losses[name] = losses[name] + value if name in losses else value
        metrics = dict(self.metrics)
        for name, (total, count) in other.metrics.items():
            had = metrics.get(name)
            metrics[name] = (had[0] + total, had[1] + count) if had else (total, count)
        return Aux(losses, metrics)

    def summed(self) -> Aux:
        """Add up the leading axis that `lax.scan` stacked."""
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), self)

    @classmethod
    def of(cls, losses: Mapping[str, Array] | None = None, metrics: Mapping[str, Array] | None = None) -> Aux:
        """From plain scalars; each metric counts once."""
        counted = {k: (jnp.float32(v), jnp.float32(1)) for k, v in (metrics or {}).items()}
        return cls({k: jnp.float32(v) for k, v in (losses or {}).items()}, counted)


def name_seed(name: str) -> int:
    """A number for a name, the same in every process and version (Python's own `hash` is not)."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
