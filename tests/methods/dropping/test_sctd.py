"""ScTD: its loss by hand, which steps align and what they cost, what the dense run teaches, and its cosine."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import encoders
from tokenlab.core.config import override
from tokenlab.core.errors import ConfigError, ShapeError, StackError, TokenLabError
from tokenlab.methods.dropping.sctd import SctdPath, every, sctd_loss, semantic_consistency
from tokenlab.tasks.masked_lm import MaskedLM
from tokenlab.tasks.sctd import SctdConfig, SctdTask
from tokenlab.train import default_config, experiment, token_clock
from tokenlab.train.costs import train_cost
from tokenlab.train.schedule import StackVars
from tokenlab.train.step import metric_names
from tokenlab.train.token_clock import tokens_in_layers

N, B = 24, 4
STACK = "block + sctd(keep={keep}, align={align})(block*2) + block"
KEY = jax.random.key(0)


def build(keep=11, align=1, *, train=True, **settings):
    pins = {"always_kept": (0, encoders.MASK), "first_dropped": (1,), **settings}
    return encoders.build(STACK.format(keep=keep, align=align), N, train=train, **pins)


@cache
def state():
    model = build()
    known = model.statistics["importance"]
    values = np.random.default_rng(0).permutation(np.linspace(1, 9, encoders.VOCABULARY))
    drawn = encoders.weights(model)
    return {**drawn, "statistics": {"importance": known.pinned(jnp.asarray(values, jnp.float32))}}


def losses(model, *, train=True, **settings):
    """Loss and metrics of one batch."""
    return jax.jit(loss_of(model, SctdTask(SctdConfig(**settings)), train))(state())


def loss_of(model, task, train=True):
    """A function of the model's state, of one batch; metrics without what is said of statistics."""
    given = jax.tree.map(jnp.asarray, encoders.batch(B, N))

    def loss(state):
        value, metrics = task.loss(model, state, given, rng=KEY, train=train)
        return value, {name: pair for name, pair in metrics.items() if "/" not in name}

    return loss


# ------------------------------------------------------------------------------------------------ the loss


def test_the_divergence_is_of_the_dense_from_the_sparse():
    """D = 2: p = softmax([1, 0]), q = softmax([0, 0]); the other way round is another number."""
    dense, sparse = jnp.array([[1.0, 0.0]]), jnp.zeros((1, 2))
    p = np.exp([1, 0]) / np.exp([1, 0]).sum()
    np.testing.assert_allclose(semantic_consistency(sparse, dense), (p * np.log(p / 0.5)).sum(), rtol=1e-6)
    np.testing.assert_allclose(semantic_consistency(dense, sparse), (0.5 * np.log(0.5 / p)).sum(), rtol=1e-6)
    assert abs(semantic_consistency(sparse, dense) - semantic_consistency(dense, sparse)) > 1e-3


def test_it_is_a_sum_over_sequences_never_below_zero():
    a, b = jax.random.normal(KEY, (2, 5, 7))
    each = [float(semantic_consistency(a[i : i + 1], b[i : i + 1])) for i in range(5)]
    assert min(each) > 0
    np.testing.assert_allclose(semantic_consistency(a, b), sum(each), rtol=1e-6)
    np.testing.assert_allclose(semantic_consistency(a, b, "mean"), sum(each) / 5, rtol=1e-6)
    weights = jnp.array([1.0, 0, 1, 0, 0])
    np.testing.assert_allclose(semantic_consistency(a, b, weights=weights), each[0] + each[2], rtol=1e-6)
    assert semantic_consistency(a, a) == 0


def test_who_learns_from_it():
    """Both states as published; the sparse one alone with `stop_gradient`."""
    a, b = jax.random.normal(KEY, (2, 5, 7))
    sparse, dense = jax.grad(semantic_consistency, (0, 1))(a, b)
    assert np.abs(sparse).min() > 0 and np.abs(dense).max() > 1e-3
    stopped = jax.grad(lambda a, b: semantic_consistency(a, b, stop_gradient=True), (0, 1))(a, b)
    np.testing.assert_allclose(stopped[0], sparse, rtol=1e-5)
    assert (stopped[1] == 0).all()


