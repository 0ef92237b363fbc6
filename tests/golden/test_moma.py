"""moma against KempnerForge's port of it: who takes what, outputs, gradients; padding, and with the noise it drew.

There the tokens of the whole batch are ranked together, and each modality has a capacity of its own.
"""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.modality import MODALITIES
from tokenlab.layers.ffn.swiglu import SwiGLU
from tokenlab.methods.experts.moma import MoMa
from tokenlab.ops import modality as ops
from tokenlab.ops import route

GOLDEN = dict(np.load(Path(__file__).with_name("moma.npz")))
CONFIG = json.loads(str(GOLDEN["config"]))
GRADIENT = {"atol": 2e-5, "rtol": 1e-4}
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
close = np.testing.assert_allclose

# The reference's modality 0 is "image".
IDS = jnp.asarray([MODALITIES.index(name) for name in CONFIG["modalities"]], jnp.int32)[
    GOLDEN["inputs/modality_ids"]
]
MASK = {"plain": None, "padded": jnp.asarray(GOLDEN["inputs/key_padding_mask"]), "gumbel": None}


def place(name):
    return MODALITIES.index(name)


@cache
def layer(name, noise=0.0):
    """Ours with the capacity that modality `name` has there; the other modality is not looked at."""
    counts = CONFIG["experts"]
    return MoMa(
        **counts,
        capacity=CONFIG["capacity"][name] * counts[name],
        sequences=CONFIG["B"],
        noise=noise,
        decide="topk",
        expert=SwiGLU(CONFIG["hidden"]),
    )


@cache
def params():
    found = {}
    for name, count in CONFIG["experts"].items():
        start = f"params/experts.{name}"
        found[f"router_{name}"] = jnp.asarray(GOLDEN[f"{start}.router.gate.weight"].T)
        found[f"experts_{name}"] = {
            ours: {
                "kernel": jnp.stack([GOLDEN[f"{start}.experts.{e}.{theirs}.weight"].T for e in range(count)])
            }
            for ours, theirs in NAMES.items()
        }
    return found


def theirs(grads, x):
    """Our gradients under their names."""
    found = {"x": x}
    for name, count in CONFIG["experts"].items():
        found[f"experts.{name}.router.gate.weight"] = grads[f"router_{name}"].T
        for ours, other in NAMES.items():
            for e in range(count):
                kernel = grads[f"experts_{name}"][ours]["kernel"][e]
                found[f"experts.{name}.experts.{e}.{other}.weight"] = kernel.T
    return found


def drawn(name, shape):
    """Their noise, laid where the tokens of the modality stand; the draws come in the order of the tokens."""
    noise = np.zeros(shape, np.float32)
    rows = np.flatnonzero(np.asarray(IDS).reshape(-1) == place(name))
    plus, minus = (GOLDEN[f"gumbel/inputs/{name}_gumbel_{sign}"] for sign in ("plus", "minus"))
    noise.reshape(-1, shape[-1])[rows] = plus - minus
    return jnp.asarray(noise)


@cache
def run(variant, name):
    """Output and gradients with the capacity of `name`."""
    module = layer(name, noise=1.0 if variant == "gumbel" else 0.0)
    x, cotangent, valid = GOLDEN["inputs/x"], GOLDEN["cotangents/y"], MASK[variant]
    own = (IDS == place(name))[..., None]
    kept = jax.random.logistic
    jax.random.logistic = lambda key, shape: drawn(
        name if shape[-1] == CONFIG["experts"][name] else other(name), shape
    )
    try:

        def total(params, x):
            y, _ = module.apply(
                {"params": params},
                x,
                modality=IDS,
                valid=valid,
                train=variant == "gumbel",
                rngs={"ffn": jax.random.key(0)},
            )
            return jnp.sum(jnp.where(own, y * cotangent, 0.0)), y

        (_, y), grads = quick(jax.value_and_grad(total, (0, 1), has_aux=True))(params(), x)
    finally:
        jax.random.logistic = kept
    return np.where(own, y, 0.0), grads


def other(name):
    return next(each for each in CONFIG["experts"] if each != name)


@pytest.mark.parametrize("variant", list(MASK))
def test_outputs_and_gradients(variant):
    both = [run(variant, name) for name in CONFIG["experts"]]
    close(sum(y for y, _ in both), GOLDEN[f"{variant}/outputs/y"], atol=1e-5)
    grads = jax.tree.map(jnp.add, both[0][1], both[1][1])
    found = theirs(*grads)
    start = f"{variant}/grads/"
    stored = {key.removeprefix(start): value for key, value in GOLDEN.items() if key.startswith(start)}
    assert stored
    for key, value in stored.items():
        close(found[key], value, **GRADIENT, err_msg=key)


@pytest.mark.parametrize("variant", ["plain", "padded"])
@pytest.mark.parametrize("name", list(CONFIG["experts"]))
def test_who_is_taken(variant, name):
    """Positions, the experts' choices in their order, and the scores."""
    flat = IDS.reshape(1, -1)
    valid = None if MASK[variant] is None else MASK[variant].reshape(1, -1)
    lane = ops.lanes(flat, (14, 14), valid)[place(name)]
    count = int(lane.count[0])
    np.testing.assert_array_equal(lane.index[0, :count], GOLDEN[f"{variant}/mid/{name}_positions"])
    rows = GOLDEN["inputs/x"].reshape(1, -1, CONFIG["dim"])
    gates = jax.nn.sigmoid(ops.gather_lane(jnp.asarray(rows @ params()[f"router_{name}"]), lane))
    index = GOLDEN[f"{variant}/mid/{name}_topk_index"]
    places = layer(name).taken_of(layer(name).groups[place(name)], count)
    assert places == index.shape[1]
    taken = route.experts_choice(gates, places, valid=lane.there)
    np.testing.assert_array_equal(taken.token[0], index)
    close(taken.weight[0], GOLDEN[f"{variant}/mid/{name}_topk_score"], atol=1e-6)
