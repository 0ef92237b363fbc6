"""Rules of a configuration: they travel in the mesh, for parameters and activations; mistakes in them are errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tokenlab.core.config import override, to_dataclass
from tokenlab.core.errors import ConfigError, ShardingError
from tokenlab.sharding import rules
from tokenlab.sharding.constrain import constrain
from tokenlab.sharding.mesh import AXES, make_mesh
from tokenlab.train.config import MeshConfig, TrainConfig, default_config

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
OWN = {"embed": ("fsdp", "data"), "vocab": None, "batch": "data"}
TABLE = {"up": ("embed", "mlp"), "table": ("vocab", "embed")}
LEAVES = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32) for name in TABLE}


def specs(mesh):
    return {name: place.spec for name, place in rules.shardings(LEAVES, TABLE, mesh).items()}


def test_parameters_and_rows_lie_as_the_mesh_says():
    mesh = make_mesh(SIZES, rules=OWN)
    assert specs(mesh) == {
        "up": PartitionSpec(("fsdp", "data"), "tensor"),
        "table": PartitionSpec(None, ("fsdp", "data")),
    }
    assert rules.row_sharding(mesh).spec == PartitionSpec("data") and rules.ways("batch", mesh) == 2
    assert specs(make_mesh(SIZES)) == {
        "up": PartitionSpec("fsdp", "tensor"),
        "table": PartitionSpec("tensor", "fsdp"),
    }


def test_what_is_not_said_follows_from_the_axes():
    mesh = make_mesh(SIZES, rules=OWN)
    assert mesh.axis_names == (*AXES, "rules-batch.data-embed.fsdp.data-vocab")
    assert rules.sizes_of(mesh) == {**SIZES, "expert": 1}
    found = {**rules.rules_of(mesh)}
    assert {name for name in found if found[name] != rules.DEFAULT_RULES[name]} == {"embed", "vocab", "batch"}
    assert rules.rules_of(make_mesh(SIZES)) == rules.DEFAULT_RULES


def test_no_program_of_other_rules_is_run():
    """One jitted function, the same devices, other rules: it is traced again, and again found."""
    traced = []

    @jax.jit
    def double(x):
        traced.append(x.shape)
        return constrain(2 * x, "batch", "mlp")

    x, found = jnp.arange(64.0).reshape(8, 8), {}
    for own in ({}, {"mlp": None}, {"batch": None, "mlp": ("data", "tensor")}, {}):
        with jax.set_mesh(make_mesh(SIZES, rules=own)):
            y = double(x)
            found[str(own)] = y.sharding.spec
            np.testing.assert_array_equal(y, 2 * x)
    assert list(found.values()) == [
        PartitionSpec(("data", "fsdp"), "tensor"),
        PartitionSpec(("data", "fsdp")),
        PartitionSpec(None, ("data", "tensor")),
    ]
    assert len(traced) == 3


def test_of_a_configuration():
    config = override(default_config(), {"mesh.fsdp": "4", "mesh.rules.embed": "('fsdp', 'data')"})
    config = override(config, {"mesh.rules.vocab": "None", "mesh.rules.mlp": "fsdp"})
    read = to_dataclass(TrainConfig, config).mesh
    assert read.rules == {"embed": ("fsdp", "data"), "vocab": None, "mlp": "fsdp"}
    assert rules.rules_of(read.build())["embed"] == ("fsdp", "data")
    assert read.sizes(8) == {"data": 2, "fsdp": 4}


def test_dimensions_that_meet_on_an_axis_are_refused():
    mesh = make_mesh(SIZES, rules={"mlp": "fsdp"})
    with pytest.raises(ShardingError, match=r"up .*both to be split over mesh axis 'fsdp'"):
        specs(mesh)
    with jax.set_mesh(mesh), pytest.raises(ShardingError, match=r"both to be split over mesh axis 'fsdp'"):
        jax.eval_shape(lambda x: constrain(x, "batch", "mlp"), LEAVES["up"])


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"embedd": "fsdp"}, r"rules: there is no logical axis 'embedd'\. Did you mean 'embed'"),
        ({"embed": "fsdpp"}, r"rule 'embed' -> 'fsdpp': there is no mesh axis 'fsdpp'\. Did you mean 'fsdp"),
        ({"embed": ("data", "fdsp")}, r"there is no mesh axis 'fdsp'"),
        ({"embed": ("data", "data")}, r"rule 'embed' .* names a mesh axis twice"),
    ],
)
def test_mistakes(own, message):
    for make in (lambda: make_mesh(SIZES, rules=own), lambda: MeshConfig(rules=own)):
        with pytest.raises(ShardingError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_rules_of_another_type_are_refused():
    with pytest.raises(ConfigError, match=r"config\.mesh\.rules\.embed is 3 \(int\)"):
        to_dataclass(TrainConfig, {"mesh": {"rules": {"embed": 3}}})
