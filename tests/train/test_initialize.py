"""Parameters of another run: what is loaded, what starts anew, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import CheckpointError
from tokenlab.train import initialize
from tokenlab.train.checkpoint import Checkpoints
from tokenlab.train.config import InitFrom


def params(value: float = 1.0, *, outputs: int = 3, item: bool = True) -> dict[str, Any]:
    found = {
        "blocks": {"mlp": {"kernel": jnp.full((2, 4, 4), value)}},
        "head": {"kernel": jnp.full((4, outputs), value), "bias": jnp.full(outputs, value)},
    }
    return found | {"items": {"keep": {"kernel": jnp.full((1, 4), value)}}} if item else found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Parameters of 1 and their average of 2 at step 5."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(5, {"params": params(1.0), "ema": params(2.0)}, {"ema": True}, wait=True)
    yield folder


def test_the_average_is_what_is_loaded(workdir: Path) -> None:
    loaded = initialize.load(InitFrom(str(workdir)), params())
    assert sorted(loaded) == ["blocks/mlp/kernel", "head/bias", "head/kernel", "items/keep/kernel"]
    assert all((leaf == 2.0).all() for leaf in loaded.values())
    assert initialize.evaluation_params(workdir)[1]["step"] == 5


def test_without_an_average_the_parameters_are(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(5, {"params": params(1.0), "ema": None}, {"ema": False}, wait=True)
    assert (initialize.evaluation_params(tmp_path)[0]["head"]["bias"] == 1.0).all()


def test_what_is_fresh_is_left_alone_whatever_its_shape(workdir: Path) -> None:
    config = InitFrom(str(workdir), fresh=("head", "items/keep"))
    new = params(7.0, outputs=5, item=False)
    loaded = initialize.load(config, new)
    assert sorted(loaded) == ["blocks/mlp/kernel"]
    merged = initialize.merge(new, loaded)
    np.testing.assert_array_equal(merged["blocks"]["mlp"]["kernel"], 2.0)
    np.testing.assert_array_equal(merged["head"]["kernel"], 7.0)
    assert jax.tree.structure(merged) == jax.tree.structure(new)


def test_nothing_is_loaded_without_a_path() -> None:
    assert initialize.load(InitFrom(), params()) == {}


@pytest.mark.parametrize(
    ("fresh", "model", "words"),
    [
        ((), {"outputs": 5}, ["head/bias", "(3,)", "(5,)", "init_from.fresh=('head/bias',)"]),
        ((), {"item": False}, ["items/keep/kernel", "the model does not have it", "fresh=('items/keep',)"]),
        (("hed",), {}, ["'hed'", "Did you mean 'head'?"]),
        (("hea",), {}, ["'hea'"]),
        (("hea[d]/*",), {}, ["'hea[d]/*'"]),
        (("hea?/*",), {}, ["'hea?/*'"]),
    ],
)
def test_what_does_not_fit(
    workdir: Path, fresh: tuple[str, ...], model: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        initialize.load(InitFrom(str(workdir), fresh), params(**model))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_an_item_the_checkpoint_lacks_is_an_error(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        dense = params(1.0, item=False)
        checkpoints.save(5, {"params": dense, "ema": None}, {"ema": False}, wait=True)
    with pytest.raises(CheckpointError, match=r"items/keep/kernel: .* does not have it, the model needs it"):
        initialize.load(InitFrom(str(tmp_path)), params())
    loaded = initialize.load(InitFrom(str(tmp_path), ("items",)), params())
    assert "head/kernel" in loaded and "items/keep/kernel" not in loaded
