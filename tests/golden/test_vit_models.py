"""Whole models against the authors' own: EViT and patched-timm ToMe, through the stack, in both ways of running it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import models

sys.path.insert(0, str(Path(__file__).parent))
from timm_weights import gradients_like, to_state

HERE = Path(__file__).parent


def load(name: str):
    arrays = dict(np.load(HERE / f"{name}.npz"))
    return json.loads(str(arrays.pop("config"))), arrays


def params_of(arrays, prefix):
    return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}


def build(config, stack):
    image = (config["img_size"], config["img_size"], 3)
    settings = {
        "name": "vit",
        "size": f"nano/{config['patch_size']}",
        "width": config["D"],
        "num_heads": config["num_heads"],
        "mlp_dim": 4 * config["D"],
        "activation": "gelu",
        "stack": stack,
    }
    return models.build(settings, spec={"image": (image, "float32")}, num_outputs=config["num_classes"])


def check(model, params, images, logits, cotangent, grads, config, execution, depth):
    state = to_state(params, config["num_heads"])
    images = jnp.asarray(images.transpose(0, 2, 3, 1))

    def total(state, images):
        out = model.apply(state, {"image": images}, execution=execution).logits
        return jnp.sum(out * cotangent), out

    (_, out), (by_state, by_image) = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(
        state, images
    )
    np.testing.assert_allclose(out, logits, atol=5e-5)
    found = gradients_like(by_state, [n for n in grads if n != "images"], depth, config["D"])
    np.testing.assert_allclose(by_image.transpose(0, 3, 1, 2), grads["images"], atol=1e-4, rtol=1e-3)
    for name, value in found.items():
        np.testing.assert_allclose(value, grads[name], atol=1e-4, rtol=1e-3, err_msg=name)


def recorded(model, state, images):
    """The tokens at each recorded point."""

    def run(state, images):
        return [point.tokens for point in model.apply(state, {"image": images}, record=True).trace]

    return jax.jit(run)(state, jnp.asarray(images.transpose(0, 2, 3, 1)))


@pytest.mark.parametrize("execution", [pytest.param("scan", marks=pytest.mark.slow), "unroll"])
@pytest.mark.parametrize("variant", ["fuse", "drop"])
def test_evit_model(variant, execution):
    config, arrays = load("evit")
    fused = "" if variant == "fuse" else ", fused=False"
    stack = f"block + block(between=evit(0.7{fused})) + block + block(between=evit(0.6{fused}))"
    model = build(config, stack)
    params = params_of(arrays, "params/")
    grads = params_of(arrays, f"{variant}/grads/")
    check(
        model,
        params,
        arrays["inputs/images"],
        arrays[f"{variant}/outputs/logits"],
        arrays["cotangents/logits"],
        grads,
        config,
        execution,
        4,
    )
    assert model.program.after == arrays[f"{variant}/mid/block3"].shape[1]
    # The same patches are kept at the first reduction (the authors list them by score, without CLS).
    first = recorded(model, to_state(params, config["num_heads"]), arrays["inputs/images"])[0]
    kept = np.asarray(first.position)[:, 1 : 1 + arrays[f"{variant}/mid/keep_index1"].shape[1]] - 1
    np.testing.assert_array_equal(kept, np.sort(arrays[f"{variant}/mid/keep_index1"], axis=1))


@pytest.mark.parametrize("execution", [pytest.param("scan", marks=pytest.mark.slow), "unroll"])
def test_tome_model(execution):
    config, arrays = load("tome")
    model = build(config, f"block(between=tome({config['model_r']}))*{config['depth']}")
    params = params_of(arrays, "model/params/")
    check(
        model,
        params,
        arrays["model/inputs/images"],
        arrays["model/outputs/logits"],
        arrays["model/cotangents/logits"],
        params_of(arrays, "model/grads/"),
        config,
        execution,
        config["depth"],
    )
    last = recorded(model, to_state(params, config["num_heads"]), arrays["model/inputs/images"])[-1]
    sizes = np.sort(np.asarray(last.size), axis=1)
    np.testing.assert_array_equal(sizes, np.sort(arrays["model/mid/size"][..., 0], axis=1))
    # The same inputs went together: compare the groups as sets of positions.
    for owner, source in zip(np.asarray(last.owner), arrays["model/mid/source"], strict=True):
        ours = {frozenset(np.flatnonzero(owner == token)) for token in range(source.shape[0])}
        assert ours == {frozenset(np.flatnonzero(row)) for row in source}
