"""Metrics of classification from logits and labels: numpy in, numbers out.

Everything is computed in float64. The class a model says is the first of those with the largest logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenlab.core.errors import ShapeError

BINS = 15
"""Bins of confidence, as in Guo et al. 2017."""


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over classes, [n, C] float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(label), in nats."""
    _check(logits, labels)
    return float(-log_probabilities(logits)[np.arange(len(labels)), labels].mean())


def brier_score(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over examples of the squared distance of probabilities to the label's one-hot vector, in [0, 2].

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability", equation 2.
    """
    _check(logits, labels)
    errors = np.exp(log_probabilities(logits))
    errors[np.arange(len(labels)), labels] -= 1.0
    return float(np.square(errors).sum(axis=1).mean())


@dataclass(frozen=True)
class Bin:
    """Examples with a confidence in (low, high]: how many, their mean confidence and accuracy (None without any)."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """How far confidence is from accuracy.

    Attributes:
      ece: expected calibration error, the mean over examples of |accuracy - confidence| of their bin, in [0, 1].
      bins: of equal width over [0, 1].
    """

    ece: float
    bins: tuple[Bin, ...]


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Calibration:
    """Expected calibration error of the largest probability, and the bins of its reliability diagram.

    Args:
      logits: [n, C].
      labels: [n].
      bins: equally wide, bin m is ((m - 1) / bins, m / bins].

    Source: Guo et al. 2017, arXiv 1706.04599, equation 3.
    """
    _check(logits, labels)
    confidence = np.exp(log_probabilities(logits).max(axis=1))
    right = logits.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    found, error = [], 0.0
    for number in range(bins):
        inside = place == number
        count = int(inside.sum())
        means = (float(confidence[inside].mean()), float(right[inside].mean())) if count else (None, None)
        found.append(Bin(number / bins, (number + 1) / bins, count, *means))
        if count:
            error += count / len(labels) * abs(means[1] - means[0])
    return Calibration(error, tuple(found))


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How many examples of class i (row) are said to be of class j (column): int64 [C, C]."""
    flat = np.bincount(labels.astype(np.int64) * num_classes + predicted, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def per_class(confusion: np.ndarray, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row a class: "class", "name", "support", "predicted", "precision", "recall", "f1".

    Support is the number of its examples, predicted how many are said to be of it. A class without examples has
    None for all three shares, and one that is never said has None for its precision.

    Args:
      confusion: from `confusion_matrix`.
      names: of the classes; None where they have none.
    """
    rows = []
    for number, (support, said, hits) in enumerate(
        zip(confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion), strict=True)
    ):
        rows.append(
            {
                "class": number,
                "name": names[number] if names is not None else None,
                "support": int(support),
                "predicted": int(said),
                "precision": float(hits / said) if support and said else None,
                "recall": float(hits / support) if support else None,
                "f1": float(2 * hits / (support + said)) if support else None,
            }
        )
    return rows


def most_confused(confusion: np.ndarray, limit: int = 10) -> list[dict[str, int]]:
    """Pairs of classes that are mistaken most often, the most frequent first: "label", "predicted", "count"."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(place), wrong.shape[1]) for place in order]
    return [{"label": i, "predicted": j, "count": int(wrong[i, j])} for i, j in pairs if wrong[i, j]]


def _check(logits: np.ndarray, labels: np.ndarray) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ShapeError(
            f"metrics read logits [n, C] and labels [n] of at least one example; got {list(logits.shape)} and "
            f"{list(labels.shape)}."
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ShapeError(
            f"labels are {labels.min()} to {labels.max()}; expected 0 to {logits.shape[1] - 1}, as the logits say."
        )
