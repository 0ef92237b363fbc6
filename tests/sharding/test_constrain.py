"""The one helper for activations: it takes effect under a mesh, and is nothing without one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tokenlab.core.errors import ShardingError
from tokenlab.sharding.constrain import constrain
from tokenlab.sharding.mesh import make_mesh


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def test_it_takes_effect_under_a_mesh(mesh):
    x = jnp.arange(8 * 3 * 4, dtype=jnp.float32).reshape(8, 3, 4)
    function = jax.jit(lambda x: constrain(x * 2, "batch", None, "mlp"))
    with jax.set_mesh(mesh):
        y = function(x)
    assert y.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    np.testing.assert_array_equal(y, x * 2)


def test_gradients_pass(mesh):
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(constrain(x, "batch", None) ** 2)))(jnp.ones((8, 3)))
    np.testing.assert_array_equal(gradient, 2.0)
    assert gradient.sharding.spec == PartitionSpec(("data", "fsdp"))


@pytest.mark.parametrize("devices", [0, 1])
def test_nothing_without_a_mesh_or_on_one_device(devices):
    x = jnp.ones((3, 5))
    if devices:
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
            program = jax.make_jaxpr(lambda x: constrain(x, "batch", None))(x)
    else:
        program = jax.make_jaxpr(lambda x: constrain(x, "batch", None))(x)
    assert not program.eqns
    assert constrain(x, "batch", None) is x


def test_rules_can_be_given(mesh):
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, "tokens", rules={"tokens": "tensor"}))(jnp.ones(4))
    assert y.sharding.spec == PartitionSpec("tensor")


def test_inside_shard_map(mesh):
    def inner(x):
        return constrain(x, "batch", "mlp") + 1

    with jax.set_mesh(mesh):
        for taken, spec in (({"data"}, ("data", "fsdp")), (set(mesh.axis_names), "data")):
            mapped = jax.shard_map(
                inner, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), axis_names=taken
            )
            y = jax.jit(mapped)(jnp.zeros((8, 4)))
            assert y.sharding.spec[0] == spec
            np.testing.assert_array_equal(y, 1.0)


def test_mistakes(mesh):
    x = jnp.ones((6, 4))
    with pytest.raises(ShardingError, match=r"^constrain\('batch'\): 1 logical axes .* shape \(6, 4\)"):
        constrain(x, "batch")
    with jax.set_mesh(mesh):
        with pytest.raises(
            ShardingError, match=r"^constrain\('batch', None\) \(6, 4\): dimension 0 .* not divisible"
        ):
            constrain(x, "batch", None)
        with pytest.raises(ShardingError, match=r"logical axis 'batchh'\. Did you mean 'batch'"):
            constrain(x, "batchh", None)
        with pytest.raises(ShardingError, match=r"both to be split over mesh axis 'tensor'"):
            constrain(x, "mlp", "heads")
    explicit = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(ShardingError, match="Explicit axes"):
        constrain(x, None, None)
