"""How much frozen features tell of the classes: nearest neighbours and a linear classifier, learned on them alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tokenlab.core.errors import ConfigError, DataError, suggest

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of k-NN, as in Caron et al. 2021 (DINO)."""

CHUNK = 1024
"""Test examples compared at once with all training examples."""

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Of the linear probe: values of C, the inverse of its L2 penalty, among which one is chosen."""

MAX_ITERATIONS = 1000


def parse(text: str) -> tuple[str, ...]:
    """Names of probes from "knn,linear", each once. Raises ConfigError for one there is not."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in PROBES:
            raise ConfigError(f"--probe={text}: there is no probe {name!r}.{suggest(name, PROBES)}")
    return names


def knn(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[str, Any]:
    """Weighted k-nearest-neighbour classification by cosine similarity.

    Each of the k most similar training examples votes for its class with weight exp(similarity / temperature).

    Args:
      train: features [n, D] float32.
      train_labels: [n] int.
      test: features [m, D] float32.
      test_labels: [m] int.
      num_classes: C.
      k: neighbours; all training examples where there are fewer.
      temperature: above 0.

    Returns:
      "accuracy", and the "k" and "temperature" it was found with.

    Source: Wu et al. 2018, arXiv 1805.01978, section 3.4; Caron et al. 2021, arXiv 2104.14294, section 4.1.
    """
    k = min(k, len(train))
    memory = _unit(train)
    hits = 0
    for first in range(0, len(test), CHUNK):
        similarity = _unit(test[first : first + CHUNK]) @ memory.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        # Relative to the most similar example, which changes no vote's share and cannot overflow.
        closeness = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
        weights = np.exp((closeness - closeness.max(axis=1, keepdims=True)) / temperature)
        votes = np.zeros((len(similarity), num_classes))
        np.add.at(votes, (np.arange(len(similarity))[:, None], train_labels[nearest]), weights)
        hits += int((votes.argmax(axis=1) == test_labels[first : first + CHUNK]).sum())
    return {"accuracy": hits / len(test), "k": k, "temperature": temperature}


def linear(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, num_classes: int
) -> dict[str, Any]:
    """Multinomial logistic regression on standardised features, with an L2 penalty.

    The strength of the penalty is the one of `STRENGTHS` that is right most often on a tenth of the training examples
    that is held out, the strongest penalty among equals; then all training examples are learned with it.

    Args:
      train, train_labels, test, test_labels, num_classes: as for `knn`.

    Returns:
      "accuracy" on the test examples, the chosen "C", "held_out_accuracy" with it, the values "tried" and whether the
      last fit "converged".

    Raises:
      DataError: the training examples are of one class, or too few to hold a tenth out.
    """
    from sklearn.linear_model import LogisticRegression  # here: it takes a second to import

    mean, deviation = train.mean(axis=0), train.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1.0)
    train, test = (train - mean) / scale, (test - mean) / scale
    order = np.random.default_rng(0).permutation(len(train))
    held, rest = np.split(order, [len(train) // 10])
    if not len(held) or min(len(np.unique(train_labels[part])) for part in (rest, order)) < 2:
        raise DataError(
            f"the linear probe learns from {len(train)} examples of {len(np.unique(train_labels))} classes; expected "
            "at least 10 examples, and 2 classes among the nine tenths it learns from."
        )

    def fit(part: np.ndarray, strength: float) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it did not converge stands in the result
            return LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(
                train[part], train_labels[part]
            )

    scores = {c: float(fit(rest, c).score(train[held], train_labels[held])) for c in STRENGTHS}
    chosen = max(STRENGTHS, key=lambda strength: (scores[strength], -strength))
    final = fit(order, chosen)
    return {
        "accuracy": float(final.score(test, test_labels)),
        "C": chosen,
        "held_out_accuracy": scores[chosen],
        "tried": list(STRENGTHS),
        "converged": bool(np.max(final.n_iter_) < MAX_ITERATIONS),
    }


PROBES: Mapping[str, Callable[..., dict[str, Any]]] = {"knn": knn, "linear": linear}
"""By the name that `--probe` gives them."""


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays one."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1.0)
