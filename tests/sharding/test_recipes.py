"""Recipes of sharding: how a configuration takes one, what is refused, and that a state is split enough."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab.core import config as configs
from tokenlab.core.errors import ConfigError, ShardingError
from tokenlab.sharding import recipes
from tokenlab.sharding.check import assert_sharded
from tokenlab.sharding.mesh import make_mesh
from tokenlab.train import default_config, experiment
from tokenlab.train.config import MeshConfig, TrainConfig


def mesh_of(recipe: str, **changes: Any) -> MeshConfig:
    given = configs.override(default_config(), {"mesh.recipe": recipe, **changes})
    return configs.to_dataclass(TrainConfig, given).mesh


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        ("data_parallel", {"data": 8}),
        ("fsdp", {"fsdp": 8}),
        ("fsdp:2", {"data": 4, "fsdp": 2}),
        ("fsdp_tensor:2", {"fsdp": 4, "tensor": 2}),
        ("expert:4", {"data": 2, "expert": 4}),
        ("fsdp_expert:4", {"fsdp": 2, "expert": 4}),
        ("sequence:2", {"fsdp": 4, "sequence": 2}),
        ("folded:2,4", {"fsdp": 2, "fsdp_expert": 2, "tensor_expert": 2}),
    ],
)
def test_sizes_of_every_recipe_on_eight_devices(recipe: str, sizes: dict[str, int]) -> None:
    found = mesh_of(recipe)
    assert found.sizes(8) == sizes
    assert {axis: size for axis, size in found.build().shape.items() if size > 1} == sizes
    assert configs.to_dataclass(MeshConfig, dataclasses.asdict(found)) == found


def test_what_a_recipe_says_may_be_said_again_but_not_otherwise() -> None:
    assert mesh_of("fsdp_expert:4", **{"mesh.expert": 4}).expert == 4
    with pytest.raises(
        ConfigError, match=r"config\.mesh\.expert is 2: expected its default, as config\.mesh\.recipe="
    ):
        mesh_of("fsdp_expert:4", **{"mesh.expert": 2})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("fdsp", "there is no configs/sharding/fdsp.py. Did you mean 'fsdp'?"),
        ("../fsdp", "there is no configs/sharding/../fsdp.py."),
        ("fsdp:many", "expected numbers behind the colon, such as fsdp:4"),
        ("fsdp:2,4", "it cannot be called with the argument 2, 4"),
        ("fsdp:0", "config.mesh.fsdp is 0: expected a number of devices >= 1"),
    ],
)
def test_no_such_recipe(recipe: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        mesh_of(recipe)


def test_a_recipe_of_ones_own_with_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / recipes.FOLDER
    folder.mkdir(parents=True)
    text = 'def get_mesh():\n    return {"data": -1, "rules": {"embed": "data"}}\n'
    (folder / "zero.py").write_text(text)
    (folder / "wrong.py").write_text('def get_mesh():\n    return {"fspd": 2}\n')
    (folder / "nothing.py").write_text("")
    (folder / "fsdp.py").write_text(text)  # one beside the package comes first
    found = mesh_of("zero")
    assert found.rules == {"embed": "data"} and mesh_of("fsdp").rules == {}
    given = default_config()
    given.batch_size = given.eval.batch_size = 8
    given.model.update(size="nano/4", stack="block")
    built = experiment.build(configs.override(given, {"mesh.recipe": "zero"}))
    kernel = built.abstract_state.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "data")
    with pytest.raises(ConfigError, match=r"'wrong' has no key 'fspd'\. Did you mean 'fsdp'\?"):
        mesh_of("wrong")
    with pytest.raises(ConfigError, match="does not define get_mesh"):
        mesh_of("nothing")


class TestSplitEnough:
    """Of two leaves of 4 MiB and one of 4 bytes, those are whole that `whole` says."""

    def state(self, sizes: dict[str, int], whole: int) -> tuple[Any, Any]:
        mesh = make_mesh(sizes)
        split = NamedSharding(mesh, PartitionSpec(max(sizes, key=sizes.__getitem__)))
        places = [NamedSharding(mesh, PartitionSpec())] * whole + [split] * (2 - whole)
        leaves = {
            f"w{i}": jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=place)
            for i, place in enumerate(places)
        }
        leaves["b"] = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        return leaves, mesh

    def test_enough(self) -> None:
        for state, mesh in (self.state({"fsdp": 8}, 0), self.state({"data": 8}, 2)):
            assert_sharded(state, mesh, 0.0)
        assert_sharded(*self.state({"data": 2, "fsdp": 4}, 1), 0.5)

    def test_too_much_is_whole(self) -> None:
        state, mesh = self.state({"data": 2, "fsdp": 4}, 1)
        with pytest.raises(
            ShardingError, match=r"^50\.0% of the state's 8,388,612 bytes lie whole on each of 8 "
        ) as told:
            assert_sharded(state, mesh, 0.1)
        assert "w0 float32[1024,1024] 4194304 bytes" in str(told.value) and "w1" not in str(told.value)
        assert "Expected at most 10.0%" in str(told.value) and "config.mesh.unsharded" in str(told.value)

    def test_a_run_is_checked_before_it_begins(self) -> None:
        given = default_config()
        given.batch_size = given.eval.batch_size = 8
        given.model.update(size="nano/4", stack="block(ffn=tokens_choice(experts=8))", mlp_dim=16384)
        changes = {"mesh.data": 1, "mesh.expert": 8, "mesh.rules": {"expert": None}}
        with pytest.raises(ShardingError, match=r"% of the state's .* lie whole on each of 8 devices: "):
            experiment.build(configs.override(given, changes))
        experiment.build(configs.override(given, {**changes, "mesh.unsharded": 1.0}))
