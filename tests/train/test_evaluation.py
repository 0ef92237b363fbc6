"""The evaluator: each example once, on any mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tokenlab import data, models, tasks
from tokenlab.sharding.mesh import make_mesh
from tokenlab.train.evaluation import Evaluator, means

DIGITS = data.build({"name": "digits"})


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    found = models.build(
        {"size": "nano/2", "stack": "block + keep(9, by=norm) + block"},
        spec=DIGITS.spec,
        num_outputs=10,
        train=False,
    )
    params = jax.jit(found.init)(jax.random.key(3))
    # The classifier starts at zero, which would make every accuracy the same.
    kernel = jax.random.normal(jax.random.key(4), params["head"]["classifier"]["kernel"].shape)
    params["head"]["classifier"]["kernel"] = kernel
    return found, jax.tree.map(np.asarray, params)


def plain(model: Any, params: Any, split: str) -> dict[str, float]:
    """Loss and accuracy of one forward pass over everything, by hand."""
    records = DIGITS.split(split)
    batch = records.batch(np.arange(len(records)))
    logits = np.asarray(jax.jit(model.apply)(params, batch).logits, np.float64)
    each = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    each -= logits[np.arange(len(records)), batch["label"]]
    return {"loss": each.mean(), "accuracy": np.mean(logits.argmax(-1) == batch["label"])}


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 2, "expert": 2}])
@pytest.mark.parametrize("rows", [80, 512])
def test_every_example_counts_once_on_any_mesh(model: Any, axes: dict[str, int], rows: int) -> None:
    built, params = model
    evaluator = Evaluator(built, tasks.build({}), make_mesh(axes))
    assert evaluator.shards == 8 // axes.get("tensor", 1)
    placed = evaluator.put(params)
    whole = placed["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(whole, params["blocks"]["mlp"]["up"]["kernel"])
    split = any(axes.get(axis, 1) > 1 for axis in ("fsdp", "tensor"))
    assert (whole.addressable_shards[0].data.size < whole.size) == split
    found, wanted = evaluator(placed, DIGITS, "validation", rows).metrics, plain(built, params, "validation")
    assert found["accuracy"] == pytest.approx(wanted["accuracy"], abs=1e-12)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert 0 < found["accuracy"] < 1


def test_means_leave_out_what_has_no_weight() -> None:
    assert means({"b": (3.0, 2.0), "a": (1.0, 4.0), "none": (0.0, 0.0)}, None) == {"a": 0.25, "b": 1.5}
