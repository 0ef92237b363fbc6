"""One pass over a split: every example once and in order, on any mesh and for several models."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import sklearn.metrics

from tokenlab import data, models, tasks
from tokenlab.core.errors import NonFiniteError
from tokenlab.evaluate import metrics
from tokenlab.evaluate.predictions import predict, put
from tokenlab.sharding.mesh import make_mesh
from tokenlab.train.evaluation import Evaluator

DIGITS = data.build({"name": "digits"})
STACKS = ("block*2", "block + keep(9, by=norm) + block")


@pytest.fixture(scope="module")
def built() -> tuple[list[Any], Any]:
    found = [
        models.build({"size": "nano/2", "stack": stack}, spec=DIGITS.spec, num_outputs=10, train=False)
        for stack in STACKS
    ]
    params = jax.jit(found[0].init)(jax.random.key(3))
    kernel = jax.random.normal(jax.random.key(4), params["head"]["classifier"]["kernel"].shape)
    params["head"]["classifier"]["kernel"] = kernel
    return found, jax.tree.map(np.asarray, params)


def everything(split: str) -> data.Batch:
    (batch,) = data.eval_batches(DIGITS, split, DIGITS.splits[split])
    return batch


@pytest.mark.parametrize(
    ("axes", "rows"), [({"data": 8}, 80), ({"data": 2, "fsdp": 4}, 256), ({"data": 1}, 7)]
)
def test_as_one_plain_forward_pass(built: Any, axes: dict[str, int], rows: int) -> None:
    found, params = built
    task = tasks.build({})
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = make_mesh(axes, devices) if len(devices) < len(jax.devices()) else make_mesh(axes)
    evaluators = [Evaluator(model, task, mesh) for model in found]
    placed = put(evaluators, [params, params])
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, *placed))
    said = predict(evaluators, placed, DIGITS, "validation", rows)
    batch, size = everything("validation"), DIGITS.splits["validation"]
    assert size % rows
    for model, each in zip(found, said, strict=True):
        plain = jax.jit(model.apply)(params, {"image": batch["image"]})
        np.testing.assert_array_equal(each.index, np.arange(size))
        np.testing.assert_array_equal(each.labels, batch["label"])
        np.testing.assert_allclose(each.logits, plain.logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(each.features, plain.features, rtol=1e-4, atol=1e-4)
        assert (each.logits.dtype, each.features.shape, len(each)) == (np.float32, (size, 16), size)
        right = np.mean(each.logits.argmax(axis=1) == batch["label"])
        assert each.metrics["accuracy"] == pytest.approx(right, abs=1e-12)
        nll = metrics.negative_log_likelihood(each.logits, each.labels)
        assert each.metrics["loss"] == pytest.approx(nll, rel=1e-5)
        top = sklearn.metrics.top_k_accuracy_score(each.labels, each.logits, k=5, labels=range(10))
        assert each.metrics["top5_accuracy"] == pytest.approx(top, abs=1e-6) and right < top < 1
        assert each.examples_per_second > 0
    assert np.abs(said[0].logits - said[1].logits).max() > 0.01


def test_what_the_data_leaves_out_is_left_out(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, params = built
    batches = data.eval_batches

    def skipping(*args: Any, **kwargs: Any) -> Any:
        for number, batch in enumerate(batches(*args, **kwargs)):
            batch["mask"][3] = 0 if number == 1 else 1
            yield batch

    evaluator = Evaluator(found[0], tasks.build({}), make_mesh({"data": 8}))
    (placed,) = put([evaluator], [params])
    (whole,) = predict([evaluator], [placed], DIGITS, "validation", 64)
    monkeypatch.setattr(data, "eval_batches", skipping)
    (said,) = predict([evaluator], [placed], DIGITS, "validation", 64)
    left = np.delete(np.arange(len(whole)), 67)
    np.testing.assert_array_equal(said.index, left)
    np.testing.assert_array_equal(said.labels, whole.labels[left])
    np.testing.assert_array_equal(said.logits, whole.logits[left])
    hits = said.logits.argmax(axis=1) == said.labels
    assert said.metrics["accuracy"] == pytest.approx(hits.mean(), abs=1e-12)


def test_logits_that_are_not_finite(built: Any) -> None:
    found, params = built
    bad = jax.tree.map(np.copy, params)
    bad["head"]["classifier"]["bias"][2] = np.inf
    evaluator = Evaluator(found[0], tasks.build({}), make_mesh({"data": 8}))
    with pytest.raises(NonFiniteError, match="not finite for 180 of 180 examples of split 'validation'"):
        predict([evaluator], put([evaluator], [bad]), DIGITS, "validation", 256)


def test_tied_logits_in_the_task() -> None:
    """A fresh classifier gives every class the same: half of ten are among five."""
    model = models.build({"size": "nano/2"}, spec=DIGITS.spec, num_outputs=10, train=False)
    params, batch = jax.jit(model.init)(jax.random.key(0)), everything("validation")
    task = tasks.build({})
    _, found = task.loss(model, params, batch, rng=jax.random.key(0), train=False)
    assert float(found["top5_accuracy"][0] / found["top5_accuracy"][1]) == pytest.approx(0.5)
    _, found = task.loss(model, params, batch, rng=jax.random.key(0), train=True)
    assert "top5_accuracy" not in found
