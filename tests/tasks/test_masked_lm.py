"""masked_lm: what is hidden of a batch, when it changes, and the loss against numpy."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests import encoders
from tokenlab.core.errors import ConfigError
from tokenlab.tasks import build, masked_lm
from tokenlab.train import step

B, N, V = 6, 24, encoders.VOCABULARY
BATCH = encoders.batch(B, N)
MODEL = SimpleNamespace(vocab_size=V)


def task(**settings):
    return build({"name": "masked_lm", **settings})


def hidden(batch=BATCH, seed=0, *, train=True, **settings):
    made = task(**settings)
    run = jax.jit(lambda given, key: made.hidden(MODEL, given, rng=key, train=train))
    return jax.tree.map(np.asarray, run(batch, jax.random.key(seed)))


def rows_of(batch, chosen):
    return {key: leaf[np.asarray(chosen)] for key, leaf in batch.items()}


@pytest.mark.parametrize("how", ["tokens", "words", "spans"])
def test_labels_are_what_stood_at_the_places_that_are_guessed(how):
    found = hidden(hide=how, ratio=0.3)
    most = math.ceil(0.3 * N)
    assert found["predict"].shape == found["label"].shape == found["weight"].shape == (B, most)
    np.testing.assert_array_equal(found["label"], np.take_along_axis(BATCH["ids"], found["predict"], 1))
    real = found["weight"] > 0
    assert (np.take_along_axis(BATCH["word"], found["predict"], 1)[real] > 0).all()
    changed = found["ids"] != BATCH["ids"]
    guessed = np.zeros((B, N), bool)
    for row in range(B):
        guessed[row, found["predict"][row][real[row]]] = True
    assert changed.any() and not (changed & ~guessed).any()
    assert found.keys() == BATCH.keys() | {"predict", "label", "weight"}


def test_training_hides_anew_at_every_step_and_by_row():
    first, again, other = hidden(), hidden(), hidden(seed=1)
    np.testing.assert_array_equal(first["ids"], again["ids"])
    assert (first["predict"] != other["predict"]).any()
    same = rows_of(BATCH, [0] * B)
    assert len(np.unique(hidden(same)["predict"], axis=0)) > 1


def test_evaluation_asks_the_same_of_an_example_whatever_is_beside_it():
    found, other = hidden(train=False), hidden(seed=5, train=False)
    jax.tree.map(np.testing.assert_array_equal, found, other)
    order = [4, 4, 1]
    moved = hidden(rows_of(BATCH, order), train=False)
    jax.tree.map(np.testing.assert_array_equal, moved, rows_of(found, order))
    assert len(np.unique(found["predict"], axis=0)) > 1


def test_the_loss_is_the_mean_over_the_guesses_that_count():
    draws = np.random.default_rng(2)
    given = {**BATCH, "mask": np.array([1, 1, 0, 1, 1, 1], np.float32)}
    made = task(ratio=0.3)
    asked = hidden(given, train=False, ratio=0.3)
    logits = draws.standard_normal((*asked["predict"].shape, V)).astype(np.float32) * 3
    places = asked["predict"].copy()
    places[1, 0] = -1  # a token that has not got through the stack
    output = SimpleNamespace(
        logits=logits, places=places, losses={"more": 0.5}, aux=SimpleNamespace(metrics={"seen": (1.0, 2.0)})
    )
    model = SimpleNamespace(vocab_size=V, apply=lambda *args, **kwargs: output)
    value, metrics = made.loss(model, None, given, rng=jax.random.key(0), train=False)

    nats, hits, size = [], [], []
    for row, k in np.ndindex(*asked["predict"].shape):
        if asked["weight"][row, k] and given["mask"][row] and places[row, k] >= 0:
            one = logits[row, k].astype(np.float64)
            nats.append(np.log(np.exp(one).sum()) - one[asked["label"][row, k]])
            hits.append(one.argmax() == asked["label"][row, k])
            size.append(given["bytes"][row, asked["predict"][row, k]])
    np.testing.assert_allclose(value, np.mean(nats) + 0.5, rtol=1e-5)
    means = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
    np.testing.assert_allclose(means["loss"], np.mean(nats), rtol=1e-5)
    np.testing.assert_allclose(means["accuracy"], np.mean(hits), rtol=1e-5)
    np.testing.assert_allclose(means["bits_per_byte"], sum(nats) / math.log(2) / sum(size), rtol=1e-5)
    free = (given["word"] * given["mask"][:, None] > 0).sum()
    np.testing.assert_allclose(means["guessed"], len(nats) / free, rtol=1e-6)
    assert means["more"] == 0.5 and means["seen"] == 0.5
    assert made.derived({"loss": 2.0}) == {"perplexity": math.exp(2.0)}
    found = masked_lm.judged(output, {**asked, "mask": given["mask"]})
    assert found.nats.shape == found.label.shape and float(found.nats.sum()) == pytest.approx(
        sum(nats), rel=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ratio": 0.0}, "config.task.ratio must be between 0 and 1; got 0.0"),
        ({"ratio": 1.0}, "config.task.ratio must be between 0 and 1; got 1.0"),
        ({"ratio": float("nan")}, "config.task.ratio must be between 0 and 1"),
        ({"mask": 0.8, "random": 0.3}, "together at most 1; got 0.8 and 0.3"),
        ({"mask": -0.1}, "must be probabilities"),
        ({"span_p": 0.0}, r"config.task.span_p must be in \(0, 1\]"),
        ({"span_longest": 0}, "config.task.span_longest must be at least 1"),
        ({"hide": "word"}, "config.task.hide"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(ConfigError, match=says):
        task(**settings)


def test_other_data_is_refused():
    source = SimpleNamespace(name="digits", spec={"image": 0, "label": 0}, vocab_size=None)
    with pytest.raises(ConfigError, match="masked_lm needs text with a mask; data 'digits' has image, label"):
        task().num_outputs(source)
    source = SimpleNamespace(name="tiny", spec={"ids": 0, "target": 0}, vocab_size=9)
    with pytest.raises(ConfigError, match="config.data.encoder=True"):
        task().num_outputs(source)


@pytest.mark.parametrize("name", ["masked_lm", "sctd"])
def test_a_head_that_guesses_nothing_is_refused_when_a_run_is_built(name):
    made = build({"name": name})
    model = encoders.build("block", head="classify", vocab_size=V, outputs=2, train=True)
    with pytest.raises(
        ConfigError, match=r"the 4 hidden places.*\[6, 4, V\], and the model gives \[6, 2\].*'masked_lm'"
    ):
        step.metric_names(model, made, model.abstract_state(), BATCH)


def test_a_head_that_guesses_tokens_does_not_classify():
    model = encoders.build("block", outputs=2, train=True)
    given = {**BATCH, "label": np.zeros(B, np.int32)}
    with pytest.raises(
        ConfigError, match=r"\[6, classes\], and the model gives \[6, 24, 2\].*config.model.head='classify'"
    ):
        step.metric_names(model, build({"name": "classify"}), model.abstract_state(), given)


def test_accumulated_microbatches_are_the_mean_over_all_that_is_hidden(monkeypatch):
    """Rows hide from 0 to 7 tokens here, the same in whole batches as in microbatches, one of which hides none."""
    fixed = masked_lm.row_keys
    monkeypatch.setattr(masked_lm, "row_keys", lambda batch, rng, *, train: fixed(batch, rng, train=False))
    free = np.array([0, 5, 0, 0, 0, 23])[:, None] >= np.arange(N)
    given = {**BATCH, "word": BATCH["word"] * free}
    model, made = encoders.build("block", train=True), task(ratio=0.3)
    state, key = encoders.weights(model), jax.random.key(0)
    whole, metrics, gradients = jax.jit(
        lambda state, batch: step.loss_and_gradients(model, made, state, batch, key)
    )(state, given)
    parts, parted, accumulated = jax.jit(
        lambda state, batch: step.accumulated(model, made, state, batch, key, 3, lambda tree: tree)
    )(state, given)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    np.testing.assert_array_equal(parted["loss"][1], metrics["loss"][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), accumulated, gradients)
