"""What kernels start from."""

from __future__ import annotations

import flax.linen as nn
from jax.nn.initializers import Initializer


def kernel_initializer(std: float | None = None) -> Initializer:
    """Glorot's uniform distribution, or a normal one that is cut off at two of its standard deviations `std`, > 0."""
    if std is None:
        return nn.initializers.xavier_uniform()
    return nn.initializers.truncated_normal(std)
