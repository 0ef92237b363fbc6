"""Probes against what they are defined as."""

from __future__ import annotations

import numpy as np
import pytest

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.evaluate import probe

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(0, 1, (4, 8))


def features(count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    labels = RNG.integers(0, 4, count)
    return (CENTRES[labels] + RNG.normal(0, noise, (count, 8))).astype(np.float32), labels


TRAIN, TRAIN_LABELS = features(200, 0.8)
TEST, TEST_LABELS = features(60, 0.8)
DATA = (TRAIN, TRAIN_LABELS, TEST, TEST_LABELS, 4)


def test_knn_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = 0
    for row, label in zip(TEST, TEST_LABELS, strict=True):
        similarity = TRAIN @ row / np.linalg.norm(TRAIN, axis=1) / np.linalg.norm(row)
        votes = np.zeros(4)
        for place in np.argsort(-similarity)[:20]:
            votes[TRAIN_LABELS[place]] += np.exp(similarity[place] / 0.07)
        hits += votes.argmax() == label
    found = probe.knn(*DATA)
    assert found == {"accuracy": hits / 60, "k": 20, "temperature": 0.07}
    assert 0.5 < found["accuracy"] < 1
    monkeypatch.setattr(probe, "CHUNK", 7)
    assert probe.knn(*DATA) == found
    few = probe.knn(TRAIN[:3], TRAIN_LABELS[:3], TEST, TEST_LABELS, 4)
    assert few["k"] == 3
    assert np.isfinite(probe.knn(TRAIN * 0, TRAIN_LABELS, TEST * 0, TEST_LABELS, 4)["accuracy"])


def test_linear_chooses_its_strength_without_the_test_set() -> None:
    found = probe.linear(*DATA)
    assert 0.6 < found["accuracy"] < 1 and found["converged"]
    assert found["C"] in found["tried"] == [0.01, 0.1, 1.0, 10.0]
    other = probe.linear(TRAIN, TRAIN_LABELS, TEST, (TEST_LABELS + 1) % 4, 4)
    assert (other["C"], other["held_out_accuracy"]) == (found["C"], found["held_out_accuracy"])
    assert other["accuracy"] < 0.3
    # Standardised: neither a scale nor a shift, nor a feature that never changes, makes a difference.
    scaled = [np.hstack([part * 100 + 7, np.ones((len(part), 1), np.float32)]) for part in (TRAIN, TEST)]
    again = probe.linear(scaled[0], TRAIN_LABELS, scaled[1], TEST_LABELS, 4)
    assert again["accuracy"] == pytest.approx(found["accuracy"], abs=0.02)


def test_too_little_to_learn_from() -> None:
    with pytest.raises(DataError, match=r"9 examples of .* classes; expected at least 10"):
        probe.linear(TRAIN[:9], TRAIN_LABELS[:9], TEST, TEST_LABELS, 4)
    with pytest.raises(DataError, match="of 1 classes"):
        probe.linear(TRAIN, TRAIN_LABELS * 0, TEST, TEST_LABELS, 4)


def test_names() -> None:
    assert probe.parse("knn, linear,knn") == ("knn", "linear")
    with pytest.raises(ConfigError, match="no probe 'liner'. Did you mean 'linear'"):
        probe.parse("knn,liner")
