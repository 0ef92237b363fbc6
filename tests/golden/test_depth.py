"""Routing around blocks against the authors' own: p-MoD's layer, the public relative of VideoLLM-MoD."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import models
from tokenlab.core.tokens import Tokens
from tokenlab.layers import execute
from tokenlab.layers.context import Context
from tokenlab.methods.depth.videollm_mod import VideoMixtureOfDepths, keep_ratios

GOLDEN = dict(np.load(Path(__file__).with_name("videollm_mod.npz")))
CONFIG = json.loads(str(GOLDEN["config"]))
D, H, TOKENS = CONFIG["D"], CONFIG["H"], 19
SLOTS = {
    "self_attn.q_proj": ("attention", "query"),
    "self_attn.k_proj": ("attention", "key"),
    "self_attn.v_proj": ("attention", "value"),
    "self_attn.o_proj": ("attention", "out"),
    "mlp.gate_proj": ("swiglu", "gate"),
    "mlp.up_proj": ("swiglu", "up"),
    "mlp.down_proj": ("swiglu", "down"),
}
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def ours(stored):
    """Theirs, by name, as {"blocks": ..., "items": ...}."""
    blocks = {
        kind: {"scale": stored[f"decoder_layer.{name}.weight"][None]}
        for kind, name in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
    }
    for name, (kind, slot) in SLOTS.items():
        kernel = stored[f"decoder_layer.{name}.weight"].T
        if kind == "attention":
            kernel = kernel.reshape((H, -1, D) if slot == "out" else (D, H, -1))
        blocks.setdefault(kind, {})[slot] = {"kernel": kernel[None]}
    router = {
        "router": stored["router.router.weight"].reshape(1, D),
        "router_bias": stored["router.router.bias"].reshape(1),
    }
    return {"blocks": blocks, "items": {"videollm_mod": router}}


def below(prefix):
    return {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}


@pytest.mark.parametrize("case", ["single", "batch"])
def test_p_mod_layer(case):
    given = below(f"{case}/inputs/")
    stack = (
        f"videollm_mod(keep={CONFIG['factor']}, frames=1, per_frame={CONFIG['V'][0]}, gate=tanh_scaled, bias=True, "
        "on=ffn, skip=scaled, always=none)(block)"
    )
    settings = {
        "width": D,
        "num_heads": H,
        "num_kv_heads": H,
        "mlp_dim": CONFIG["m"],
        "norm_eps": CONFIG["eps"],
    }
    model = models.build(
        {"name": "decoder_lm", "size": "nano", "stack": stack, "leaks": True, **settings},
        spec={"ids": ((TOKENS,), "int32")},
        num_outputs=7,
    )
    want = model.abstract_state()
    state = ours(below("params/"))
    assert jax.tree.map(jnp.shape, state["blocks"]) == jax.tree.map(jnp.shape, want["blocks"])
    place = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), given["valid"].shape)
    frame = jnp.where(given["visual"], 0, -1)

    def run(state, x):
        tokens = Tokens(
            x, place, place[..., None].astype(jnp.float32), given["valid"], extra={"frame": frame}
        )
        out, _ = execute.run(model.program, state, tokens, Context(jax.random.key(0), False))
        return out.x

    @quick
    def both(state, x):
        found, back = jax.vjp(run, state, x)
        return found, back(GOLDEN[f"{case}/cotangents/hidden"])

    found, (grads, into) = both(state, given["hidden"])
    np.testing.assert_allclose(found, GOLDEN[f"{case}/outputs/hidden"], atol=2e-5)
    np.testing.assert_allclose(into, GOLDEN[f"{case}/grads/hidden"], atol=1e-4, rtol=1e-3)
    theirs = ours(below(f"{case}/grads/"))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-3), grads, theirs)


@pytest.mark.parametrize("case", ["single", "batch"])
def test_which_tokens_p_mod_keeps(case):
    given = below(f"{case}/inputs/")
    item = VideoMixtureOfDepths(CONFIG["factor"], 1, CONFIG["V"][0], always="none", bias=True)
    params = {
        "router": GOLDEN["params/router.router.weight"][0],
        "router_bias": GOLDEN["params/router.router.bias"][0],
    }
    tokens = Tokens(
        jnp.asarray(given["hidden"]),
        jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), given["valid"].shape),
        valid=jnp.asarray(given["valid"]),
        extra={"frame": jnp.where(given["visual"], 0, -1)},
    )
    kept = item.kept(item.score(params, tokens), tokens, item.frame(tokens), jax.random.key(0))
    found = np.where(given["visual"], kept, given["valid"])
    np.testing.assert_array_equal(found, GOLDEN[f"{case}/outputs/kept"])


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_p_mod_keep_ratios(shape):
    found = keep_ratios(32, CONFIG["average_ratio"], shape)
    np.testing.assert_allclose(
        found, GOLDEN[f"schedule/outputs/shifted{'cos' if shape == 'cosine' else shape}"], atol=1e-6
    )
