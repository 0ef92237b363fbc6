"""Jumbo: what must hold of it whatever the numbers, its published sizes, its weights that all blocks share."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import decoders
from tokenlab import models, tasks
from tokenlab.core import config as configs
from tokenlab.core.errors import CheckpointError, ConfigError, ShapeError, StackError
from tokenlab.cost import count
from tokenlab.evaluate.attention_map import attention_map
from tokenlab.layers.attention import Attention
from tokenlab.layers.execute import stacks_of
from tokenlab.layers.norm import LayerNorm
from tokenlab.layers.program import DEPTH
from tokenlab.methods.tokens.jumbo import JumboBlock, JumboMLP
from tokenlab.models.state import fit_state
from tokenlab.ops.pieces import join_pieces, split_pieces
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import shardings
from tokenlab.train.costs import active_parameters, cost_table

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
KEY = jax.random.key(1)
J, D, N, B = 4, 16, 16, 8
STACK = "block(special=jumbo)*3"
IMAGES = jax.random.normal(jax.random.key(2), (B, 8, 8, 1))
COTANGENT = jax.random.normal(jax.random.key(3), (B, 5))
SPEC = {"image": ((8, 8, 1), "float32")}


def build(stack=STACK, train=True, **settings):
    settings = {"size": "nano/2", "registers": J, "head": "special", "norm_eps": 1e-5, **settings}
    return models.build({"stack": stack, **settings}, spec=SPEC, num_outputs=5, train=train)


def redrawn(model):
    """Weights without a zero or a one that could hide a mistake."""
    draws = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * draws.standard_normal(leaf.shape, np.float32)), model.abstract_state()
    )


@functools.cache
def weights(stack=STACK):
    return redrawn(build(stack))


def logits(model, state, images=IMAGES, **how):
    return jax.jit(lambda s, i: model.apply(s, {"image": i}, **how).logits)(state, images)


def gradients(model, state, **how):
    def total(state):
        out = model.apply(state, {"image": IMAGES}, **how).logits
        return jnp.sum(out * COTANGENT), out

    return jax.jit(jax.value_and_grad(total, has_aux=True))(state)


# ------------------------------------------------------------------------------------------------ what must hold


def test_pieces_joined_and_split_are_what_they_were():
    pieces = jnp.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    wide = join_pieces(pieces)
    np.testing.assert_array_equal(wide[0], np.arange(15.0))  # the features of piece 0 first
    np.testing.assert_array_equal(split_pieces(wide, 3), pieces)
    with pytest.raises(ShapeError, match="expected pieces"):
        join_pieces(wide)
    with pytest.raises(ShapeError, match="cannot be cut into 4 pieces"):
        split_pieces(wide, 4)


def test_one_piece_with_the_weights_of_the_mlp_is_the_class_token():
    stack = "block(special=jumbo(mult=2, shared=False))*3"
    own = {"registers": 0, "head": "cls"}
    plain, wide = build("block*3", **own), build(stack, **own)
    state = redrawn(plain)
    blocks = {**state["blocks"], "jumbo": state["blocks"]["mlp"], "jumbo_norm": state["blocks"]["ffn_norm"]}
    found = logits(wide, {**state, "blocks": blocks})
    np.testing.assert_array_equal(found, logits(plain, state))


def test_permuted_pieces_with_permuted_weights_change_nothing():
    state, order = weights(), np.array([2, 0, 3, 1])

    def moved(leaf, axis):
        """The J groups of D entries along an axis in another order; what is behind them stays."""
        leaf = np.moveaxis(np.asarray(leaf), axis, 0)
        first = leaf[: J * D].reshape(J, D, *leaf.shape[1:])[order].reshape(J * D, *leaf.shape[1:])
        return jnp.asarray(np.moveaxis(np.concatenate([first, leaf[J * D :]]), 0, axis))

    up, down = (state["shared"]["jumbo"][name] for name in ("up", "down"))
    norm, classifier = state["blocks"]["jumbo_norm"], state["head"]["classifier"]
    other = {
        "embed": {**state["embed"], "registers": state["embed"]["registers"][order]},
        "blocks": {**state["blocks"], "jumbo_norm": {name: moved(leaf, 1) for name, leaf in norm.items()}},
        "shared": {
            "jumbo": {
                "up": {**up, "kernel": moved(up["kernel"], 0)},
                "down": {"kernel": moved(down["kernel"], 1), "bias": moved(down["bias"], 0)},
            }
        },
        "head": {**state["head"], "classifier": {**classifier, "kernel": moved(classifier["kernel"], 0)}},
    }
    plain = logits(build(), state)
    np.testing.assert_allclose(logits(build(), other), plain, atol=1e-5)
    other["embed"]["registers"] = state["embed"]["registers"]
    assert np.abs(logits(build(), other) - plain).max() > 1e-3


def test_patches_permuted_with_their_positions_change_nothing():
    state, order = weights(), np.random.default_rng(0).permutation(N)
    patches = np.asarray(IMAGES).reshape(B, 4, 2, 4, 2).swapaxes(2, 3).reshape(B, N, 4)[:, order]
    images = patches.reshape(B, 4, 4, 2, 2).swapaxes(2, 3).reshape(B, 8, 8, 1)
    embed = {**state["embed"], "position": state["embed"]["position"][order]}
    found = logits(build(), {**state, "embed": embed}, jnp.asarray(images))
    np.testing.assert_allclose(found, logits(build(), state), atol=1e-5)


def test_keeping_all_patches_is_no_dropping_and_pieces_are_always_kept():
    whole = build(f"keep(1.0, by=random) + {STACK}")
    np.testing.assert_array_equal(logits(whole, weights()), logits(build(), weights()))
    model = build(f"keep(0.5, by=random) + {STACK}")
    assert model.program.after == J + N // 2
    _, [(_, position)] = recorded(model, weights())
    position = np.asarray(position)
    np.testing.assert_array_equal(position[:, :J], np.broadcast_to(np.arange(J), (B, J)))
    assert (np.diff(position, axis=1) > 0).all()


def test_without_an_output_layer_the_pieces_move_by_attention_alone():
    pieces, patches = (jax.random.normal(jax.random.key(n), (2, n, 12)) for n in (3, 7))
    block = JumboBlock(num_heads=3)
    own = block.init(KEY, pieces, patches, jnp.zeros_like)["params"]
    found, _ = block.apply({"params": own}, pieces, patches, jnp.zeros_like)
    x = jnp.concatenate([pieces, patches], axis=1)
    normed = LayerNorm(eps=1e-5).apply({"params": own["attention_norm"]}, x)
    mixed = Attention(3).apply({"params": own["attention"]}, normed)
    np.testing.assert_allclose(found, pieces + mixed[:, :3], atol=1e-6)


def test_at_the_start_every_logit_is_the_bias():
    model = build(head_bias=-math.log(5), kernel_std=0.02)
    state = jax.jit(model.init)(KEY)
    np.testing.assert_array_equal(logits(model, state), np.float32(-math.log(5)))
    kernels = [state["shared"]["jumbo"]["up"]["kernel"], state["blocks"]["attention"]["query"]["kernel"]]
    for kernel in kernels:
        assert abs(float(jnp.std(kernel)) / 0.0176 - 1) < 0.1  # of 0.02, cut off at two
    assert float(jnp.std(kernels[1][0] - kernels[1][1])) > 0.02  # every block draws its own
    np.testing.assert_array_equal(state["shared"]["jumbo"]["up"]["bias"], 0.0)


# ------------------------------------------------------------------------------------------------ shared weights


def test_the_gradient_of_the_shared_copy_is_the_sum_over_the_blocks():
    apart = build("block(special=jumbo(shared=False))*3")
    shared = weights()["shared"]["jumbo"]
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), shared)
    own = {name: tree for name, tree in weights().items() if name != "shared"}
    own["blocks"] = {**own["blocks"], "jumbo": copies}
    (_, out), grads = gradients(build(), weights())
    (_, out_apart), grads_apart = gradients(apart, own)
    np.testing.assert_array_equal(out, out_apart)
    summed = jax.tree.map(lambda leaf: leaf.sum(axis=0), grads_apart["blocks"]["jumbo"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()),
        grads["shared"]["jumbo"],
        summed,
    )


def test_scanned_unrolled_and_rematerialised_are_the_same():
    """In training, with drop path, the copy closed over by the loop."""
    model = build(drop_path=0.3, drop_path_rates="constant")
    how = {"train": True, "rng": KEY}
    (_, plain), grads = gradients(model, weights(), execution="unroll", **how)
    for more in ({"execution": "scan"}, {"execution": "scan", "remat": "full"}):
        (_, out), other = gradients(model, weights(), **how, **more)
        np.testing.assert_array_equal(out, plain)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, np.abs(b).max()))


def test_a_copy_depends_on_its_name_alone_and_another_shape_is_another_copy():
    made = [jax.jit(build(stack).program.init)(KEY) for stack in (STACK, f"block*2 + {STACK}")]
    jax.tree.map(np.testing.assert_array_equal, made[0]["shared"], made[1]["shared"])
    two = build(
        "block(special=jumbo) + block(special=jumbo(mult=2))*2 + block(special=jumbo)"
    ).abstract_state()
    assert two["shared"]["jumbo"]["up"]["kernel"].shape == (J * D, 4 * J * D)
    assert two["shared"]["jumbo_2"]["up"]["kernel"].shape == (J * D, 2 * J * D)
    assert two["blocks"]["jumbo_norm"]["scale"].shape == (4, J * D)


def test_the_weights_of_another_run():
    dense = build("block*3").abstract_state()
    with pytest.raises(
        CheckpointError, match=r"jumbo.* does not have it.*fresh=\('(blocks/jumbo_norm|shared/jumbo)',\)"
    ):
        fit_state(dense, build().abstract_state(), left_out=False)
    fresh = ("blocks/jumbo_norm", "shared/jumbo")
    leaves, _ = fit_state(dense, build().abstract_state(), fresh, left_out=False)
    assert "blocks/mlp/up/kernel" in leaves and not any("jumbo" in path for path in leaves)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"data": 8}, marks=pytest.mark.slow)],
    ids=str,
)
def test_sharded_equals_one_device(sizes):
    model = build()
    (_, plain), grads = gradients(model, weights())
    mesh = make_mesh(sizes, jax.devices())
    places = shardings(weights(), model.logical_axes(), mesh)
    wide = places["shared"]["jumbo"]
    if "tensor" in sizes:
        assert wide["up"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
        assert wide["down"]["kernel"].spec == PartitionSpec("tensor", "fsdp")
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))

    def total(state, images):
        out = model.apply(state, {"image": images}).logits
        return jnp.sum(out * COTANGENT), out

    with jax.set_mesh(mesh):
        state, images = jax.device_put(weights(), places), jax.device_put(IMAGES, rows)
        step = jax.jit(jax.value_and_grad(total, has_aux=True), out_shardings=(None, places))
        (_, out), other = step(state, images)
    np.testing.assert_allclose(out, plain, atol=1e-5, rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(other), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(
            a, b, atol=1e-5 * max(1.0, np.abs(b).max()), err_msg=jax.tree_util.keystr(path)
        )


# ------------------------------------------------------------------------------------------------ what it costs

PUBLISHED = {
    # name: pieces, width, parameters of the wide MLP, of all (millions), GFLOPs of the blocks at 224 px
    "pico": (6, 96, 2.66, 4.78, 0.78),
    "nano": (6, 128, 4.72, 8.14, 1.30),
    "tiny": (6, 192, 10.6, 17.5, 2.73),
    "small": (6, 384, 42.5, 66.9, 10.2),
    "base": (3, 768, 42.5, 131.4, 35.9),
}


def published(words, **changes):
    config = configs.load(f"{CONFIGS / 'jumbo.py'}:{words}")
    kept = {"kept": 0.1} if "drop" in words else None
    spec = {"image": ((224, 224, 3), "float32"), "label": ((), "int32")}
    return models.build(
        {**config.model.to_dict(), **changes}, spec=spec, num_outputs=1000, stack_vars=kept, train=bool(kept)
    )


def forward(model):
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    return count(
        lambda s, i: model.apply(s, {"image": i}, execution="scan").logits, model.abstract_state(), image
    )


def formula(pieces, patches, width):
    """FLOPs of a block: projections and maps of all, the MLP of the patches, that of the wide token."""
    tokens = pieces + patches
    attention = 8 * tokens * width**2 + 4 * tokens**2 * width
    return attention + 16 * patches * width**2 + 16 * pieces**2 * width**2


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    pieces, width, of_mlp, of_all, gflops = PUBLISHED[size]
    model = published(size)
    state = model.abstract_state()
    millions = [sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6 for tree in (state["shared"], state)]
    np.testing.assert_allclose(millions, [of_mlp, of_all], rtol=5e-3)
    blocks = 12 * formula(pieces, 196, width)
    assert abs(blocks / 1e9 / gflops - 1) < 0.02
    ends = 2 * 196 * 768 * width + 2 * (pieces + 1) * width * 1000  # the embedding and the head
    assert forward(model).flops == blocks + ends


def test_token_dropping_and_the_baseline_cost_what_they_should():
    dropped = published("nano,drop")
    assert dropped.program.after == 6 + 20
    assert forward(dropped).flops == 12 * formula(6, 20, 128) + 2 * 196 * 768 * 128 + 2 * 7 * 128 * 1000
    baseline = published("nano,registers")
    tokens = 1 + 16 + 196
    blocks = 12 * (24 * tokens * 128**2 + 4 * tokens**2 * 128)
    assert forward(baseline).flops == blocks + 2 * 196 * 768 * 128 + 2 * 128 * 1000


def test_the_cost_table_has_a_row_for_what_is_shared():
    table = cost_table(build(), tasks.build({"name": "classify"}), {**SPEC, "label": ((), "int32")})
    rows = {row.name: row for row in table.rows}
    wide = 8 * J * J * D * D + 5 * J * D
    assert rows["shared/jumbo"].parameters == wide and rows["shared/jumbo"].forward_flops == 0
    assert rows["block_01"].forward_by_kind["jumbo"] == 16 * J * J * D * D
    total = sum(leaf.size for leaf in jax.tree.leaves(build().abstract_state()))
    assert table.total.parameters == total


# ------------------------------------------------------------------------------------------------ beside others


def recorded(model, state):
    """The logits in training, and at every reduction who carries which token and where the tokens stand."""

    def run(state):
        out = model.apply(state, {"image": IMAGES}, train=True, rng=KEY, record=True)
        return out.logits, [(point.tokens.owner, point.tokens.position) for point in out.trace]

    return jax.jit(run)(state)


@pytest.mark.parametrize(
    "stack",
    [
        pytest.param("block(special=jumbo, ffn=soft_moe(experts=4, capacity=1.0))*2", marks=pytest.mark.slow),
        pytest.param("block(special=jumbo, between=tome(2))*2 + block", marks=pytest.mark.slow),
        "skip(keep=0.5)(block(special=jumbo)) + videollm_mod(keep=0.5, frames=1, on=ffn)(block(special=jumbo))",
    ],
)
def test_beside_other_parts(stack):
    model = build(stack, layer_scale=0.1)
    out, points = recorded(model, redrawn(model))
    assert np.isfinite(out).all()
    for owner, _ in points:
        np.testing.assert_array_equal(owner[:, :J], np.broadcast_to(np.arange(J), (B, J)))


def test_experts_see_the_patches_alone():
    """As many slots as there are patches, not tokens; a token's share is counted so, too."""
    model = build("block(special=jumbo, ffn=soft_moe(experts=4, capacity=1.0))*2")
    assert model.abstract_state()["blocks"]["soft_moe"]["router"]["mu"].shape == (2, D, 4, N // 4)
    model = build("block(special=jumbo, ffn=soft_moe(experts=4, slots=4))*2")
    total = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_state()))
    of_experts = 2 * 4 * (2 * D * 32 + 32 + D)
    assert (
        active_parameters(model) == total - of_experts * 3 // 4
    )  # a slot for each patch: one expert of four


