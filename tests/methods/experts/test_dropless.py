"""Dropless experts: the mixture over all experts by hand, whatever their load and whatever computes them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import models, tasks
from tokenlab.core.errors import ConfigError, TokenLabError
from tokenlab.cost import count
from tokenlab.layers.ffn.swiglu import SwiGLU
from tokenlab.methods.experts.dropless import Dropless
from tokenlab.ops import route
from tokenlab.train.costs import batch_shapes
from tokenlab.train.step import loss_and_gradients

E = 3
close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
equal = np.testing.assert_array_equal

# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def plain(expert):
    return Dropless(E, expert=expert)


@pytest.fixture(scope="module")
def params(plain, x, weights):
    return weights(plain, x)


def apply(layer, params, x, **how):
    return quick(lambda params, x: layer.apply({"params": params}, x, **how))(params, x)


def mixture(logits, k, gate):
    """[B, N, E]: the weight of every expert, 0 for those not chosen."""
    logits = np.asarray(logits, np.float64)
    scores = 1 / (1 + np.exp(-logits)) if gate == "sigmoid" else np.exp(logits)
    if gate == "softmax":
        scores = scores / scores.sum(-1, keepdims=True)
    order = np.argsort(-scores, axis=-1)
    out = np.zeros_like(scores)
    np.put_along_axis(out, order[..., :k], np.take_along_axis(scores, order[..., :k], -1), -1)
    if gate == "top_softmax" or (gate == "sigmoid" and k > 1):
        out /= out.sum(-1, keepdims=True)
    return out


@pytest.mark.parametrize(
    ("gate", "k"), [("softmax", 1), ("softmax", 3), ("top_softmax", 2), ("sigmoid", 1), ("sigmoid", 2)]
)
def test_it_is_the_mixture_of_the_experts_chosen(plain, params, x, each_expert, gate, k):
    weights = mixture(x @ params["router"], k, gate)
    y, aux = apply(plain.clone(k=k, gate=gate), params, x)
    close(y, np.einsum("bne,ebnd->bnd", weights, each_expert(params["experts"], x)))
    share = (weights > 0).sum((0, 1)) / (weights > 0).sum()
    close(aux.load, share)
    close(aux.metrics["expert_load_max"][0], E * share.max())


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
@pytest.mark.parametrize("implementation", ["blocks", "ragged", "dense"])
def test_every_implementation_gives_the_same(plain, x, weights, implementation, kind):
    """Forward and backward, with padding among the tokens, against experts run on buffers that hold all tokens."""
    layer = plain.clone(expert=SwiGLU(6)) if kind == "swiglu" else plain
    params = weights(layer, x)
    valid = jnp.ones((3, 7), bool).at[1, :4].set(False)
    weight = np.where(valid[..., None], mixture(x @ params["router"], 2, "softmax"), 0.0).astype(np.float32)

    def total(experts, run):
        return (run(experts) * jnp.arange(5.0)).sum()

    def dense(experts):
        made = jax.vmap(lambda own: layer.expert.apply({"params": own}, x))(experts)
        return jnp.einsum("bne,ebnd->bnd", weight, made)

    def sorted_rows(experts):
        own = layer.clone(implementation=implementation)
        return own.apply({"params": {**params, "experts": experts}}, x, valid=valid)[0]

    gradient = quick(lambda experts: (dense(experts), jax.grad(total)(experts, dense)))(params["experts"])
    found = quick(lambda experts: (sorted_rows(experts), jax.grad(total)(experts, sorted_rows)))(
        params["experts"]
    )
    jax.tree.map(partial(close, atol=5e-5), found, gradient)


def test_nothing_is_dropped_when_all_go_to_one_expert(plain, params, each_expert):
    router = jnp.zeros((5, E)).at[0, 2].set(50.0)
    x = jax.random.uniform(jax.random.key(0), (2, 9, 5), minval=0.5)
    y, aux = apply(plain.clone(k=1), {**params, "router": router}, x)
    close(y, each_expert(params["experts"], x)[2])
    close(aux.load, [0, 0, 1])


def test_more_experts_than_rows(x, weights, each_expert, expert):
    layer = Dropless(9, 1, expert=expert)
    params, x = weights(layer, x), x[:1, :2]
    y, _ = apply(layer, params, x)
    close(
        y,
        np.einsum(
            "bne,ebnd->bnd", mixture(x @ params["router"], 1, "softmax"), each_expert(params["experts"], x)
        ),
    )


def test_losses(plain, params, x):
    layer = plain.clone(balance=0.5, z=0.25)
    valid = jnp.ones((3, 7), bool).at[1, :4].set(False)
    _, aux = apply(layer, params, x, valid=valid, train=True)
    logits = x @ params["router"]
    expert = jnp.where(valid[..., None], route.choose(logits, 2)[0], E)
    close(aux.losses["balance_loss"], 0.5 * route.balance_loss(jax.nn.softmax(logits), expert, valid))
    close(aux.losses["router_z_loss"], 0.25 * route.z_loss(logits, valid))
    assert apply(plain.clone(balance=0.0), params, x, train=True)[1].losses == {}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"k": 0}, TokenLabError, "k = 0 of 3 experts"),
        ({"k": 4}, TokenLabError, "k = 4 of 3 experts"),
        ({"balance": -1.0}, ConfigError, "balance and z must be at least 0; got -1.0 and 0.0"),
        ({"z": float("nan")}, ConfigError, "balance and z must be at least 0"),
        ({"gate": "top_softmax", "k": 1}, ConfigError, "every weight is 1 and the router learns nothing"),
        ({"gate": "sigmod"}, ConfigError, "gate 'sigmod' is unknown"),
        ({"implementation": "megablox"}, TokenLabError, "'megablox' runs on TPU"),
        ({"implementation": "blox"}, TokenLabError, "implementation 'blox' is unknown"),
        ({"exchange": "pad"}, TokenLabError, "exchange 'pad' is unknown. Did you mean 'padded'"),
        ({"exchange": "ragged"}, TokenLabError, "XLA:CPU does not have; take 'padded'"),
    ],
    ids=lambda value: "=".join(map(str, list(value.items())[0])) if isinstance(value, dict) else "",
)
def test_bad_settings(plain, params, x, change, error, says):
    with pytest.raises(error, match=says) as raised:
        plain.clone(**change).apply({"params": params}, x)
    assert "\n" not in str(raised.value)


def test_an_implementation_that_cannot_run_is_refused_for_any_module(plain, params, x):
    """Such experts run block by block whatever is named, but a name is never ignored."""
    layer = plain.clone(expert=nn.Dense(5), implementation="megablox")
    with pytest.raises(TokenLabError, match="'megablox' runs on TPU"):
        layer.init(jax.random.key(0), x)


@pytest.mark.parametrize("layer", ["dropless(experts=4)", "grin(experts=4)"])
def test_training_counts_the_same_scanned_and_unrolled(layer):
    """JAX cuts the grouped products of a scanned block in two; each still counts once, and again when recomputed."""
    spec = {"image": ((8, 8, 1), "float32"), "label": ((), "int32")}
    settings = {"name": "vit", "size": "nano/2", "stack": f"block(ffn={layer})*2"}
    model, task = models.build(settings, spec=spec, num_outputs=5), tasks.build({"name": "classify"})

    def counted(**how):
        def apply(*args, **kwargs):
            return model.apply(*args, **{**kwargs, **how})

        run = partial(loss_and_gradients, SimpleNamespace(apply=apply), task)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return count(run, model.abstract_state(), batch_shapes(spec, 2), key).flops

    plain = {how: counted(execution=how) for how in ("scan", "unroll")}
    again = {how: counted(execution=how, remat="full") for how in ("scan", "unroll")}
    assert plain["scan"] == plain["unroll"] and again["scan"] == again["unroll"]
    # One of the two products of each block, at least, on two examples of 17 tokens with two choices each.
    assert again["scan"] - plain["scan"] >= 2 * 2 * (2 * 17 * 2) * 16 * 32
