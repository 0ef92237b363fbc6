"""Shared by the contract tests: weights re-drawn so that no zero initialisation hides anything, and a fixed batch."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))


def redraw(state, seed=7):
    """Every leaf moved by noise: zeros (heads, biases) and ones (norms) no longer hide a mistake."""
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


@pytest.fixture(scope="session")
def images():
    """[6, 8, 8, 1]."""
    return jax.random.normal(jax.random.key(2), (6, 8, 8, 1))


@pytest.fixture(scope="session")
def cotangent():
    """A direction for the logits, [6, 5]."""
    return jax.random.normal(jax.random.key(3), (6, 5))
