"""From parameter paths to shardings: every gap, collision and misfit is an error of one line."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab.core.errors import ShardingError
from tokenlab.sharding import rules
from tokenlab.sharding.mesh import make_mesh

TABLE = {
    "embed/kernel": (None, "embed"),
    "query/kernel": ("embed", "heads", None),
    "up/kernel": ("embed", "mlp"),
    "up/bias": ("mlp",),
    "norm/scale": (None,),
    "keep/kernel": ("embed", None),
    "head/kernel": ("embed", "vocab"),
}


def leaf(*shape, dtype=jnp.float32):
    return ShapeDtypeStruct(shape, dtype)


def parameters():
    return {
        "embed": {"kernel": leaf(6, 16)},
        "blocks": {
            "attention": {"query": {"kernel": leaf(3, 16, 4, 5)}, "norm": {"scale": leaf(3, 16)}},
            "mlp": {"up": {"kernel": leaf(3, 16, 8), "bias": leaf(3, 8)}},
        },
        "items": {"keep": {"kernel": leaf(2, 16, 1)}},
        "norm": {"scale": leaf(16)},
        "head": {"kernel": leaf(16, 10)},
    }


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def specs(tree):
    return jax.tree.map(lambda sharding: sharding.spec, tree)


def test_shardings(mesh):
    found = rules.shardings(parameters(), TABLE, mesh)
    assert specs(found) == {
        "embed": {"kernel": PartitionSpec(None, "fsdp")},
        "blocks": {
            "attention": {
                "query": {"kernel": PartitionSpec(None, "fsdp", "tensor")},
                "norm": {"scale": PartitionSpec()},
            },
            "mlp": {
                "up": {"kernel": PartitionSpec(None, "fsdp", "tensor"), "bias": PartitionSpec(None, "tensor")}
            },
        },
        "items": {"keep": {"kernel": PartitionSpec(None, "fsdp")}},
        "norm": {"scale": PartitionSpec()},
        "head": {"kernel": PartitionSpec("fsdp", "tensor")},
    }
    assert all(sharding.mesh == mesh for sharding in jax.tree.leaves(found))


def test_arrays_can_be_placed_so(mesh):
    values = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), parameters())
    placed = jax.device_put(values, rules.shardings(values, TABLE, mesh))
    kernel = placed["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 8, 4)


def test_the_longest_row_wins(mesh):
    table = {**TABLE, "attention/norm/scale": ("embed",)}
    found = rules.shardings(parameters(), table, mesh)
    assert found["blocks"]["attention"]["norm"]["scale"].spec == PartitionSpec(None, "fsdp")
    assert found["norm"]["scale"].spec == PartitionSpec()


def test_rows_match_whole_components_only(mesh):
    with pytest.raises(
        ShardingError, match=r"^norm/scale \(16,\): no row .* matches this leaf; add 'norm/scale'\.$"
    ):
        rules.shardings({"norm": {"scale": leaf(16)}}, {"m/scale": (None,), "cale": (None,)}, mesh)


def test_a_row_may_name_the_stacked_axis_itself(mesh):
    table = {**TABLE, "up/bias": ("layers", "mlp")}
    found = rules.shardings(parameters(), table, mesh)
    assert found["blocks"]["mlp"]["up"]["bias"].spec == PartitionSpec(None, "tensor")


def test_layers_may_be_split_by_another_rule(mesh):
    table = {"up/kernel": (None, None)}
    tree = {"blocks": {"up": {"kernel": leaf(4, 3, 3)}}}
    found = rules.shardings(tree, table, mesh, {**rules.DEFAULT_RULES, "layers": ("data", "fsdp")})
    assert found["blocks"]["up"]["kernel"].spec == PartitionSpec(("data", "fsdp"))


def test_axes_of_size_one_split_nothing():
    mesh = make_mesh({"data": 8})
    tree = {"w": leaf(3, 5)}
    assert rules.shardings(tree, {"w": ("embed", "embed")}, mesh)["w"].spec == PartitionSpec()
    assert rules.spec(("batch", None), (16, 3), mesh) == PartitionSpec("data")


def test_a_scalar_needs_no_row(mesh):
    assert rules.shardings({"temperature": leaf()}, {}, mesh)["temperature"].spec == PartitionSpec()


@pytest.mark.parametrize(
    ("change", "rows", "message"),
    [
        ({"extra": {"kernel": leaf(4, 4)}}, {}, r"^extra/kernel \(4, 4\): no row of the sharding table matches"),
        ({}, {"heads/kernel": ("embed",)}, r"^sharding table: row 'heads/kernel' .* mean 'head/kernel'\?$"),
        ({}, {"nothing/like": ("embed",)}, r"^sharding table: row 'nothing/like' matches no leaf\.$"),
        ({}, {"head/kernel": ("mlp", "vocab")}, r"^head/kernel \(16, 10\): dimensions 0 \(mlp\) and 1 \(vocab\)"),
        ({"head": {"kernel": leaf(16, 7)}}, {}, r"^head/kernel \(16, 7\): dimension 1 .* by mesh tensor=2\.$"),
        ({}, {"head/kernel": ("embed",)}, r"^head/kernel has shape \(16, 10\), but 1 logical axes \('embed',\)"),
        ({"blocks": {"up": {"bias": leaf(2, 3, 4)}}}, {}, r"^blocks/up/bias has shape \(2, 3, 4\), but 1 logical"),
        ({"up": {"bias": leaf(3, 8)}}, {}, r"^up/bias has shape \(3, 8\), but 1 logical axes"),
        ({}, {"head/kernel": ("embedd", None)}, r"^head/kernel: .* logical axis 'embedd'\. Did you mean 'embed'\?"),
    ],
)  # fmt: skip
def test_mistakes(mesh, change, rows, message):
    with pytest.raises(ShardingError, match=message) as error:
        rules.shardings({**parameters(), **change}, {**TABLE, **rows}, mesh)
    assert "\n" not in str(error.value)


def test_a_batch_that_does_not_divide(mesh):
    message = r"^x \(6, 3\): dimension 0 \(batch\) of size 6 is not divisible by mesh data=2 x fsdp=2\.$"
    with pytest.raises(ShardingError, match=message):
        rules.spec(("batch", None), (6, 3), mesh, what="x")


def test_a_rule_with_an_unknown_mesh_axis(mesh):
    message = (
        r"rule 'embed' -> \('fsdpp',\) names mesh axis 'fsdpp', which does not exist\. Did you mean 'fsdp'"
    )
    with pytest.raises(ShardingError, match=message):
        rules.shardings({"w": leaf(4)}, {"w": ("embed",)}, mesh, {**rules.DEFAULT_RULES, "embed": "fsdpp"})


class TestShardingsLike:
    def place(self, mesh, transform):
        params = parameters()
        params["inner"] = {"head": {"kernel": leaf(10, 16)}}  # its path ends with that of head/kernel
        table = {**TABLE, "inner/head/kernel": (None, "embed")}
        placed = rules.shardings(params, table, mesh)
        state = jax.eval_shape(transform.init, params)
        return state, placed, rules.shardings_like(state, params, placed, mesh)

    def test_moments_lie_with_their_parameters(self, mesh):
        transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        state, placed, found = self.place(mesh, transform)
        adam = found[1][0]
        assert specs(adam.mu) == specs(placed)
        assert specs(adam.nu) == specs(placed)
        assert adam.mu["inner"]["head"]["kernel"].spec == PartitionSpec(None, "fsdp")
        assert adam.count.spec == PartitionSpec()
        assert jax.tree.structure(state) == jax.tree.structure(found)

    @pytest.mark.parametrize(
        "transform",
        [
            optax.sgd(0.1),
            optax.sgd(0.1, momentum=0.9),
            optax.lion(1e-3),
            optax.adafactor(1e-3, min_dim_size_to_factor=4),
            optax.masked(optax.adam(1e-3), lambda tree: jax.tree.map(lambda x: len(x.shape) > 1, tree)),
        ],
        ids=["sgd", "momentum", "lion", "adafactor", "masked"],
    )
    def test_any_state_is_placed_whole(self, mesh, transform):
        state, _, found = self.place(mesh, transform)
        assert jax.tree.structure(state) == jax.tree.structure(found)
        for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
            sharding.shard_shape(x.shape)

    def test_factored_moments_are_replicated(self, mesh):
        _, _, found = self.place(mesh, optax.adafactor(1e-3, min_dim_size_to_factor=4))
        factored = [
            s for s in jax.tree.leaves(found, is_leaf=lambda x: hasattr(x, "v_row")) if hasattr(s, "v_row")
        ]
        assert factored[0].v_row["head"]["kernel"].spec == PartitionSpec()

    def test_one_update_keeps_the_placement(self, mesh):
        params = {"w": jnp.ones((4, 6)), "b": jnp.ones((6,))}
        placed = rules.shardings(params, {"w": ("embed", "mlp"), "b": (None,)}, mesh)
        transform = optax.adam(1e-3)
        state = transform.init(params)
        where = rules.shardings_like(state, params, placed, mesh)
        params, state = jax.device_put(params, placed), jax.device_put(state, where)

        def step(params, state):
            updates, state = transform.update(params, state, params)
            return optax.apply_updates(params, updates), state

        _, state = jax.jit(step, out_shardings=(placed, where))(params, state)
        assert state[0].mu["w"].sharding == NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
