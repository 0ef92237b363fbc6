"""Random-LTD: what is drawn, what is skipped, what the gradient does, and that evaluation is dense."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import encoders
from tokenlab import models
from tokenlab.core.errors import ConfigError, StackError, TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.layers import execute
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.execute import Inside
from tokenlab.methods.dropping import random_ltd as method
from tokenlab.methods.dropping.random_ltd import (
    RandomLTD,
    bucketed,
    layer_token_lr,
    layer_tokens,
    linear_keep_schedule,
    ltd_layers,
    random_token_indices,
)
from tokenlab.train.token_clock import tokens_in_layers

B, N, K, D = 2, 9, 4, 16
KEY = jax.random.key(3)
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
drawn = quick(random_token_indices, static_argnames=("layers", "batch", "n", "k", "protected"))


def sequence(x: Any, **more: Any) -> Tokens:
    position = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return Tokens(jnp.asarray(x), position, **more)


def vit(stack: str, *, train: bool = True, **settings: Any) -> Any:
    spec = {"image": ((8, 8, 1), "float32")}
    return models.build(
        {"name": "vit", "size": "nano/2", "stack": stack, **settings}, spec=spec, num_outputs=5, train=train
    )


def decoder(stack: str, *, train: bool = True, **settings: Any) -> Any:
    spec = {"ids": ((N,), "int32")}
    return models.build(
        {"name": "decoder_lm", "size": "nano", "stack": stack, **settings},
        spec=spec,
        num_outputs=7,
        train=train,
    )


# ------------------------------------------------------------------------------------------------ what is drawn


def test_indices_are_ascending_distinct_and_uniform() -> None:
    """Marginal and joint frequencies within 5 sigma over 10,000 draws, for two layers and two examples."""
    keys = jax.random.split(KEY, 10_000)
    draw = partial(random_token_indices, layers=2, batch=2, n=N, k=K)
    found = np.asarray(jax.jit(jax.vmap(lambda key: draw(key)))(keys))
    assert found.shape == (10_000, 2, 2, K) and found.dtype == np.int32
    assert (np.diff(found, axis=-1) > 0).all() and found.min() == 0 and found.max() == N - 1
    there = (found[..., None] == np.arange(N)).any(axis=-2)  # [draws, layers, B, N]
    sigma = np.sqrt(K / N * (1 - K / N) / len(keys))
    assert np.abs(there.mean(axis=0) - K / N).max() < 5 * sigma
    rows = there.reshape(len(keys), 4, N)
    expected = (K / N) ** 2
    for one in range(4):
        for other in range(one):  # layers and examples know nothing of each other
            both = (rows[:, one] & rows[:, other]).mean(axis=0)
            assert np.abs(both - expected).max() < 5 * np.sqrt(expected * (1 - expected) / len(keys))


def test_protected_positions_stay() -> None:
    found = np.asarray(drawn(KEY, layers=3, batch=4, n=N, k=K, protected=2))
    assert found.shape == (3, 4, 2 + K)
    assert (found[..., :2] == [0, 1]).all() and (found[..., 2:] >= 2).all()


@pytest.mark.parametrize("k", [0, N + 1, -1])
def test_wrong_counts(k: int) -> None:
    with pytest.raises(TokenLabError):
        random_token_indices(KEY, layers=1, batch=1, n=N, k=k)
    with pytest.raises(StackError, match="random_ltd: keep"):
        decoder(f"block + random_ltd({k})(block) + block")
    with pytest.raises(TokenLabError):
        layer_tokens(1, N, k, 3, 1)


# ------------------------------------------------------------------------------------------------ one layer


@pytest.fixture(scope="module")
def layer() -> Any:
    """(x, weight, cotangent) -> output, gradients, of a layer in which all tokens meet."""

    def body(weight: Any, part: Tokens) -> tuple[Tokens, Aux]:
        return part.replace(x=part.x + jnp.tanh(part.x.mean(axis=1, keepdims=True) + part.x @ weight)), Aux()

    def run(x: Any, weight: Any) -> Any:
        inside = Inside(partial(body, weight), K)
        return RandomLTD(K)({}, sequence(x), Context(KEY, True), {}, KEY, inside)[0].x

    @jax.jit
    def both(x: Any, weight: Any, cotangent: Any) -> Any:
        found, back = jax.vjp(run, x, weight)
        return found, *back(cotangent)

    return both


def test_what_is_not_drawn_is_untouched_in_value_and_gradient(layer: Any) -> None:
    x, cotangent = np.asarray(jax.random.normal(KEY, (2, B, N, D)))
    weight = jax.random.normal(jax.random.key(4), (D, D))
    kept = np.asarray(drawn(KEY, layers=1, batch=B, n=N, k=K))[0]
    found, into, gradient = map(np.asarray, layer(x, weight, cotangent))
    noise = np.array(x)
    for b in range(B):
        rest = np.setdiff1d(np.arange(N), kept[b])
        np.testing.assert_array_equal(found[b, rest], x[b, rest])
        np.testing.assert_array_equal(into[b, rest], cotangent[b, rest])
        assert not np.allclose(found[b, kept[b]], x[b, kept[b]])
        noise[b, rest] = 1e3
    changed, _, same = map(np.asarray, layer(noise, weight, cotangent))
    np.testing.assert_array_equal(gradient, same)  # the layer never saw them
    np.testing.assert_array_equal(changed[np.arange(B)[:, None], kept], found[np.arange(B)[:, None], kept])


def test_with_all_tokens_kept_the_body_runs_as_it_is() -> None:
    state = quick(vit("block*3").init)(KEY)
    images = {"image": jax.random.normal(KEY, (2, 8, 8, 1))}
    dense, own = vit("block*3"), vit("block + random_ltd(17)(block) + block")
    run = lambda model: quick(lambda: model.apply(state, images, train=True, rng=KEY).logits)()  # noqa: E731
    np.testing.assert_array_equal(run(dense), run(own))
    everything = drawn(KEY, layers=1, batch=2, n=N, k=N)  # the gather itself changes nothing either
    np.testing.assert_array_equal(np.asarray(everything)[0], np.broadcast_to(np.arange(N), (2, N)))


# ------------------------------------------------------------------------------------------------ in models


def test_the_cls_token_is_dropped_like_any_other_unless_it_is_protected(monkeypatch: Any) -> None:
    seen = []

    def spy(key: Any, **given: Any) -> Any:
        seen.append(given)
        return random_token_indices(key, **given)

    monkeypatch.setattr(method, "random_token_indices", spy)
    images = {"image": jnp.zeros((2, 8, 8, 1))}
    for stack in ("random_ltd(6)(block) + block", "random_ltd(6, protect=True)(block) + block"):
        model = vit(stack)
        jax.eval_shape(
            lambda state, model=model: model.apply(state, images, train=True, rng=KEY), model.abstract_state()
        )
    assert [(given["k"], given["protected"]) for given in seen] == [(6, 0), (6, 1)]
    assert [step.inside for step in vit("random_ltd(6, protect=True)(block)").program.steps] == [7]


def test_an_item_that_reads_cls_inside_is_refused() -> None:
    with pytest.raises(StackError, match="inside random_ltd it is dropped like any other"):
        vit("block + random_ltd(6)(block + skip(keep=2, by=cls)(block))")
    assert vit(
        "block + random_ltd(6, protect=True)(block + skip(keep=2, by=cls)(block)) + keep(0.5, by=norm)"
    )


@pytest.mark.parametrize("keep", [4, N])
@pytest.mark.parametrize("protect", [False, True])
def test_the_body_knows_which_of_its_tokens_are_protected(keep: int, protect: bool) -> None:
    """Those outside are none inside unless they stay, whether or not all tokens go through."""
    seen = []

    def body(part: Tokens) -> tuple[Tokens, Aux]:
        seen.append(part.protected)
        return part, Aux()

    item, tokens = RandomLTD(keep - 2 * protect, protect), sequence(jnp.zeros((B, N, D)), protected=2)
    assert item.inside(N, 2) == keep
    out, _ = item({}, tokens, Context(KEY, True), {}, KEY, Inside(body, keep))
    assert seen == [2 * protect] and out.protected == 2
    within = vit(f"block + random_ltd(6, protect={protect})(skip(keep=2, by=norm)(block))").program.steps[1]
    assert within.body[0].inside == 2 + protect  # the item inside has CLS besides, or nothing


def test_padding_of_an_encoder_changes_nothing_and_has_its_places() -> None:
    """Of each example its own K of N tokens attend to those among them that are there."""
    model = encoders.build("block + random_ltd(5)(block)*2 + block", N, train=True)
    state, batch = encoders.weights(model), encoders.batch(3, N)
    there = np.arange(N) < batch["length"][:, None]
    assert 0 < there.sum() < there.size

    @quick
    def run(ids: Any) -> Any:
        found = model.apply(state, {**batch, "ids": ids}, train=True, rng=KEY, record=True)
        return found.tokens, [(point.tokens.position, point.tokens.valid) for point in found.trace]

    found, trace = run(batch["ids"])
    other, _ = run(np.where(there, batch["ids"], 7))
    np.testing.assert_array_equal(np.asarray(found)[there], np.asarray(other)[there])
    assert not np.array_equal(np.asarray(found)[~there], np.asarray(other)[~there])
    inside = [point for point in trace if point[0].shape[1] == 5]
    assert len(inside) == 2 and not np.array_equal(inside[0][0], inside[1][0])
    for place, valid in inside:
        np.testing.assert_array_equal(valid, np.take_along_axis(there, np.asarray(place), 1))
        assert not np.asarray(valid).all()


@pytest.fixture(scope="module")
def lm() -> dict[str, Any]:
    """A decoder with two layers that drop, in each way of running it: name -> logits and gradients."""
    ids = jax.random.randint(KEY, (2, N), 0, 7)
    stack = f"block + random_ltd({K})(block)*2 + block"
    ways = {
        "unroll": {"execution": "unroll"},
        "scan": {"execution": "scan"},
        "remat": {"execution": "scan", "remat": "full"},
    }
    state = quick(decoder(stack).init)(KEY)

    def one(**settings: Any) -> Any:
        model = decoder(stack, **settings)

        @quick
        def both(state: Any, ids: Any) -> Any:
            def loss(state: Any) -> Any:
                logits = model.apply(state, {"ids": ids}, train=True, rng=KEY).logits
                return jnp.sum(jnp.sin(logits)), logits

            (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(state)
            return logits, grads

        return both

    return {"ids": ids, "state": state, "run": {name: one(**settings) for name, settings in ways.items()}}


def test_scanned_unrolled_and_rematerialised_draw_the_same(lm: Any) -> None:
    logits, grads = lm["run"]["unroll"](lm["state"], lm["ids"])
    for name in ("scan", "remat"):
        other, others = lm["run"][name](lm["state"], lm["ids"])
        np.testing.assert_array_equal(logits, other)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), grads, others)


def test_no_token_changes_what_came_before_it(lm: Any) -> None:
    logits, _ = lm["run"]["unroll"](lm["state"], lm["ids"])
    for place in (3, N - 1):
        changed, _ = lm["run"]["unroll"](lm["state"], lm["ids"].at[:, place].add(1) % 7)
        np.testing.assert_array_equal(changed[:, :place], logits[:, :place])
        assert not np.array_equal(changed[:, place], logits[:, place])


def test_positions_go_with_their_tokens() -> None:
    """Rotary positions and the causal mask inside are those of the whole sequence."""
    model = decoder(f"block + random_ltd({K})(block) + block")
    x = jax.random.normal(KEY, (B, N, D))
    place = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    tokens = Tokens(x, place, coords=place[..., None].astype(jnp.float32), valid=place < 7)

    @jax.jit
    def dropped(key: Any) -> Tokens:
        points: list[Any] = []
        state = model.init(key)
        execute.run(model.program, state, tokens, Context(KEY, True), execution="unroll", trace=points)
        return next(point.tokens for point in points if point.inside)

    inside = dropped(KEY)
    assert inside.count == K and (np.diff(inside.position, axis=1) > 0).all()
    np.testing.assert_array_equal(inside.coords[..., 0], inside.position)
    np.testing.assert_array_equal(inside.valid, inside.position < 7)


@pytest.mark.parametrize("build", [vit, decoder])
def test_evaluation_is_dense(build: Any) -> None:
    """With the weights of a run that drops, evaluation is that of the dense model, leaf by leaf and bit by bit."""
    stack = "block + random_ltd(5)(block)*2 + block"
    trained, evaluated, dense = build(stack), build(stack, train=False), build("block*4", train=False)
    state = quick(trained.init)(KEY)
    assert jax.tree.structure(state) == jax.tree.structure(dense.abstract_state())
    batch = (
        {"image": jax.random.normal(KEY, (2, 8, 8, 1))}
        if build is vit
        else {"ids": jax.random.randint(KEY, (2, N), 0, 7)}
    )
    logits = [
        quick(lambda state, model=model: model.apply(state, batch).logits)(state)
        for model in (evaluated, dense)
    ]
    np.testing.assert_array_equal(*logits)
    dropped = build(stack.replace("(5)", "(5, train_only=False)"), train=False)
    assert [step.inside for step in dropped.program.steps if hasattr(step, "inside")] == [5, 5]


def test_layer_tokens_of_a_model_are_those_of_the_formula() -> None:
    assert layer_tokens(1, 2048, 128, 24, 22) == 6912 and layer_tokens(1, 2048, 2048, 24, 22) == 49_152
    model = decoder("block + random_ltd(4)(block)*3 + block")
    assert tokens_in_layers(model) == layer_tokens(1, N, 4, 5, 3)


# ------------------------------------------------------------------------------------------------ schedules


def test_the_schedules_of_the_paper() -> None:
    gpt = partial(linear_keep_schedule, k_min=128, k_max=2048, require_steps=200_000, multiple=16)
    assert [gpt(step) for step in (0, 1000, 100_000, 200_000)] == [128, 128, 1088, 2048]
    vision = partial(linear_keep_schedule, k_min=32, k_max=197, require_steps=3910, multiple=8)
    assert [vision(step) for step in (3910, 3981, 3982, 10**6)] == [192, 192, 197, 197]
    assert linear_keep_schedule(0, k_min=100, k_max=1000, require_steps=10, multiple=7) == 98


def test_buckets() -> None:
    line = partial(linear_keep_schedule, k_min=128, k_max=2048, require_steps=2000, multiple=16)
    few = bucketed(line, 5, k_min=128, k_max=2048, multiple=16)
    found = [few(step) for step in range(2100)]
    assert sorted(set(found)) == [128, 608, 1088, 1568, 2048] and found == sorted(found)
    assert all(value <= line(step) for step, value in enumerate(found))


def test_the_learning_rate_rises_and_falls() -> None:
    given = dict(peak=0.3, floor=0.01, warmup_tokens=100, total_tokens=1000)
    for decay in ("cosine", "linear"):
        rates = np.asarray(layer_token_lr(np.arange(0, 1201), **given, decay=decay))
        assert (np.diff(rates[:101]) > 0).all() and (np.diff(rates[100:1001]) <= 0).all()
        assert rates[100] == np.float32(0.3) and (rates[1000:] == np.float32(0.01)).all()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: linear_keep_schedule(0, k_min=0, k_max=4, require_steps=2),
        lambda: linear_keep_schedule(0, k_min=5, k_max=4, require_steps=2),
        lambda: linear_keep_schedule(0, k_min=1, k_max=4, require_steps=2, multiple=0),
        lambda: linear_keep_schedule(0, k_min=1, k_max=4, require_steps=0),
        lambda: linear_keep_schedule(0, k_min=7, k_max=64, require_steps=9, multiple=8),
        lambda: bucketed(lambda step: 4, 1, k_min=1, k_max=4),
        lambda: bucketed(lambda step: 4, 2, k_min=4, k_max=4),
        lambda: ltd_layers(2),
        lambda: ltd_layers(6, [1, 1]),
        lambda: ltd_layers(6, [1, 6]),
        lambda: ltd_layers(6, []),
        lambda: layer_tokens(1, 9, 4, 3, 4),
        lambda: layer_token_lr(1, peak=1.0, floor=0.1, warmup_tokens=5, total_tokens=5),
        lambda: layer_token_lr(1, peak=1.0, floor=2.0, warmup_tokens=5, total_tokens=9),
        lambda: layer_token_lr(1, peak=1.0, floor=0.0, warmup_tokens=5, total_tokens=9, decay="step"),
    ],
)
def test_wrong_arguments(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="random-LTD"):
        wrong()


def test_the_layers_that_drop() -> None:
    assert ltd_layers(24) == tuple(range(1, 23)) and ltd_layers(6, [2, 4]) == (2, 4)


def test_another_number_of_tokens_is_refused() -> None:
    model = decoder(f"block + random_ltd({K})(block) + block")
    with pytest.raises(TokenLabError, match=f"{N}"):
        model.apply(model.abstract_state(), {"ids": jnp.zeros((1, N + 3), jnp.int32)}, train=True, rng=KEY)
