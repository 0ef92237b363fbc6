"""Parallel folding: every mapping of eight devices computes what one computes, and tokens travel, not weights."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import decoders
from tokenlab import Dropless, ExpertsChoice, SoftMoE, TokensChoice, models, tasks
from tokenlab.core.errors import TokenLabError
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.layers.ffn.swiglu import SwiGLU
from tokenlab.sharding.check import collectives
from tokenlab.sharding.plan import ParallelPlan, every_plan
from tokenlab.sharding.rules import row_sharding, shardings

# Some 250 programs whose numbers are compared: optimised they take four times as long.
pytestmark = pytest.mark.optimised(False)

B, N, D, F, E, K = 8, 6, 16, 40, 8, 2  # F is no number of rows, so that weights are told from tokens by shape
KEY = jax.random.key(0)
LAYERS = {
    "dropless": Dropless(E, k=K, expert=SwiGLU(F)),
    "gathered": Dropless(E, k=K, expert=MLP(F), exchange="gather"),
    "tokens_choice": TokensChoice(E, k=K, capacity=0.8, expert=MLP(F)),
    "experts_choice": ExpertsChoice(E, capacity=2.0, expert=MLP(F)),
    "soft_moe": SoftMoE(E, slots=3, expert=MLP(F)),
}
PLANS = {str(plan): plan for plan in every_plan(8, beyond=True) if E % plan.ep == 0 and F % plan.etp == 0}
PUBLISHED = {
    str(plan): plan
    for plan in (
        ParallelPlan(tp=2, cp=2, dp=2, etp=1, ep=8),
        ParallelPlan(tp=4, dp=2, etp=2, ep=4),
        ParallelPlan(dp=8, ep=8),
        ParallelPlan(tp=2, dp=4, etp=2, ep=2),
    )
}
FOLDED = "tp2 cp2 dp2 | ep8"
X = jax.random.normal(jax.random.key(1), (B, N, D))
COTANGENT = jax.random.normal(jax.random.key(2), X.shape)


def gradients(layer, params, x):
    """Output and losses, and gradients of both; in training, so with noise."""

    def total(params, x):
        y, aux = layer.apply({"params": params}, x, train=True, rngs={"ffn": KEY})
        return (y * COTANGENT).sum() + 10 * sum(aux.losses.values()), (y, aux.losses, aux.metrics, aux.load)

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)


@functools.cache
def expected(name):
    params = LAYERS[name].init({"params": KEY, "ffn": KEY}, X)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(KEY, leaf.shape), params)
    return params, jax.jit(functools.partial(gradients, LAYERS[name]))(params, X)


def compiled(layer, params, plan):
    """The compiled function, its mesh, and what it takes, placed on the mesh."""
    mesh = plan.mesh()
    places, rows = shardings(params, layer.axes(), mesh), row_sharding(mesh)
    with jax.set_mesh(mesh):
        given = jax.device_put(params, places), jax.device_put(X, rows)
        run = jax.jit(functools.partial(gradients, layer), in_shardings=(places, rows))
        return run.lower(*given).compile(), mesh, given


def check(name, plan):
    params, wanted = expected(name)
    run, mesh, given = compiled(LAYERS[name], params, plan)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(run(*given)), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=jax.tree_util.keystr(path))
    for path, leaf in jax.tree_util.tree_leaves_with_path(given[0]["experts"]):
        units = plan.etp if "down']['bias" not in jax.tree_util.keystr(path) else 1
        assert leaf.sharding.shard_shape(leaf.shape)[0] == E // plan.ep
        assert leaf.addressable_shards[0].data.size == leaf.size // (plan.ep * units)
    moved = [each for each in collectives(run) if each.crosses(mesh, plan.axes("ep"))]
    weights = {tuple(leaf.shape[1:]) for leaf in jax.tree.leaves(given[0]["experts"])}
    held = {tuple(leaf.sharding.shard_shape(leaf.shape)[1:]) for leaf in jax.tree.leaves(given[0]["experts"])}
    for each in moved:
        # Expert weights, whole or in part, end with these; tokens never do, but for their width alone.
        ends = {shape[-2:] for shape in (*each.shapes, *each.operand_shapes)}
        assert not ends & {shape for shape in weights | held if len(shape) > 1}, f"weights move: {each}"
    if plan.ep > 1:
        kinds = {each.kind for each in moved}
        assert ("reduce-scatter" if name == "gathered" else "all-to-all") in kinds, [
            str(each) for each in moved
        ]


def test_a_folded_plan_equals_one_device():
    check("dropless", PUBLISHED[FOLDED])


def test_devices_that_all_have_the_same_tokens_share_the_units_of_experts():
    """Nothing but `tensor` is split, neither examples nor tokens; gradients are among those of every plan, below."""
    layer, mesh = LAYERS["dropless"], ParallelPlan(tp=8).mesh()
    params = layer.init({"params": KEY, "ffn": KEY}, X)["params"]
    with jax.set_mesh(mesh):
        given = jax.device_put(params, shardings(params, layer.axes(), mesh)), X
        y = jax.jit(lambda p, x: layer.apply({"params": p}, x)[0])(*given)
    np.testing.assert_allclose(y, layer.apply({"params": params}, X)[0], atol=1e-5)


@pytest.mark.optimised(True)
@pytest.mark.slow
@pytest.mark.parametrize("plan", PUBLISHED)
@pytest.mark.parametrize("name", LAYERS)
def test_the_published_plans_equal_one_device(name, plan):
    check(name, PUBLISHED[plan])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plan"),  # of layers that send rows and layers that send buffers, one or the other in turn
    [
        (("dropless", "tokens_choice")[number % 2], plan)
        for number, plan in enumerate(each for each in PLANS if each not in PUBLISHED)
    ],
)
def test_every_plan_equals_one_device(name, plan):
    check(name, PLANS[plan])


def test_every_product_of_roles_is_among_the_plans():
    assert len(PLANS) > 30
    assert {axis for plan in every_plan(8, fsdp=True) for axis in plan.sizes} == set(
        "data data_tensor fsdp fsdp_tensor fsdp_expert sequence sequence_tensor sequence_expert tensor_data tensor "
        "tensor_expert expert".split()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropless", "gathered", "tokens_choice"])
@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(dp=8, fsdp=4, ep=2),  # fsdp_expert
        ParallelPlan(dp=8, fsdp=4, etp=2, ep=4),  # fsdp_tensor
        ParallelPlan(tp=2, dp=4, fsdp=2, ep=4, etp=1),
    ],
    ids=str,
)
def test_parameters_split_over_data_too(name, plan):
    check_values(LAYERS[name], *expected(name), plan)


def check_values(layer, params, wanted, plan):
    run, _, given = compiled(layer, params, plan)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), run(*given), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropless", "gathered", "tokens_choice"])
def test_devices_that_get_no_token_compute_nothing_and_stop_nothing(name):
    """All tokens to the first two experts: seven of eight devices get none, and one gets all."""
    params, _ = expected(name)
    router = jnp.zeros_like(params["router"]).at[:, :2].set(50.0)
    params = {**params, "router": router}
    x = jnp.abs(X)
    layer = LAYERS[name]
    y, aux = layer.apply({"params": params}, x, train=True, rngs={"ffn": KEY})
    np.testing.assert_array_equal(aux.load[2:], 0)
    plan = PUBLISHED[FOLDED]
    mesh = plan.mesh()
    with jax.set_mesh(mesh):
        given = (
            jax.device_put(params, shardings(params, layer.axes(), mesh)),
            jax.device_put(x, row_sharding(mesh)),
        )
        run = jax.jit(lambda p, x: layer.apply({"params": p}, x, train=True, rngs={"ffn": KEY})[0])
        np.testing.assert_allclose(run(*given), y, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_tokens_that_the_mesh_does_not_divide_are_as_on_one_device():
    """Five tokens over four devices of an example's tokens."""
    layer, plan = LAYERS["dropless"], PUBLISHED[FOLDED]
    params, _ = expected("dropless")
    x, mesh = X[:, :5], plan.mesh()
    with jax.set_mesh(mesh):
        given = (
            jax.device_put(params, shardings(params, layer.axes(), mesh)),
            jax.device_put(x, row_sharding(mesh)),
        )
        y = jax.jit(lambda p, x: layer.apply({"params": p}, x)[0])(*given)
    np.testing.assert_allclose(y, layer.apply({"params": params}, x)[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [FOLDED, "dp8 | ep8"])
def test_no_row_is_lost_or_computed_twice(plan):
    """What arrives at the experts of all devices together is every choice of every token, once."""
    layer, counted = LAYERS["dropless"], []

    class Counting(MLP):
        def grouped(self, params, rows, sizes, *, implementation=None):
            jax.debug.callback(lambda sizes: counted.append(np.asarray(sizes)), sizes)
            return MLP.grouped(self, params, rows, sizes, implementation=implementation)

    layer = layer.clone(expert=Counting(F))
    params = layer.init(KEY, X)["params"]
    jax.effects_barrier()
    counted.clear()
    mesh = PUBLISHED[plan].mesh()
    with jax.set_mesh(mesh):
        given = (
            jax.device_put(params, shardings(params, layer.axes(), mesh)),
            jax.device_put(X, row_sharding(mesh)),
        )
        jax.block_until_ready(jax.jit(lambda p, x: layer.apply({"params": p}, x)[0])(*given))
        jax.effects_barrier()
    assert len(counted) == 8 and sum(int(sizes.sum()) for sizes in counted) == B * N * K


@pytest.mark.parametrize("name", ["dropless", "tokens_choice"])
def test_experts_and_batches_that_do_not_divide_are_refused(name):
    layer = LAYERS[name].clone(num_experts=6)
    params = jax.eval_shape(layer.init, {"params": KEY, "ffn": KEY}, X)["params"]

    def run(x, plan):
        with jax.set_mesh(plan.mesh()):
            jax.eval_shape(lambda params, x: layer.apply({"params": params}, x), params, x)

    with pytest.raises(
        TokenLabError, match=r"6 experts cannot be split over mesh expert=2 x tensor_expert=2"
    ):
        run(X, ParallelPlan(tp=2, dp=4, etp=1, ep=4))
    with pytest.raises(
        TokenLabError, match=r"a batch of 6 cannot be split over mesh data=4; take a multiple"
    ):
        run(X[:6], ParallelPlan(tp=2, dp=4, etp=1, ep=2))
    with pytest.raises(TokenLabError, match=r"size 24 is not divisible by mesh tensor=16|13 hidden units"):
        ParallelPlan(dp=2, tp=2).validate(hidden=13)


SPEC = {"ids": ((12,), "int32")}


def language_batch(rows=8, length=12):
    ids = np.random.default_rng(0).integers(0, 30, (rows, length + 1)).astype(np.int32)
    ones = np.ones((rows, length), np.float32)
    place = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    return {
        "ids": ids[:, :-1], "target": ids[:, 1:], "weight": ones, "bytes": ones,
        "segment": ones.astype(np.int32), "position": place, "mask": ones[:, 0],
    }  # fmt: skip


def trained_once(stack, plan, **settings):
    """Loss and gradients of a small decoder on one device and on the mesh of a plan, and the compiled program.

    Of drawn weights: a router that has learned nothing scores tokens so much alike that rounding chooses among them.
    """
    given = {"name": "decoder_lm", "size": "nano", "stack": stack, "vocab_multiple": 8, **settings}
    model, task = models.build(given, spec=SPEC, num_outputs=31), tasks.build({"name": "next_token"})
    params, batch = decoders.weights(model), language_batch()

    def run(params, batch):
        loss = functools.partial(task.loss, model, batch=batch, rng=jax.random.key(1), train=True)
        return jax.value_and_grad(lambda params: loss(params)[0])(params)

    wanted, mesh = jax.jit(run)(params, batch), plan.mesh()
    places, rows = shardings(params, model.logical_axes(), mesh), row_sharding(mesh)
    with jax.set_mesh(mesh):
        on = jax.device_put(params, places), jax.device_put(batch, rows)
        program = jax.jit(run, in_shardings=(places, rows)).lower(*on).compile()
        found = program(*on)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), found, wanted)
    return program, mesh


