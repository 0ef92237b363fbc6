"""Tokens Choice: the dense mixture, who is dropped, the balance losses and the bias that balances."""

from __future__ import annotations

import math
from functools import partial

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ConfigError, TokenLabError
from tokenlab.methods.experts.tokens_choice import TokensChoice
from tokenlab.ops import route

E = 3
close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
equal = np.testing.assert_array_equal

# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNGS = {"ffn": jax.random.key(3)}


@pytest.fixture(scope="module")
def plain(expert):
    """Without noise and losses."""
    return TokensChoice(E, noise=0.0, importance=0.0, load=0.0, expert=expert)


@pytest.fixture(scope="module")
def params(plain, x, weights):
    return weights(plain, x)


def apply(layer, params, x, **how):
    return quick(lambda params, x: layer.apply({"params": params}, x, **how))(params, x)


def values(aux):
    return {name: float(total / count) for name, (total, count) in aux.metrics.items()}


@pytest.mark.parametrize("form", ["indexed", "weighted"])
@pytest.mark.parametrize("padded", [False, True])
def test_all_experts_with_room_for_all_are_the_dense_mixture(plain, params, x, each_expert, form, padded):
    valid = np.ones((3, 7), bool)
    valid[[0, 2], [2, 6]] = not padded
    y, aux = apply(plain.clone(k=E, capacity=1.0, form=form), params, x, valid=valid)
    gates = np.where(valid[..., None], jax.nn.softmax(x @ params["router"]), 0.0)
    close(y, np.einsum("bne,ebnd->bnd", gates, each_expert(params["experts"], x)))
    assert values(aux)["dropped"] == 0
    close(aux.load, np.full(E, 1 / E))


@pytest.mark.parametrize("form", ["indexed", "weighted"])
def test_with_capacity_without_end_every_choice_is_computed(plain, params, x, form):
    """As with places for all, of which most stay empty; in generation whatever the capacity is."""
    valid = np.ones((3, 7), bool)
    valid[1, 4] = False
    roomy, _ = apply(plain.clone(k=2, capacity=float(E), form=form), params, x, valid=valid)
    endless, aux = apply(plain.clone(k=2, capacity=math.inf, form=form), params, x, valid=valid)
    close(endless, roomy)
    assert values(aux)["dropped"] == 0
    tight = plain.clone(k=2, capacity=0.3, form=form)
    assert values(apply(tight, params, x, valid=valid)[1])["dropped"] > 0.3
    close(apply(tight.in_generation(), params, x, valid=valid)[0], roomy)


@pytest.mark.parametrize("form", ["indexed", "weighted"])
def test_a_token_that_chooses_a_noop_is_computed_by_nobody(plain, x, weights, each_expert, form):
    """Exact zeros of the layer, no place taken; the others as if the no-op were one more expert with nothing to say."""
    layer = plain.clone(num_experts=2, noops=2, capacity=4.0, form=form)
    params = weights(layer, x)
    assert params["router"].shape[1] == 4
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(params["experts"]))
    y, aux = apply(layer, params, x)
    gates = np.asarray(jax.nn.softmax(x @ params["router"]))
    choice = gates.argmax(-1)
    made = np.concatenate([each_expert(params["experts"], x), np.zeros((2, *x.shape))])
    rows = np.arange(3)[:, None], np.arange(7)
    close(y, gates.max(-1)[..., None] * made[choice, *rows])
    assert 0 < (choice >= 2).mean() < 1
    equal(np.asarray(y)[choice >= 2], 0)
    assert values(aux)["noop_share"] == pytest.approx((choice >= 2).mean())
    assert values(aux)["dropped"] == 0
    close(aux.load, [(choice == e).sum() / (choice < 2).sum() for e in range(2)])


