"""Fixtures: weights of others."""

from __future__ import annotations

import numpy as np
import pytest

from tests.interop.outside import timm_like


@pytest.fixture
def digits() -> dict[str, np.ndarray]:
    """Weights by timm's names for the digits: 8x8 pixels of one channel, patches of 2, ten classes; L 3, D 16, H 2."""
    return timm_like(np.random.default_rng(0))
