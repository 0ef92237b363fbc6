"""Experts Choice: every expert full, the dense mixture, and no array of N x E x C."""

from __future__ import annotations

from functools import partial

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ConfigError, TokenLabError
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.methods.experts.experts_choice import ExpertsChoice
from tokenlab.methods.experts.tokens_choice import TokensChoice

E = 3
close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
equal = np.testing.assert_array_equal

# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def plain(expert):
    return ExpertsChoice(E, expert=expert)


@pytest.fixture(scope="module")
def params(plain, x, weights):
    return weights(plain, x)


def apply(layer, params, x, **how):
    return quick(lambda params, x: layer.apply({"params": params}, x, **how))(params, x)


def gates_of(params, x, score):
    return (jax.nn.softmax if score == "softmax" else jax.nn.sigmoid)(x @ params["router"])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", ["indexed", "weighted"])
def test_taking_every_token_is_the_dense_mixture(plain, params, x, each_expert, score, form):
    y, aux = apply(plain.clone(capacity=float(E), score=score, form=form), params, x)
    close(y, np.einsum("bne,ebnd->bnd", gates_of(params, x, score), each_expert(params["experts"], x)))
    assert aux.metrics["dropped"][0] == 0
    assert aux.metrics["experts_per_token_max"][0] == E


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_every_expert_takes_its_best_tokens_and_is_full(plain, params, x, each_expert, score, padded):
    """C = round(7 * 1.3 / 3) = 3; each expert its own three, whoever else took them."""
    valid = np.ones((3, 7), bool)
    if padded:
        valid[0, :3] = valid[2, 6] = False
        valid[1, 2:] = False  # fewer tokens than places
    y, aux = apply(plain.clone(capacity=1.3, score=score), params, x, valid=jnp.asarray(valid))
    gates = np.where(valid[..., None], gates_of(params, x, score), 0.0)
    taken = np.zeros_like(gates, bool)
    for b in range(3):
        for e in range(E):
            taken[b, np.argsort(-gates[b, :, e], kind="stable")[:3], e] = True
    taken &= valid[..., None]
    close(y, np.einsum("bne,ebnd->bnd", gates * taken, each_expert(params["experts"], x)))
    nobody = ~taken.any(2) & valid
    if not padded:
        equal(taken.sum(1), 3)
        assert nobody.any()
    equal(np.asarray(y)[nobody], 0)
    close(aux.load, np.full(E, 1 / E))
    close(aux.metrics["dropped"][0], nobody.sum() / valid.sum())
    close(aux.metrics["capacity_factor"][0], 9 / 7)


def test_noise_is_for_training(plain, params, x):
    noisy = plain.clone(noise=3.0)
    close(apply(noisy, params, x)[0], apply(plain, params, x, train=True)[0])
    one, again, other = (
        apply(noisy, params, x, train=True, rngs={"ffn": jax.random.key(i)})[0] for i in (0, 0, 1)
    )
    equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    with pytest.raises(flax.errors.InvalidRngError):
        noisy.apply({"params": params}, x, train=True)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"noise": -1.0}, ConfigError, "noise must be at least 0; got -1.0"),
        ({"capacity": 0.0}, TokenLabError, "above 0; got 0.0"),
        ({"capacity": 0.1}, TokenLabError, "rounds to 0: 7 tokens"),
        ({"capacity": 4.0}, TokenLabError, "each expert takes 9 tokens, of 7 there are"),
        ({"multiple_of": 8}, TokenLabError, "each expert takes 8 tokens, of 7 there are"),
        ({"multiple_of": 0}, TokenLabError, "multiple_of must be at least 1"),
        ({"form": "index"}, ConfigError, "form 'index' is unknown"),
        ({"score": "softmx"}, ConfigError, "score 'softmx' is unknown"),
    ],
    ids=lambda value: "=".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_settings(plain, params, x, change, error, says):
    with pytest.raises(error, match=says) as raised:
        plain.clone(**change).apply({"params": params}, x)
    assert "\n" not in str(raised.value)


# Memory


def largest(jaxpr):
    """Elements of the largest array that a program, or one inside it, makes."""
    found = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            found += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(found, default=0)


@pytest.mark.parametrize("kind", [TokensChoice, ExpertsChoice])
def test_a_layer_of_indices_builds_nothing_of_n_by_e_by_c(kind):
    """The whole layer with losses, metrics and gradients; the weighted form does build it, so the walk finds it."""
    experts, width = 8, 4

    def made(n, form):
        layer = kind(experts, capacity=1.0, expert=MLP(width), form=form)
        x = jax.ShapeDtypeStruct((1, n, width), jnp.float32)
        rngs = {"params": jax.random.key(0), "ffn": jax.random.key(0)}
        params = jax.eval_shape(lambda x: layer.init(rngs, x), x)

        def total(params, x):
            y, aux = layer.apply(params, x, train=True, rngs={"ffn": jax.random.key(0)})
            return y.sum() + sum(aux.losses.values()), aux

        return largest(jax.make_jaxpr(jax.value_and_grad(total, (0, 1), has_aux=True))(params, x).jaxpr)

    for n in (64, 128):
        assert made(n, "indexed") <= n * experts
        assert made(n, "weighted") == n * n
