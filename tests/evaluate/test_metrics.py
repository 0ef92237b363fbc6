"""Metrics of classification against sums by hand and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics

from tokenlab.core.errors import ShapeError
from tokenlab.evaluate import metrics

LOGITS = np.random.default_rng(0).normal(0, 2, (300, 7)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 6, 300)  # class 6 has no examples
PREDICTED = LOGITS.argmax(axis=1)
SHARES = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum(axis=1, keepdims=True)


def test_against_scikit_learn() -> None:
    wanted = sklearn.metrics.log_loss(LABELS, SHARES, labels=range(7))
    assert metrics.negative_log_likelihood(LOGITS, LABELS) == pytest.approx(wanted, rel=1e-12)
    assert metrics.brier_score(LOGITS, LABELS) == pytest.approx(
        np.mean(np.sum((SHARES - np.eye(7)[LABELS]) ** 2, axis=1))
    )
    found = metrics.confusion_matrix(PREDICTED, LABELS, 7)
    np.testing.assert_array_equal(found, sklearn.metrics.confusion_matrix(LABELS, PREDICTED, labels=range(7)))
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
        LABELS, PREDICTED, labels=range(6)
    )
    rows = metrics.per_class(found)[:6]
    for key, wanted in (("precision", precision), ("recall", recall), ("f1", f1), ("support", support)):
        np.testing.assert_allclose([row[key] for row in rows], wanted)


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.9, 0.95, 0.62, 0.64, 2 / 3])
    logits = np.log(np.stack([confidence, 1 - confidence], axis=1))
    found = metrics.calibration(logits, np.array([0, 1, 0, 0, 1]))
    used = {round(each.low * 15): each for each in found.bins if each.count}
    assert {number: each.count for number, each in used.items()} == {13: 1, 14: 1, 9: 3}
    assert used[9].accuracy == pytest.approx(2 / 3)
    assert used[9].confidence == pytest.approx((0.62 + 0.64 + 2 / 3) / 3)
    wanted = abs(1 - 0.9) / 5 + abs(0 - 0.95) / 5 + abs(2 - (0.62 + 0.64 + 2 / 3)) / 5
    assert found.ece == pytest.approx(wanted)
    assert found.bins[0] == metrics.Bin(0.0, 1 / 15, 0, None, None)
    sure = metrics.calibration(np.array([[900.0, -900.0]] * 4), np.array([0, 0, 0, 1]))
    assert sure.ece == pytest.approx(0.25) and sure.bins[-1].count == 4


def test_a_class_without_examples_has_none_and_one_never_said_no_precision() -> None:
    confusion = np.array([[2, 1, 0], [0, 0, 0], [3, 0, 0]])
    first, empty, never = metrics.per_class(confusion, ("a", "b", "c"))
    assert (empty["name"], empty["support"], empty["predicted"]) == ("b", 0, 1)
    assert empty["precision"] is empty["recall"] is empty["f1"] is None
    assert (never["precision"], never["recall"], never["f1"]) == (None, 0.0, 0.0)
    assert (first["precision"], first["recall"], first["f1"]) == (2 / 5, 2 / 3, 4 / 8)


def test_most_confused_pairs() -> None:
    confusion = np.array([[9, 1, 4], [0, 9, 0], [4, 0, 9]])
    found = metrics.most_confused(confusion)
    assert [(pair["label"], pair["predicted"], pair["count"]) for pair in found] == [
        (0, 2, 4),
        (2, 0, 4),
        (0, 1, 1),
    ]
    assert len(metrics.most_confused(confusion, limit=1)) == 1 and confusion[0, 0] == 9


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ShapeError, match="labels are 0 to 7; expected 0 to 6"):
        metrics.brier_score(LOGITS[:2], np.array([0, 7]))
    with pytest.raises(ShapeError, match="at least one example"):
        metrics.calibration(LOGITS[:0], LABELS[:0])
