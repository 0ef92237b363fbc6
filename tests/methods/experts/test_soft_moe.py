"""Soft MoE: its mixtures by hand, the ablations, and what it costs."""

from __future__ import annotations

from functools import cache, partial

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ConfigError, ShapeError, TokenLabError
from tokenlab.cost.flops import count
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.methods.experts.soft_moe import SoftMoE, SoftRouter

E, P = 3, 2
close = partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-5)
equal = np.testing.assert_array_equal

# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@cache
def router():
    return quick(lambda params, x: SoftRouter(E, P).apply({"params": params}, x))


@pytest.fixture(scope="module")
def layer(expert):
    return SoftMoE(E, slots=P, expert=expert)


@pytest.fixture(scope="module")
def params(layer, x, weights):
    return weights(layer, x)


@pytest.fixture(scope="module")
def run(layer):
    return quick(lambda params, x: layer.apply({"params": params}, x)[0])


def apply(layer, params, x, **how):
    return quick(lambda params, x: layer.apply({"params": params}, x, **how))(params, x)


def test_it_is_the_equations(params, run, x, each_expert):
    """Logits of unit vectors, a softmax over tokens and one over slots; the tokens mixed are not unit vectors."""
    tokens, mu = (np.asarray(a, np.float64) for a in (x, params["router"]["mu"]))
    tokens_unit = tokens / np.sqrt((tokens**2).sum(-1, keepdims=True) + 1e-6)
    mu_unit = mu / np.sqrt((mu**2).sum(0, keepdims=True) + 1e-6)
    exp = np.exp(float(params["router"]["scale"]) * np.einsum("bnd,dep->bnep", tokens_unit, mu_unit))
    dispatch, combine = exp / exp.sum(1, keepdims=True), exp / exp.sum((2, 3), keepdims=True)
    found = router()(params["router"], x)
    close(found[0], dispatch)
    close(found[1], combine)
    slots = np.einsum("bnep,bnd->bepd", dispatch, tokens).astype(np.float32)
    results = each_expert(params["experts"], slots)  # every expert on all slots
    own = np.stack([results[e][:, e] for e in range(E)], axis=1)
    close(run(params, x), np.einsum("bnep,bepd->bnd", combine, own), atol=1e-5)


def test_one_slot_gives_every_token_the_same(x, weights, each_expert, expert):
    layer = SoftMoE(1, slots=1, expert=expert)
    params = weights(layer, x)
    y, _ = apply(layer, params, x)
    dispatch, _ = apply(SoftRouter(1, 1), params["router"], x)
    slot = np.einsum("bn,bnd->bd", dispatch[..., 0, 0], x)
    close(y, np.broadcast_to(each_expert(params["experts"], slot)[0][:, None], x.shape), atol=1e-5)


def test_without_scale_all_weights_are_even(params, run, x, each_expert):
    even = {**params, "router": {**params["router"], "scale": jnp.zeros(())}}
    dispatch, combine = router()(even["router"], x)
    close(dispatch, np.full(dispatch.shape, 1 / 7))
    close(combine, np.full(combine.shape, 1 / (E * P)))
    mean = each_expert(params["experts"], x.mean(1)).mean(0)
    close(run(even, x), np.broadcast_to(mean[:, None], x.shape), atol=1e-5)


def test_linear_experts_alike_are_one_product_of_matrices(params, x):
    layer = SoftMoE(E, slots=P, expert=nn.Dense(5, use_bias=False))
    kernel = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
    alike = {"router": params["router"], "experts": {"kernel": np.tile(kernel, (E, 1, 1))}}
    dispatch, combine = (np.asarray(w).reshape(3, 7, -1) for w in router()(params["router"], x))
    y, _ = apply(layer, alike, x)
    close(y, combine @ np.swapaxes(dispatch, 1, 2) @ np.asarray(x) @ kernel, atol=1e-5)


