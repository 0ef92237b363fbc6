"""Experts over a mesh axis: as on one device, tokens exchanged, and no expert's weights gathered along that axis."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab import GRIN, Dropless, ExpertsChoice, MoMa, SoftMoE, TokensChoice, models
from tokenlab.core.errors import TokenLabError
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.ops import exchange
from tokenlab.sharding.check import collectives
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import DEFAULT_RULES, shardings

B, N, D, F, E = 8, 6, 16, 24, 8
KEY = jax.random.key(0)
LAYERS = {
    "soft_moe": SoftMoE(E, slots=2, expert=MLP(F)),
    "tokens_choice": TokensChoice(E, k=2, capacity=0.8, expert=MLP(F)),
    "tokens_choice, weighted": TokensChoice(E, k=2, capacity=0.8, expert=MLP(F), form="weighted"),
    "experts_choice": ExpertsChoice(E, capacity=2.0, expert=MLP(F)),
    "dropless": Dropless(E, k=2, expert=MLP(F)),
    "grin": GRIN(E, r=0.3, expert=MLP(F)),
    "moma": MoMa(text=E, image=E, capacity=2.0, noise=1.0, expert=MLP(F)),
}
MESHES = (
    {"data": 2, "expert": 4},
    pytest.param({"expert": 8}, marks=pytest.mark.slow),
    pytest.param({"data": 2, "fsdp": 2, "expert": 2}, marks=pytest.mark.slow),
)
X = jax.random.normal(jax.random.key(1), (B, N, D))
COTANGENT = jax.random.normal(jax.random.key(2), X.shape)
MODALITY = jnp.asarray(np.arange(B * N).reshape(B, N) * 7 // 3 % 2, jnp.int32)


def gradients(layer, params, x, train=True):
    """Output, and gradients of it in one direction and of all losses; in training, so with noise."""
    more = {"modality": MODALITY} if getattr(layer, "by_modality", False) else {}

    def total(params, x):
        y, aux = layer.apply({"params": params}, x, train=train, rngs={"ffn": KEY}, **more)
        return (y * COTANGENT).sum() + 10 * sum(aux.losses.values()), y

    (_, y), found = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)
    return y, found


def start(layer):
    @jax.jit
    def draw():
        params = layer.init({"params": KEY, "ffn": KEY}, X)["params"]
        return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(KEY, leaf.shape), params)

    return draw()


def compiled(layer, params, sizes, train=True):
    """The compiled function, its mesh, and what it takes, placed on the mesh."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    places = shardings(params, layer.axes(), mesh)
    rows = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES["batch"]))
    with jax.set_mesh(mesh):
        run = jax.jit(
            partial(gradients, layer, train=train),
            in_shardings=(places, rows),
            out_shardings=(rows, (places, rows)),
        )
        given = jax.device_put(params, places), jax.device_put(X, rows)
        return run.lower(*given).compile(), mesh, given


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_equal_to_one_device_and_tokens_travel_instead_of_weights(name, sizes):
    layer = LAYERS[name]
    params = start(layer)
    expected = jax.jit(partial(gradients, layer))(params, X)
    run, mesh, given = compiled(layer, params, sizes)
    found = run(*given)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=jax.tree_util.keystr(path))
    moved = [each for each in collectives(run) if each.crosses(mesh, ("expert",))]
    exchanged = [each for each in moved if each.kind == "all-to-all"]
    assert len(exchanged) >= 4, [str(each) for each in moved]  # there and back, forward and backward
    banks = [bank for name, bank in params.items() if name.startswith("experts")]
    weights = {tuple(leaf.shape[1:]) for leaf in jax.tree.leaves(banks)}
    for each in moved:
        if each.kind in ("all-gather", "all-to-all", "collective-permute"):
            ends = {shape[-2:] for shape in each.shapes} | {
                shape[-1:] for shape in each.shapes if len(shape) < 3
            }
            assert not ends & weights, f"weights of experts move: {each}"
        if each.kind == "all-reduce":  # gradients of what every device holds: the router
            assert not {shape[-2:] for shape in each.shapes} & weights, f"weights of experts move: {each}"


