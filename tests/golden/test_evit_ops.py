"""tokenlab.ops against the authors' EViT: kept tokens, scores, the fused token, logits and gradients of a whole ViT.

The model is written out here in plain functions around our operations, so that nothing but them is tested.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.ops.attention import attention, attention_rows
from tokenlab.ops.gather import gather
from tokenlab.ops.merge import fuse
from tokenlab.ops.select import top_k

GOLDEN = dict(np.load(Path(__file__).with_name("evit.npz")))
KEEP = (1, 0.7, 1, 0.6)


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def embed(p, images):
    batch, channels, side, _ = images.shape
    patches = images.reshape(batch, channels, side // 6, 6, side // 6, 6).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, (side // 6) ** 2, -1)
    x = patches @ p["patch_embed.proj.weight"].reshape(12, -1).T + p["patch_embed.proj.bias"]
    return jnp.concatenate([jnp.tile(p["cls_token"], (batch, 1, 1)), x], 1) + p["pos_embed"]


def evit(params, images, *, fused, heads=3):
    x = embed(params, images)
    found = {}
    for block, rate in enumerate(KEEP):
        p = {name.removeprefix(f"blocks.{block}."): value for name, value in params.items()}
        y = layer_norm(x, p["norm1.weight"], p["norm1.bias"])
        qkv = (y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).reshape(*y.shape[:2], 3, heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        x = x + attention(q, k, v).reshape(y.shape) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        if rate < 1:
            scores = attention_rows(q[:, :1], k).mean(1)[:, 0]
            kept = top_k(scores, math.ceil(rate * (x.shape[1] - 1)), protected=1, order="score")
            found[f"cls_attention{block}"] = scores[:, 1:]
            found[f"keep_index{block}"] = kept[:, 1:] - 1
            rest = [fuse(x, scores, kept)] if fused else []
            x = jnp.concatenate([gather(x, kept), *rest], axis=1)
        y = layer_norm(x, p["norm2.weight"], p["norm2.bias"])
        y = jax.nn.gelu(y @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"], approximate=False)
        x = x + y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
        found[f"block{block}"] = x
    y = layer_norm(x, params["norm.weight"], params["norm.bias"])
    return y[:, 0] @ params["head.weight"].T + params["head.bias"], found


@pytest.mark.parametrize("variant", ["fuse", "drop"])
def test_whole_model(variant):
    params = {
        name.removeprefix("params/"): value for name, value in GOLDEN.items() if name.startswith("params/")
    }

    # Compiling is nearly all of this test's time, and the numbers need no optimised code.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params, images):
        def loss(params, images):
            logits, found = evit(params, images, fused=variant == "fuse")
            return (logits * GOLDEN["cotangents/logits"]).sum(), (logits, found)

        return jax.grad(loss, (0, 1), has_aux=True)(params, images)

    (gradients, d_images), (logits, found) = run(params, GOLDEN["inputs/images"])
    stored = {name: value for name, value in GOLDEN.items() if name.startswith(f"{variant}/mid/")}
    assert len(stored) == len(found) == 8
    for name, value in found.items():
        if name.startswith("keep_index"):
            np.testing.assert_array_equal(value, stored[f"{variant}/mid/{name}"])
        else:
            atol = 1e-6 if name.startswith("cls_attention") else 5e-5
            np.testing.assert_allclose(value, stored[f"{variant}/mid/{name}"], atol=atol, err_msg=name)
    np.testing.assert_allclose(logits, GOLDEN[f"{variant}/outputs/logits"], atol=5e-5)
    gradients["images"] = d_images
    prefix = f"{variant}/grads/"
    stored = {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}
    assert len(stored) == 8
    for name, gradient in stored.items():
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-4, rtol=1e-3, err_msg=name)