def test_noops_save_what_even_choices_would_send_them(plain, x):
    """Places are those of an even spread over experts and no-ops; balance counts both, in losses and in the bias."""
    layer = plain.clone(num_experts=2, noops=5, capacity=1.0, bias=0.1, noise=1.0, importance=1.0)
    made = jax.eval_shape(lambda: layer.init({"params": RNGS["ffn"], "ffn": RNGS["ffn"]}, x))["params"]
    assert made["router"].shape == (5, 7) and made["bias"].shape == (7,)
    assert layer.experts_per_token(7) == pytest.approx(2 / 7)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), made)
    _, aux = apply(layer, params, x)
    assert values(aux)["capacity_factor"] == 1.0  # 1 place of 7 tokens for each of 7
    # Without noise and with equal gates all choose the first: it is to fall, every other, no-ops too, to rise.
    still = layer.clone(noise=0.0)

    def loss(bias):
        return still.apply({"params": {**params, "bias": bias}}, x, train=True)[1].losses["router_bias"]

    close(quick(jax.grad(loss))(params["bias"]), 0.1 * np.array([1, -1, -1, -1, -1, -1, -1]))


@pytest.fixture(scope="module")
def crowded(params):
    """Weights and tokens of which all prefer expert 1, token 3 most, then 0, 2, 1: the last least."""
    router, x = np.zeros((5, E), np.float32), np.zeros((1, 4, 5), np.float32)
    router[0, 1] = 1.0
    x[0, :, 0], x[0, :, 1] = [3.0, 1.0, 2.0, 4.0], 1.0
    return {**params, "router": router}, x


@pytest.mark.parametrize(("batch_priority", "served"), [(False, [0, 1]), (True, [0, 3])])
def test_who_is_dropped(plain, crowded, each_expert, batch_priority, served):
    """The last in the sequence, or by priority the least sure; a dropped token gets exact zeros."""
    params, x = crowded
    layer = plain.clone(capacity=1.5, batch_priority=batch_priority)  # 2 places
    y, aux = apply(layer, params, x)
    gates = np.asarray(jax.nn.softmax(x @ params["router"]))[0, :, 1]
    exact = np.zeros_like(x[0])
    exact[served] = (gates[:, None] * each_expert(params["experts"], x[0])[1])[served]
    y = np.asarray(y)
    close(y[0], exact)
    dropped = sorted(set(range(4)) - set(served))
    equal(y[0, dropped], 0)
    assert values(aux)["dropped"] == 0.5
    close(aux.load, [0, 1, 0])


def test_room_may_differ_outside_training(plain, crowded):
    params, x = crowded
    layer = plain.clone(capacity=1.5, eval_capacity=3.0, multiple_of=2)
    dropped = [values(apply(layer, params, x, train=train)[1])["dropped"] for train in (True, False)]
    assert dropped == [0.5, 0.0]
    factors = [values(apply(layer, params, x, train=train)[1])["capacity_factor"] for train in (True, False)]
    assert factors == [1.5, 3.0]
    # What is computed, not what was asked for: 4 places of 4 tokens, not 2.
    assert values(apply(plain.clone(capacity=1.5, multiple_of=4), params, x)[1])["capacity_factor"] == 3.0


def test_noise_is_for_training_and_divided_by_the_experts(plain, params, x, monkeypatch):
    noisy = plain.clone(noise=0.6, capacity=3.0, k=E)
    still = apply(noisy, params, x)[0]
    close(still, apply(noisy.clone(noise=0.0), params, x, train=True)[0])
    with pytest.raises(flax.errors.InvalidRngError):
        noisy.apply({"params": params}, x, train=True)
    drawn = np.random.default_rng(0).normal(size=(3, 7, E)).astype(np.float32)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(drawn))
    y = apply(noisy, params, x, train=True, rngs=RNGS)[0]
    # Noise of 0.6 / E is a router that sees its logits moved by as much.
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: 3 * jnp.asarray(drawn))
    close(apply(noisy.clone(noise=0.2), params, x, train=True, rngs=RNGS)[0], y)
    assert np.abs(y - still).max() > 1e-3


def test_losses_are_weighted_once(plain, params, x):
    layer = plain.clone(k=2, capacity=1.0, noise=0.9, importance=0.5, load=0.25, gshard=0.125, z=2.0)
    kept = np.ones((3, 7), bool)
    kept[1, 3:] = False
    drawn = jax.random.normal(layer.bind({"params": params}, rngs=RNGS).make_rng("ffn"), (3, 7, E))
    _, aux = apply(layer, params, x, valid=jnp.asarray(kept), train=True, rngs=RNGS)

    @quick
    def expected(logits):
        noisy = logits + 0.3 * drawn
        gates = jax.nn.softmax(noisy)
        expert, _ = route.choose(gates, 2)
        return {
            "importance_loss": 0.5 * route.importance_loss(jax.nn.softmax(logits), kept),
            "load_loss": 0.25 * route.load_loss(logits, noisy, 2, 0.3, kept),
            "gshard_loss": 0.125 * route.gshard_loss(gates, expert, kept),
            "router_z_loss": 2.0 * route.z_loss(logits, kept),
        }

    exact = expected(x @ params["router"])
    assert set(aux.losses) == set(exact)
    for name, loss in exact.items():
        close(aux.losses[name], loss, rtol=1e-4, err_msg=name)
        assert loss > 1e-4


