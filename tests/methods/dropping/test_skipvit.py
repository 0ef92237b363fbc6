"""SkipViT: scores and kept sets are EViT's, what skips comes back as it left, and what the span costs."""

from __future__ import annotations

import math
import sys
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
from tokenlab.layers.program import BlockStep, Loop
from tokenlab.methods.dropping.skipvit import SkipViT, cls_attention_scores, span
from tokenlab.ops.select import top_k
from tokenlab.train.token_clock import tokens_in_layers

sys.path.insert(0, str(Path(__file__).parents[2] / "golden"))
from timm_weights import to_state

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden" / "evit.npz"))
KEY = jax.random.key(5)
SPEC = {"image": ((8, 8, 1), "float32")}
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
scores_of = quick(cls_attention_scores, static_argnames="num_prefix")


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
    scores = scores_of(qkv[:, :, 0], qkv[:, :, 1])
    np.testing.assert_allclose(scores, GOLDEN["drop/mid/cls_attention1"], atol=1e-6)
    kept = top_k(scores, SkipViT(0.7).kept(17, 1), order="score")
    np.testing.assert_array_equal(kept, GOLDEN["drop/mid/keep_index1"])


def test_scores_are_of_the_clean_softmax() -> None:
    query, key = np.asarray(jax.random.normal(KEY, (2, 3, 9, 2, 4)))
    scores = np.asarray(scores_of(query, key))
    logits = np.einsum("bhd,bnhd->bhn", query[:, 0], key) / 2.0
    own = np.asarray(jax.nn.softmax(logits, axis=-1))[..., 0].mean(axis=1)
    np.testing.assert_allclose(scores.sum(axis=1) + own, 1.0, rtol=1e-6)
    order = np.asarray(jax.random.permutation(KEY, 8))
    shuffled = np.concatenate([key[:, :1], key[:, 1:][:, order]], axis=1)
    np.testing.assert_allclose(scores_of(query, shuffled), scores[:, order], rtol=1e-5)
    gradient = quick(jax.grad(lambda key: cls_attention_scores(query, key).sum()))(key)
    np.testing.assert_array_equal(gradient, np.zeros_like(key))
    np.testing.assert_array_equal(scores_of(query, key, num_prefix=3), scores[:, 2:])
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
    state = quick(model.init)(KEY)
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
    return {"before": np.asarray(before), "place": np.asarray(place), "behind": np.asarray(behind)}


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
    state, tokens = quick(model.init)(KEY), _tokens(jax.random.normal(KEY, (3, 17, 16)))

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
    for leaf in map(np.asarray, jax.tree.leaves(blocks)):
        np.testing.assert_array_equal(leaf[1:], np.zeros_like(leaf[1:]))
    assert np.abs(np.asarray(blocks["mlp"]["up"]["kernel"])[0]).max() > 0


def test_the_stack_of_a_span() -> None:
    assert span() == "block*4 + skipvit(0.45)(block*7) + block*1"
    assert span(layers=6, drop=1, back=6) == "block*2 + skipvit(0.45)(block*4)"
    assert span(drop=3, back=4) == "block*12"
    assert span(split="pre_mlp") == "block*3 + skipvit(0.45, split=pre_mlp)(block*8) + block*1"
    assert (
        span(layers=2, drop=0, back=1, split="pre_mlp") == "skipvit(0.45, split=pre_mlp)(block*1) + block*1"
    )
    with pytest.raises(ConfigError, match="split is 'post'. Known: post_block, pre_mlp"):
        span(split="post")
    for wrong in (dict(drop=5, back=5), dict(drop=-1), dict(back=13)):
        with pytest.raises(ConfigError, match="expected 0 <= drop < back"):
            span(**wrong)


def test_without_return_what_follows_sees_the_kept_alone() -> None:
    steps = vit("block + skipvit(0.45, rejoin=False)(block) + block*2").program.steps
    assert [step.present for step in steps] == [17, 17, 9, 9] and steps[1].after == 9
    kept = vit("block + keep(8, by=cls) + block*3")
    gone = vit("block + skipvit(0.45, rejoin=False)(block) + block*2")
    state, images = quick(kept.init)(KEY), {"image": jax.random.normal(KEY, (2, 8, 8, 1))}
    run = lambda model: quick(lambda: model.apply(state, images, train=True, rng=KEY).logits)()  # noqa: E731
    np.testing.assert_array_equal(run(kept), run(gone))
    assert (
        vit("block + skipvit(0.45, rejoin=False, train_only=True)(block) + block", train=False).program.after
        == 17
    )


