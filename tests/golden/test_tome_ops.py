"""tokenlab.ops.merge and attention against the authors' ToMe: every matching variant, and a whole ViT with gradients.

The model is written out here in plain functions around our operations, so that nothing but them is tested.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.ops.attention import attention
from tokenlab.ops.gather import gather
from tokenlab.ops.merge import bipartite_soft_matching, merge, merge_limit, merge_weighted, unmerge

GOLDEN = dict(np.load(Path(__file__).with_name("tome.npz")))
METRIC, X, SIZE = (GOLDEN[f"match/inputs/{name}"] for name in ("metric", "x", "size"))
SIZE = SIZE[..., 0]
N, R = 13, 4


def random_partition():
    """The reference's: the r tokens with the smallest draws merge into the others."""
    order = jnp.argsort(GOLDEN["match/inputs/random"][..., 0], axis=1)
    return order[:, :R], order[:, R:]


def third(n):
    """The reference's k-th matching with k = 3: every third token is a destination, and all others merge."""
    places = np.arange(n)
    return places[places % 3 != 2], places[places % 3 == 2]


# Variant -> tokens it works on (the reference's k-th matching cuts the rest off), r, options.
VARIANTS = {
    "plain": (N, R, {}),
    "cls": (N, R, {"protected": 1}),
    "cls_dist": (N, R, {"protected": 2}),
    "kth3": (12, 8, {"partition": third(12)}),
    "random": (N, R, {"partition": random_partition()}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_matching(variant):
    n, r, options = VARIANTS[variant]
    stored = {
        name: GOLDEN.get(f"match/{variant}/{name}") for name in ("source", "size", "x_merged", "x_unmerged")
    }

    @jax.jit
    def run(metric, x, size):
        plan = bipartite_soft_matching(metric, r, order="reference", **options)
        average, total = merge_weighted(plan, x, size)
        return plan, average, total, merge(plan, size), unmerge(plan, average)

    plan, average, total, summed, unmerged = run(METRIC[:, :n], X[:, :n], SIZE[:, :n])
    parts = np.asarray(plan.assignment)[:, None, :] == np.arange(n - r)[:, None]
    np.testing.assert_array_equal(parts, stored["source"][..., :n])
    np.testing.assert_array_equal(stored["source"][..., n:], 0)
    np.testing.assert_array_equal(total, stored["size"][..., 0])
    np.testing.assert_array_equal(summed, total)
    np.testing.assert_allclose(average, stored["x_merged"], atol=1e-5)
    if variant == "cls_dist":  # not stored: the reference does not undo its reordering there
        assert stored["x_unmerged"] is None
    else:
        np.testing.assert_allclose(unmerged, stored["x_unmerged"], atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_of_the_merged_values(variant):
    n, r, options = VARIANTS[variant]

    def loss(x):
        plan = bipartite_soft_matching(METRIC[:, :n], r, order="reference", **options)
        return (merge_weighted(plan, x[:, :n], SIZE[:, :n])[0] * GOLDEN[f"match/{variant}/cotangent"]).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(X), GOLDEN[f"match/{variant}/grad_x"], atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_other_order_holds_the_same_tokens(variant):
    n, r, options = VARIANTS[variant]

    @partial(jax.jit, static_argnums=0)
    def run(order):
        plan = bipartite_soft_matching(METRIC[:, :n], r, order=order, **options)
        return plan.kept, unmerge(plan, merge_weighted(plan, X[:, :n], SIZE[:, :n])[0])

    (kept, ours), (_, theirs) = run("position"), run("reference")
    assert (np.diff(kept, axis=1) > 0).all()
    np.testing.assert_array_equal(ours, theirs)


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def embed(p, images):
    batch, channels, side, _ = images.shape
    patches = images.reshape(batch, channels, side // 6, 6, side // 6, 6).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, (side // 6) ** 2, -1)
    x = patches @ p["patch_embed.proj.weight"].reshape(12, -1).T + p["patch_embed.proj.bias"]
    return jnp.concatenate([jnp.tile(p["cls_token"], (batch, 1, 1)), x], 1) + p["pos_embed"]


def tome_vit(params, images, heads=3, r=4):
    x = embed(params, images)
    size = jnp.ones(x.shape[:2])
    owner = jnp.tile(jnp.arange(x.shape[1]), (x.shape[0], 1))
    features = []
    for block in range(3):
        p = {name.removeprefix(f"blocks.{block}."): value for name, value in params.items()}
        y = layer_norm(x, p["norm1.weight"], p["norm1.bias"])
        qkv = (y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).reshape(*y.shape[:2], 3, heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        y = attention(q, k, v, size=size).reshape(y.shape)
        x = x + y @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        count = min(r, merge_limit(x.shape[1], 1))
        plan = bipartite_soft_matching(k.mean(2), count, protected=1, order="reference")
        x, size = merge_weighted(plan, x, size)
        owner = gather(plan.assignment, owner)
        y = layer_norm(x, p["norm2.weight"], p["norm2.bias"])
        y = jax.nn.gelu(y @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"], approximate=False)
        x = x + y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
        features.append(x)
    y = layer_norm(x, params["norm.weight"], params["norm.bias"])
    return y[:, 0] @ params["head.weight"].T + params["head.bias"], features, size, owner


def test_whole_model():
    prefix = "model/params/"
    params = {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}
    cotangent = GOLDEN["model/cotangents/logits"]

    # Compiling is nearly all of this test's time, and the numbers need no optimised code.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params, images):
        def loss(params, images):
            logits, *rest = tome_vit(params, images)
            return (logits * cotangent).sum(), (logits, *rest)

        return jax.grad(loss, (0, 1), has_aux=True)(params, images)

    (gradients, d_images), (logits, features, size, owner) = run(params, GOLDEN["model/inputs/images"])
    for block, feature in enumerate(features):
        np.testing.assert_allclose(feature, GOLDEN[f"model/mid/block{block}"], atol=5e-5)
    np.testing.assert_array_equal(size, GOLDEN["model/mid/size"][..., 0])
    parts = np.asarray(owner)[:, None, :] == np.arange(5)[:, None]
    np.testing.assert_array_equal(parts, GOLDEN["model/mid/source"])
    np.testing.assert_allclose(logits, GOLDEN["model/outputs/logits"], atol=5e-5)
    gradients["images"] = d_images
    prefix = "model/grads/"
    stored = {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}
    assert len(stored) == 9
    for name, gradient in stored.items():
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-4, rtol=1e-3, err_msg=name)
