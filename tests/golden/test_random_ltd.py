"""Random-LTD against DeepSpeed and Megatron: schedule tables, token clocks, learning rates, wrapped blocks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import models
from tokenlab.core.stack import parse
from tokenlab.core.tokens import Tokens
from tokenlab.layers import execute
from tokenlab.layers.attention import Attention
from tokenlab.layers.block import Block
from tokenlab.layers.build_program import build_program
from tokenlab.layers.context import Context
from tokenlab.layers.ffn import FFNDefaults
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.methods.dropping import random_ltd as method
from tokenlab.methods.dropping.random_ltd import (
    effective_tokens,
    layer_token_lr,
    layer_tokens,
    linear_keep_schedule,
)
from tokenlab.models import Names
from tokenlab.train import schedule

GOLDEN = dict(np.load(Path(__file__).with_name("random_ltd.npz")))
CONFIG = json.loads(str(GOLDEN["config"]))
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def below(prefix):
    return {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}


@pytest.mark.parametrize("number", range(len(CONFIG["schedules"])))
def test_schedule_tables(number):
    own = CONFIG["schedules"][number]
    steps, k = GOLDEN[f"schedule{number}/steps"], GOLDEN[f"schedule{number}/k"]
    given = {key: own[key] for key in ("k_min", "k_max", "require_steps", "multiple")}
    assert [linear_keep_schedule(int(step), **given) for step in steps] == k.tolist()
    text = "linear({k_min}, {k_max}, until={require_steps}, multiple={multiple})".format(**given)
    variables = schedule.stack_vars({"k": text}, int(steps.max()) + 1)
    assert [variables.at(int(step))["k"] for step in steps] == k.tolist()


def test_layer_tokens_consumed():
    own = CONFIG["running"]
    given = {key: own[key] for key in ("k_min", "k_max", "require_steps", "multiple")}
    k = [linear_keep_schedule(step, **given) for step in range(own["steps"])]
    assert k == GOLDEN["running/k"].tolist()
    spent = [layer_tokens(own["batch"], own["k_max"], one, own["layers"], own["ltd_layers"]) for one in k]
    np.testing.assert_array_equal(np.cumsum(spent), GOLDEN["running/consumed_layer_tokens"])


def test_effective_tokens():
    found = [effective_tokens(*map(int, row)) for row in GOLDEN["neff/inputs"]]
    assert found == GOLDEN["neff/outputs"].tolist()


@pytest.mark.parametrize("number", range(len(CONFIG["lr"])))
def test_learning_rates(number):
    own = CONFIG["lr"][number]
    found = layer_token_lr(
        GOLDEN[f"lr{number}/tokens"],
        peak=own["peak"],
        floor=own["floor"],
        warmup_tokens=own["warmup"],
        total_tokens=own["total"],
        decay=own["style"],
    )
    np.testing.assert_allclose(found, GOLDEN[f"lr{number}/lr"], rtol=1e-6)


# ------------------------------------------------------------------------------------------------ a decoder


def gpt2(stored):
    """Blocks of GPT-2 by name, as {"blocks": ...}."""
    size, heads = CONFIG["stack"]["D"], CONFIG["stack"]["H"]

    def one(number):
        own = {key.partition(".")[2]: value for key, value in stored.items() if key[0] == str(number)}
        kernels = np.split(own["attn.c_attn.weight"], 3, axis=1)
        biases = np.split(own["attn.c_attn.bias"], 3)
        projections = {
            name: {"kernel": kernel.reshape(size, heads, -1), "bias": bias.reshape(heads, -1)}
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        projections["out"] = {
            "kernel": own["attn.c_proj.weight"].reshape(heads, -1, size),
            "bias": own["attn.c_proj.bias"],
        }
        mlp = {
            mine: {"kernel": own[f"mlp.{name}.weight"], "bias": own[f"mlp.{name}.bias"]}
            for mine, name in (("up", "c_fc"), ("down", "c_proj"))
        }
        return {
            "attention_norm": {"scale": own["ln_1.weight"], "bias": own["ln_1.bias"]},
            "attention": projections,
            "ffn_norm": {"scale": own["ln_2.weight"], "bias": own["ln_2.bias"]},
            "mlp": mlp,
        }

    return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(one, range(CONFIG["stack"]["L"])))}


def decoder(stack):
    own = CONFIG["stack"]
    return build_program(
        parse(stack),
        Names(),
        block=Block(
            Attention(own["H"], causal=True), MLP(4 * own["D"], "gelu_tanh"), norm_eps=1e-5, norm="layer"
        ),
        ffn_defaults=FFNDefaults(4 * own["D"], jnp.float32, "gelu_tanh"),
        width=own["D"],
        tokens=own["N"],
        protected=0,
        has_cls=False,
        coordinates=1,
        train=True,
    )


def sequence(x, **more):
    position = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return Tokens(jnp.asarray(x), position, **more)


def given_indices(monkeypatch, rows):
    """The layers draw the stored subsets, in their order."""
    drawn = iter(np.asarray(rows, np.int32))
    monkeypatch.setattr(method, "random_token_indices", lambda key, **_: jnp.asarray(next(drawn))[None])


def test_wrapped_blocks_of_a_decoder(monkeypatch):
    own = CONFIG["stack"]
    made = decoder(f"block + random_ltd({own['K']})(block)*2 + block")
    given_indices(monkeypatch, GOLDEN["stack/inputs/indices"])
    context, trace = Context(jax.random.key(0), True), []

    def run(state, x):
        tokens, _ = execute.run(made, state, sequence(x), context, execution="unroll", trace=trace)
        return tokens.x, [point.tokens.x for point in trace if not point.inside]

    @quick
    def both(state, x):
        out, back, states = jax.vjp(run, state, x, has_aux=True)
        return out, states, back(GOLDEN["stack/cotangents/y"])

    state = gpt2(below("stack/params/"))
    found, states, (grads, into) = both(state, GOLDEN["stack/inputs/x"])
    for number, name in ((0, "block1"), (1, "block2")):
        np.testing.assert_allclose(states[number], GOLDEN[f"stack/mid/{name}"], atol=2e-5)
    np.testing.assert_allclose(found, GOLDEN["stack/mid/block3"], atol=2e-5)
    # What is not drawn comes out as it went in, bit for bit.
    for b, kept in enumerate(GOLDEN["stack/inputs/indices"][1]):
        rest = np.setdiff1d(np.arange(own["N"]), kept)
        np.testing.assert_array_equal(np.asarray(states[1])[b, rest], np.asarray(states[0])[b, rest])
    close = partial(np.testing.assert_allclose, atol=5e-5, rtol=1e-4)
    close(into, GOLDEN["stack/grads/x"])
    theirs = below("stack/grads/")
    blank = {name: np.zeros_like(value) for name, value in below("stack/params/").items()}
    expected = gpt2({**blank, **{name: value for name, value in theirs.items() if name != "x"}})["blocks"]
    jax.tree.map(lambda ours, want: close(ours[1], want[1]), grads["blocks"], expected)
    close(grads["blocks"]["attention_norm"]["scale"][0], theirs["0.ln_1.weight"])
    close(grads["blocks"]["mlp"]["down"]["bias"][3], theirs["3.mlp.c_proj.bias"])


# ------------------------------------------------------------------------------------------------ an encoder


BERT = {
    "attention.self.query": ("attention", "query"),
    "attention.self.key": ("attention", "key"),
    "attention.self.value": ("attention", "value"),
    "attention.output.dense": ("attention", "out"),
    "attention.output.LayerNorm": ("attention_norm",),
    "intermediate.dense": ("mlp", "up"),
    "output.dense": ("mlp", "down"),
    "output.LayerNorm": ("ffn_norm",),
}


def of_bert(name, value):
    """Where a parameter of a layer of BERT stands here, and its value there."""
    layer, _, leaf = name.rpartition(".")
    path, heads = BERT[layer], CONFIG["encoder"]["H"]
    if layer.endswith("LayerNorm"):
        return (*path, "scale" if leaf == "weight" else "bias"), value
    value = value.T  # of a bias itself
    if layer.startswith("attention.self"):
        value = value.reshape(*value.shape[:-1], heads, -1)
    elif path == ("attention", "out") and leaf == "weight":
        value = value.reshape(heads, -1, value.shape[-1])
    return (*path, "kernel" if leaf == "weight" else "bias"), value


def test_a_wrapped_layer_of_an_encoder_with_padding(monkeypatch):
    """Through the layers of `encoder_lm`, post-norm; its first token is protected outside, and dropped like others."""
    own, given = CONFIG["encoder"], below("encoder/inputs/")
    stack = f"random_ltd({own['K']})(block)"
    settings = {
        "name": "encoder_lm", "stack": stack, "width": own["D"], "num_heads": own["H"], "mlp_dim": 4 * own["D"],
        "norm_eps": 1e-12, "activation": "gelu",
    }  # fmt: skip
    spec = {"ids": ((own["N"],), "int32")}
    model = models.build(settings, spec=spec, num_outputs=7, train=True)
    blocks = {}
    for name, value in below("encoder/params/").items():
        (kind, *path), leaf = of_bert(name, value)
        at = blocks.setdefault(kind, {})
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = jnp.asarray(leaf)[None]
    shapes = jax.tree.map(lambda leaf: leaf.shape, dict(model.abstract_state()["blocks"]))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, blocks)

    def run(blocks, x):
        given_indices(monkeypatch, given["indices"][None])
        tokens = sequence(x, valid=jnp.asarray(given["valid"]), protected=1)
        context = Context(jax.random.key(0), True)
        return execute.run(model.program, {"blocks": blocks}, tokens, context, execution="unroll")[0].x

    @quick
    def both(blocks, x):
        found, back = jax.vjp(run, blocks, x)
        return found, back(GOLDEN["encoder/cotangents/y"])

    found, (grads, into) = both(blocks, given["x"])
    np.testing.assert_allclose(found, GOLDEN["encoder/outputs/y"], atol=2e-5)
    close = partial(np.testing.assert_allclose, atol=5e-5, rtol=1e-4)
    theirs = below("encoder/grads/")
    close(into, theirs.pop("x"))
    for name, value in theirs.items():
        path, expected = of_bert(name, value)
        leaf = grads
        for part in path:
            leaf = leaf[part]
        close(leaf[0], expected)
    for b, kept in enumerate(given["indices"]):
        rest = np.setdiff1d(np.arange(own["N"]), kept)
        np.testing.assert_array_equal(np.asarray(found)[b, rest], given["x"][b, rest])
        np.testing.assert_array_equal(np.asarray(into)[b, rest], GOLDEN["encoder/cotangents/y"][b, rest])
