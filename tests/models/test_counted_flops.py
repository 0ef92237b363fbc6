"""Counted FLOPs of ViT-S/16 at 224 px equal hand formulas exactly; XLA's own count agrees within 1 %."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tokenlab import models, tasks
from tokenlab.cost.flops import count

D, F, H, PATCH, CLASSES, N = 384, 1536, 6, 16 * 16 * 3, 1000, 197
DENSE = "block*12"
KEEP = "block*4 + keep(0.5, by=cls) + block*8"
SKIP = "block*2 + skip(keep=0.5)(block*8) + block*2"
MERGE = "block*4 + merge(50) + block*8"


def projections(n):
    return 4 * 2 * n * D * D


def maps(n):
    return 2 * 2 * n * n * D


def mlp(n):
    return 2 * 2 * n * D * F


def block(n):
    return projections(n) + maps(n) + mlp(n)


EMBED, HEAD = 2 * 196 * PATCH * D, 2 * D * CLASSES
KEPT = 1 + 98

# stack -> (tokens of each block, what is computed once and has no gradient: score rows, similarities)
BY_HAND = {
    DENSE: ([N] * 12, 0),
    KEEP: ([N] * 4 + [KEPT] * 8, 2 * N * D),  # one row of N logits over H heads of D/H
    SKIP: ([N] * 2 + [KEPT] * 8 + [N] * 2, 0),
    MERGE: (
        [N] * 4 + [N - 50] * 8,
        2 * 98 * 98 * (D // H),
    ),  # sources (CLS is none) x destinations, keys averaged over heads
}


def build(stack, **settings):
    spec = {"image": ((224, 224, 3), "float32")}
    return models.build({"size": "S/16", "stack": stack, **settings}, spec=spec, num_outputs=CLASSES)


def forward(model, batch=1):
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32)
    return lambda state, image: model.apply(state, {"image": image}).logits, (model.abstract_state(), images)


def training(model, batch=1):
    task = tasks.build({"name": "classify"})
    specs = {
        "image": jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((batch,), jnp.float32),
    }

    def step(state, batch):
        loss = lambda s: task.loss(model, s, batch, rng=jax.random.key(0), train=True)[0]  # noqa: E731
        return jax.value_and_grad(loss)(state)

    return step, (model.abstract_state(), specs)


@pytest.mark.parametrize("execution", ["scan", "unroll"])
@pytest.mark.parametrize("stack", BY_HAND)
def test_forward_and_training(stack, execution):
    tokens, once = BY_HAND[stack]
    model = build(stack, execution=execution)
    by_hand = EMBED + HEAD + once + sum(map(block, tokens))
    function, args = forward(model)
    assert count(function, *args).flops == by_hand
    # Backward: twice the forward, but images need no gradient, nor do scores.
    function, args = training(model)
    assert count(function, *args).flops == 3 * (by_hand - once) + once - EMBED


@pytest.mark.parametrize("execution", ["scan", "unroll"])
@pytest.mark.parametrize("stack", [DENSE, KEEP, SKIP])
def test_rematerialisation(stack, execution):
    """Under "full" a block is computed again but for its last product, which nothing reads; scores are not."""
    tokens, once = BY_HAND[stack]
    function, args = training(build(stack, execution=execution, remat="full"))
    plain = 3 * (EMBED + HEAD + sum(map(block, tokens))) + once - EMBED
    again = sum(block(n) - mlp(n) // 2 for n in tokens)
    counted = count(function, *args)
    assert counted.flops == plain + again
    assert counted.recomputed == again and counted.model_flops == plain


@pytest.mark.quick("block*12", "block*2 + skip(keep=0.5)(block*8) + block*2")
@pytest.mark.parametrize("stack", BY_HAND)
def test_xla_agrees(stack):
    """Unrolled, without rematerialisation; XLA counts elementwise work too, so ours is added."""
    for function, args in (
        forward(build(stack, execution="unroll")),
        training(build(stack, execution="unroll")),
    ):
        ours = count(function, *args)
        analysis = jax.jit(function).lower(*args).cost_analysis()
        assert abs((ours.flops + ours.elementwise) / analysis["flops"] - 1) < 0.01
        assert abs(ours.flops / analysis["flops"] - 1) < 0.01
