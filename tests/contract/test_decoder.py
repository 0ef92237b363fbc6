"""The contract in a decoder language model: what says that it is causal is, and generates what a prompt would give.

Parts are found as everywhere here and tried in the stacks they give as examples. One that says it looks ahead, or reads
a CLS token, must be refused by the model, and for no other reason may it be.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parts
import pytest

from tests import decoders
from tokenlab.core.errors import StackError

N, P, SHORT, B = 16, 8, 3, 8
FOUND = parts.find()
# What further examples of a part add is tried in the slow tests.
NAMES = [(part.role, part.name) for part in FOUND]
each_part = pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=pytest.mark.slow if key in NAMES[:at] else ())
        for at, (part, key) in enumerate(zip(FOUND, NAMES, strict=True))
    ],
    ids=str,
)


@functools.cache
def refused(stack):
    """What the model says against the stack, "" for nothing."""
    try:
        decoders.build(stack, N)
        decoders.build(stack, N, train=True)
    except StackError as error:
        return str(error)
    return ""


@functools.cache
def ready(stack):
    """The model at evaluation, and weights."""
    model = decoders.build(stack, N)
    return model, decoders.weights(model)


def declared(stack):
    """What the parts of a stack say of themselves: (causal, fit for a model without CLS, run step by step)."""
    steps = parts.build(stack).program.flat()
    items = [step.item for step in steps if hasattr(step, "item")]
    layers = [step.block.ffn for step in steps if hasattr(step, "block")]
    causal = all(each.causal for each in items) and all(getattr(each, "causal", True) for each in layers)
    causal &= not any(step.apart for step in steps if hasattr(step, "block"))
    fit = not any(part.needs_cls for item in items for part in (item, *item.scores()))
    return causal, fit, all(item.generates for item in items)


@each_part
def test_a_decoder_takes_what_is_causal_and_refuses_the_rest(part):
    causal, fit, _ = declared(part.stack)
    why = refused(part.stack)
    assert bool(why) == (not causal or not fit)
    assert not why or ("CLS token" in why if not fit else "in a language model" in why)


@each_part
def test_what_is_causal_lets_no_future_token_change_an_earlier_logit(part):
    """At evaluation, up to rounding; the tokens that changed do change their own."""
    if refused(part.stack):
        return
    model, state = ready(part.stack)
    ids = decoders.ids(B, N)
    run = jax.jit(lambda s, i: (o := model.apply(s, {"ids": i}), (o.logits, o.places))[1])
    for at in (N // 4, N // 2, N - 1):
        (plain, places), (other, too) = (
            run(state, ids),
            run(state, ids.at[:, at:].set((ids[:, at:] + 5) % 37)),
        )
        before = np.asarray(places) < at
        np.testing.assert_array_equal(np.where(before, places, -1), np.where(too < at, too, -1))
        np.testing.assert_allclose(np.asarray(other)[before], np.asarray(plain)[before], atol=1e-5)
        assert before.any() and ((np.asarray(other) != plain).any(-1) & ~before).any()


@each_part
def test_what_generates_gives_step_by_step_what_a_prompt_gives(part):
    """A prompt of 8 at once, and one of 3 with five steps behind it; what prunes prompts is left out."""
    if refused(part.stack) or not declared(part.stack)[2]:
        return
    model, state = ready(part.stack)
    functions = model.generation(P, N - P)
    if functions.program.after < functions.program.present:
        return

    def both(state, ids):
        weights = functions.prepare(state)
        whole, _ = functions.prefill(weights, ids, jnp.full((B,), P))
        _, memory = functions.prefill(weights, ids, jnp.full((B,), SHORT))

        def step(memory, token):
            logits, memory = functions.step(weights, token, memory)
            return memory, logits

        _, each = jax.lax.scan(step, memory, ids[:, SHORT:].T)
        return whole, each[-1]

    whole, last = jax.jit(both)(state, decoders.ids(B, P))
    np.testing.assert_allclose(last, whole, atol=1e-5, rtol=1e-5)


def test_something_was_tried():
    """Methods that must be among those that are taken, so that the tests above hold something."""
    tried = {part.name: part.stack for part in reversed(FOUND)}  # the first stack of each
    for name in ("mod", "random", "mlp", "swiglu", "dropless", "grin"):
        assert not refused(tried[name]), name
        assert declared(tried[name])[2] or name == "random"
