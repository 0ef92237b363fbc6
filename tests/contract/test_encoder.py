"""The contract in an encoder language model: every part runs there, and neither padding nor another row is seen.

Parts are found as everywhere here, the first stack of each, around post-norm blocks with a mask of padding.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import parts
import pytest

from tests import encoders
from tokenlab import models
from tokenlab.tasks import build

N, B = 17, 4  # 16 tokens behind CLS, as many as the contract's pictures have patches
TASK = build({"name": "masked_lm", "ratio": 0.25})
FIRST = list({(part.role, part.name): part for part in reversed(parts.find())}.values())[::-1]
SLOW = [
    part
    for part in FIRST
    if part.role == "score" or part.name not in ("mlp", "swiglu") and part.role == "ffn"
]
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def needs_more(stack):
    """Whether a stack asks what tokens stand for, or for places in a picture, which an encoder of text does not say."""
    steps = encoders.build(stack, N).program.flat()
    return any(hasattr(step, "block") and step.block.by_modality for step in steps)


@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=pytest.mark.slow if p in SLOW else ()) for p in FIRST], ids=str
)
def test_every_part_runs_and_does_not_see_padding(part):
    if needs_more(part.stack):
        return
    model = encoders.build(part.stack, N, train=True)
    state = encoders.weights(model)
    batch = {**encoders.batch(B, N), "length": np.array([17, 16, 15, 13], np.int32)}
    inside = np.arange(N) < batch["length"][:, None]
    batch["word"] = np.where(inside, np.maximum(batch["word"], np.arange(N) > 0), 0).astype(np.int32)
    hidden = TASK.hidden(model, batch, rng=jax.random.key(0), train=False)

    compiled = quick(lambda state, batch: model.apply(state, batch, rng=jax.random.key(1)))
    plain = compiled(state, hidden)
    assert np.isfinite(plain.logits).all() and np.isfinite(plain.features).all()
    assert plain.logits.shape == (B, 5, encoders.VOCABULARY) and (np.asarray(plain.places)[:, 0] >= -1).all()
    other = {**hidden, "ids": np.where(inside, hidden["ids"], 5)}
    changed = compiled(state, other)
    np.testing.assert_allclose(changed.features, plain.features, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", FIRST, ids=str)
def test_gradients_are_finite_where_rows_are_padded(part):
    if needs_more(part.stack):
        return
    model = encoders.build(part.stack, N, train=True)
    hidden = TASK.hidden(model, encoders.batch(B, N), rng=jax.random.key(0), train=False)

    def loss(state):
        return jnp.sum(model.apply(state, hidden, rng=jax.random.key(1), train=True).logits ** 2)

    gradient = quick(jax.grad(loss))(encoders.weights(model))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("part", parts.identities(), ids=str)
def test_an_identity_is_the_dense_encoder(part):
    model = encoders.build(part.stack, N, train=True)
    state = encoders.weights(encoders.build(f"block*{model.program.depth}", N))
    spec = {"ids": ((N,), "int32")}
    settings = {"name": "encoder_lm", "size": "nano", "stack": f"block*{model.program.depth}"}
    dense = models.build(settings, spec=spec, num_outputs=encoders.VOCABULARY)
    fresh = encoders.weights(model)
    fresh = {**fresh, **state, **({"items": fresh["items"]} if "items" in fresh else {})}
    batch = {key: leaf for key, leaf in encoders.batch(B, N).items() if key in ("ids", "length")}
    # As in training: outside it, what a router decides alone need not be everything.
    found = quick(partial(model.apply, execution="unroll", train=True))(fresh, batch)
    wanted = quick(partial(dense.apply, execution="unroll"))(state, batch)
    inside = np.arange(N) < batch["length"][:, None]
    np.testing.assert_allclose(
        np.asarray(found.logits)[inside], np.asarray(wanted.logits)[inside], atol=1e-5, rtol=1e-5
    )
