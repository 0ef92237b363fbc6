"""The expert layers against the authors' own: Soft MoE and its baselines (V-MoE), and GRIN.

Random draws are those that the reference was given: they take the place of our own where a layer draws.
"""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.layers.ffn.mlp import MLP
from tokenlab.layers.ffn.swiglu import SwiGLU
from tokenlab.methods.experts import grin
from tokenlab.methods.experts.experts_choice import ExpertsChoice
from tokenlab.methods.experts.grin import GRIN
from tokenlab.methods.experts.soft_moe import SoftMoE, SoftRouter
from tokenlab.methods.experts.tokens_choice import TokensChoice
from tokenlab.ops import route
from tokenlab.ops.dispatch import Indexed, Weighted

GRADIENT = {"atol": 5e-5, "rtol": 1e-4}
KEY = jax.random.key(0)

# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
close = np.testing.assert_allclose
equal = np.testing.assert_array_equal


@cache
def golden(case):
    return dict(np.load(Path(__file__).with_name(f"{case}.npz")))


@cache
def config(case):
    return json.loads(str(golden(case)["config"]))


def below(case, prefix):
    return {
        name.removeprefix(prefix): value for name, value in golden(case).items() if name.startswith(prefix)
    }


def mlp_bank(stored):
    """The expert MLPs of V-MoE as ours, and the other way for the gradients."""
    return {
        ours: {leaf: stored[f"Mlp/{theirs}/{leaf}"] for leaf in ("kernel", "bias")}
        for ours, theirs in (("up", "Dense_0"), ("down", "Dense_1"))
    }


def check_gradients(case, variant, found, tolerance):
    """`found` by the reference's names; every stored gradient is compared."""
    stored = below(case, f"{variant}/grads/")
    stored.pop("scores_from_routing", None)  # the estimator alone: see `test_grin_routing`
    assert set(stored) <= set(found)
    for name, value in stored.items():
        close(found[name], value, **tolerance, err_msg=name)


def by_their_names(params, x):
    """Gradients of an MLP bank and the tokens under the reference's names."""
    found = {"x": x}
    for ours, theirs in (("up", "Dense_0"), ("down", "Dense_1")):
        found |= {f"Mlp/{theirs}/{leaf}": value for leaf, value in params["experts"][ours].items()}
    return found


# Soft MoE


@cache
def soft(variant):
    """Layer, weights and tokens."""
    stored, sizes = below("soft_moe", f"{variant}/params/"), config("soft_moe")[variant]
    layer = SoftMoE(
        num_experts=sizes["E"],
        slots=sizes["P"],
        capacity=sizes["cf"],
        expert=MLP(sizes["F"], "gelu_tanh"),
        similarity=True,
    )
    params = {
        "router": {"mu": stored["Router/mu"], "scale": stored["Router/scale"]},
        "experts": mlp_bank(stored),
    }
    return layer, params, golden("soft_moe")[f"{variant}/inputs/x"]


@pytest.mark.parametrize("variant", ["slots", "capacity"])
def test_soft_router(variant):
    _, params, x = soft(variant)
    mid = below("soft_moe", f"{variant}/mid/")
    close(route.unit(params["router"]["mu"], axis=0), mid["mu_unit"], atol=1e-6)
    router = SoftRouter(*mid["logits"].shape[2:])
    dispatch, combine = router.apply({"params": params["router"]}, x)
    for found in ((dispatch, combine), route.soft_weights(mid["logits"])):
        close(found[0], mid["dispatch"], atol=1e-5)
        close(found[1], mid["combine"], atol=1e-5)
    # Either softmax leaves a constant of the logits open.
    for weights, axes in ((dispatch, 1), (combine, (2, 3))):
        rest = np.log(weights) - mid["logits"]
        close(rest, np.broadcast_to(rest.mean(axes, keepdims=True), rest.shape), atol=1e-5)
    slots = Weighted(dispatch, combine).dispatch(jnp.asarray(x))
    close(np.moveaxis(slots, 0, 1), mid["slots"], atol=1e-5)


