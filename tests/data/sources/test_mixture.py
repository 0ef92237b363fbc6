from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import tiny_tfds
from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError, NameLookupError
from tokenlab.data.pipeline import Parts
from tokenlab.data.source import Source
from tokenlab.data.sources import mixture


def build(*parts: dict[str, Any], **options: str) -> mixture.MixtureSource:
    config = data.resolve({"name": "mixture", "parts": parts, **options})
    assert isinstance(config, mixture.Config)
    return mixture.build(config)


def arrays(
    folder: Path, name: str, *, size: int = 4, classes: int = 3, counts=(6, 3), **more: Any
) -> dict[str, Any]:
    """A part of arrays: every pixel of an image is its index, plus 100 for the second split."""
    (folder / name).mkdir()
    for base, split, count in zip((0, 100), ("train", "test"), counts, strict=True):
        images = np.broadcast_to(
            np.arange(base, base + count, dtype=np.uint8)[:, None, None, None], (count, size, 4, 1)
        )
        np.savez(folder / name / f"{split}.npz", image=images, label=np.arange(count) % classes)
    return {"name": "arrays", "path": str(folder / name), "num_classes": classes, "weight": 1.0, **more}


def tfds(folder: Path, name: str, **make: Any) -> dict[str, Any]:
    tiny_tfds.make(folder, name=name, **make)
    return {"name": "tfds", "dataset": name, "data_dir": str(folder), "weight": 2}


def test_records_follow_one_another(tmp_path: Path) -> None:
    source = build(arrays(tmp_path, "a"), arrays(tmp_path, "b", counts=(4, 5), weight=0.5))
    assert isinstance(source, Source)
    assert source.splits == {"test": 8, "train": 10}
    assert source.parts("train") == ((6, 1.0), (4, 0.5))
    assert source.parts("test") == ((3, 1.0), (5, 0.5))
    assert source.spec == {"image": ((4, 4, 1), "uint8"), "label": ((), "int32")}
    records = pickle.loads(pickle.dumps(source.split("train")))
    indices = np.array([9, 0, 6, 5, 9])
    batch = records.batch(indices)
    assert batch["image"][:, 0, 0, 0].tolist() == [3, 0, 0, 5, 3]
    assert batch["label"].tolist() == [0, 0, 0, 2, 0]
    for row, index in enumerate(indices.tolist()):
        record = records[index]
        np.testing.assert_array_equal(record["image"], batch["image"][row])
        assert record["label"] == batch["label"][row]
    with pytest.raises(IndexError):
        records[10]


def test_offset_labels(tmp_path: Path) -> None:
    first = tfds(tmp_path, "one", splits={"train": 3})
    second = tfds(tmp_path, "two", splits={"train": 4}, classes=("fly", "bug"))
    source = build(first, second, labels="offset")
    assert source.num_classes == 5
    assert source.class_names == ("cat", "dog", "owl", "fly", "bug")
    batch = source.split("train").batch(np.arange(7))
    assert batch["label"].tolist() == [0, 1, 2, 3, 4, 3, 4] and batch["label"].dtype == np.int32
    assert source.split("train")[6]["label"] == 4
    assert isinstance(batch["image"], list) and all(isinstance(each, bytes) for each in batch["image"])


def test_classes_must_be_the_same(tmp_path: Path) -> None:
    first = tfds(tmp_path, "one")
    with pytest.raises(DataError, match="different numbers of classes: 'one' has 3, 'two' has 2"):
        build(first, tfds(tmp_path, "two", classes=("fly", "bug")))
    with pytest.raises(DataError, match="'one' and 'three' name their classes differently"):
        build(first, tfds(tmp_path, "three", classes=("dog", "cat", "owl")))


def test_sizes_that_differ(tmp_path: Path) -> None:
    source = build(arrays(tmp_path, "a"), arrays(tmp_path, "b", size=6))
    assert source.spec["image"] == ((None, 4, 1), "uint8")
    images = source.split("train").batch(np.array([0, 7, 1]))["image"]
    assert [image.shape for image in images] == [(4, 4, 1), (6, 4, 1), (4, 4, 1)]
    small = tfds(tmp_path, "one", splits={"train": 2})
    large = tfds(tmp_path, "two", images={"train": tiny_tfds.pictures(2, (9, 9, 3))})
    assert build(small, large).spec["image"] == ((None, None, 3), "encoded")


