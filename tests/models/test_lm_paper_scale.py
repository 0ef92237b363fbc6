"""The published language models: counted parameters and costs of their configurations."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import pytest

from tokenlab import models, tasks
from tokenlab.core.config import load
from tokenlab.train.costs import active_parameters, forward_cost

CONFIGS = Path(__file__).parents[2] / "configs"
KEYS = {
    "ids": "int32",
    "target": "int32",
    "segment": "int32",
    "position": "int32",
    "weight": "float32",
    "bytes": "float32",
}


def built(name, vocabulary, length=None):
    config = load(CONFIGS / name)
    spec = {key: ((length or config.data.length,), dtype) for key, dtype in KEYS.items()}
    return models.build(config.model, spec=spec, num_outputs=vocabulary), spec


def parameters(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract_state()))


def test_grin_has_the_published_parameters():
    """42 billion, 6.6 billion of them active (arXiv 2409.12136, section 4)."""
    model, _ = built("grin.py", 32_064)
    assert parameters(model) == pytest.approx(41.9e9, rel=0.005)
    assert active_parameters(model) == pytest.approx(6.6e9, rel=0.01)


@pytest.mark.parametrize("size", ["60M", "220M", "3B"])
def test_routed_and_dense_differ_by_routers_alone(size):
    routed, _ = built(f"mixture_of_depths.py:{size}", 32_000)
    dense, _ = built(f"mixture_of_depths.py:{size}-dense", 32_000)
    width, depth = routed.settings.dims()[:2]
    half = width // 2
    each = width + width * half + half + half + 1  # the router, and the predictor D -> D/2 -> 1
    assert parameters(routed) - parameters(dense) == depth // 2 * each


def test_routed_blocks_cost_an_eighth():
    """At 2,048 tokens: K of N in the linear part, (K / N)^2 in the attention part, of every second block."""
    task = tasks.build({"name": "next_token"})
    routed, spec = built("mixture_of_depths.py:60M", 32_000)
    dense, _ = built("mixture_of_depths.py:60M-dense", 32_000)
    width, depth, hidden, *_ = dense.settings.dims()
    n, k, pairs = 2048, 256, depth // 2
    linear, quadratic = 2 * (4 * width**2 + 3 * width * hidden), 4 * width
    saved = pairs * (linear * (n - k) + quadratic * (n**2 - k**2))
    added = pairs * 2 * n * width  # the router; outside training the predictor, which is counted apart
    predictor = pairs * n * (2 * width * (width // 2) + 2 * (width // 2))
    found = [forward_cost(model, task, spec).flops for model in (dense, routed)]
    assert found[0] - found[1] == pytest.approx(saved - added - predictor, rel=0.001)


MOMA = {  # billions, arXiv 2407.21770, table 1
    "90M-dense": 0.09,
    "90M-4t4i": 0.21,
    "435M-4t4i": 1.9,
    "435M-8x": 1.9,
    "1.4B-dense": 1.5,
    "1.4B-4t4i": 7.1,
    "110M-mod-4t4i": 0.317,
    "635M-mod-4t4i": 3.0,
    "2.3B-mod-4t4i": 12.0,
}


def with_modality(run):
    config = load(CONFIGS / f"moma.py:{run}")
    keys = {**KEYS, "modality": "int32", "target_modality": "int32"}
    spec = {key: ((config.data.length,), dtype) for key, dtype in keys.items()}
    return models.build(config.model, spec=spec, num_outputs=515), spec


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, marks=() if run in ("90M-4t4i", "110M-mod-4t4i") else pytest.mark.slow)
        for run in MOMA
    ],
)
def test_moma_has_the_published_parameters(run):
    model, _ = with_modality(run)
    assert parameters(model) / 1e9 == pytest.approx(MOMA[run], rel=0.03)


@pytest.mark.slow
def test_experts_by_modality_train_at_the_cost_of_the_dense_model():
    """Routers and auxiliary routers aside, which are a hundredth; mixed experts the same."""
    from tokenlab.train.costs import train_cost

    task = tasks.build({"name": "mixed_next_token"})
    found = {}
    for run in ("90M-dense", "90M-1t1i", "90M-4t4i", "90M-8x"):
        model, spec = with_modality(run)
        found[run] = train_cost(model, task, spec).model_flops
    dense = found.pop("90M-dense")
    assert found["90M-1t1i"] == dense
    for run, flops in found.items():
        assert dense <= flops < 1.02 * dense, run