@pytest.mark.parametrize("variant", ["slots", "capacity"])
def test_soft_layer(variant):
    layer, params, x = soft(variant)
    stored = below("soft_moe", f"{variant}/")

    @quick
    def run(params, x):
        def total(params, x):
            y, aux = layer.apply({"params": params}, x, train=True)
            return (y * stored["cotangents/y"]).sum(), (y, aux)

        rounded, _ = layer.clone(transport="bfloat16").apply({"params": params}, x)
        return jax.grad(total, (0, 1), has_aux=True)(params, x), rounded

    ((gradient, dx), (y, aux)), rounded = run(params, x)
    close(y, stored["outputs/y"], atol=1e-5)
    close(rounded, stored["outputs/y_bf16_transport"], atol=1e-5)
    assert np.abs(rounded - y).max() > 1e-4
    router = {f"Router/{name}": value for name, value in gradient["router"].items()}
    check_gradients("soft_moe", variant, by_their_names(gradient, dx) | router, {"atol": 2e-5, "rtol": 1e-4})

    assert not aux.losses and stored["outputs/metrics/auxiliary_loss"] == 0
    for ours, theirs in (
        ("dispatch_max", "dispatch_weights_max_mean"),
        ("combine_max", "combine_weights_max_mean"),
    ):
        total, count = aux.metrics[ours]
        close(total / count, stored[f"outputs/metrics/{theirs}"], atol=1e-5)


# Tokens Choice

CHOICES = tuple(config("tokens_choice")["variants"])


def choice_params(case):
    stored = below(case, "params/")
    return {"router": stored["Router/dense/kernel"], "experts": mlp_bank(stored)}


def fix_noise(monkeypatch, case, variant):
    """The noise that the next layer traced adds to its logits; the strength of it."""
    strength = config(case)["variants"][variant].get("noise", 0.0)
    if strength:
        drawn = golden(case)[f"{variant}/inputs/noise"]

        def normal(key, shape, dtype=float):
            assert shape == drawn.shape
            return jnp.asarray(drawn)

        monkeypatch.setattr(jax.random, "normal", normal)
    return strength


@pytest.mark.parametrize("variant", CHOICES)
def test_tokens_choice_routing(variant):
    stored, sizes = below("tokens_choice", f"{variant}/"), config("tokens_choice")
    case = sizes["variants"][variant]
    x, kernel = golden("tokens_choice")["inputs/x"], choice_params("tokens_choice")["router"]
    clean = x @ kernel
    close(clean, stored["mid/logits"], atol=1e-5)
    std = case.get("noise", 0.0) / sizes["E"]
    noisy = clean + std * stored.get("inputs/noise", 0.0)
    gates = jax.nn.softmax(noisy)
    close(gates, stored["mid/gates"], atol=1e-5)
    places = route.capacity(sizes["N"], sizes["E"], case["cf"], choices=case["K"], multiple_of=case["mult"])
    assert places == stored["mid/dispatch"].shape[-1]

    @quick
    def routed(gates):
        chosen = route.tokens_choice(gates, case["K"], batch_priority=case["bpr"])
        return chosen, Indexed.of_choices(chosen, sizes["E"], places).weights()

    chosen, dense = routed(gates)
    equal(chosen.expert, stored["mid/expert_index"])
    equal(chosen.place, stored["mid/buffer_index"])
    equal(np.asarray(dense.into) > 0, stored["mid/dispatch"])
    close(dense.back, stored["mid/combine"], atol=1e-5)

    @quick
    def losses(clean, noisy, expert):
        found = {
            "importance_loss": route.importance_loss(jax.nn.softmax(clean)),
            "gshard_loss": route.gshard_loss(jax.nn.softmax(noisy), expert),
        }
        return found | ({"load_loss": route.load_loss(clean, noisy, case["K"], std)} if std else {})

    groups = [losses(clean[i : i + 1], noisy[i : i + 1], chosen.expert[i : i + 1]) for i in range(len(x))]
    for name, whole in losses(clean, noisy, chosen.expert).items():
        wanted = stored[f"outputs/{name}"]
        tolerance = {"atol": 1e-5, "rtol": 1e-4 if name == "load_loss" else 1e-5}
        close([group[name] for group in groups], wanted, **tolerance, err_msg=name)
        close(whole, wanted.mean(), **tolerance, err_msg=name)
    assert ("outputs/load_loss" in stored) == (std > 0)


