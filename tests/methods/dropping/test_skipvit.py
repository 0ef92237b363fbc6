"""SkipViT: scores and kept sets are EViT's, what skips comes back as it left, and what the span costs."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import models
from tokenlab.core.errors import ConfigError, ShapeError, StackError, TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.cost import count
from tokenlab.layers import execute
from tokenlab.layers.context import Context
from tokenlab.methods.dropping.skipvit import SkipViT, cls_attention_scores, span
from tokenlab.ops.select import top_k

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden" / "evit.npz"))
KEY = jax.random.key(5)
SPEC = {"image": ((8, 8, 1), "float32")}
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def vit(stack: str, *, train: bool = True, **settings: Any) -> Any:
    return models.build(
        {"name": "vit", "size": "nano/2", "stack": stack, **settings}, spec=SPEC, num_outputs=5, train=train
    )


def test_scores_and_kept_sets_are_those_of_evit() -> None:
    """Block 1 of the reference network on its own stored input."""
    p = {name.removeprefix("params/blocks.1."): value for name, value in GOLDEN.items()}
    x = GOLDEN["drop/mid/block0"]
    mean = x.mean(-1, keepdims=True)
    y = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
    y = y * p["norm1.weight"] + p["norm1.bias"]
    qkv = (y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).reshape(*y.shape[:2], 3, 3, -1)
    scores = cls_attention_scores(jnp.asarray(qkv[:, :, 0]), jnp.asarray(qkv[:, :, 1]))
    np.testing.assert_allclose(scores, GOLDEN["drop/mid/cls_attention1"], atol=1e-6)
    kept = top_k(scores, SkipViT(0.7).kept(17, 1), order="score")
    np.testing.assert_array_equal(kept, GOLDEN["drop/mid/keep_index1"])


def test_scores_are_of_the_clean_softmax() -> None:
    query, key = jax.random.normal(KEY, (2, 3, 9, 2, 4))
    scores = cls_attention_scores(query, key)
    logits = jnp.einsum("bhd,bnhd->bhn", query[:, 0], key) / 2.0
    own = jax.nn.softmax(logits, axis=-1)[..., 0].mean(axis=1)
    np.testing.assert_allclose(scores.sum(axis=1) + own, 1.0, rtol=1e-6)
    order = jax.random.permutation(KEY, 8)
    shuffled = jnp.concatenate([key[:, :1], key[:, 1:][:, order]], axis=1)
    np.testing.assert_allclose(cls_attention_scores(query, shuffled), scores[:, order], rtol=1e-5)
    gradient = jax.grad(lambda key: cls_attention_scores(query, key).sum())(key)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(key))
    np.testing.assert_array_equal(cls_attention_scores(query, key, num_prefix=3), scores[:, 2:])
    with pytest.raises(TokenLabError, match="num_prefix is 0"):
        cls_attention_scores(query, key, num_prefix=0)


@pytest.mark.parametrize(
    ("share", "n", "k"), [(0.45, 196, 89), (0.45, 64, 29), (0.55, 20, 11), (1.0, 7, 7), (0.01, 5, 1)]
)
def test_the_number_kept_is_rounded_up(share: float, n: int, k: int) -> None:
    assert SkipViT(share).kept(n + 1, 1) == k == SkipViT(k).kept(n + 1, 1)


@pytest.fixture(scope="module")
def ran() -> dict[str, Any]:
    """Tokens before, inside and behind the span, and the gradient of the input of the span."""
    model = vit("block + skipvit(0.45)(block*2) + block")
    state = model.init(KEY)
    tokens = _tokens(jax.random.normal(KEY, (3, 17, 16)))

    @quick
    def run(state: Any) -> Any:
        points: list[Any] = []
        first = vit("block").program
        before, _ = execute.run(first, _part(state, 1), tokens, Context(KEY, True))
        execute.run(model.program, state, tokens, Context(KEY, True), execution="unroll", trace=points)
        inside, behind = (next(p.tokens for p in points if p.inside is flag) for flag in (True, False))
        return before.x, inside.position, behind.x

    before, place, behind = run(state)
    return {"before": before, "place": np.asarray(place), "behind": behind}


def _part(state: Any, blocks: int) -> Any:
    return {"blocks": jax.tree.map(lambda leaf: leaf[:blocks], state["blocks"])}


def _tokens(x: Any) -> Tokens:
    position = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return Tokens(x, position, protected=1)


def test_what_skips_returns_as_it_left(ran: dict[str, Any]) -> None:
    place = ran["place"]
    assert place.shape == (3, 1 + math.ceil(0.45 * 16)) and (place[:, 0] == 0).all()
    assert (np.diff(place, axis=1) > 0).all()
    for b, kept in enumerate(place):
        rest = np.setdiff1d(np.arange(17), kept)
        np.testing.assert_array_equal(ran["behind"][b, rest], ran["before"][b, rest])
        assert not np.isclose(ran["behind"][b, kept], ran["before"][b, kept]).all(axis=-1).any()


def test_no_gradient_of_what_skips_passes_through_the_span() -> None:
    """The loss reads the skipped rows alone: nothing reaches the weights of the blocks between."""
    model = vit("block + skipvit(0.45)(block*2)")
    state, tokens = model.init(KEY), _tokens(jax.random.normal(KEY, (3, 17, 16)))

    @quick
    def gradient(state: Any) -> Any:
        def loss(state: Any) -> Any:
            points: list[Any] = []
            out, _ = execute.run(
                model.program, state, tokens, Context(KEY, True), execution="unroll", trace=points
            )
            inside = next(p.tokens.position for p in points if p.inside)
            gone = ~(inside[..., None] == jnp.arange(17)).any(axis=1)
            return jnp.sum(jnp.where(gone[..., None], jnp.sin(out.x), 0.0))

        return jax.grad(loss)(state)

    blocks = gradient(state)["blocks"]
    for leaf in jax.tree.leaves(blocks):
        np.testing.assert_array_equal(leaf[1:], jnp.zeros_like(leaf[1:]))
    assert np.abs(blocks["mlp"]["up"]["kernel"][0]).max() > 0


def test_the_stack_of_a_span() -> None:
    assert span() == "block*4 + skipvit(0.45)(block*7) + block*1"
    assert span(layers=6, drop=1, back=6) == "block*2 + skipvit(0.45)(block*4)"
    assert span(drop=3, back=4) == "block*12"
    for wrong in (dict(drop=5, back=5), dict(drop=-1), dict(back=13)):
        with pytest.raises(ConfigError, match="expected 0 <= drop < back"):
            span(**wrong)


def test_without_return_what_follows_sees_the_kept_alone() -> None:
    steps = vit("block + skipvit(0.45, rejoin=False)(block) + block*2").program.steps
    assert [step.present for step in steps] == [17, 17, 9, 9] and steps[1].after == 9
    kept = vit("block + keep(8, by=cls) + block*3")
    gone = vit("block + skipvit(0.45, rejoin=False)(block) + block*2")
    state, images = kept.init(KEY), {"image": jax.random.normal(KEY, (2, 8, 8, 1))}
    run = lambda model: quick(lambda: model.apply(state, images, train=True, rng=KEY).logits)()  # noqa: E731
    np.testing.assert_array_equal(run(kept), run(gone))
    assert (
        vit("block + skipvit(0.45, rejoin=False, train_only=True)(block) + block", train=False).program.after
        == 17
    )


def test_cost_of_the_span_is_the_formula() -> None:
    """(d + 1 + L - r) F(N + 1) + (r - d - 1) F(K + 1) with F(n) = 24 n D^2 + 4 n^2 D, and the CLS row, 2 N D."""
    size, n, k = 16, 17, 9
    model = vit(span(layers=6, drop=1, back=5))
    counted = count(
        model.apply, model.abstract_state(), {"image": jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")}
    )
    blocks = sum(flops for scope, flops in counted.by_scope.items() if "block" in scope)
    hidden = model.abstract_state()["blocks"]["mlp"]["up"]["kernel"].shape[-1]

    def one(n: int) -> int:
        return 8 * n * size**2 + 4 * n**2 * size + 4 * n * size * hidden

    assert blocks == 3 * one(n) + 3 * one(k) + 2 * n * size


@pytest.mark.parametrize(
    ("stack", "settings", "part"),
    [
        ("block + skipvit(0)(block)", {}, "skipvit: keep"),
        ("block + skipvit(17)(block)", {}, "skipvit: keep"),
        ("block + skipvit(1.5)(block)", {}, "skipvit: keep"),
        ("skipvit(0.45)(block)", {}, "reads the attention of a block just before"),
        ("block + skipvit(0.45)(block)", {"head": "mean"}, "CLS"),
    ],
)
def test_wrong_spans(stack: str, settings: dict, part: str) -> None:
    with pytest.raises((StackError, ConfigError), match=part):
        vit(stack, **settings)


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError):
        top_k(jnp.zeros((2, 3, 4)), 2)
