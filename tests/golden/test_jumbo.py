"""Jumbo against the authors' own: the whole model, its gradients, one block on plain arrays, the map of attention."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import models
from tokenlab.core.errors import CheckpointError
from tokenlab.evaluate.attention_map import attention_map
from tokenlab.interop.vit_weights import convert_jumbo_checkpoint, read
from tokenlab.methods.tokens.jumbo import JumboBlock, JumboMLP
from tokenlab.ops.position import resample_grid

HERE = Path(__file__).parent
FORWARD = {"atol": 5e-5, "rtol": 1e-4}
BACKWARD = {"atol": 1e-4, "rtol": 1e-3}


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(HERE / "jumbo.npz"))
    return json.loads(str(arrays.pop("config"))), arrays


@pytest.fixture(scope="module")
def params(golden):
    """The authors' parameters by their names, and the one that nothing reads."""
    found = {key[7:]: value for key, value in golden[1].items() if key.startswith("params/")}
    return {**found, "cls_token": np.full((1, 1, 12), 9.0, np.float32)}


@pytest.fixture(scope="module")
def state(params):
    return jax.tree.map(jnp.asarray, convert_jumbo_checkpoint(params, 3))


def images(golden):
    return jnp.asarray(golden[1]["inputs/images"].transpose(0, 2, 3, 1))


def build(golden, params, **changes):
    config, _ = golden
    weights = read(params)
    settings = {
        "num_heads": 3,
        **weights.conventional,
        **weights.settings,
        "stack": f"{weights.block}*{weights.depth}",
    }
    side = config["img_size"]
    spec = {"image": ((side, side, 3), "float32")}
    return models.build({"name": "vit", **settings, **changes}, spec=spec, num_outputs=config["num_classes"])


def test_what_the_weights_say_of_the_model(golden, params):
    weights = read(params)
    assert weights.layout.name == "Jumbo" and weights.block == "block(special=jumbo)" and weights.depth == 3
    assert {
        key: weights.settings[key] for key in ("width", "registers", "head", "position_grid", "mlp_dim")
    } == {
        "width": 12,
        "registers": 4,
        "head": "special",
        "position_grid": (4, 4),
        "mlp_dim": 48,
    }
    assert weights.conventional == {"activation": "gelu", "norm_eps": 1e-5}
    assert weights.notes == ("cls_token is left out: the pieces stand in its place",)


@pytest.fixture(scope="module", params=["scan", "unroll"])
def run(request, golden, params, state):
    """The output, and gradients for (state, images)."""
    model = build(golden, params, execution=request.param)
    shapes = jax.tree.map(jnp.shape, model.abstract_state())
    assert jax.tree.map(jnp.shape, state) == shapes

    def total(state, image):
        out = model.apply(state, {"image": image})
        return jnp.sum(out.logits * golden[1]["cotangents/logits"]), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(state, images(golden))


def test_features_and_logits(golden, run):
    out = run[0][1]
    np.testing.assert_allclose(out.tokens, golden[1]["outputs/features"], **FORWARD)
    np.testing.assert_allclose(out.logits, golden[1]["outputs/logits"], **FORWARD)
    assert out.features.shape == (2, 5 * 12)


def test_gradients(golden, run):
    (by_state, by_image), wanted = run[1], golden[1]
    blocks, shared = by_state["blocks"], by_state["shared"]["jumbo"]
    query = [
        np.asarray(blocks["attention"][n]["kernel"][0]).reshape(12, 12).T for n in ("query", "key", "value")
    ]
    found = {
        "images": by_image.transpose(0, 3, 1, 2),
        "jumbo_token": by_state["embed"]["registers"][None],
        "pos_embed": by_state["embed"]["position"][None],
        "patch_embed.proj.weight": by_state["embed"]["patch"]["kernel"]
        .reshape(8, 8, 3, 12)
        .transpose(3, 2, 0, 1),
        "jumbo_mlp.fc1.weight": shared["up"]["kernel"].T,
        "jumbo_mlp.fc1.bias": shared["up"]["bias"],
        "jumbo_mlp.fc2.weight": shared["down"]["kernel"].T,
        "jumbo_mlp.fc2.bias": shared["down"]["bias"],
        "blocks.0.attn.qkv.weight": np.concatenate(query),
        "blocks.0.norm3.weight": blocks["jumbo_norm"]["scale"][0],
        "blocks.1.norm3.bias": blocks["jumbo_norm"]["bias"][1],
        "blocks.1.mlp.fc1.weight": blocks["mlp"]["up"]["kernel"][1].T,
        "blocks.1.norm2.weight": blocks["ffn_norm"]["scale"][1],
        "norm.weight": by_state["head"]["norm"]["scale"],
        "head.weight": by_state["head"]["classifier"]["kernel"].T,
        "head.bias": by_state["head"]["classifier"]["bias"],
    }
    assert {f"grads/{name}" for name in found} == {name for name in wanted if name.startswith("grads/")}
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[f"grads/{name}"], **BACKWARD, err_msg=name)


