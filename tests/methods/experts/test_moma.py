"""MoMa: experts of each modality, in training and by auxiliary routers; parity with a port is in tests/golden."""

from __future__ import annotations

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import decoders
from tokenlab import models
from tokenlab.core.errors import ConfigError, ShapeError, StackError, TokenLabError
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.methods.experts.moma import MoMa

B, N, D, HIDDEN = 3, 12, 5, 6
IDS = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(N) % 2, (B, 1)), axis=1), jnp.int32)
close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
equal = np.testing.assert_array_equal
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
X = jax.random.normal(jax.random.key(11), (B, N, D))
EXPERT = MLP(HIDDEN)
BOTH = MoMa(text=2, image=3, expert=EXPERT)


@cache
def drawn(layer):
    shapes = jax.eval_shape(lambda: layer.init({"params": jax.random.key(0)}, X))["params"]
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(scale=0.7, size=leaf.shape), leaf.dtype), shapes)


def apply(layer, x=X, ids=IDS, params=None, **how):
    params = drawn(layer) if params is None else params
    run = lambda params, x, ids, valid: layer.apply(  # noqa: E731
        {"params": params}, x, modality=ids, valid=valid, rngs={"ffn": jax.random.key(3)}, train=how["train"]
    )
    return quick(run)(params, x, ids, how.get("valid"))


train = partial(apply, train=True)
evaluate = partial(apply, train=False)


def values(aux):
    return {name: float(total / count) for name, (total, count) in aux.metrics.items()}


def by_hand(layer, params, x, ids, valid=None):
    """Tokens ranked by each expert in plain loops, one example at a time; who took what too."""
    x, ids = np.asarray(x, np.float64), np.asarray(ids)
    y, taken = np.zeros_like(x), []
    for row in range(len(x)):
        for group in layer.groups:
            own = np.flatnonzero(ids[row] == group.number) if group.number is not None else np.arange(N)
            own = own if valid is None else own[np.asarray(valid)[row, own]]
            take = len(own)
            if group.experts > 1:
                take = min(take, max(1, math.ceil(round(layer.capacity * len(own) / group.experts, 9))))
                score = 1 / (1 + np.exp(-x[row, own] @ np.asarray(params[f"router_{group.name}"])))
            for e in range(group.experts):
                weight = score[:, e] if group.experts > 1 else np.ones(len(own))
                for at in np.argsort(-weight, kind="stable")[:take]:
                    y[row, own[at]] += weight[at] * expert(
                        params[f"experts_{group.name}"], e, x[row, own[at]]
                    )
                    taken.append((row, group.name, e, int(own[at])))
    return y, sorted(taken)


def expert(bank, e, x):
    up, down = (
        {leaf: np.asarray(bank[name][leaf][e], np.float64) for leaf in ("kernel", "bias")}
        for name in ("up", "down")
    )
    hidden = np.asarray(jax.nn.gelu(jnp.asarray(x @ up["kernel"] + up["bias"]), approximate=False))
    return hidden @ down["kernel"] + down["bias"]


