"""The count of a whole transformer in plain JAX against XLA's analysis of it, unrolled and without remat."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from tokenlab.cost import count

BATCH, TOKENS, WIDTH, DEPTH, HEADS, CLASSES, PATCH = 2, 64, 128, 2, 2, 10, 48
HIDDEN = 4 * WIDTH


def params(dtype: Any = jnp.float32) -> dict[str, Any]:
    def leaf(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    def norm() -> dict[str, Any]:
        return {"scale": leaf(WIDTH), "bias": leaf(WIDTH)}

    def block() -> dict[str, Any]:
        products = {name: leaf(WIDTH, WIDTH) for name in "qkvo"}
        mlp = {
            "up": leaf(WIDTH, HIDDEN),
            "up_bias": leaf(HIDDEN),
            "down": leaf(HIDDEN, WIDTH),
            "down_bias": leaf(WIDTH),
        }
        return {"norm1": norm(), "norm2": norm(), **products, **mlp}

    return {
        "embed": leaf(PATCH, WIDTH),
        "position": leaf(TOKENS, WIDTH),
        "blocks": [block() for _ in range(DEPTH)],
        "norm": norm(),
        "head": leaf(WIDTH, CLASSES),
    }


def layer_norm(p: dict[str, Array], x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def block(p: dict[str, Any], x: Array) -> Array:
    y = layer_norm(p["norm1"], x)
    q, k, v = ((y @ p[name]).reshape(*x.shape[:2], HEADS, -1) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bnhc,bmhc->bhnm", q, k) / q.shape[-1] ** 0.5)
    x = x + jnp.einsum("bhnm,bmhc->bnhc", weights, v).reshape(x.shape) @ p["o"]
    y = layer_norm(p["norm2"], x)
    return x + jax.nn.gelu(y @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]


def loss(p: dict[str, Any], patches: Array, labels: Array) -> Array:
    x = patches @ p["embed"] + p["position"]
    for one in p["blocks"]:
        x = block(one, x)
    logits = layer_norm(p["norm"], x).mean(1) @ p["head"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


def batch(dtype: Any = jnp.float32) -> tuple[Any, Any]:
    patches = jax.ShapeDtypeStruct((BATCH, TOKENS, PATCH), dtype)
    return patches, jax.ShapeDtypeStruct((BATCH,), jnp.int32)


PER_BLOCK = 2 * BATCH * TOKENS * WIDTH * (4 * WIDTH + 2 * TOKENS + 2 * HIDDEN)
EMBED = 2 * BATCH * TOKENS * PATCH * WIDTH
FORWARD = EMBED + DEPTH * PER_BLOCK + 2 * BATCH * WIDTH * CLASSES


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("train", [False, True])
def test_within_one_percent_of_xla(train: bool, dtype: Any) -> None:
    fn = jax.value_and_grad(loss) if train else loss
    args = params(dtype), *batch(dtype)
    cost = count(fn, *args)
    assert cost.flops == (3 * FORWARD - EMBED if train else FORWARD)
    analysis = jax.jit(fn).lower(*args).cost_analysis()
    assert cost.flops + cost.elementwise == pytest.approx(analysis["flops"], rel=0.01)
    assert cost.transcendental == pytest.approx(analysis["transcendentals"], rel=0.01)


def test_within_one_percent_of_what_xla_compiles() -> None:
    args = params(), *batch()
    cost = count(loss, *args)
    analysis = jax.jit(loss).lower(*args).compile().cost_analysis()
    assert cost.flops + cost.elementwise == pytest.approx(analysis["flops"], rel=0.01)


def test_xla_counts_a_scan_body_once_and_we_do_not() -> None:
    def scanned(p: Any, x: Array) -> Array:
        return jax.lax.scan(lambda x, p: (block(p, x), None), x, p)[0]

    one = params()["blocks"][0]
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((5, *leaf.shape), leaf.dtype), one)
    x = jax.ShapeDtypeStruct((BATCH, TOKENS, WIDTH), jnp.float32)
    analysis = jax.jit(scanned).lower(stacked, x).cost_analysis()
    assert count(scanned, stacked, x).flops == 5 * PER_BLOCK
    assert analysis["flops"] < 1.1 * PER_BLOCK


def test_xla_on_cpu_takes_a_ragged_product_for_dense_and_we_do_not() -> None:
    def experts(w: Array, x: Array, sizes: Array) -> Array:
        return jax.lax.ragged_dot(x, w, sizes)

    shapes = ((8, 16, 32), jnp.float32), ((64, 16), jnp.float32), ((8,), jnp.int32)
    args = [jax.ShapeDtypeStruct(dims, dtype) for dims, dtype in shapes]
    analysis = jax.jit(experts).lower(*args).compile().cost_analysis()
    assert count(experts, *args).flops == 2 * 64 * 16 * 32
    assert analysis["flops"] > 4 * 2 * 64 * 16 * 32
