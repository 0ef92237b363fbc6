"""Meshes: named axes of type Auto, and the mistakes in their sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tokenlab.core.errors import ShardingError
from tokenlab.sharding import mesh as meshes
from tokenlab.sharding.mesh import AXES, make_mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (None, (8, 1, 1, 1)),
        ({}, None),
        ({"data": 8}, (8, 1, 1, 1)),
        ({"data": -1, "fsdp": 2}, (4, 2, 1, 1)),
        ({"expert": 2, "tensor": -1}, (1, 1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}, (2, 2, 2, 1)),
        ({"data": -1, "fsdp": 8}, (1, 8, 1, 1)),
    ],
)
def test_shape(sizes, shape):
    if shape is None:
        with pytest.raises(ShardingError, match="needs 1 devices, but there are 8"):
            make_mesh(sizes)
        return
    mesh = make_mesh(sizes)
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_some_of_the_devices():
    assert make_mesh(devices=jax.devices()[:1]).size == 1
    assert make_mesh({"data": 2, "fsdp": -1}, jax.devices()[:4]).devices.shape == (2, 2, 1, 1)


def test_axes_that_are_no_axes_of_the_torus_are_parts_of_them(monkeypatch):
    """As for 4 experts on a slice of 8 x 8 x 8, which JAX makes when it is asked to."""
    asked = []

    def refuse(*given, **how):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 3")

    def split(shape, devices, *, allow_split_physical_axes):
        asked.append(allow_split_physical_axes)
        return np.array(devices).reshape(shape)

    monkeypatch.setattr(jax, "make_mesh", refuse)
    monkeypatch.setattr(meshes.mesh_utils, "create_device_mesh", split)
    made = make_mesh({"fsdp": 2, "expert": 4})
    assert asked == [True] and dict(made.shape) == {"data": 1, "fsdp": 2, "tensor": 1, "expert": 4}
    assert set(made.axis_types) == {AxisType.Auto}


def test_it_serves_under_set_mesh():
    mesh = make_mesh({"data": 4, "tensor": 2})
    x = jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, PartitionSpec("data", "tensor")))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: x @ x.T)(x)
    assert len(y.sharding.device_set) == 8
    assert float(y[0, 0]) == 6


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fdsp": 2}, r"mesh: there is no axis 'fdsp'\. Did you mean 'fsdp'\?"),
        ({"data": 0}, r"mesh\.data is 0: expected a number of devices >= 1, or -1"),
        ({"data": -2}, r"mesh\.data is -2"),
        ({"data": True}, r"mesh\.data is True"),
        ({"data": 4.0}, r"mesh\.data is 4\.0"),
        ({"data": -1, "fsdp": -1}, r"at most one axis may be -1"),
        ({"data": -1, "fsdp": 3}, r"data=-1 x fsdp=3 .*: 8 devices cannot be split by 3"),
        ({"data": 3}, r"data=3 x fsdp=1 .* needs 3 devices, but there are 8; make one axis -1"),
        ({"data": 16}, r"needs 16 devices, but there are 8"),
    ],
)
def test_mistakes(sizes, message):
    with pytest.raises(ShardingError, match=message) as error:
        make_mesh(sizes)
    assert "\n" not in str(error.value)
