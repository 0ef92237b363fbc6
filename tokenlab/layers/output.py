"""What every model returns from `apply`."""

from __future__ import annotations

from collections.abc import Mapping

from flax import struct
from jax import Array

from tokenlab.layers.context import Aux
from tokenlab.layers.execute import TracePoint


@struct.dataclass
class Output:
    """Logits and everything else of one forward pass; what is not used, `jit` prunes.

    Attributes:
      logits: [B, outputs], float32; of a language model [B, N, V], what follows each token; of a model of pictures
        [B, H, W, C]; of a masked autoencoder [B, N, p*p*C].
      features: what the head reads, [B, D], after the final norm; of a language model [B, N, D]; of a model of pictures
        [B, h, w, D], what its codes stand for.
      tokens: all tokens after the final norm [B, N, D].
      aux: losses (weighted already) and metrics of the model's parts.
      trace: tokens at every reduction, when `record` was asked for. Static.
      loads: name of the block -> [E], the share of work of each of its experts, when `record` was asked for.
      places: [B, N] int32, of a language model: where in the sequence the tokens of the logits stand; of a masked
        autoencoder [B, K]: which patches it saw.
      entering: number of a block -> what comes into it, [B, N, D], where that was asked for.
    """

    logits: Array
    features: Array
    tokens: Array
    aux: Aux
    trace: tuple[TracePoint, ...] = struct.field(pytree_node=False, default=())
    loads: Mapping[str, Array] = struct.field(default_factory=dict)
    places: Array | None = None
    entering: Mapping[int, Array] = struct.field(default_factory=dict)

    @property
    def losses(self) -> Mapping[str, Array]:
        """Name -> scalar, already weighted."""
        return self.aux.losses