def test_a_block_on_plain_arrays(golden, params, state):
    """The first two blocks one by one; `mid/block2` of the golden file is not the third block's output."""
    arrays = golden[1]
    patches = jnp.asarray(arrays["mid/patch_embed"] + params["pos_embed"])
    pieces = jnp.broadcast_to(jnp.asarray(params["jumbo_token"]), (2, 4, 12))
    feed = JumboMLP().bind({"params": state["shared"]["jumbo"]})
    block = jax.jit(lambda own, *given: JumboBlock(num_heads=3).apply({"params": own}, *given, feed))
    for k in range(2):
        pieces, patches = block(jax.tree.map(lambda leaf, k=k: leaf[k], state["blocks"]), pieces, patches)
        np.testing.assert_allclose(
            jnp.concatenate([pieces, patches], axis=1), arrays[f"mid/block{k}"], **FORWARD
        )


def test_attention_map(golden, params, state):
    model = build(golden, params)
    found = jax.jit(lambda state, image: attention_map(model, state, image))(state, images(golden))
    np.testing.assert_allclose(found, golden[1]["outputs/attention_map"], atol=1e-6)


def test_positions_on_another_grid(golden, params):
    wanted = golden[1]["mid/pos_embed_resampled"][0]
    found = resample_grid(jnp.asarray(params["pos_embed"][0]), (4, 4), tuple(golden[0]["new_grid"]))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_checkpoints_that_do_not_fit(params):
    with pytest.raises(CheckpointError, match=r"jumbo_mlp\.fc2\.weight is missing \(layout Jumbo\)"):
        convert_jumbo_checkpoint({k: v for k, v in params.items() if k != "jumbo_mlp.fc2.weight"}, 3)
    with pytest.raises(
        CheckpointError, match=r"blocks\.1\.norm3\.weight .* has shape \[47\], expected \[48\]"
    ):
        convert_jumbo_checkpoint({**params, "blocks.1.norm3.weight": np.ones(47)}, 3)
    with pytest.raises(CheckpointError, match=r"head\.weight .* has shape \[7, 12\], expected \[7, 60\]"):
        convert_jumbo_checkpoint({**params, "head.weight": np.ones((7, 12))}, 3)
    with pytest.raises(CheckpointError, match="width 12, which no published size has; give num_heads"):
        convert_jumbo_checkpoint(params)
    with pytest.raises(CheckpointError, match="cannot be split into 5 heads"):
        convert_jumbo_checkpoint(params, 5)
    with pytest.raises(
        CheckpointError, match=r"jumbo_mlp\.fc1\.weight .* no multiple of the joined width 48"
    ):
        odd = {"jumbo_mlp.fc1.weight": np.ones((50, 48)), "jumbo_mlp.fc1.bias": np.ones(50)}
        convert_jumbo_checkpoint({**params, **odd, "jumbo_mlp.fc2.weight": np.ones((48, 50))}, 3)
    plain = {k: v for k, v in params.items() if "jumbo" not in k and "norm3" not in k}
    with pytest.raises(CheckpointError, match="has the names of timm, not of Jumbo"):
        convert_jumbo_checkpoint(
            {**plain, "pos_embed": np.ones((1, 17, 12)), "head.weight": np.ones((7, 12))}, 3
        )
