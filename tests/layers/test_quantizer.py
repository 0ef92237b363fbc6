"""Both quantisers through one interface: what codes stand for, what learns from which loss, rows that do not count."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ConfigError
from tokenlab.layers.quantizer import FSQ, VQ

B, H, W, D = 3, 2, 4, 6
MODULES = {
    "cosine": VQ(D, codes=9, width=3),
    "euclidean": VQ(D, codes=9, width=3, distance="euclidean", commitment=0.5),
    "fsq": FSQ(D, levels=(4, 3)),
}
MASK = np.array([1, 1, 0], np.float32)

each = pytest.mark.parametrize("name", MODULES)
with_codebook = pytest.mark.parametrize("name", ["cosine", "euclidean"])


@functools.cache
def ran(name: str) -> dict[str, Any]:
    """Everything that is looked at, in one program a quantiser, as numpy arrays."""
    module = MODULES[name]

    @jax.jit
    def everything() -> dict[str, Any]:
        z = jax.random.normal(jax.random.key(0), (B, H, W, D))
        params = module.init(jax.random.key(1), z)["params"]

        def apply(params: Any, z: jax.Array, mask: jax.Array | None = None) -> Any:
            return module.apply({"params": params}, z, mask)

        found = apply(params, z)
        gradients = {
            loss: jax.grad(lambda p, z, loss=loss: apply(p, z).losses[loss], (0, 1))(params, z)
            for loss in found.losses
        }
        return {
            "found": found,
            "again": module.apply({"params": params}, found.codes, method=type(module).lookup),
            "behind": jax.grad(lambda p, z: apply(p, z).z_q.sum(), (0, 1))(params, z),
            "gradients": gradients,
            "few": apply(params, z[:2]),
            "masked": apply(params, z.at[2].mul(7), jnp.asarray(MASK)),
        }

    return jax.tree.map(np.asarray, everything())


@each
def test_features_become_what_their_codes_stand_for(name: str) -> None:
    found, count = ran(name)["found"], MODULES[name].codes_count
    assert found.codes.shape == (B, H, W) and found.codes.dtype == np.int32
    assert 0 <= found.codes.min() and found.codes.max() < count == (12 if name == "fsq" else 9)
    assert len(np.unique(found.codes)) > 2
    np.testing.assert_array_equal(ran(name)["again"], found.z_q)


@each
def test_the_gradient_of_what_follows_reaches_the_features_and_not_the_codebook(name: str) -> None:
    of_params, of_z = ran(name)["behind"]
    assert np.abs(of_z).max() > 0 and np.abs(of_params["down"]["kernel"]).max() > 0
    if name != "fsq":
        np.testing.assert_array_equal(of_params["codebook"], 0)


@with_codebook
@pytest.mark.parametrize(("loss", "learns"), [("codebook_loss", "codebook"), ("commitment_loss", "down")])
def test_each_loss_teaches_one_side_alone(name: str, loss: str, learns: str) -> None:
    of_params, of_z = ran(name)["gradients"][loss]
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(of_params[learns])) > 0
    assert (np.abs(of_z).max() > 0) == (learns == "down")
    for part in {"codebook", "down", "up"} - {learns}:
        for leaf in jax.tree.leaves(of_params[part]):
            np.testing.assert_array_equal(leaf, 0)


@with_codebook
def test_commitment_weighs_its_loss_alone(name: str) -> None:
    losses = ran(name)["found"].losses
    beta = MODULES[name].commitment
    assert losses["commitment_loss"] == pytest.approx(beta * losses["codebook_loss"], rel=1e-6)


def test_rounding_needs_no_loss() -> None:
    assert ran("fsq")["found"].losses == {}


@each
def test_rows_without_weight_count_in_no_loss_and_no_metric(name: str) -> None:
    few, masked = ran(name)["few"], ran(name)["masked"]
    for wanted, given in ((few.losses, masked.losses), (few.metrics, masked.metrics)):
        assert wanted.keys() == given.keys()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), wanted, given)
    assert set(few.metrics) >= {"batch_perplexity", "batch_codes_used"}
    np.testing.assert_allclose(masked.z_q[:2], few.z_q, rtol=1e-5)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (VQ(D, codes=1), "at least 2 codes"),
        (VQ(D, width=0), "at least 1 dimension"),
        (VQ(D, commitment=-1.0), "commitment must be at least 0"),
        (FSQ(D, levels=(8, 1)), "each at least 2"),
    ],
)
def test_what_makes_no_codes_is_refused(module: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((B, H, W, D)))
