"""Shared by the contract tests: a fixed batch."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def images():
    """[6, 8, 8, 1]."""
    return jax.random.normal(jax.random.key(2), (6, 8, 8, 1))


@pytest.fixture(scope="session")
def cotangent():
    """A direction for the logits, [6, 5]."""
    return jax.random.normal(jax.random.key(3), (6, 5))