def test_the_map_of_attention_after_dropping():
    """Where patches were dropped there is nothing, and the rest is a share of what the pieces give."""
    model = build(f"block + keep(0.5, by=random) + {STACK}")
    state = redrawn(model)
    found = np.asarray(jax.jit(lambda s: attention_map(model, s, IMAGES))(state))
    assert found.shape == (B, 4, 4) and ((found == 0).sum(axis=(1, 2)) == N // 2).all()
    total = found.sum(axis=(1, 2))
    assert (found >= 0).all() and (total > 0).all() and (total < 1).all()
    with pytest.raises(ShapeError, match="ends with keep_00"):
        attention_map(build("block + keep(0.5, by=random)"), state, IMAGES)
    with pytest.raises(ShapeError, match="no special one"):
        mean = build("block", head="mean", registers=0)
        attention_map(mean, redrawn(mean), IMAGES)


def test_constant_drop_path():
    model = build()
    for rates, wanted in (("constant", [0.1, 0.1, 0.1]), ("linear", [0.0, 0.05, 0.1])):
        found = stacks_of(model.program, weights(), 0.1, rates)[DEPTH]["rate"]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    pieces, patches = jnp.ones((64, 2, 12)), jnp.ones((64, 3, 12))
    block = JumboBlock(num_heads=3, drop_path=0.5)
    own = block.init(KEY, pieces, patches, jnp.zeros_like)["params"]
    run = functools.partial(block.apply, {"params": own}, pieces, patches, jnp.ones_like)
    a, b = run(train=True, rngs={"drop_path": KEY}), run()
    assert (a[0] != b[0]).any() and (np.asarray(run()[0]) == np.asarray(b[0])).all()


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"registers": 0}, ConfigError, "head is 'special', which reads the registers, and there are none"),
        ({"registers": 0, "head": "mean"}, StackError, "feeds special tokens, and this model has none"),
        ({"kernel_std": 0.0}, ConfigError, "kernel_std must be above 0; got 0.0"),
        ({"drop_path_rates": "rising"}, ConfigError, "linear.*constant"),
        ({"num_heads": 3}, ShapeError, "width must be a multiple of num_heads"),
        ({"size": "nano/3"}, ShapeError, "patch 3 does not divide the image"),
        (
            {"stack": "block(special=jumbi)"},
            StackError,
            "feeder of special tokens 'jumbi' is unknown. Did you mean",
        ),
        (
            {"stack": "block(special=jumbo(mult=0))"},
            StackError,
            "mult must be a whole number of at least 1; got 0",
        ),
        ({"stack": "block(special=jumbo(mult=2.0))"}, StackError, "mult must be a whole number; got 2.0"),
        ({"stack": "block(special=jumbo(shared=1))"}, StackError, "shared must be True or False; got 1"),
        ({"stack": "block(special=jumbo(mlt=2))"}, StackError, "Did you mean 'mult'"),
        ({"stack": "block(special=4)"}, StackError, "special must be a name"),
        ({"stack": "keep(0, by=random) + block(special=jumbo)"}, StackError, "the count 0"),
        ({"stack": "keep(17, by=random) + block(special=jumbo)"}, StackError, "17"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings, error, words):
    with pytest.raises(error, match=words):
        build(**settings)


def test_a_language_model_refuses_it():
    with pytest.raises(StackError, match="in a language model there are none"):
        decoders.build("block(special=jumbo)", 8)


def test_arrays_and_runs_that_do_not_fit():
    pieces, patches = jnp.ones((2, 0, 12)), jnp.ones((2, 5, 12))
    with pytest.raises(ShapeError, match=r"pieces \(2, 0, 12\).*J >= 1"):
        JumboBlock(num_heads=3).init(KEY, pieces, patches, jnp.zeros_like)
    with pytest.raises(ShapeError, match=r"patches \(2, 5, 12\)"):
        JumboBlock(num_heads=3).init(KEY, jnp.ones((2, 2, 10)), patches, jnp.zeros_like)
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        JumboMLP(mult=0).init(KEY, jnp.ones((2, 12)))
    for run, words in (
        ("nanno", "Did you mean 'nano'"),
        ("nano,dorp", "Did you mean 'drop'"),
        ("mini,128", "'128'"),
    ):
        with pytest.raises(ConfigError, match=words):
            configs.load(f"{CONFIGS / 'jumbo.py'}:{run}")