@pytest.mark.parametrize("form", ["indexed", "weighted"])
@pytest.mark.parametrize("variant", CHOICES)
def test_tokens_choice_layer(variant, form, monkeypatch):
    stored, sizes = below("tokens_choice", f"{variant}/"), config("tokens_choice")
    case = sizes["variants"][variant]
    noise = fix_noise(monkeypatch, "tokens_choice", variant)
    layer = TokensChoice(
        sizes["E"],
        case["K"],
        capacity=case["cf"],
        multiple_of=case["mult"],
        batch_priority=case["bpr"],
        noise=noise,
        importance=0.3,
        load=0.7 if noise else 0.0,
        gshard=0.5,
        expert=MLP(sizes["F"], "gelu_tanh"),
        form=form,
    )
    groups = sizes["B"]
    cotangent = golden("tokens_choice")["cotangents/y"]

    @quick
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(params, x):
        y, aux = layer.apply({"params": params}, x, train=True, rngs={"ffn": KEY})
        # The reference adds up the losses of groups, this is their mean.
        return (y * cotangent).sum() + 0.1 * groups * sum(aux.losses.values()), (y, aux)

    (gradient, dx), (y, aux) = run(choice_params("tokens_choice"), golden("tokens_choice")["inputs/x"])
    close(y, stored["outputs/y"], atol=1e-5)
    lost = (stored["mid/buffer_index"] >= stored["mid/dispatch"].shape[-1]).mean()
    close(aux.metrics["dropped"][0], lost, atol=1e-6)
    nowhere = ~stored["mid/dispatch"].any((2, 3))
    assert nowhere.any()
    equal(np.asarray(y)[nowhere], 0)
    close(sum(aux.losses.values()), stored["outputs/auxiliary_loss"].mean(), atol=1e-5, rtol=1e-4)
    found = by_their_names(gradient, dx) | {"Router/dense/kernel": gradient["router"]}
    check_gradients("tokens_choice", variant, found, GRADIENT)


# Experts Choice


@pytest.mark.parametrize("form", ["indexed", "weighted"])
@pytest.mark.parametrize("variant", list(config("experts_choice")["variants"]))
def test_experts_choice(variant, form, monkeypatch):
    stored, sizes = below("experts_choice", f"{variant}/"), config("experts_choice")
    case = sizes["variants"][variant]
    if form == "indexed":

        @quick
        def routed(gates):
            taken = route.experts_choice(gates, stored["mid/token_index"].shape[-1])
            return taken, Indexed.of_taken(taken, sizes["N"]).weights()

        taken, dense = routed(stored["mid/gates"])
        equal(taken.token, stored["mid/token_index"])
        equal(np.asarray(dense.into) > 0, stored["mid/dispatch"])
        close(dense.back, stored["mid/combine"], atol=1e-5)

    noise = fix_noise(monkeypatch, "experts_choice", variant)
    layer = ExpertsChoice(
        sizes["E"], case["cf"], case["mult"], noise=noise, expert=MLP(sizes["F"], "gelu_tanh"), form=form
    )
    assert layer.places(sizes["N"]) == stored["mid/token_index"].shape[-1]
    cotangent = golden("experts_choice")["cotangents/y"]

    @quick
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(params, x):
        y, aux = layer.apply({"params": params}, x, train=True, rngs={"ffn": KEY})
        return (y * cotangent).sum(), (y, aux)

    (gradient, dx), (y, aux) = run(choice_params("experts_choice"), golden("experts_choice")["inputs/x"])
    close(y, stored["outputs/y"], atol=1e-5)
    found = by_their_names(gradient, dx) | {"Router/dense/kernel": gradient["router"]}
    check_gradients("experts_choice", variant, found, GRADIENT)
    assert not aux.losses
    metrics = {name: total / count for name, (total, count) in aux.metrics.items()}
    reached = stored["outputs/metrics/ratio_processed_items_by_at_least_1_experts"].mean()
    close(metrics["dropped"], 1 - reached, atol=1e-6)
    most = stored["outputs/metrics/num_experts_per_item_max"].mean()
    close(metrics["experts_per_token_max"], most, atol=1e-6)