def test_weights_can_be_made_on_a_mesh_that_splits_sequences():
    """They are made with a single example, which no mesh can split."""
    given = {"name": "decoder_lm", "size": "nano", "stack": MODELS["dropless"], "vocab_multiple": 8}
    model = models.build(given, spec=SPEC, num_outputs=31)
    with jax.set_mesh(PUBLISHED[FOLDED].mesh()):
        made = jax.eval_shape(model.init, KEY)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, jax.eval_shape(model.init, KEY))


MODELS = {
    "dropless": "block + block(ffn=dropless(experts=8, k=2))",
    "capacity": "block + block(ffn=tokens_choice(experts=8, k=1, capacity=0.75))",
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", [plan for plan in PUBLISHED if "tp4" not in plan])
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_equals_one_device(name, plan):
    trained_once(MODELS[name], PUBLISHED[plan])


@pytest.mark.optimised(True)
@pytest.mark.slow
def test_a_split_sequence_gathers_keys_and_values_and_nothing_else():
    program, mesh = trained_once("block*2", ParallelPlan(cp=4, dp=2))
    gathered = [
        each for each in collectives(program) if each.kind == "all-gather" and len(each.shapes[0]) > 2
    ]
    assert {each.shapes for each in gathered} == {((4, 12, 2, 8),)}  # [B, N, H, Dh] of half the batch
    assert len(gathered) == 4 and all("maps" in each.source for each in gathered)
    assert not re.search(r"f32\[4,2,12,12\]", program.as_text()), "a device has the whole attention map"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stack", "settings"),
    [
        ("block + mod(keep=0.5)(block) + block", {}),
        ("block + mod(keep=5)(block(ffn=dropless(experts=8, k=2))) + block", {}),
        ("block*2", {"num_kv_heads": 1}),
        ("block*2", {"window": 4}),
    ],
)
def test_selection_and_shared_keys_on_a_split_sequence(stack, settings):
    """The tokens that are chosen are those of the whole example: scores are gathered along the sequence."""
    program, mesh = trained_once(stack, ParallelPlan(cp=4, dp=2, ep=4), **settings)
    moved = [each for each in collectives(program) if each.crosses(mesh, ("sequence_expert",))]
    assert any(each.kind == "all-gather" for each in moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stack",
    [
        "block + keep(0.5, by=cls) + block",
        "block + merge(3) + block",
        "block + skip(keep=0.5, by=norm)(block) + block(between=tome(2))",
    ],
)
def test_pictures_on_a_split_sequence(stack):
    """17 tokens and whatever is left of them over four devices: the last get less."""
    spec = {"image": ((8, 8, 1), "float32")}
    model = models.build({"name": "vit", "size": "nano/2", "stack": stack}, spec=spec, num_outputs=3)
    params, image = jax.jit(model.init)(KEY), jax.random.normal(KEY, (4, 8, 8, 1))

    def run(params, image):
        return jax.value_and_grad(lambda params: (model.apply(params, {"image": image}).logits ** 2).sum())(
            params
        )

    wanted, mesh = jax.jit(run)(params, image), ParallelPlan(cp=4, dp=2).mesh()
    places = shardings(params, model.logical_axes(), mesh)
    with jax.set_mesh(mesh):
        on = jax.device_put(params, places), jax.device_put(image, row_sharding(mesh))
        found = jax.jit(run, in_shardings=(places, row_sharding(mesh)))(*on)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), found, wanted)
