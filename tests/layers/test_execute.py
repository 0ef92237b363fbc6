"""Blocks that are alike are traced once; nothing else changes."""

from __future__ import annotations

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import decoders
from tokenlab import models
from tokenlab.core.errors import ShapeError
from tokenlab.core.tokens import Tokens
from tokenlab.layers import execute
from tokenlab.layers.block import Block
from tokenlab.layers.context import Context
from tokenlab.sharding.constrain import recorded
from tokenlab.sharding.mesh import make_mesh

SPEC = {"image": ((8, 8, 1), "float32")}
ALIKE = "block*3 + keep(0.5) + block*2"  # 17 tokens, then 9


def build(stack: str):
    given = {"name": "vit", "size": "nano/2", "stack": stack, "drop_path": 0.3}
    return models.build(given, spec=SPEC, num_outputs=5, train=True)


@pytest.fixture
def traced(monkeypatch) -> list[int]:
    """The number of tokens of every block that Python goes through."""
    found, attend = [], Block.attend

    def counted(self, params, tokens, *given):
        found.append(tokens.count)
        return attend(self, params, tokens, *given)

    monkeypatch.setattr(Block, "attend", counted)
    return found


def forward(model, **how):
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    return lambda state: model.apply(
        state, {"image": images}, train=True, rng=jax.random.key(1), **how
    ).logits.sum()


@pytest.mark.parametrize("execution", ["unroll", "scan"])
def test_blocks_that_are_alike_are_traced_once(traced, execution):
    model = build(ALIKE)
    shapes = model.abstract_state()
    jax.eval_shape(jax.grad(forward(model, execution=execution)), shapes)
    assert sorted(traced) == [9, 17]
    jax.eval_shape(forward(model, execution=execution, remat="full"), shapes)  # and by all that run the model
    assert sorted(traced) == [9, 17]


def test_a_model_that_is_built_anew_is_traced_anew(traced):
    """Whoever edits a method builds the model again and must not meet the method as it was."""
    for count in (1, 2):
        model = build(ALIKE)
        jax.eval_shape(forward(model), model.abstract_state())
        assert sorted(traced) == [9] * count + [17] * count


def test_another_mesh_is_another_trace(traced):
    model = build("block*2")
    shapes = model.abstract_state()
    for sizes in ({"data": 2}, {"data": 4}):
        with jax.set_mesh(make_mesh(sizes, jax.devices()[: sizes["data"]])):
            jax.eval_shape(forward(model), shapes)
    assert traced == [17, 17]


def test_each_has_its_own_name_and_draws(traced):
    """Traced once, blocks are as different as their weights, their rates and their keys."""
    model = build("block*3")
    state = decoders.weights(model)  # a head of zeros would let no gradient through
    lowered = jax.jit(forward(model, execution="unroll")).lower(state).as_text(debug_info=True)
    assert traced == [17]
    # From JAX 0.12 on a call that was inlined stands in the path of its scopes.
    named = re.findall(r"block_(\d\d)/(?:jit\(compute\)/)?mlp", lowered)
    assert sorted(set(named)) == ["00", "01", "02"]
    expected, found = [], []
    for execution in ("scan", "unroll"):
        value, grads = jax.jit(jax.value_and_grad(forward(model, execution=execution)))(state)
        (found if expected else expected).extend([value, *jax.tree.leaves(grads)])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    kernel = np.asarray(jax.jit(jax.grad(forward(model)))(state)["blocks"]["mlp"]["up"]["kernel"])
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3  # each got the gradient of its own weights


def test_who_collects_what_is_constrained_sees_every_block(traced):
    model = build("block*3")
    shapes = model.abstract_state()
    with jax.set_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
        for _ in range(2):
            with recorded() as found:
                jax.eval_shape(forward(model, execution="unroll"), shapes)
            assert {each.scope.partition("/")[0] for each in found} >= {"block_00", "block_01", "block_02"}
    assert traced == [17] * 6


def test_without_jit_blocks_see_values_and_not_tracers():
    """What looks at its numbers where there are any still does: a layer that refuses an example of padding alone."""
    model = build("block + block(ffn=soft_moe(experts=4, slots=2))")
    state, count = decoders.weights(model), model.program.present
    valid = jnp.ones((3, count), bool).at[1].set(False)
    place = jnp.broadcast_to(jnp.arange(count), valid.shape)
    tokens = Tokens(jnp.ones((3, count, 16)), place, valid=valid, protected=1)
    with pytest.raises(ShapeError, match="example 1 is padding alone"):
        execute.run(model.program, state, tokens, Context(jax.random.key(1), train=True))


def test_a_model_that_has_run_can_be_pickled():
    model = build("block*2")
    jax.eval_shape(forward(model), model.abstract_state())
    again = pickle.loads(pickle.dumps(model.program))
    assert again.folded() == model.program.folded() and model.program.memory and not again.memory


def test_the_load_of_experts_is_recorded_by_block():
    layer = "block(ffn=tokens_choice(experts=4))"
    model = build(
        f"block + {layer} + skip(keep=0.5, by=norm)({layer}) + block(ffn=soft_moe(experts=2, slots=2))"
    )
    images = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    run = jax.jit(lambda state: model.apply(state, {"image": images}, record=True).loads)
    loads = run(decoders.weights(model))
    assert set(loads) == {"block_01", "block_02"}  # slots of soft_moe are filled alike
    for share in loads.values():
        assert share.shape == (4,) and float(share.sum()) == pytest.approx(1) and float(share.std()) > 0