# ------------------------------------------------------------------------------------------------ split within a block


@pytest.fixture(scope="module")
def parted() -> dict[str, Any]:
    """SkipViT parted before the feed-forward layer of block 1 of the stored EViT network, with and without return."""
    state = to_state(below("params/"), 3)
    images = {"image": jnp.asarray(GOLDEN["inputs/images"].transpose(0, 2, 3, 1))}
    stacks = {
        "back": "block + skipvit(0.7, split=pre_mlp)(block*2) + block",
        "gone": f"block + {GONE.format(0.7)}(block*2) + {GONE.format(0.6)}(block)",
        "all": "block + skipvit(1.0, split=pre_mlp)(block*2) + block",
    }

    def run(model: Any) -> Any:
        output = model.apply(state, images, record=True)
        return output.logits, [point.tokens for point in output.trace]

    found = {name: quick(partial(run, _golden_vit(stack)))() for name, stack in stacks.items()}
    return jax.tree.map(np.asarray, found)


GONE = "skipvit({}, rejoin=False, split=pre_mlp)"


def below(prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}


def _golden_vit(stack: str) -> Any:
    settings = {
        "size": "nano/6",
        "width": 12,
        "num_heads": 3,
        "mlp_dim": 48,
        "activation": "gelu",
        "stack": stack,
    }
    spec = {"image": ((24, 24, 3), "float32")}
    return models.build({"name": "vit", **settings}, spec=spec, num_outputs=5, train=True)


def test_parted_within_a_block_it_is_evit_without_fusion(parted: dict[str, Any]) -> None:
    """Kept sets, states behind two reductions and logits, of which the reference has those that go on alone."""
    logits, trace = parted["gone"]
    first = np.sort(GOLDEN["drop/mid/keep_index1"], axis=1)
    order = np.argsort(GOLDEN["drop/mid/keep_index1"], axis=1)
    theirs = np.take_along_axis(GOLDEN["drop/mid/block2"][:, 1:], order[..., None], 1)
    np.testing.assert_array_equal(trace[1].position[:, 1:] - 1, first)
    np.testing.assert_allclose(trace[1].x[:, 1:], theirs, atol=5e-5)
    np.testing.assert_allclose(trace[1].x[:, :1], GOLDEN["drop/mid/block2"][:, :1], atol=5e-5)
    assert trace[3].count == GOLDEN["drop/mid/block3"].shape[1]
    np.testing.assert_allclose(logits, GOLDEN["drop/outputs/logits"], atol=5e-5)


def test_what_left_before_the_feed_forward_layer_returns_as_it_left(parted: dict[str, Any]) -> None:
    _, (inside, behind) = parted["back"]
    gone, (attended, _) = (
        parted["gone"][1],
        parted["all"][1],
    )  # of all tokens, behind the attention of block 1
    np.testing.assert_array_equal(inside.position, gone[0].position)
    np.testing.assert_allclose(inside.x, gone[0].x, atol=1e-6)
    for b, kept in enumerate(np.asarray(inside.position)):
        rest = np.setdiff1d(np.arange(17), kept)
        assert len(rest) == 4
        np.testing.assert_allclose(behind.x[b, rest], attended.x[b, rest], atol=1e-6)
        np.testing.assert_allclose(behind.x[b, kept], gone[1].x[b], atol=1e-6)


