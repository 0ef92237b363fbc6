"""Feed-forward layers for `block(ffn=...)`: one module a file, found by its name.

A file offers `ffn(defaults, **arguments) -> nn.Module`; the module maps [B, N, D] to [B, N, D], or to a pair of that
and an `Aux` of losses and metrics. It is called as `module(x, valid=..., train=...)`, and
with `modality=...` too where it says `by_modality`. One that says `tokenwise` has the same weights however many tokens
there are, so that they need not be worked out for every count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenlab.core.errors import ConfigError


@dataclass(frozen=True)
class FFNDefaults:
    """What a feed-forward layer takes from its model when the stack does not say otherwise.

    Attributes:
      hidden: hidden width of the model's dense layer.
      activation: name of the model's activation, see `tokenlab.layers.activation`.
      dtype: compute dtype.
      gated: hidden width of the model's dense layer where that is a SwiGLU, None where it is an MLP.
      kernel_std: what an MLP's kernels start from, see `tokenlab.layers.attention.Attention`.
    """

    hidden: int
    activation: str
    dtype: Any
    gated: int | None = None
    kernel_std: float | None = None


def width_of(hidden: int | None, default: int) -> int:
    """The hidden width asked for, or the default. Raises ConfigError below 1."""
    if hidden is not None and hidden < 1:
        raise ConfigError(f"hidden must be at least 1; got {hidden}.")
    return default if hidden is None else hidden
