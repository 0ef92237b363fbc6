"""Shared by the contract tests: weights re-drawn so that no zero initialisation hides anything, and a fixed batch."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))


def redraw(state, seed=7):
    """Every leaf moved by noise: zeros (heads, biases) and ones (norms) no longer hide a mistake."""
    draws = np.random.default_rng(seed)

    def moved(leaf):
        return jnp.asarray(np.asarray(leaf) + np.float32(0.2) * draws.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(moved, state)


@pytest.fixture(scope="session")
def images():
    """[6, 8, 8, 1]."""
    return jax.random.normal(jax.random.key(2), (6, 8, 8, 1))


@pytest.fixture(scope="session")
def cotangent():
    """A direction for the logits, [6, 5]."""
    return jax.random.normal(jax.random.key(3), (6, 5))
