from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tokenlab.core.errors import DataError
from tokenlab.data.source import ArrayRecords, ArraySource, Batch, Records, Source, check_batch, check_split


def toy_arrays(n: int = 6) -> dict[str, np.ndarray]:
    images = np.arange(n * 4, dtype=np.float32).reshape(n, 2, 2, 1)
    return {"image": images, "label": (np.arange(n) % 3).astype(np.int32)}


def toy_source(n: int = 6) -> ArraySource:
    return ArraySource("toy", {"train": toy_arrays(n), "test": toy_arrays(2)}, num_classes=3)


def test_protocols() -> None:
    source = toy_source()
    assert isinstance(source, Source)
    assert isinstance(source.split("train"), Records)
    assert source.splits == {"train": 6, "test": 2}
    assert source.spec == {"image": ((2, 2, 1), "float32"), "label": ((), "int32")}


def test_records_by_index_and_by_batch_agree() -> None:
    records = toy_source().split("train")
    batch = records.batch(np.array([4, 0, 4]))
    for row, index in enumerate((4, 0, 4)):
        for key, value in records[index].items():
            np.testing.assert_array_equal(batch[key][row], value)
            assert batch[key].dtype == value.dtype


def test_what_is_read_may_be_changed() -> None:
    records = toy_source().split("train")
    records[0]["image"][:] = 99
    records.batch(np.array([0]))["image"][:] = 99
    assert records[0]["image"].max() < 99


@pytest.mark.parametrize("index", [-1, 6])
def test_no_record_there(index: int) -> None:
    with pytest.raises(IndexError):
        toy_source().split("train")[index]


def test_memory_mapped_arrays_serve(tmp_path: Path) -> None:
    arrays = toy_arrays()
    np.save(tmp_path / "image.npy", arrays["image"])
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    batch = ArrayRecords({"image": mapped}).batch(np.array([5, 2]))
    assert type(batch["image"]) is np.ndarray
    np.testing.assert_array_equal(batch["image"], arrays["image"][[5, 2]])


def test_fingerprint_follows_content_names_and_order() -> None:
    base = toy_source().fingerprint
    assert base == toy_source().fingerprint
    changed = toy_arrays()
    changed["label"][0] = 1
    swapped = {key: array[::-1] for key, array in toy_arrays().items()}
    others = [
        ArraySource("toy", {"train": changed, "test": toy_arrays(2)}, 3),
        ArraySource("toy", {"train": swapped, "test": toy_arrays(2)}, 3),
        ArraySource("toy", {"train": toy_arrays(), "validation": toy_arrays(2)}, 3),
        ArraySource("other", {"train": toy_arrays(), "test": toy_arrays(2)}, 3),
        toy_source(5),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 6


def test_bad_sources() -> None:
    with pytest.raises(DataError, match="all of the same length; given {'a': 2, 'b': 3}"):
        ArrayRecords({"a": np.zeros(2), "b": np.zeros(3)})
    with pytest.raises(DataError, match="one or more"):
        ArrayRecords({})
    with pytest.raises(DataError, match="'toy' has no split"):
        ArraySource("toy", {}, None)
    with pytest.raises(DataError, match="split 'train' of source 'toy' is empty"):
        ArraySource("toy", {"train": toy_arrays(0)}, None)
    with pytest.raises(DataError, match="split 'test' has .*'label'.*int64.*split 'train' has .*int32"):
        other = {**toy_arrays(), "label": np.zeros(6, np.int64)}
        ArraySource("toy", {"train": toy_arrays(), "test": other}, None)


def test_unknown_split_names_the_nearest() -> None:
    with pytest.raises(DataError, match="source 'toy' has no split 'tset'. Did you mean 'test'?"):
        toy_source().split("tset")
    with pytest.raises(DataError, match="Known: test, train"):
        check_split(toy_source(), "xyz")


class TestCheckBatch:
    indices = np.array([3, 1])

    def check(self, **changes: np.ndarray | None) -> None:
        source = toy_source()
        batch: Batch = {**source.split("train").batch(self.indices), **changes}
        check_batch({k: v for k, v in batch.items() if v is not None}, source, "train", self.indices)

    def test_good(self) -> None:
        self.check()

    def test_large_finite_numbers_are_finite(self) -> None:
        # Their sum is not.
        self.check(image=np.full((2, 2, 2, 1), 3e38, np.float32))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"label": None}, r"source 'toy', split 'train': records have keys \['image'\]; the spec has"),
            ({"extra": np.zeros(2)}, r"keys \['extra', 'image', 'label'\]"),
            (
                {"image": np.zeros((2, 2, 2, 1))},
                r"key 'image' is float64\[2, 2, 2, 1\]; expected float32\[2, 2, 2, 1\]",
            ),
            (
                {"image": np.zeros((2, 3, 2, 1), np.float32)},
                r"is float32\[2, 3, 2, 1\]; expected float32\[2, 2,",
            ),
            ({"image": np.zeros((1, 2, 2, 1), np.float32)}, r"is float32\[1, 2, 2, 1\]"),
            ({"label": np.zeros((2, 1), np.int32)}, r"key 'label' is int32\[2, 1\]; expected int32\[2\]"),
            ({"label": np.array([0, 3], np.int32)}, "label of example 1 is 3; expected 0 to 2"),
            ({"label": np.array([-1, 0], np.int32)}, "label of example 3 is -1; expected 0 to 2"),
        ],
    )
    def test_bad(self, changes: dict[str, np.ndarray | None], message: str) -> None:
        with pytest.raises(DataError, match=message):
            self.check(**changes)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, value: float) -> None:
        image = np.zeros((2, 2, 2, 1), np.float32)
        image[1, 0, 1, 0] = value
        with pytest.raises(DataError, match="key 'image' of example 1 holds NaN or infinity"):
            self.check(image=image)

    def test_infinities_that_cancel_in_a_sum(self) -> None:
        image = np.zeros((2, 2, 2, 1), np.float32)
        image[0, 0, :, 0] = [np.inf, -np.inf]
        with pytest.raises(DataError, match="example 3 holds"):
            self.check(image=image)
