"""What is traced for other devices than those that are here is what those would run."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from tokenlab.layers.execute import resolve_execution
from tokenlab.ops.exchange import check_exchange
from tokenlab.ops.grouped import check_implementation
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.target import target_platform


def test_without_a_mesh_and_on_one_of_devices_that_are_here() -> None:
    assert target_platform() == "cpu"
    with jax.set_mesh(make_mesh({"data": 8})):
        assert target_platform() == "cpu" and check_exchange(None) == "padded"


@pytest.mark.parametrize("inside", [False, True])
def test_for_devices_that_are_not_here(inside: bool) -> None:
    there = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    found = []

    def look() -> None:
        found.append((target_platform(), check_exchange(None), check_implementation(None)))
        found.append(
            (check_exchange("ragged"), check_implementation("megablox"), resolve_execution("auto", 2))
        )

    with use_abstract_mesh(AbstractMesh((4,), ("data",), abstract_device=there)):
        if inside:
            jax.eval_shape(lambda: jax.jit(look)())
        else:
            look()
    assert found == [("tpu", "ragged", "ragged"), ("ragged", "megablox", "scan")]
