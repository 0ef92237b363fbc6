"""Shared by the tests of expert layers: tokens, weights without zeros, and a plain expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.layers.ffn.mlp import MLP

BATCH, TOKENS, WIDTH, HIDDEN = 3, 7, 5, 6


@pytest.fixture(scope="session")
def x():
    """[3, 7, 5], no two alike."""
    return jax.random.normal(jax.random.key(11), (BATCH, TOKENS, WIDTH))


@pytest.fixture(scope="session")
def expert():
    return MLP(HIDDEN)


@pytest.fixture(scope="session")
def weights():
    """layer, tokens -> its parameters, every leaf moved by noise so that no zero at the start hides anything."""

    def draw(layer, x, seed=5):
        shapes = jax.eval_shape(
            lambda x: layer.init({"params": jax.random.key(0), "ffn": jax.random.key(0)}, x), x
        )
        leaves, structure = jax.tree.flatten(shapes["params"])
        generator = np.random.default_rng(seed)
        drawn = [jnp.asarray(generator.normal(scale=0.7, size=leaf.shape), leaf.dtype) for leaf in leaves]
        return jax.tree.unflatten(structure, drawn)

    return draw


@pytest.fixture(scope="session")
def each_expert():
    """(the MLP's weights [E, ...], tokens [..., D]) -> what every expert makes of every token, [E, ..., D]."""

    def gelu(x):
        return jax.nn.gelu(x, approximate=False)

    def run(bank, x):
        bank, x = jax.tree.map(np.asarray, (bank, x))
        made = []
        for e in range(len(bank["up"]["bias"])):
            up, down = ({leaf: value[e] for leaf, value in bank[name].items()} for name in ("up", "down"))
            hidden = np.asarray(gelu(x @ up["kernel"] + up["bias"]))
            made.append(hidden @ down["kernel"] + down["bias"])
        return np.stack(made)

    return run
