from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tokenlab.data.source import Source
from tokenlab.data.sources import digits


@pytest.fixture(scope="module")
def source() -> Source:
    return digits.build(digits.Config())


def test_the_split_never_moves() -> None:
    pixels, labels = digits.load()
    digest = hashlib.sha256()
    for split, indices in digits.split_indices(labels).items():
        digest.update(split.encode())
        digest.update(indices.astype("<i8").tobytes())
        digest.update(labels[indices].astype("<i8").tobytes())
        digest.update(pixels[indices].astype("u1").tobytes())
    assert digest.hexdigest() == "cce818e05838653bc96d285dd4a0f0b3a9c82fc1e8627431110edb83b84cfd00"
    assert digits.build(digits.Config()).fingerprint == "digits:520c4cdd4521dc27"


def test_a_partition_of_all_digits() -> None:
    _, labels = digits.load()
    parts = digits.split_indices(labels)
    assert {split: len(indices) for split, indices in parts.items()} == digits.SPLITS
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1797))
    for indices in parts.values():
        assert (np.diff(indices) > 0).all()


def test_classes_in_proportion() -> None:
    _, labels = digits.load()
    counts = np.bincount(labels)
    for split, indices in digits.split_indices(labels).items():
        exact = counts * digits.SPLITS[split] / 1797
        # Train takes what two roundings leave over.
        assert np.abs(np.bincount(labels[indices]) - exact).max() < (2 if split == "train" else 1)


def test_spec_and_range(source: Source) -> None:
    assert isinstance(source, Source)
    assert source.splits == {"train": 1257, "validation": 180, "test": 360}
    assert source.spec == {"image": ((8, 8, 1), "float32"), "label": ((), "int32")}
    assert source.num_classes == 10
    for split, n in source.splits.items():
        batch = source.split(split).batch(np.arange(n))
        assert batch["image"].min() == -1 and batch["image"].max() == 1
        # Seventeen grey levels, evenly spaced.
        np.testing.assert_array_equal(np.unique(batch["image"]), np.arange(17, dtype=np.float32) / 8 - 1)
        assert set(batch["label"].tolist()) == set(range(10))


def test_images_go_with_their_labels(source: Source) -> None:
    pixels, labels = digits.load()
    for split, indices in digits.split_indices(labels).items():
        batch = source.split(split).batch(np.arange(len(indices)))
        np.testing.assert_array_equal((batch["image"][..., 0] + 1) * 8, pixels[indices])
        np.testing.assert_array_equal(batch["label"], labels[indices])


def test_the_class_means_tell_the_digits_apart(source: Source) -> None:
    # Real digits, not noise: the nearest class mean alone is right nine times out of ten.
    train = source.split("train").batch(np.arange(1257))
    test = source.split("test").batch(np.arange(360))
    means = np.stack([train["image"][train["label"] == label].mean(0) for label in range(10)])
    distance = ((test["image"][:, None] - means[None]) ** 2).sum((2, 3, 4))
    assert (distance.argmin(1) == test["label"]).mean() > 0.85


def test_where_the_file_is_elsewhere_the_import_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pixels, labels = digits.load()
    import sklearn.datasets  # noqa: F401  (before find_spec is replaced)

    elsewhere = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: elsewhere)
    other_pixels, other_labels = digits.load()
    np.testing.assert_array_equal(other_pixels, pixels)
    np.testing.assert_array_equal(other_labels, labels)
    assert other_pixels.dtype == pixels.dtype and other_labels.dtype == labels.dtype


def test_reading_digits_imports_neither_scikit_learn_nor_jax() -> None:
    code = (
        "import sys; from tokenlab import data; data.build({'name': 'digits'}); "
        "print(sorted({'jax', 'sklearn', 'tensorflow', 'grain', 'tensorflow_datasets'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
