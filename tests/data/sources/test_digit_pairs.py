"""Pairs of digits: what they are made of, that splits do not meet, that they never move."""

from __future__ import annotations

import numpy as np
import pytest

from tokenlab.core.errors import ConfigError
from tokenlab.data.sources import digit_pairs, digits

EXAMPLES = 2000


@pytest.fixture(scope="module")
def source():
    return digit_pairs.build(digit_pairs.Config(examples=EXAMPLES))


@pytest.fixture(scope="module")
def singles():
    one = digits.build(digits.Config())
    return {split: one.split(split).batch(np.arange(count)) for split, count in one.splits.items()}


def test_spec(source):
    assert source.splits == {"train": EXAMPLES, "validation": 1000, "test": 2000}
    assert source.spec == {"image": ((8, 16, 1), "float32"), "label": ((), "int32")}
    assert source.num_classes == 100


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_halves_are_digits_of_the_same_split(source, singles, split):
    pairs = source.split(split).batch(np.arange(source.splits[split]))
    known = {image.tobytes(): int(label) for image, label in zip(*singles[split].values(), strict=True)}
    for side, wanted in enumerate(np.divmod(pairs["label"], 10)):
        half = np.ascontiguousarray(pairs["image"][:, :, 8 * side : 8 * side + 8])
        found = [known[image.tobytes()] for image in half]  # a KeyError is a digit of another split
        assert found == wanted.tolist()


def test_classes_and_pictures_are_even(source):
    pairs = source.split("train").batch(np.arange(EXAMPLES))
    assert set(np.bincount(pairs["label"], minlength=100)) == {EXAMPLES // 100}
    for side in (0, 1):
        half = np.ascontiguousarray(pairs["image"][:, :, 8 * side : 8 * side + 8])
        uses = np.unique([image.tobytes() for image in half], return_counts=True)[1]
        assert uses.max() - uses.min() <= 1 and len(uses) > 1200
    # Which is on the left says nothing of which is on the right.
    assert len({image.tobytes() for image in pairs["image"]}) == EXAMPLES


def test_they_never_move(source):
    assert source.fingerprint == "digit_pairs:273fbf6f5fb3ed5d"
    assert digit_pairs.build(digit_pairs.Config(examples=EXAMPLES)) is source


def test_too_few():
    with pytest.raises(ConfigError, match="examples is 99: expected at least 100"):
        digit_pairs.Config(examples=99)
