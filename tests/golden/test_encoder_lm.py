"""The dense encoder against a modified fairseq RoBERTa (golden/sctd): embeddings, states, loss and head."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import models
from tokenlab.layers.context import Context
from tokenlab.tasks import masked_lm

CASE = dict(np.load(Path(__file__).parent / "sctd.npz"))
SIZES = json.loads(str(CASE["config"]))
IDS, TARGET = CASE["inputs/src_tokens"], CASE["inputs/target"]
PAD = 1
THERE = IDS != PAD


def encoder(stack=None, **settings):
    settings = {
        "name": "encoder_lm", "stack": stack or f"block*{SIZES['L']}", "width": SIZES["D"], "num_heads": SIZES["H"],
        "mlp_dim": SIZES["F"], "positions": CASE["params/sentence_encoder.embed_positions.weight"].shape[0],
        "types": 0, "norm_eps": 1e-5, **settings,
    }  # fmt: skip
    return models.build(settings, spec={"ids": (IDS.shape[1:], "int32")}, num_outputs=SIZES["V"])


def own(name):
    return CASE[f"params/{name}"]


def norm(name):
    return {"scale": own(f"{name}.weight"), "bias": own(f"{name}.bias")}


def dense(name):
    return {"kernel": own(f"{name}.weight").T, "bias": own(f"{name}.bias")}


def weights(layers):
    """Our weights from the reference's, of the first so many layers."""
    heads, width = SIZES["H"], SIZES["D"] // SIZES["H"]

    def layer(i):
        at = f"sentence_encoder.layers.{i}"
        attention = {}
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            found = dense(f"{at}.self_attn.{theirs}")
            attention[ours] = {
                "kernel": found["kernel"].reshape(-1, heads, width),
                "bias": found["bias"].reshape(heads, width),
            }
        out = dense(f"{at}.self_attn.out_proj")
        attention["out"] = {"kernel": out["kernel"].reshape(heads, width, -1), "bias": out["bias"]}
        return {
            "attention": attention,
            "attention_norm": norm(f"{at}.self_attn_layer_norm"),
            "mlp": {"up": dense(f"{at}.fc1"), "down": dense(f"{at}.fc2")},
            "ffn_norm": norm(f"{at}.final_layer_norm"),
        }

    return {
        "embed": {
            "table": own("sentence_encoder.embed_tokens.weight"),
            "position": own("sentence_encoder.embed_positions.weight"),
            "norm": norm("sentence_encoder.layernorm_embedding"),
        },
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *map(layer, range(layers))),
        "head": {
            "dense": dense("lm_head.dense"), "norm": norm("lm_head.layer_norm"), "bias": own("lm_head.bias"),
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    """As the reference numbers positions: from 2 on, 1 for padding."""
    assert (THERE == (np.cumsum(~THERE, 1) == 0)).all()  # padding stands behind
    position = np.where(THERE, np.cumsum(THERE, 1) + PAD, PAD).astype(np.int32)
    places = [np.flatnonzero(row != PAD) for row in TARGET]
    most = max(map(len, places))
    predict = np.array([np.pad(row, (0, most - len(row))) for row in places], np.int32)
    weight = np.array([np.arange(most) < len(row) for row in places], np.float32)
    return {
        "ids": IDS, "position": position, "length": THERE.sum(1).astype(np.int32), "predict": predict,
        "label": np.take_along_axis(TARGET, predict, 1), "weight": weight, "mask": np.ones(len(IDS), np.float32),
    }  # fmt: skip


def test_the_parameters_are_those_of_the_reference():
    shapes = jax.tree.map(jnp.shape, weights(SIZES["L"]))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, dict(encoder().abstract_state()))


def test_embeddings_are_the_references(batch):
    model = encoder()
    tokens = model.embedded(weights(SIZES["L"]), batch, Context(jax.random.key(0)))
    np.testing.assert_allclose(np.where(THERE[..., None], tokens.x, 0), CASE["mid/sparse_state0"], atol=2e-5)
    assert (tokens.extra["ids"] == IDS).all() and (tokens.valid == THERE).all() and tokens.protected == 1


def test_states_loss_and_head_are_the_references(batch):
    depth = SIZES["L"]
    for layers in (depth - 1, depth):
        model = encoder(f"block*{layers}")
        output = jax.jit(model.apply)(weights(layers), batch)
        found = np.where(THERE[..., None], output.tokens, 0)
        np.testing.assert_allclose(
            found, np.where(THERE[..., None], CASE[f"mid/dense_state{layers}"], 0), atol=2e-5
        )
    guessed = masked_lm.judged(output, batch)
    np.testing.assert_allclose(guessed.nats.sum(), CASE["outputs/ce_dense"], rtol=1e-5)


def test_the_head_gives_the_references_logits():
    """Of the states with which the reference's own sparse path ends."""
    model = encoder()
    state = weights(SIZES["L"])
    logits = model.head.apply({"params": state["head"]}, CASE["mid/sparse_state6"], state["embed"]["table"])
    found = np.where(THERE[..., None], logits, 0)
    np.testing.assert_allclose(found, np.where(THERE[..., None], CASE["outputs/logits_sparse"], 0), atol=2e-5)