@pytest.mark.parametrize(
    "layer",
    [
        BOTH,
        MoMa(text=1, image=1, expert=EXPERT),
        MoMa(text=3, image=1, capacity=0.7, expert=EXPERT),
        MoMa(mixed=4, capacity=1.5, expert=EXPERT),
    ],
    ids=["2t3i", "1t1i", "3t1i", "4x"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_training_is_what_loops_over_experts_give(layer, padded):
    valid = jnp.ones((B, N), bool).at[0, 3].set(not padded).at[2, 8:].set(not padded) if padded else None
    y, aux = train(layer, valid=valid)
    wanted, taken = by_hand(layer, drawn(layer), X, IDS, valid)
    close(y, wanted)
    assert values(aux)["left_out"] == 0
    some = len({(row, at) for row, _, _, at in taken})
    there = B * N if valid is None else int(valid.sum())
    assert values(aux)["dropped"] == pytest.approx(1 - some / there)
    load = [
        sum(name == g.name and e == i for _, name, e, _ in taken)
        for g in layer.groups
        for i in range(g.experts)
    ]
    close(aux.load, np.array(load) / sum(load))


def test_one_expert_a_modality_is_a_dense_layer_of_its_own():
    layer = MoMa(text=1, image=1, expert=EXPERT)
    params = drawn(layer)
    assert set(params) == {"experts_text", "experts_image"}
    dense = [
        quick(lambda own: EXPERT.apply({"params": own}, X))(
            jax.tree.map(lambda leaf: leaf[0], params[f"experts_{name}"])
        )
        for name in ("text", "image")
    ]
    wanted = np.where(np.asarray(IDS)[..., None] == 0, *dense)
    close(train(layer)[0], wanted, atol=1e-6)
    close(evaluate(layer)[0], wanted, atol=1e-6)


def test_an_image_token_never_changes_what_text_gets_in_the_same_layer():
    """Nor the other way; in training, where experts compare tokens."""
    y, _ = train(BOTH)
    for number in (0, 1):
        moved = jnp.where(IDS[..., None] == number, X + 1.0, X)
        other, _ = train(BOTH, moved)
        same = np.asarray(IDS) != number
        equal(np.asarray(other)[same], np.asarray(y)[same])
        assert not np.allclose(np.asarray(other)[~same], np.asarray(y)[~same])


@pytest.mark.parametrize("number", [0, 1])
def test_gradients_of_the_other_modality_are_exactly_zero(number):
    layer = BOTH.clone(slack=2.0)  # a batch of one modality needs room for it
    ids = jnp.full((B, N), number, jnp.int32)

    def total(params):
        y, aux = layer.apply({"params": params}, X, modality=ids, train=True)
        return jnp.sum(y**2) + aux.losses["moma_loss"]

    grads = quick(jax.grad(total))(drawn(layer))
    for name, leaf in grads.items():
        own = name.split("_")[1] == ("text", "image")[number]
        some = all(bool(jnp.any(each != 0)) for each in jax.tree.leaves(leaf))
        none = all(bool(jnp.all(each == 0)) for each in jax.tree.leaves(leaf))
        assert some if own else none, name


def test_padding_gets_exact_zeros_and_changes_nothing():
    valid = jnp.ones((B, N), bool).at[:, 9:].set(False)
    for run in (train, evaluate):
        y, _ = run(BOTH, valid=valid)
        noise = jnp.where(valid[..., None], X, 1e6)
        other, _ = run(BOTH, noise, jnp.where(valid, IDS, 1 - IDS), valid=valid)
        equal(np.asarray(y)[:, 9:], 0)
        equal(other, y)


def test_permuting_tokens_permutes_results():
    order = np.random.default_rng(1).permutation(N)
    y, _ = train(BOTH)
    moved, _ = train(BOTH, X[:, order], IDS[:, order])
    close(moved, np.asarray(y)[:, order])


def test_examples_ranked_together_are_one_long_example():
    layer = BOTH.clone(sequences=B)
    y, _ = train(layer)
    long, _ = train(BOTH, X.reshape(1, -1, D), IDS.reshape(1, -1), params=drawn(layer))
    close(y, np.asarray(long).reshape(B, N, D))
    assert not np.allclose(y, train(BOTH)[0])


def test_tokens_beyond_the_share_are_left_out_and_counted():
    """All text: half of the places of a sequence are for images. What is beyond gets zeros."""
    y, aux = train(MoMa(text=1, image=1, expert=EXPERT), ids=jnp.zeros((B, N), jnp.int32))
    assert values(aux)["left_out"] == 0.5
    equal(np.asarray(y)[:, N // 2 :], 0)
    assert (np.asarray(y)[:, : N // 2] != 0).all()


def test_transport_rounds_the_tokens_that_travel_and_no_others():
    """A modality's one expert is on every device, so that nothing is rounded for it."""
    layer = MoMa(text=2, image=1, expert=EXPERT)
    ids = np.asarray(IDS)
    for run in (train, evaluate):
        plain, rounded = (np.asarray(run(layer.clone(transport=how))[0]) for how in (None, "bfloat16"))
        equal(rounded[ids == 1], plain[ids == 1])
        assert not np.array_equal(rounded[ids == 0], plain[ids == 0])
        close(rounded, plain, atol=0.2, rtol=0.02)


def test_noise_is_logistic_and_only_in_training():
    """The mean of a noisy score is P(logistic noise + u < logit) for uniform thresholds: a smoothed sigmoid."""
    layer = MoMa(text=2, image=2, noise=1.0, capacity=2.0, expert=EXPERT)
    still, _ = evaluate(layer)
    equal(evaluate(layer)[0], still)
    first = train(layer)[0]
    assert not np.allclose(first, train(layer.clone(noise=0.0))[0])
    # With capacity E every token is taken by each expert, so a result is linear in the scores alone.
    logit = 0.8
    params = jax.tree.map(jnp.zeros_like, drawn(layer))
    params["router_text"] = params["router_text"].at[0].set(logit)
    for name in ("text", "image"):
        params[f"experts_{name}"]["down"]["bias"] = jnp.ones((2, D)) / 2
    x = jnp.zeros((1, 4000, D)).at[..., 0].set(1.0)
    y, _ = train(layer.clone(slack=2.0), x, jnp.zeros((1, 4000), jnp.int32), params=params)
    odds = np.linspace(-30, 30, 200_001)
    density = np.exp(-np.abs(odds)) / (1 + np.exp(-np.abs(odds))) ** 2
    wanted = np.trapezoid(density / (1 + np.exp(-(logit + odds))), odds)
    assert float(y.mean()) == pytest.approx(wanted, abs=0.012)  # three standard errors of 8,000 draws


def test_auxiliary_routers_learn_beside_the_model_and_do_not_touch_it():
    def total(params, x):
        y, aux = BOTH.apply({"params": params}, x, modality=IDS, train=True)
        return aux.losses["moma_loss"], y

    (grads, moved), _ = quick(jax.grad(total, (0, 1), has_aux=True))(drawn(BOTH), X)
    for name, leaf in grads.items():
        touched = any(bool(jnp.any(each != 0)) for each in jax.tree.leaves(leaf))
        assert touched == name.startswith("auxiliary"), name
    equal(moved, 0)
    plain = BOTH.clone(weight=0.0)
    equal(train(plain, params=drawn(BOTH))[0], train(BOTH)[0])
    assert "moma_loss" not in train(plain, params=drawn(BOTH))[1].losses


def test_the_auxiliary_loss_is_the_cross_entropy_with_who_was_taken():
    params = drawn(BOTH)
    _, taken = by_hand(BOTH, params, X, IDS)
    losses = []
    for group in BOTH.groups:
        hidden = np.asarray(X, np.float64) @ np.asarray(params[f"auxiliary_{group.name}_in"])
        logit = hidden / (1 + np.exp(-hidden)) @ np.asarray(params[f"auxiliary_{group.name}_out"])
        each = [
            np.log1p(np.exp(-logit[row, at, e] * (1 if (row, group.name, e, at) in set(taken) else -1)))
            for row in range(B)
            for at in range(N)
            for e in range(group.experts)
            if IDS[row, at] == group.number
        ]
        losses.append(np.mean(each))
    _, aux = train(BOTH)
    assert float(aux.losses["moma_loss"]) == pytest.approx(BOTH.weight * sum(losses), rel=1e-4)


def test_perfect_foresight_gives_what_training_gives():
    """Auxiliary logits are put where the truth is known, by features that tell each token and who took it."""
    wide = 2 * (B * N + 1)
    layer = MoMa(text=2, image=3, expert=MLP(4))
    rng = np.random.default_rng(2)
    x = np.zeros((B, N, wide))
    x[..., : B * N] = np.eye(B * N).reshape(B, N, -1)
    x[..., B * N :] = rng.normal(size=(B, N, wide - B * N))
    x = jnp.asarray(x, jnp.float32)
    shapes = jax.eval_shape(lambda: layer.init({"params": jax.random.key(0)}, x))["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype), shapes
    )
    _, taken = by_hand(layer, params, x, IDS)
    for group in layer.groups:
        into = np.zeros((wide, wide // 2), np.float32)
        into[: B * N, : B * N] = np.eye(B * N)
        out = -np.ones((wide // 2, group.experts), np.float32)
        for row, name, e, at in taken:
            if name == group.name:
                out[row * N + at, e] = 1.0
        params[f"auxiliary_{group.name}_in"], params[f"auxiliary_{group.name}_out"] = map(
            jnp.asarray, (into, out)
        )
    y, aux = train(layer, x, params=params)
    found, _ = evaluate(layer, x, params=params)
    close(found, y, atol=2e-6)
    assert values(aux)["moma_accuracy_text"] == values(aux)["moma_accuracy_image"] == 1.0


def test_outside_training_each_token_decides_for_itself():
    y, _ = evaluate(BOTH)
    moved, _ = evaluate(BOTH, X.at[:, 5:].add(1.0))
    equal(np.asarray(moved)[:, :5], np.asarray(y)[:, :5])
    looking, _ = evaluate(
        BOTH.clone(decide="topk"), params={k: v for k, v in drawn(BOTH).items() if "aux" not in k}
    )
    close(looking, train(BOTH)[0])
    oracle, _ = evaluate(
        BOTH.clone(decide="oracle")
    )  # with the weights as they are, auxiliary routers included
    equal(oracle, looking)
    assert (
        set(drawn(BOTH.clone(decide="oracle"))) == set(drawn(BOTH)) and not BOTH.clone(decide="oracle").causal
    )


# In a language model


def model(stack="block(ffn=moma(text=2, image=3, slack=2.0))*2", training=False, **settings):
    return decoders.build(stack, N, train=training, modal=True, **settings)


def batch(ids, modality=None):
    return {"ids": ids, "modality": ids % 2 if modality is None else modality}


def test_no_logit_changes_when_later_tokens_do():
    made = model()
    state, ids = decoders.weights(made), decoders.ids(2, N)
    run = jax.jit(lambda ids: made.apply(state, batch(ids)).logits)
    plain, moved = run(ids), run(ids.at[:, 7:].set((ids[:, 7:] + 5) % 37))
    equal(np.asarray(plain)[:, :7], np.asarray(moved)[:, :7])
    assert not np.allclose(plain, moved)


@pytest.mark.parametrize(
    "stack",
    [
        "block(ffn=moma(text=2, image=3, slack=2.0, room=4.0))*2",
        "mod(keep=0.5)(block(ffn=moma(text=2, image=2, slack=2.0, room=4.0))) "
        "+ block(ffn=moma(text=1, image=1, slack=2.0))",
    ],
    ids=["moma", "staged"],
)
def test_prompt_and_steps_give_what_the_whole_gives(stack):
    """With pictures in the prompt and behind it, in a model with a router around its experts too."""
    made, prompt = model(stack), 7
    state, ids = decoders.weights(made), decoders.ids(2, N)
    functions = made.generation(prompt, N - prompt)

    @jax.jit
    def both(state, ids):
        whole = made.apply(state, batch(ids)).logits
        weights = functions.prepare(state)
        modality = ids % 2
        first, memory = functions.prefill(
            weights, ids[:, :prompt], jnp.full(2, prompt), modality=modality[:, :prompt]
        )

        def step(memory, now):
            logits, memory = functions.step(weights, now[0], memory, modality=now[1])
            return memory, logits

        _, later = jax.lax.scan(step, memory, (ids[:, prompt:].T, modality[:, prompt:].T))
        return whole, jnp.concatenate([first[None], later])

    whole, found = both(state, ids)
    close(np.moveaxis(found, 0, 1), np.asarray(whole)[:, prompt - 1 :])


def test_the_last_of_too_many_choices_are_left_out_and_counted():
    """In whole sequences there is room for a multiple of what training computes; generation computes all."""
    params = dict(drawn(BOTH))
    for name in ("text", "image"):  # every token is named by every expert
        params[f"auxiliary_{name}_in"] = jnp.abs(params[f"auxiliary_{name}_in"])
        params[f"auxiliary_{name}_out"] = jnp.abs(params[f"auxiliary_{name}_out"])
    x = jnp.abs(X)
    layer = BOTH.clone(room=1.0)
    y, aux = evaluate(layer, x, params=params)
    whole, full = evaluate(layer.in_generation(), x, params=params)
    close(whole, evaluate(layer.clone(room=3.0), x, params=params)[0])
    assert values(full)["left_out"] == 0 and values(full)["experts_per_token"] == 2.5
    # Six of each: 2 x 3 places for text, 3 x 2 for images, so the first half and the first third.
    late = np.zeros((B, N), bool)
    for row in range(B):
        for number, some in ((0, 3), (1, 2)):
            late[row, np.flatnonzero(np.asarray(IDS)[row] == number)[some:]] = True
    assert values(aux)["left_out"] == pytest.approx(late.mean())
    equal(np.asarray(y)[late], 0)
    close(np.asarray(y)[~late], np.asarray(whole)[~late])


def test_outside_training_routed_experts_leave_out_what_finds_no_room_and_nothing_else():
    """Text alone: there is no share to keep where each token decides, but one expert of a modality has a bound."""
    text = jnp.zeros((B, N), jnp.int32)
    params = dict(drawn(BOTH))
    params["auxiliary_text_in"] = jnp.abs(params["auxiliary_text_in"])
    params["auxiliary_text_out"] = jnp.abs(params["auxiliary_text_out"])
    for room, wanted in ((4.0, 0.0), (1.0, 0.75)):  # 2 x 3 places for 2 choices of each of 12 tokens
        _, aux = evaluate(BOTH.clone(room=room), jnp.abs(X), text, params=params)
        assert values(aux)["left_out"] == wanted
    _, aux = evaluate(MoMa(text=1, image=1, expert=EXPERT), ids=text)
    assert values(aux)["left_out"] == 0.5
    _, aux = evaluate(BOTH.clone(room=4.0), ids=IDS.at[0, 0].set(7).at[1, 1].set(-1))
    assert values(aux)["left_out"] == pytest.approx(2 / (B * N))


@pytest.mark.parametrize("stack", ["block(ffn=moma(text=2, image=2))", "block(attention=by_modality)"])
def test_a_vit_has_no_modalities_and_says_so_when_it_is_built(stack):
    spec = {"image": ((8, 8, 1), "float32")}
    with pytest.raises(StackError, match="a vit has tokens of images alone: .*such as moma"):
        models.build({"name": "vit", "size": "nano/2", "stack": stack}, spec=spec, num_outputs=3)


def test_a_model_that_must_know_says_what_is_missing():
    with pytest.raises(StackError, match="the data does not say which token is which"):
        decoders.build("block(ffn=moma(text=2, image=2))*2", N)
    made = model()
    with pytest.raises(ShapeError, match="modality is None"):
        made.apply(decoders.weights(made), {"ids": decoders.ids(2, N)})


def test_top_k_is_refused_in_a_language_model_unless_it_is_to_leak():
    stack = "block(ffn=moma(text=2, image=2, decide=topk))*2"
    with pytest.raises(StackError, match="sees the answer"):
        model(stack)
    model(stack, leaks=True)
    model("block(ffn=moma(text=1, image=1, decide=topk))*2")  # nobody chooses


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "give text and image experts"),
        ({"text": 2}, "give text and image experts"),
        ({"text": 2, "image": 2, "mixed": 2}, "give text and image experts"),
        ({"text": -1, "image": 2}, "text must be a whole number"),
        ({"text": True, "image": 2}, "text must be a whole number"),
        ({"text": 2, "image": 2, "capacity": 0.0}, "capacity must be"),
        ({"text": 2, "image": 2, "capacity": math.inf}, "capacity must be"),
        ({"text": 2, "image": 2, "text_share": 1.0}, "text_share must be"),
        ({"text": 2, "image": 2, "slack": 0.5}, "slack must be"),
        ({"text": 2, "image": 2, "room": 0.9}, "room must be"),
        ({"text": 2, "image": 2, "noise": math.inf}, "noise must be"),
        ({"text": 2, "image": 2, "noise": -1.0}, "noise must be"),
        ({"text": 2, "image": 2, "weight": math.nan}, "weight must be"),
        ({"text": 2, "image": 2, "sequences": 0}, "sequences must be"),
        ({"text": 2, "image": 2, "decide": "guess"}, "decide 'guess' is unknown"),
        ({"text": 2, "image": 2, "transport": "int8"}, "transport must be"),
        ({"text": 1, "image": 1, "transport": "bfloat16"}, "where nobody chooses no token travels: leave"),
        ({"mixed": 1, "transport": "bfloat16"}, "where nobody chooses no token travels: leave"),
        ({"mixed": 2, "slack": 2.0}, "text_share and slack are of modalities"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(ConfigError, match=says):
        MoMa(**settings, expert=EXPERT).init({"params": jax.random.key(0)}, X)


def test_bad_input():
    params = drawn(BOTH)
    run = partial(BOTH.apply, {"params": params}, train=True)
    with pytest.raises(ShapeError, match="modality is None"):
        run(X)
    with pytest.raises(ShapeError, match=r"modality is int32\[3, 11\]"):
        run(X, modality=IDS[:, :-1])
    with pytest.raises(ShapeError, match="modality is float32"):
        run(X, modality=IDS.astype(jnp.float32))
    with pytest.raises(TokenLabError, match="modalities are 0..1"):
        run(X, modality=IDS.at[0, 0].set(2))
    with pytest.raises(ShapeError, match="batch of 3 is no multiple"):
        BOTH.clone(sequences=2).apply({"params": params}, X, modality=IDS, train=True)
    with pytest.raises(ConfigError, match="never trained"):
        BOTH.clone(weight=0.0).apply({"params": params}, X, modality=IDS)
    with pytest.raises(ShapeError, match="a router takes tokens"):
        run(X.astype(jnp.int32), modality=IDS)


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["unroll", "scan"])
def test_lanes_are_made_once_a_step_and_serve_every_layer(execution):
    """XLA keeps one of those that the layers make, and takes it out of the loop over layers."""

    def made(layers):
        built = model(f"block(ffn=moma(text=2, image=2))*{layers}", training=True, execution=execution)
        shapes = dict.fromkeys(("ids", "modality"), jax.ShapeDtypeStruct((2, N), jnp.int32))

        def gradient(state, batch):
            return jax.grad(lambda s: built.apply(s, batch, train=True, rng=jax.random.key(0)).logits.sum())(
                state
            )

        text = jax.jit(gradient).lower(built.abstract_state(), shapes).compile().as_text()
        where, found = "", []
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" "):
                where = line.split(" (")[0]
            if "/lanes/" in line and "cumsum" in line:
                found.append(where)
        return found

    two, four = made(2), made(4)
    assert two and len(four) == len(two)
    assert all("ENTRY" in where or "wrapped" in where or "fused" in where for where in four), four