def test_the_sum_of_its_parts():
    states = tuple(jax.random.normal(KEY, (4, 3, 5)))
    sparse, dense = SctdPath(jnp.float32(3), states[:2]), SctdPath(jnp.float32(5), states[2:])
    kls = [float(semantic_consistency(states[i], states[i + 2])) for i in (0, 1)]
    total, found = sctd_loss(sparse, dense, align=True)
    np.testing.assert_allclose(found, kls, rtol=1e-6)
    np.testing.assert_allclose(total, 4 + 0.05 * sum(kls), rtol=1e-6)
    total, _ = sctd_loss(sparse, dense, align=True, mlm_mix=0.25, lam=0.0)
    assert total == 3.5
    assert sctd_loss(sparse, dense, align=True, lam=0.0, reference_compat=True)[0] == 3
    assert sctd_loss(sparse, None, align=False) == (3, ())
    weighed = jax.grad(lambda nats: sctd_loss(sparse, SctdPath(nats, states[2:]), align=True)[0])(5.0)
    compat = jax.grad(
        lambda nats: sctd_loss(sparse, SctdPath(nats, states[2:]), align=True, reference_compat=True)[0]
    )(5.0)
    assert weighed == 0.5 and compat == 0


def test_what_makes_no_sense():
    x = jnp.zeros((3, 5))
    one, two = SctdPath(jnp.float32(1), (x,)), SctdPath(jnp.float32(1), (x, x))
    for call, error, words in (
        (lambda: sctd_loss(one, None, align=True), TokenLabError, "needs the dense run"),
        (lambda: sctd_loss(one, two, align=True), TokenLabError, "same depths"),
        (lambda: sctd_loss(one, one, align=True, lam=-1.0), TokenLabError, "lam >= 0"),
        (lambda: sctd_loss(one, one, align=True, mlm_mix=2.0), TokenLabError, "mlm_mix"),
        (lambda: semantic_consistency(x, x[:2]), ShapeError, "expected"),
        (lambda: semantic_consistency(x, x, "max"), TokenLabError, "'sum' or 'mean'"),
        (lambda: every(3, 0), TokenLabError, "1 step or more"),
        (lambda: SctdConfig(lam=-0.1), ConfigError, "lam"),
        (lambda: SctdConfig(mlm_mix=1.5), ConfigError, "mlm_mix"),
        (lambda: build(align=2), StackError, "align is 2"),
        (lambda: build(keep=0), StackError, "keep is the count 0"),
        (lambda: build(keep=1.5), StackError, "must lie in"),
    ):
        with pytest.raises(error, match=words):
            call()
    with pytest.warns(UserWarning, match="published for a KL that is summed"):
        sctd_loss(one, one, align=True, reduction="mean")
    sctd_loss(one, one, align=True, reduction="mean", lam=0.1)
    assert [step for step in range(25) if every(step, 10)] == [0, 10, 20]


# ------------------------------------------------------------------------------------------------ the task


def test_with_everything_kept_both_runs_are_one():
    """Without dropout: no divergence and no gradient of it; the loss is the dense cross-entropy whatever its share."""
    held, loss = state()["statistics"], loss_of(build(keep=1.0), SctdTask())

    def divergence(params):
        value, metrics = loss({**params, "statistics": held})
        return metrics["kl_penultimate"][0] + metrics["kl_last"][0], (value, metrics)

    params = {name: leaf for name, leaf in state().items() if name != "statistics"}
    (found, (value, metrics)), grads = jax.jit(jax.value_and_grad(divergence, has_aux=True))(params)
    np.testing.assert_allclose(found, 0, atol=2e-6)
    assert float(metrics["kl_last"][1]) == B
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-4
    np.testing.assert_allclose(metrics["dense_loss"][0], metrics["loss"][0], rtol=1e-6)
    length = encoders.batch(B, N)["length"].sum()
    np.testing.assert_allclose(value * length, metrics["loss"][0], rtol=1e-6)