@pytest.mark.parametrize("split", ["post_block", "pre_mlp"])
def test_cost_of_the_span_is_the_formula(split: str) -> None:
    """(d + 1 + L - r) F(N + 1) + (r - d - 1) F(K + 1) with F(n) = 24 n D^2 + 4 n^2 D, and the CLS row, 2 N D."""
    size, n, k = 16, 17, 9
    model = vit(span(layers=6, drop=1, back=5, split=split))
    counted = count(
        model.apply, model.abstract_state(), {"image": jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")}
    )
    blocks = sum(flops for scope, flops in counted.by_scope.items() if "block" in scope)
    hidden = model.abstract_state()["blocks"]["mlp"]["up"]["kernel"].shape[-1]

    def one(n: int) -> int:
        return 8 * n * size**2 + 4 * n**2 * size + 4 * n * size * hidden

    saved = 4 * (n - k) * size * hidden if split == "pre_mlp" else 0  # block d feeds the kept tokens alone
    assert blocks == 3 * one(n) + 3 * one(k) + 2 * n * size - saved
    assert tokens_in_layers(model) == 3 * n + 3 * k


@pytest.mark.parametrize("split", ["post_block", "pre_mlp"])
def test_xla_counts_as_much(split: str) -> None:
    """The forward pass within 3 %, of a ViT-S/16 at 112 px: elementwise work is little at that width."""
    spec = {"image": ((112, 112, 3), "float32")}
    settings = {"name": "vit", "size": "S/16", "stack": span(layers=4, drop=0, back=3, split=split)}
    model = models.build({**settings, "execution": "unroll"}, spec=spec, num_outputs=10)
    given = model.abstract_state(), {"image": jax.ShapeDtypeStruct((1, 112, 112, 3), "float32")}

    def forward(state: Any, batch: Any) -> Any:
        return model.apply(state, batch).logits

    ours = count(forward, *given).flops
    assert abs(ours / jax.jit(forward).lower(*given).cost_analysis()["flops"] - 1) < 0.03


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    """Features and gradients of stacks in which all tokens are kept, scanned and not: stack, execution -> both."""
    state, images = quick(vit("block*3").init)(KEY), {"image": jax.random.normal(KEY, (2, 8, 8, 1))}

    def one(stack: str, **how: Any) -> Any:
        model = vit(stack, **how)

        def loss(state: Any) -> Any:
            x = model.apply(state, images, train=True, rng=KEY).tokens
            return jnp.sum(jnp.sin(x)), x

        (_, x), grads = quick(jax.value_and_grad(loss, has_aux=True))(state)
        return x, grads

    parted = "skipvit({}, split=pre_mlp)(block)*2 + block"
    return {
        "dense": one("block*3"),
        "all": one(parted.format("1.0")),
        **{
            name: one(parted.format(0.45), **how)
            for name, how in {
                "unroll": {"execution": "unroll"},
                "scan": {"execution": "scan"},
                "remat": {"execution": "scan", "remat": "full"},
            }.items()
        },
    }


def test_parted_blocks_that_keep_all_are_the_dense_ones(everything: dict[str, Any]) -> None:
    (dense, grads), (found, others) = everything["dense"], everything["all"]
    np.testing.assert_array_equal(dense, found)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), grads, others)


def test_parted_blocks_are_the_same_in_a_loop(everything: dict[str, Any]) -> None:
    x, grads = everything["unroll"]
    assert not np.allclose(x, everything["dense"][0])
    for name in ("scan", "remat"):
        other, others = everything[name]
        np.testing.assert_array_equal(x, other)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), grads, others)
    loop, _ = vit("skipvit(0.45, split=pre_mlp)(block)*2 + block").program.folded()
    assert isinstance(loop, Loop) and loop.times == 2


def test_evaluation_of_a_parted_span_may_be_dense() -> None:
    model = vit("skipvit(0.45, split=pre_mlp, train_only=True)(block*2) + block", train=False)
    assert [step.left for step in model.program.flat() if isinstance(step, BlockStep)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("stack", "settings", "part"),
    [
        ("block + skipvit(0)(block)", {}, "skipvit: keep"),
        ("block + skipvit(17)(block)", {}, "skipvit: keep"),
        ("block + skipvit(1.5)(block)", {}, "skipvit: keep"),
        ("skipvit(0.45)(block)", {}, "reads the attention of a block just before"),
        ("block + skipvit(0.45)(block)", {"head": "mean"}, "CLS"),
        ("block + skipvit(0.45, split=mid)(block)", {}, "split must be one of post_block, pre_mlp; got mid"),
        (
            "skipvit(0.45, split=pre_mlp)(block(between=keep(1.0)) + block)",
            {},
            "must begin with a plain block",
        ),
        ("skipvit(0.45, split=pre_mlp)(skip(keep=0.5)(block))", {}, "must begin with a plain block"),
        ("skipvit(0.45, split=pre_mlp)(block + skip(keep=3, by=cls)(block))", {}, "nothing else reads"),
    ],
)
def test_wrong_spans(stack: str, settings: dict, part: str) -> None:
    with pytest.raises((StackError, ConfigError), match=part):
        vit(stack, **settings)


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError):
        top_k(jnp.zeros((2, 3, 4)), 2)