@pytest.mark.slow
def test_one_expert_for_a_modality_lies_where_the_tokens_are():
    layer = LAYERS["moma"].clone(text=4, image=1)
    params = start(layer)
    expected = jax.jit(partial(gradients, layer))(params, X)
    run, mesh, given = compiled(layer, params, {"data": 2, "expert": 4})
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), run(*given), expected)
    assert given[0]["experts_image"]["up"]["kernel"].sharding.shard_shape((1, D, F)) == (1, D, F)


def test_auxiliary_routers_decide_as_on_one_device():
    """Outside training tokens choose, and go to experts elsewhere in rows of another kind."""
    layer = LAYERS["moma"]
    params = start(layer)
    expected = jax.jit(partial(gradients, layer, train=False))(params, X)
    run, mesh, given = compiled(layer, params, {"data": 2, "expert": 4}, train=False)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), run(*given), expected)
    assert any(each.kind == "all-to-all" and each.crosses(mesh, ("expert",)) for each in collectives(run))


def test_each_device_holds_its_experts_alone():
    layer = LAYERS["dropless"]
    _, _, (params, _) = compiled(layer, start(layer), {"data": 2, "expert": 4})
    kernel = params["experts"]["up"]["kernel"]
    assert kernel.shape == (E, D, F) and kernel.sharding.shard_shape(kernel.shape) == (E // 4, D, F)


@pytest.mark.parametrize("layer", ["soft_moe(experts=4, slots=2)", "dropless(experts=4)"])
def test_the_weights_of_a_model_can_be_made_on_a_mesh(layer):
    """They are made with one example, which no mesh can split."""
    stack = f"block(ffn={layer})"
    spec = {"image": ((8, 8, 1), "float32")}
    model = models.build({"name": "vit", "size": "nano/4", "stack": stack}, spec=spec, num_outputs=3)
    expected = jax.jit(model.init)(KEY)
    mesh = make_mesh({"data": 2, "expert": 4})
    places = shardings(expected, model.logical_axes(), mesh)
    with jax.set_mesh(mesh):
        made = jax.jit(model.init, out_shardings=places)(KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), made, expected)


@pytest.mark.parametrize("name", ["tokens_choice", "dropless"])
def test_experts_that_do_not_divide_are_refused(name):
    layer = LAYERS[name].clone(num_experts=6)
    with pytest.raises(Exception, match=r"not divisible|cannot be split"):
        compiled(layer, start(layer), {"expert": 4})


@pytest.mark.parametrize("name", ["soft_moe", pytest.param("dropless", marks=pytest.mark.slow)])
def test_shared_experts_lie_where_the_tokens_are(name):
    """However few: they are not split over the axis of the others, and no token travels to them."""
    layer = LAYERS[name].clone(shared=1)
    params = start(layer)
    run, mesh, given = compiled(layer, params, {"expert": 8})
    expected = jax.jit(partial(gradients, layer))(params, X)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), run(*given), expected)
    moved = [each for each in collectives(run) if each.kind == "all-gather"]
    assert not [each for each in moved if X.shape in each.shapes]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("soft_moe", marks=pytest.mark.slow),
        "dropless",
        pytest.param("grin", marks=pytest.mark.slow),
    ],
)
def test_experts_split_by_tensor_too_are_as_on_one_device(name):
    """And no device waits for others inside a branch that they may not take."""
    layer = LAYERS[name]
    params = start(layer)
    run, _, given = compiled(layer, params, {"data": 2, "tensor": 2, "expert": 2})
    text = run.as_text()
    branches = {
        name for listed in re.findall(r"branch_computations=\{([^}]*)\}", text) for name in listed.split(", ")
    }
    bodies = re.findall(r"^%?([\w.\-]+) \(.*?^\}", text, re.MULTILINE | re.DOTALL)
    inside = [
        body
        for body in re.split(r"^\}", text, flags=re.MULTILINE)
        if any(re.search(rf"^{re.escape(name)} ", body, re.MULTILINE) for name in branches)
    ]
    assert bodies and len(inside) == len(branches)
    assert not [each for body in inside for each in collectives(body)]
    expected = jax.jit(partial(gradients, layer))(params, X)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), run(*given), expected)


