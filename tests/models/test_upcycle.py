"""Upcycling: experts begin as copies of the dense layer of their block, and what does not fit is told."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tokenlab import models, train
from tokenlab.core.errors import CheckpointError, ConfigError
from tokenlab.models.state import flat
from tokenlab.models.upcycle import upcycle
from tokenlab.train import initialize
from tokenlab.train.checkpoint import Checkpoints
from tokenlab.train.config import InitFrom, default_config
from tokenlab.train.records import write_json

SPEC = {"image": ((8, 8, 1), "float32")}
LAYERS = (
    "soft_moe(experts=4, slots=2)",
    "tokens_choice(experts=3)",
    "experts_choice(experts=2)",
    "dropless(experts=3, shared=1)",
    "grin(experts=3)",
)


def model(stack, **settings):
    given = {"name": "vit", "size": "nano/2", "stack": stack, **settings}
    return models.build(given, spec=SPEC, num_outputs=5)


@pytest.fixture(scope="module")
def dense():
    return jax.tree.map(np.asarray, jax.jit(model("block*3").init)(jax.random.key(0)))


@pytest.mark.parametrize("layer", LAYERS)
def test_experts_are_copies_of_their_own_block(dense, layer):
    name = layer.partition("(")[0]
    target = model(f"block(ffn={layer}) + block + block(ffn={layer})")
    shapes = target.abstract_state()
    made, fresh = upcycle(dense, target.program, shapes)
    for path, leaf in flat(dense["blocks"]["mlp"]).items():
        for place, block in enumerate((0, 2)):
            for expert in made[f"blocks/{name}/experts/{path}"][place]:
                np.testing.assert_array_equal(expert, leaf[block])
        np.testing.assert_array_equal(made[f"blocks/mlp/{path}"], leaf[1:2])
    assert {path for path in fresh if "/router" in path}
    assert {*made, *fresh} == set(flat(shapes))
    np.testing.assert_array_equal(
        made["blocks/attention/out/kernel"], dense["blocks"]["attention"]["out"]["kernel"]
    )


def test_noise_parts_the_copies(dense):
    target = model("block*2 + block(ffn=tokens_choice(experts=4))")
    shapes = target.abstract_state()
    plain, _ = upcycle(dense, target.program, shapes)
    noisy, _ = upcycle(dense, target.program, shapes, noise=0.1)
    path = "blocks/tokens_choice/experts/up/kernel"
    difference = noisy[path] - plain[path]
    assert difference.std() == pytest.approx(0.1 * plain[path].std(), rel=0.1)
    assert np.abs(np.corrcoef(difference[0].reshape(4, -1))[0, 1:]).max() < 0.2
    np.testing.assert_array_equal(noisy["blocks/mlp/up/kernel"], plain["blocks/mlp/up/kernel"])


@pytest.mark.parametrize("noise", [-0.1, np.nan, np.inf])
def test_noise_that_is_none(dense, noise):
    target = model("block*2 + block(ffn=tokens_choice(experts=4))")
    with pytest.raises(CheckpointError, match="noise must be a number at least 0; got"):
        upcycle(dense, target.program, target.abstract_state(), noise=noise)


def test_what_does_not_fit_is_told(dense):
    def of(stack):
        target = model(stack)
        return upcycle(dense, target.program, target.abstract_state(), source="the checkpoint in a")

    with pytest.raises(CheckpointError, match=r"the stack 'block\*3' has no experts"):
        of("block*3")
    with pytest.raises(
        CheckpointError, match=r"the checkpoint in a has no layer like that.*expert=mlp\(hidden"
    ):
        of("block*2 + block(ffn=soft_moe(experts=2, expert=mlp(hidden=7)))")
    with pytest.raises(CheckpointError, match="has no layer like that in block 3"):
        of("block*3 + block(ffn=soft_moe(experts=2))")


def test_settings_that_contradict():
    config = default_config()
    config.init_from.upcycle = True
    with pytest.raises(ConfigError, match=r"init_from.upcycle.*unless path is set"):
        train.run(config, "/nowhere")
    config.init_from.update(upcycle=False, path="a", upcycle_noise=0.1)
    with pytest.raises(ConfigError, match="upcycle_noise"):
        train.run(config, "/nowhere")


def short(steps, stack):
    config = default_config()
    config.update(steps=steps, batch_size=64, log_every=steps, eval_every=steps, checkpoint_every=steps)
    config.model.update(size="nano/2", stack=stack)
    return config


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dense") / "run"
    train.run(short(150, "block*2"), workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS[:2])
def test_from_a_dense_run_to_one_with_experts(dense_run, tmp_path, layer):
    """End to end: after as many steps the upcycled run is ahead of one from scratch."""
    config = short(20, f"block + block(ffn={layer})")
    fresh = train.run(config, tmp_path / "fresh")
    config.init_from.update(path=str(dense_run), upcycle=True, upcycle_noise=0.01)
    found = train.run(config, tmp_path / "upcycled")
    assert found["validation"]["loss"] < fresh["validation"]["loss"] - 0.2


LM = {"ids": ((12,), "int32"), "modality": ((12,), "int32")}


def decoder(stack):
    return models.build({"name": "decoder_lm", "size": "nano", "stack": stack}, spec=LM, num_outputs=9)


@pytest.mark.parametrize("start", ["block*2", "block(ffn=moma(text=1, image=1))*2"])
def test_experts_of_a_modality_are_copies_of_its_one(start):
    """Or of the dense layer, where the model did not tell modalities apart."""
    source, target = decoder(start), decoder("block(ffn=moma(text=4, image=2))*2")
    state = jax.tree.map(np.asarray, jax.jit(source.init)(jax.random.key(0)))
    shapes = target.abstract_state()
    made, fresh = upcycle(state, target.program, shapes)
    assert {*made, *fresh} == set(flat(shapes))
    assert fresh and all("/router_" in path or "/auxiliary_" in path for path in fresh)
    blocks = state["blocks"]
    for name, count in (("text", 4), ("image", 2)):
        for part in ("gate", "up", "down"):
            found = made[f"blocks/moma/experts_{name}/{part}/kernel"]
            old = (
                blocks["moma"][f"experts_{name}"][part]["kernel"]
                if "moma" in blocks
                else blocks["swiglu"][part]["kernel"][:, None]
            )
            np.testing.assert_array_equal(found, np.repeat(old, count, axis=1))


def test_an_upcycled_layer_begins_as_its_seed_times_the_score():
    """Routers of zeros score one half everywhere; with as many places as tokens all experts take all."""
    stack = "block(ffn=moma(text={0}, image={0}, slack=2.0{1}))*2"
    source, target = decoder(stack.format(1, "")), decoder(stack.format(2, ", capacity=2.0"))
    state = jax.tree.map(np.asarray, jax.jit(source.init)(jax.random.key(0)))
    made, _ = upcycle(state, target.program, target.abstract_state())
    seed, layer = source.program.flat()[0].block.ffn, target.program.flat()[0].block.ffn
    x = jax.random.normal(jax.random.key(1), (2, 12, 16))
    ids = np.arange(24).reshape(2, 12) % 2
    params = {
        f"experts_{name}": {
            part: {"kernel": made[f"blocks/moma/experts_{name}/{part}/kernel"][0]}
            for part in ("gate", "up", "down")
        }
        for name in ("text", "image")
    }
    routers = {
        f"{kind}_{name}{end}": np.zeros(shape, np.float32)
        for name in ("text", "image")
        for kind, end, shape in (
            ("router", "", (16, 2)),
            ("auxiliary", "_in", (16, 8)),
            ("auxiliary", "_out", (8, 2)),
        )
    }
    one = jax.tree.map(lambda leaf: leaf[0], state["blocks"]["moma"])
    wanted, _ = seed.apply({"params": one}, x, modality=jax.numpy.asarray(ids), train=True)
    found, _ = layer.apply({"params": {**params, **routers}}, x, modality=jax.numpy.asarray(ids), train=True)
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # two experts at one half each


def test_more_experts_than_one_are_no_seed():
    source, target = (
        decoder("block(ffn=moma(text=2, image=1))*2"),
        decoder("block(ffn=moma(text=4, image=2))*2"),
    )
    state = jax.tree.map(np.asarray, jax.jit(source.init)(jax.random.key(0)))
    with pytest.raises(CheckpointError, match="no layer like that in block 0"):
        upcycle(state, target.program, target.abstract_state())


ONE, MANY = "block(ffn=moma(text=1, image=1))", "block(ffn=moma(text=4, image=2))"


@pytest.mark.parametrize(
    ("start", "stack", "wanted"),
    [
        # From where the first expert of text of each block of experts comes: (kind, row).
        (f"block + {ONE}", f"block + {MANY}", {1: ("moma", 0)}),
        (f"{ONE}*3", f"{ONE} + {MANY} + {ONE}", {0: ("moma", 0), 1: ("moma", 1), 2: ("moma", 2)}),
        (f"{ONE} + block", f"{MANY}*2", {0: ("moma", 0), 1: ("swiglu", 0)}),
        (f"block + {ONE} + block", f"block + {MANY}*2", {1: ("moma", 0), 2: ("swiglu", 1)}),
    ],
)
def test_experts_come_from_their_own_block_wherever_it_stood(start, stack, wanted):
    """As many blocks of a kind are not the same blocks."""
    source, target = decoder(start), decoder(stack)
    state = jax.tree.map(np.asarray, jax.jit(source.init)(jax.random.key(0)))
    shapes = target.abstract_state()
    made, fresh = upcycle(state, target.program, shapes, origin=source.program)
    assert {*made, *fresh} == set(flat(shapes))
    blocks, found = state["blocks"], {}
    for (_, kind), occurrences in target.program.kinds.items():
        if not kind.startswith("moma"):
            continue
        for row, each in enumerate(occurrences):
            found[each.index] = made[f"blocks/{kind}/experts_text/up/kernel"][row]
    assert found.keys() == wanted.keys()
    for block, (kind, row) in wanted.items():
        one = blocks[kind]["experts_text"]["up"]["kernel"][row][0] if kind == "moma" else None
        one = blocks[kind]["up"]["kernel"][row] if one is None else one
        for expert in found[block]:
            np.testing.assert_array_equal(expert, one)
    for path in made:
        if path.startswith("blocks/swiglu/"):  # what stays dense is of block 0
            old = blocks["swiglu"][path.split("/")[2]]["kernel"]
            np.testing.assert_array_equal(made[path], old[:1])


def test_layers_that_stood_in_other_blocks_are_told():
    """The same counts in another order; where the stack of the weights is not known, also in the same."""
    source = decoder(f"{ONE} + block")
    state = jax.tree.map(np.asarray, jax.jit(source.init)(jax.random.key(0)))
    target = decoder(f"{ONE} + block(ffn=moma(text=4, image=2))").program, decoder(f"block + {MANY}")
    with pytest.raises(CheckpointError, match=r"block 0 of the stack has swiglu, and .* has it in block 1: "):
        upcycle(state, target[1].program, target[1].abstract_state(), origin=source.program)
    same = decoder(f"{MANY} + block")
    upcycle(state, same.program, same.abstract_state(), origin=source.program)
    with pytest.raises(CheckpointError, match="has no layer like that in block 0"):
        upcycle(state, same.program, same.abstract_state())


def test_a_run_says_in_which_blocks_its_layers_stood(tmp_path):
    source, target = decoder(f"block + {ONE}"), decoder(f"block + {MANY}")
    state = jax.jit(source.init)(jax.random.key(0))
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(5, {"params": state, "ema": None}, {"ema": False}, wait=True)
    start = InitFrom(str(tmp_path), upcycle=True)
    with pytest.raises(CheckpointError, match="layer like that in block 1"):
        initialize.load(start, target.abstract_state(), target)
    write_json(tmp_path / "run.json", {"stack": source.stack_text})
    loaded = initialize.load(start, target.abstract_state(), target)
    old = np.asarray(state["blocks"]["moma"]["experts_image"]["up"]["kernel"])
    np.testing.assert_array_equal(loaded["blocks/moma/experts_image/up/kernel"], np.repeat(old, 2, axis=1))
    write_json(tmp_path / "run.json", {"stack": "block + gone(3)"})
    with pytest.raises(CheckpointError, match=r"was trained as 'block \+ gone\(3\)', which does not fit"):
        initialize.load(start, target.abstract_state(), target)