# The bias


@pytest.fixture(scope="module")
def biased(plain):
    return plain.clone(bias=0.1, capacity=3.0)


@pytest.fixture(scope="module")
def loss_of_bias(biased):
    """(bias, other parameters, tokens) -> its loss, its gradient, the loads."""

    @quick
    def run(bias, params, x):
        def loss(bias):
            _, aux = biased.apply({"params": {**params, "bias": bias}}, x, train=True)
            return aux.losses["router_bias"], aux.load

        (value, load), gradient = jax.value_and_grad(loss, has_aux=True)(bias)
        return value, gradient, load

    return run


def test_the_bias_has_a_loss_of_zero_and_the_sign_for_a_gradient(loss_of_bias, params, x):
    for bias in (jnp.zeros(E), jnp.array([0.3, -0.2, 0.1])):
        value, gradient, load = loss_of_bias(bias, params, x)
        equal(value, 0.0)
        equal(gradient, np.float32(-0.1) * np.sign(1 / E - load))
        assert (gradient != 0).any()


def test_the_bias_chooses_and_does_not_weigh(biased, params, x, each_expert):
    """A large bias sends all to expert 2, with their own gates; and the output is nothing it could learn from."""
    moved = {**params, "bias": jnp.array([0.0, 0.0, 5.0])}

    @quick
    @partial(jax.grad, has_aux=True)
    def total(params, x):
        y, _ = biased.apply({"params": params}, x)
        return y.sum(), y

    gradient, y = total(moved, x)
    gates = np.asarray(jax.nn.softmax(x @ params["router"]))[..., 2:]
    close(y, gates * each_expert(params["experts"], x)[2])
    equal(gradient["bias"], 0)


def test_descending_on_the_bias_alone_evens_out_the_load(loss_of_bias, params, x):
    rows = jax.random.normal(jax.random.key(0), x.shape) + jnp.eye(5)[0]
    skewed = {**params, "router": jnp.zeros((5, E)).at[0, 0].set(1.0).at[1:].set(0.3 * params["router"][1:])}
    bias = jnp.zeros(E)
    spread = []
    for _ in range(80):
        _, gradient, load = loss_of_bias(bias, skewed, rows)
        spread.append(float(load.max()))
        bias = bias - 0.1 * gradient
    assert spread[0] > 0.55
    assert np.mean(spread[-10:]) < 0.42


def test_without_a_bias_there_is_none(plain, x):
    made = jax.eval_shape(lambda: plain.init(jax.random.key(0), x))["params"]
    assert set(made) == {"router", "experts"} and "bias" not in plain.axes()


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        *[
            ({name: -0.5}, ConfigError, f"{name} must be at least 0; got -0.5")
            for name in ("noise", "importance", "load", "gshard", "z", "bias", "noops")
        ],
        ({"z": math.nan}, ConfigError, "z must be at least 0; got nan"),
        ({"load": 0.1}, ConfigError, "load loss exists only with router noise"),
        ({"k": 4}, TokenLabError, "k = 4 of 3 experts"),
        ({"k": 0}, TokenLabError, "choices must be at least 1; got 0"),
        ({"capacity": 0.0}, TokenLabError, "above 0; got 0.0"),
        ({"eval_capacity": -1.0}, TokenLabError, "above 0; got -1.0"),
        ({"multiple_of": 0}, TokenLabError, "multiple_of must be at least 1"),
        ({"form": "index"}, ConfigError, "form 'index' is unknown"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings(plain, params, x, change, error, says):
    with pytest.raises(error, match=says) as raised:
        plain.clone(**change).apply({"params": {**params, "bias": jnp.zeros(E)}}, x)
    assert "\n" not in str(raised.value)