# GRIN

GRINS = tuple(config("grin")["variants"])


def grin_draws(variant, shape):
    """The reference's draws as ours: -log of an exponential is a Gumbel, and its coin is u > 3/4."""
    stored = below("grin", f"{variant}/inputs/")
    return tuple(
        grin.Draws(-np.log(stored[f"exp{k}"]).reshape(shape), 1 - stored[f"u{k}"].reshape(shape[:-1]))
        for k in range(1, len(stored) // 2 + 1)
    )


@pytest.mark.parametrize("variant", GRINS)
def test_grin_routing(variant):
    stored, case = below("grin", f"{variant}/"), config("grin")["variants"][variant]
    scores = stored["mid/scores"]
    draws = grin_draws(variant, scores.shape) if case["train"] else None

    @quick
    @partial(jax.grad, has_aux=True)
    def run(scores):
        mixed = grin.sparse_mixer(scores, case["K"], case["r"], draws=draws)
        return (mixed.weight * stored["cotangents/multiplier"]).sum(), mixed

    gradient, mixed = run(scores)
    equal(mixed.expert, stored["outputs/selected_experts"])
    factor = np.concatenate([stored[f"mid/c{k + 1}"] for k in range(case["K"])], axis=1)
    close(mixed.factor, factor, atol=1e-4)  # the reference writes 0.3333
    close(mixed.weight / mixed.factor, stored["outputs/multiplier"] / factor, atol=1e-6)
    close(gradient, stored["grads/scores_from_routing"], atol=2e-5, rtol=1e-4)
    if case["train"]:
        assert {round(float(c), 3) for c in np.ravel(mixed.factor)} == {0.333, 1.0}

    available = np.ones(scores.shape, bool)
    for k in range(case["K"]):
        p, mask = grin.masked_softmax(scores, case["r"], available=available)
        close(p, stored[f"mid/p{k + 1}"], atol=1e-6)
        equal(mask, stored[f"mid/p{k + 1}"] > 0)
        available[np.arange(len(scores)), mixed.expert[:, k]] = False


@pytest.mark.parametrize("variant", GRINS)
def test_grin_layer(variant, monkeypatch):
    stored, sizes = below("grin", f"{variant}/"), config("grin")
    case, width = sizes["variants"][variant], sizes["F"]
    theirs = below("grin", "params/")
    gate_up = np.swapaxes(theirs["experts.gate_up_proj"], 1, 2)
    params = {
        "router": theirs["router.weight"].T,
        "experts": {
            "gate": {"kernel": gate_up[..., :width]},
            "up": {"kernel": gate_up[..., width:]},
            "down": {"kernel": np.swapaxes(theirs["experts.down_proj"], 1, 2)},
        },
    }

    def draw(key, shape, k):
        assert shape == (sizes["B"], sizes["N"], sizes["E"]) and k == case["K"]
        return grin_draws(variant, shape)

    monkeypatch.setattr(grin, "draw", draw)
    layer = GRIN(sizes["E"], case["K"], case["r"], balance=0.0, expert=SwiGLU(width))

    @quick
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(params, x):
        rngs = {"ffn": KEY} if case["train"] else {}
        y, _ = layer.apply({"params": params}, x, train=case["train"], rngs=rngs)
        return (y * stored["cotangents/y"]).sum(), y

    (gradient, dx), y = run(params, golden("grin")["inputs/x"])
    # In training the reference's 0.3333 is our 1/3.
    close(y, stored["outputs/y"], atol=1e-4 if case["train"] else 1e-5)
    experts = {name: np.swapaxes(leaf["kernel"], 1, 2) for name, leaf in gradient["experts"].items()}
    found = {
        "x": dx,
        "router.weight": gradient["router"].T,
        "experts.gate_up_proj": np.concatenate([experts["gate"], experts["up"]], axis=1),
        "experts.down_proj": experts["down"],
    }
    tolerance = {"atol": 1e-4 if case["train"] else 2e-5, "rtol": 1e-4}
    check_gradients("grin", variant, found, tolerance)