def test_layer_tokens_are_those_of_both_runs():
    """The clock of the learning rate, records and budgets count what is computed."""
    sparse, aligned = build(align=0), build(align=1)
    dense = build(train=False).layer_tokens
    assert tokens_in_layers(sparse, SctdTask()) == sparse.layer_tokens < dense == N * sparse.program.depth
    assert tokens_in_layers(aligned, SctdTask()) == sparse.layer_tokens + dense
    clock = token_clock.build("layer_tokens", StackVars(()), {"": aligned}, 8, SctdTask())
    assert clock.total == pytest.approx(8 * (1 + sparse.layer_tokens / dense))


def test_only_steps_that_align_run_dense():
    """A step that does costs a dense one more; metrics have the same names, and no weight in the others."""
    spec = {
        "ids": ((N,), "int32"),
        "word": ((N,), "int32"),
        "bytes": ((N,), "float32"),
        "length": ((), "int32"),
        "mask_id": ((), "int32"),
        "special_ids": ((3,), "int32"),
    }
    task = SctdTask()
    costs = [train_cost(build(align=align), task, spec, B).model_flops for align in (0, 1)]
    dense = train_cost(build(train=False), MaskedLM(), spec, B).model_flops
    assert costs[1] == costs[0] + dense and costs[0] < dense
    _, aligned = losses(build())
    value, plain = losses(build(align=0), normalize="hidden")
    assert aligned.keys() == plain.keys()
    assert [float(plain[name][1]) for name in ("dense_loss", "kl_penultimate", "kl_last")] == [0, 0, 0]
    assert float(aligned["kl_last"][0]) > 1e-4 and float(aligned["kl_penultimate"][0]) > 1e-4
    assert float(aligned["dense_loss"][0]) != float(aligned["loss"][0])
    np.testing.assert_allclose(aligned["loss"][0], plain["loss"][0], rtol=1e-6)
    masked, _ = jax.jit(loss_of(build(align=0), MaskedLM()))(state())
    np.testing.assert_allclose(value, masked, rtol=1e-6)


def test_the_dense_run_draws_for_itself():
    """With dropout the two runs differ even where everything is kept."""
    _, metrics = losses(build(keep=1.0, dropout=0.2))
    assert float(metrics["kl_last"][0]) > 1e-3


def test_evaluation_is_dense_and_tells_the_cosine():
    value, metrics = losses(build(train=False), train=False)
    plain = losses(encoders.build("block*4", N), train=False)
    assert metrics["loss"][0] == plain[1]["loss"][0] and value == plain[0]
    assert "cls_cosine" not in plain[1] and "kl_last" not in metrics
    total, rows = metrics["cls_cosine"]
    assert float(rows) == B and -1 <= float(total) / B < 1
    same = losses(build(keep=1.0, train=False), train=False)[1]["cls_cosine"]
    np.testing.assert_allclose(same[0] / same[1], 1.0, rtol=1e-6)


def test_the_cosine_is_left_out_where_the_importances_are():
    task, given = SctdTask(), jax.tree.map(jnp.asarray, encoders.batch(B, N))
    params = {name: leaf for name, leaf in state().items() if name != "statistics"}
    _, metrics = jax.eval_shape(
        lambda p: task.loss(build(train=False), p, given, rng=KEY, train=False), params
    )
    assert "cls_cosine" not in metrics


def test_another_task_does_not_align():
    given = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in encoders.batch(B, N).items()}
    with pytest.raises(ConfigError, match="sctd in the stack expects 'kl_last'"):
        metric_names(build(), MaskedLM(), build().abstract_state(), given)
    assert "kl_last" not in metric_names(build(align=0), MaskedLM(), build().abstract_state(), given)


def test_a_run_aligns_every_tenth_step_from_the_first_on():
    """Two compiled steps that share one state; evaluation and the facts of the run are those of the usual one."""
    config = default_config(model="encoder_lm", task="sctd", data="shakespeare")
    config.update(steps=25, batch_size=8)
    config.eval.batch_size = 64
    config.data.update(length=16, encoder=True)
    config.model.update(size="nano", stack="block + sctd(keep=7, align=a)(block*2) + block")
    built = experiment.build(override(config, {"stack_vars.a": "every 10: 1 else 0"}))
    assert [step for step in range(25) if built.values(step) == "a=1"] == [0, 10, 20]
    assert len(built.models) == 2
    assert built.step_cost(0).model_flops > 2 * built.step_cost(1).model_flops
    assert "align=0" in built.facts()["stack"]