def test_the_length_of_tokens_does_not_route(params, run, x):
    stretched = x * jnp.linspace(0.5, 3.0, 7)[:, None]
    for a, b in zip(router()(params["router"], stretched), router()(params["router"], x), strict=True):
        close(a, b, atol=1e-5)
    assert np.abs(run(params, stretched) - run(params, x)).max() > 0.1  # but what slots hold


def test_slots_in_another_order_give_the_same(params, run, x):
    moved = {**params, "router": {**params["router"], "mu": params["router"]["mu"][..., ::-1]}}
    close(run(moved, x), run(params, x))


# Ablations


@pytest.mark.parametrize(
    ("dispatch", "combine"), [("uniform", "uniform"), ("soft", "uniform"), ("uniform", "soft")]
)
def test_uniform_weights_are_plain_means(dispatch, combine, params, layer, x, each_expert):
    ablated = layer.clone(dispatch=dispatch, combine=combine)
    own = params if "soft" in (dispatch, combine) else {"experts": params["experts"]}
    into, back = (np.asarray(w) for w in router()(params["router"], x))
    into = into if dispatch == "soft" else np.full_like(into, 1 / 7)
    back = back if combine == "soft" else np.full_like(back, 1 / (E * P))
    results = each_expert(params["experts"], np.einsum("bnep,bnd->bepd", into, x))
    own_results = np.stack([results[e][:, e] for e in range(E)], axis=1)
    y, _ = apply(ablated, own, x)
    close(y, np.einsum("bnep,bepd->bnd", back, own_results), atol=1e-5)
    made = jax.eval_shape(lambda: ablated.init(jax.random.key(0), x))["params"]
    assert set(made) == set(own)
    assert set(ablated.axes()) >= {"router/mu"} if "router" in own else "router/mu" not in ablated.axes()


