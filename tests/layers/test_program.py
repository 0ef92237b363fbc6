"""From text to program: numbers of blocks and items, tokens at every point, readings, loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tokenlab import models
from tokenlab.core.errors import StackError, TokenLabError
from tokenlab.layers.attention import cls_attention, mean_key
from tokenlab.layers.build_program import shapes_of
from tokenlab.layers.item import join_readings
from tokenlab.layers.program import BlockStep, ItemStep, Loop
from tokenlab.models import Names


def program(stack, **settings):
    spec = {"image": ((8, 8, 1), "float32")}
    return models.build({"size": "nano/2", "stack": stack, **settings}, spec=spec, num_outputs=5).program


def outline(steps):
    """A program in short: b3 a block on 3 tokens (b3! when it is read), names of items, [..]*n loops."""

    def one(step):
        match step:
            case Loop():
                return f"[{outline(step.body)}]*{step.times}"
            case BlockStep():
                return (
                    f"b{step.present}"
                    + ("!" if step.reads else "")
                    + (f"<{step.between.kind[1]}" if step.between else "")
                )
            case ItemStep():
                return step.kind[1] + (f"({outline(step.body)})" if step.body else "")

    return " ".join(one(step) for step in steps)


@pytest.mark.parametrize(
    ("stack", "folded"),
    [
        ("block*12", "[b17]*12"),
        ("block + block + block", "[b17]*3"),
        ("block*4 + keep(0.5, by=cls) + block*8", "[b17]*3 b17! keep [b9]*8"),
        ("block*4 + keep(0.5, by=norm) + block*8", "[b17]*4 keep [b9]*8"),
        ("block + skip(keep=0.5)(block)*10 + block", "b17 [skip(b9)]*10 b17"),
        ("block*2 + skip(keep=0.25)(block*20) + block*2", "[b17]*2 skip([b5]*20) [b17]*2"),
        ("(block + skip(keep=0.5)(block))*6", "[b17 skip(b9)]*6"),
        ("(block + skip(keep=0.5, by=cls)(block))*2", "[b17! skip(b9)]*2"),
        # A reading ties an item to the block before it, so an iteration begins with that block.
        ("block + (skip(keep=0.5, by=cls)(block) + block)*2", "[b17! skip(b9)]*2 b17"),
        ("(block*4 + skip(keep=0.5)(block*2))*3", "[[b17]*4 skip([b9]*2)]*3"),
        ("(block + merge(2))*3", "b17! merge b15! merge b13! merge"),
        ("block(between=merge(0))*4", "[b17<merge]*4"),
        ("block*3 + block(ffn=swiglu)*3", "[b17]*3 [b17]*3"),
    ],
)
def test_folding(stack, folded):
    assert outline(program(stack).folded()) == folded


def test_folding_takes_the_same_weights_in_the_same_order():
    """What loops and single steps use adds up to what there is."""
    for stack in (
        "(block*4 + skip(keep=0.5)(block*2))*3 + block",
        "block*2 + keep(0.5, by=learned) + block*3",
    ):
        built = program(stack)
        for steps in (built.steps, built.folded()):
            used = {}
            for step in steps:
                for kind, count in step.uses().items():
                    used[kind] = used.get(kind, 0) + count
            assert {k: n for k, n in used.items() if k[0] != "depth"} == {
                k: len(o) for k, o in built.kinds.items()
            }


def test_numbers():
    flat = program("block + skip(keep=0.5)(block + skip(keep=4)(block)) + keep(3) + block").flat()
    assert [step.name for step in flat] == [
        "block_00",
        "skip_00",
        "block_01",
        "skip_01",
        "block_02",
        "keep_00",
        "block_03",
    ]
    assert [step.present for step in flat] == [17, 17, 9, 9, 5, 17, 4]


def test_kinds_of_other_shapes_are_stacked_apart():
    built = program("block(ffn=mlp(hidden=8)) + block*2 + block(ffn=mlp(hidden=8)) + block(ffn=swiglu)")
    stacked = {kind: [o.index for o in found] for kind, found in built.kinds.items()}
    assert stacked["blocks", "mlp"] == [0, 3] and stacked["blocks", "mlp_2"] == [1, 2]
    assert stacked["blocks", "swiglu"] == [4] and stacked["blocks", "attention"] == [0, 1, 2, 3, 4]
    shapes = jax.eval_shape(built.init, jax.random.key(0))["blocks"]
    assert shapes["mlp"]["up"]["kernel"].shape == (2, 16, 8)
    assert shapes["mlp_2"]["up"]["kernel"].shape == (2, 16, 32)


def test_items_have_weights_of_their_own():
    built = program("block + keep(0.5, by=learned) + block + keep(0.5, by=learned) + block")
    state = jax.jit(built.init)(jax.random.key(0))
    kernel = state["items"]["keep"]["score"]["kernel"]
    assert kernel.shape == (2, 16) and (kernel[0] != kernel[1]).any()
    first = jax.jit(program("block + keep(0.9, by=learned) + block").init)(jax.random.key(0))
    assert jnp.array_equal(first["items"]["keep"]["score"]["kernel"][0], kernel[0])


def test_items_without_weights_do_not_number_those_with():
    """A keep that learns nothing, put before one that learns, leaves the latter's weights where they were."""
    alone = program("block + keep(0.5, by=learned) + block")
    behind = program("keep(0.9, by=norm) + block + keep(0.5, by=learned) + block")
    shapes = [jax.eval_shape(p.init, jax.random.key(0))["items"] for p in (alone, behind)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    assert list(shapes[1]) == ["keep"]
    assert [s.name for s in behind.flat() if isinstance(s, ItemStep)] == ["keep_00", "keep_01"]


def test_one_name_for_two_readings_is_an_error():
    wanted = {"mean_key": mean_key}
    with pytest.raises(TokenLabError, match="stands for two functions"):
        join_readings(wanted, {"mean_key": cls_attention})


def test_every_item_can_be_train_only():
    spec = {"image": ((8, 8, 1), "float32")}
    settings = {"size": "nano/2", "stack": "block + evit(0.5, train_only=True) + block"}
    assert models.build(settings, spec=spec, num_outputs=5, train=False).program.after == 17
    assert models.build(settings, spec=spec, num_outputs=5).program.after == 10


def test_deep_stacks_are_built_quickly_and_small():
    """2,000 steps are worked out without tracing each one, and fold into one loop."""
    built = program("block*2000")
    assert built.depth == 2000 and outline(built.folded()) == "[b17]*2000"


@pytest.mark.parametrize(
    "stack",
    [
        "skip(keep=0.5)(block + evit(0.8))",
        "skip(keep=0.5)(block(between=evit(0.8)))",
        "block + skipvit(0.5)(block + evit(0.8))",
        "random_ltd(0.5, protect=True)(block + evit(0.8))",
        "block + token_dropping(keep=0.5, by=norm)(block*2 + evit(0.8))",
        "mod(keep=0.5)(block + evit(0.8))",
        "videollm_mod(keep=0.5, frames=4)(block + evit(0.8))",
    ],
)
def test_a_body_that_puts_tokens_into_other_places_is_refused(stack):
    """CLS and 8 patches in, CLS, 7 of them and one for the eighth out: as many, and no longer in order."""
    with pytest.raises(
        StackError, match=r"evit gives as many tokens as it takes, 9, in other places"
    ) as error:
        program(stack + " + block")
    name = stack.removeprefix("block + ").partition("(")[0]
    assert f"move evit out of {name}" in str(error.value)


def test_where_nothing_is_put_back_by_place_an_item_may_move_tokens():
    program("block(between=evit(0.93)) + block")  # 16 patches become 15 and one more
    program("skip(keep=0.5)(block + evit(1.0))")  # nothing is dropped
    spec = {"image": ((8, 8, 1), "float32")}
    settings = {"size": "nano/2", "stack": "random_ltd(1.0, protect=True)(block + evit(0.93)) + block"}
    models.build(settings, spec=spec, num_outputs=5, train=False)  # random_ltd is not there
    with pytest.raises(StackError, match="evit gives as many tokens"):
        models.build(settings, spec=spec, num_outputs=5)


def test_weights_that_depend_on_the_count_of_tokens_are_of_a_kind_each():
    """Soft MoE has a slot a token or so: behind keep it has fewer, and weights of another shape."""
    found = program("block(ffn=soft_moe(experts=4)) + keep(0.5) + block(ffn=soft_moe(experts=4))")
    shapes = jax.eval_shape(found.init, jax.random.key(0))["blocks"]
    assert shapes["soft_moe"]["router"]["mu"].shape == (1, 16, 4, 4)
    assert shapes["soft_moe_2"]["router"]["mu"].shape == (1, 16, 4, 2)
    assert shapes["attention"]["out"]["kernel"].shape[0] == 2


def test_a_part_is_traced_once_whatever_stacks_it_stands_in(monkeypatch):
    """A comparison and these tests build hundreds of programs."""
    shapes_of.cache_clear()
    program("block*2 + merge(2) + block*2")
    traced = shapes_of.cache_info().misses
    program("block + skip(keep=0.5)(block)*3 + block + merge(2)")
    assert shapes_of.cache_info().misses == traced + 1  # skip
    looked, found = [], Names.item
    monkeypatch.setattr(Names, "item", lambda self, name: looked.append(name) or found(self, name))
    program("block + (skip(keep=0.5)(block) + keep(0.9))*4")
    assert looked == ["skip", "keep"]