def test_specs_that_do_not_fit(tmp_path: Path) -> None:
    pixels, encoded = arrays(tmp_path, "a"), tfds(tmp_path, "one")
    with pytest.raises(DataError, match="key 'image' is uint8 and encoded; expected the same; decode one"):
        build(pixels, encoded)
    grey = tfds(tmp_path, "grey", images={"train": tiny_tfds.pictures(3, (6, 5, 1))})
    with pytest.raises(DataError, match=r"key 'image' is \[6, 5, 3\] and \[6, 5, 1\]"):
        build(encoded, grey)
    age = {"features": {"age": tiny_tfds.tensor("int64")}, "extra": {"age": list(range(9))}}
    with pytest.raises(DataError, match="different keys"):
        build(encoded, tfds(tmp_path, "aged", **age))
    with pytest.raises(DataError, match="no split in common: 'one': train, test; 'dev': dev. Set splits"):
        build(encoded, tfds(tmp_path, "dev", splits={"dev": 3}))


def test_splits_of_a_part_are_honoured(tmp_path: Path) -> None:
    splits = {"train": "train[:2]", "test": "train[2:]"}
    source = build(arrays(tmp_path, "a", splits=splits), arrays(tmp_path, "b"))
    assert source.parts("train") == ((2, 1.0), (6, 1.0))
    assert source.split("test").batch(np.arange(5))["image"][:, 0, 0, 0].tolist() == [2, 3, 4, 5, 100]


def test_the_fingerprint_follows_parts_and_weights(tmp_path: Path) -> None:
    a, b = arrays(tmp_path, "a"), arrays(tmp_path, "b", counts=(5, 3))
    found = [build(a, b), build(b, a), build(a, {**b, "weight": 3}), build(a, b, labels="offset"), build(a)]
    assert len({source.fingerprint for source in found}) == 5
    assert build(a, b).fingerprint == found[0].fingerprint


def test_a_mixture_of_mixtures(tmp_path: Path) -> None:
    a, b = arrays(tmp_path, "a"), arrays(tmp_path, "b")
    inner = {"name": "mixture", "parts": ({**a, "weight": 1}, {**b, "weight": 3}), "weight": 2}
    source = build(inner, a)
    assert source.splits == {"test": 9, "train": 18}
    assert source.parts("train") == ((6, 0.5), (6, 1.5), (6, 1.0))


def test_weights_too_large_to_be_added(tmp_path: Path) -> None:
    heavy = [arrays(tmp_path, name, weight=1e308) for name in "ab"]
    for source in (
        build(*heavy),
        build({"name": "mixture", "parts": tuple(heavy), "weight": 1e308}, heavy[0]),
    ):
        parts = Parts.of(source, "train")
        of, _ = parts.assign(0, np.arange(Parts.GROUP))
        assert np.bincount(of).tolist() == ([2048, 2048] if len(parts.sizes) == 2 else [1024, 1024, 2048])


def test_splits_of_the_mixture_are_refused_as_they_would_lose_its_weights(tmp_path: Path) -> None:
    parts = (arrays(tmp_path, "a"), arrays(tmp_path, "b", weight=9))
    with pytest.raises(
        DataError, match=r"splits is set for a mixture; expected it in the parts: config\.data"
    ):
        data.source_of({"name": "mixture", "parts": parts, "splits": {"train": "train[:5]"}})


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        ({"weight": 0}, ConfigError, r"config\.data\.parts\[1\]\.weight is 0: expected a number > 0"),
        ({"weight": float("nan")}, ConfigError, r"parts\[1\]\.weight is nan"),
        ({"weight": True}, ConfigError, r"parts\[1\]\.weight is True"),
        ({"weight": None}, ConfigError, r"parts\[1\]\.weight is None"),
        ({"pth": "x"}, ConfigError, r"config\.data\.parts\[1\] has no key 'pth'. Did you mean 'path'"),
        ({"num_classes": "x"}, ConfigError, r"config\.data\.parts\[1\]\.num_classes is 'x'"),
        (
            {"transform": "decode"},
            ConfigError,
            r"parts\[1\]\.transform is about the pipeline.*config\.data\.transform",
        ),
        (
            {"name": "arays"},
            NameLookupError,
            r"parts\[1\]\.name is 'arays'; expected the name of a source\. Did you mean 'arrays'",
        ),
    ],
)
def test_mistakes_in_a_part(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], expected: str
) -> None:
    good = arrays(tmp_path, "a")
    with pytest.raises(error, match=expected) as found:
        build(good, {**good, **change})
    assert "\n" not in str(found.value)


def test_what_is_missing(tmp_path: Path) -> None:
    good = arrays(tmp_path, "a")
    for key in ("name", "weight"):
        with pytest.raises(ConfigError, match=rf"config\.data\.parts\[0\]\.{key} is missing"):
            build({name: value for name, value in good.items() if name != key})
    with pytest.raises(ConfigError, match=r"config\.data\.parts is empty"):
        build()
    with pytest.raises(ConfigError, match=r"config\.data\.parts is missing"):
        data.resolve({"name": "mixture"})