@pytest.mark.parametrize("name", ["soft_moe", "dropless"])
def test_a_batch_that_the_mesh_does_not_divide_is_refused(name):
    layer = LAYERS[name]
    params = start(layer)
    with jax.set_mesh(make_mesh({"expert": 8})), pytest.raises(TokenLabError, match=r"4 .*expert=8") as error:
        jax.eval_shape(lambda x: layer.apply({"params": params}, x), X[:4])
    assert "\n" not in str(error.value)


def test_a_mesh_without_expert_axis_exchanges_nothing():
    layer = LAYERS["dropless"]
    params = start(layer)
    run, mesh, given = compiled(layer, params, {"data": 8})
    expected, _ = jax.jit(partial(gradients, layer))(params, X)
    np.testing.assert_allclose(run(*given)[0], expected, atol=1e-5)
    assert not [each for each in collectives(run) if each.kind == "all-to-all"]


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` by gathering everything, for a backend that does not have it."""
    del recv_sizes
    rows = jax.lax.all_gather(operand, axis_name)
    starts, sizes, ends = (
        jax.lax.all_gather(each, axis_name) for each in (input_offsets, send_sizes, output_offsets)
    )
    me = jax.lax.axis_index(axis_name)
    place = jnp.arange(operand.shape[0])
    for source in range(rows.shape[0]):
        start, size, end = starts[source, me], sizes[source, me], ends[source, me]
        sent = (place >= start) & (place < start + size)
        output = output.at[jnp.where(sent, place - start + end, output.shape[0])].set(
            rows[source], mode="drop"
        )
    return output


@pytest.mark.parametrize("ways", [2, 8])
def test_the_ragged_exchange_equals_the_padded_one(ways, monkeypatch):
    monkeypatch.setattr(exchange, "check_exchange", lambda implementation: implementation)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    mesh = make_mesh({"expert": ways}, jax.devices()[:ways])
    rng = np.random.default_rng(ways)
    expert = np.sort(rng.integers(0, E + 1, size=(ways, 12)), axis=1)  # E: padding, behind all others
    expert[0] = 3  # all of one device's rows for one expert
    sizes = np.stack([(expert == e).sum(axis=1) for e in range(E)], axis=1).astype(np.int32)
    rows = rng.standard_normal((ways, 12, 5)).astype(np.float32)

    def there_and_back(implementation):
        def local(rows, sizes):
            sent = exchange.send(rows[0], sizes[0], "expert", ways, implementation=implementation)
            y = sent.rows * (1 + jax.lax.axis_index("expert"))
            back = exchange.send_back(y, sent, 12, "expert", implementation=implementation)
            return sent.rows[None], sent.sizes[None], back[None]

        spec = PartitionSpec("expert")
        run = jax.shard_map(
            local, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec, spec), check_vma=False
        )
        return jax.jit(run)(rows, sizes)

    padded, ragged = there_and_back("padded"), there_and_back("ragged")
    jax.tree.map(np.testing.assert_array_equal, ragged, padded)
    owner = 1 + np.minimum(expert, E - 1) // (E // ways)
    wanted = np.where((expert < E)[..., None], rows * owner[..., None], 0)
    np.testing.assert_allclose(padded[2], wanted, rtol=1e-6)


def test_ragged_exchange_is_refused_where_it_cannot_run():
    layer = LAYERS["dropless"].clone(exchange="ragged")
    with pytest.raises(Exception, match="XLA:CPU does not have"):
        compiled(layer, start(layer), {"expert": 8})


@pytest.mark.parametrize("name", ["tokens_choice", "dropless"])
def test_transport_rounds_what_travels(name):
    """As traced: XLA:CPU itself exchanges bfloat16 as float32."""
    layer = LAYERS[name].clone(transport="bfloat16")
    params, mesh = start(layer), make_mesh({"data": 2, "expert": 4})
    with jax.set_mesh(mesh):
        text = jax.jit(lambda p, x: layer.apply({"params": p}, x)[0]).lower(params, X).as_text()
    moved = [line for line in text.splitlines() if "all_to_all" in line or '[{"expert"}, {"data"}' in line]
    found = {
        dtype for line in moved for dtype in re.findall(r"tensor<[\dx]*x(\w+)>", line.partition(" : ")[2])
    }
    assert {dtype for dtype in found if dtype[0] in "bf"} == {"bf16"}