@pytest.mark.parametrize("padded", [False, True])
def test_identity_gives_token_i_to_slot_i(padded, params, x, each_expert, expert):
    x = x[:, :6]
    layer = SoftMoE(E, slots=2, dispatch="identity", combine="identity", expert=expert)
    valid = jnp.ones((3, 6), bool).at[1, 4].set(not padded)
    y, _ = apply(layer, {"experts": params["experts"]}, x, valid=valid)
    results = each_expert(params["experts"], x)
    exact = np.stack([results[n // 2][:, n] for n in range(6)], axis=1)
    close(y, np.where(valid[..., None], exact, 0.0), atol=1e-5)
    assert set(jax.eval_shape(lambda: layer.init(jax.random.key(0), x))["params"]) == {"experts"}


@pytest.mark.parametrize(
    "settings",
    [
        {"dispatch": "identity", "combine": "soft", "slots": 2},
        {"dispatch": "uniform", "combine": "identity", "slots": 2},
        {"dispatch": "identity", "combine": "identity", "slots": 3},
    ],
)
def test_identity_is_for_both_with_as_many_slots_as_tokens(settings, x):
    with pytest.raises(ConfigError, match=r"'identity' is for both.*; got dispatch .* slots, 6 tokens"):
        SoftMoE(E, **settings).init(jax.random.key(0), x[:, :6])


# Noise


def test_noise_is_for_training(params, layer, run, x):
    noisy = layer.clone(noise=0.5)
    train = quick(lambda key: noisy.apply({"params": params}, x, train=True, rngs={"ffn": key})[0])
    one, again, other = (train(jax.random.key(i)) for i in (0, 0, 1))
    equal(one, again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - run(params, x)).max() > 1e-3
    close(apply(noisy, params, x)[0], run(params, x))
    with pytest.raises(flax.errors.InvalidRngError):
        noisy.apply({"params": params}, x, train=True)
    close(apply(layer, params, x, train=True)[0], run(params, x))  # without noise it needs no rng


# The router alone


def test_the_router_alone_keeps_padding_out_of_its_gradients(params, x):
    valid = jnp.ones((3, 7), bool).at[1, 2].set(False)
    gradient = quick(
        jax.grad(lambda p, x: (SoftRouter(E, P).apply({"params": p}, x, valid=valid)[0] ** 2).sum())
    )
    found = gradient(params["router"], x.at[1, 2].set(jnp.nan))
    jax.tree.map(close, found, gradient(params["router"], x))
    with pytest.raises(ShapeError, match=r"takes tokens \[B, N, D\]"):
        SoftRouter(E, P).init(jax.random.key(0), x[0])


# Slots and cost


def test_how_many_slots():
    assert SoftMoE(4, slots=3).slots_of(100) == 3
    assert SoftMoE(4).slots_of(10) == 2  # 2.5: halves to even
    assert SoftMoE(4, capacity=0.8).slots_of(9) == 2
    assert SoftMoE(4, capacity=0.5).slots_of(16) == 2
    assert SoftMoE(4, slots=2).experts_per_token(16) == 0.5
    assert SoftMoE(3).experts_per_token(7) == 6 / 7


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_experts": 4, "slots": 2, "capacity": 1.0}, "slots or capacity, not both; got 2 and 1.0"),
        ({"num_experts": 4, "slots": 0}, "at least 1; got 4 and 0"),
        ({"num_experts": 0, "slots": 2}, "at least 1; got 0 and 2"),
        ({"num_experts": 0}, "experts must be at least 1; got 0"),
        ({"num_experts": 16}, "rounds to 0: 7 tokens"),
        ({"num_experts": 4, "capacity": 0.0}, "above 0; got 0.0"),
        ({"num_experts": 4, "slots": 1, "noise": -1.0}, "noise must be at least 0; got -1.0"),
        (
            {"num_experts": 4, "slots": 1, "dispatch": "uniform", "combine": "uniform", "noise": 0.1},
            "noise is on the logits of a soft mixture; dispatch 'uniform' and combine 'uniform' have none",
        ),
        (
            {
                "num_experts": 7,
                "slots": 1,
                "dispatch": "identity",
                "combine": "identity",
                "similarity": True,
            },
            "similarity is that of mixtures; 'identity' mixes nothing",
        ),
        (
            {"num_experts": 4, "slots": 1, "dispatch": "sofft"},
            "dispatch 'sofft' is unknown. Did you mean 'soft'",
        ),
    ],
)
def test_bad_settings(settings, says, x):
    with pytest.raises(TokenLabError, match=says) as error:
        SoftMoE(**settings).init(jax.random.key(0), x)
    assert "\n" not in str(error.value)


def test_cost_is_that_of_the_slots_whatever_the_experts():
    """6 N S D for logits and mixtures, 4 S D F for experts."""
    n, d, f, s = 16, 8, 12, 16
    for experts in (2, 4, 16):
        layer = SoftMoE(experts, slots=s // experts, expert=MLP(f))
        x = jax.ShapeDtypeStruct((1, n, d), jnp.float32)
        params = jax.eval_shape(lambda x, layer=layer: layer.init(jax.random.key(0), x), x)
        assert (
            count(lambda p, x, layer=layer: layer.apply(p, x)[0], params, x).flops
            == 6 * n * s * d + 4 * s * d * f
        )


def test_metrics(params, layer, x):
    _, aux = apply(layer.clone(similarity=True), params, x)
    metrics = {name: total / count for name, (total, count) in aux.metrics.items()}
    into, back = (np.asarray(w) for w in router()(params["router"], x))
    close(metrics["dispatch_max"], into.max(1).mean())
    close(metrics["combine_max"], back.max((2, 3)).mean())
    close(metrics["capacity_factor"], E * P / 7)
    slots = into.reshape(3, 7, -1)
    slots = slots / np.linalg.norm(slots, axis=1, keepdims=True)
    alike = [slots[b, :, i] @ slots[b, :, j] for b in range(3) for i in range(6) for j in range(6) if i != j]
    close(metrics["slot_similarity"], np.mean(alike), atol=1e-4)
    assert "slot_similarity" not in jax.eval_shape(lambda: layer.apply({"params": params}, x))[1].metrics
