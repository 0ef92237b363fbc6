"""Activations by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax import Array

from tokenlab.core.errors import NameLookupError, suggest

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The elementwise function called `name`; `gelu` is the exact (erf) one. Raises NameLookupError."""
    if name not in ACTIVATIONS:
        raise NameLookupError(f"activation {name!r} is unknown.{suggest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]
