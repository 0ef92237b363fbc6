from __future__ import annotations

import numpy as np
import pytest

from tokenlab.core.errors import DataError
from tokenlab.data.source import ArraySource, Source
from tokenlab.data.splits import sliced


class Listed:
    """Records of bytes, which come as lists."""

    def __init__(self, first: int, size: int):
        self.values = [bytes([first + i]) for i in range(size)]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"image": self.values[index], "label": np.int32(index)}

    def batch(self, indices: np.ndarray) -> dict[str, object]:
        return {"image": [self.values[i] for i in indices], "label": np.asarray(indices, np.int32)}


class ListedSource:
    name, num_classes, class_names, fingerprint = "listed", 99, None, "listed"
    spec = {"image": ((None, None, 3), "encoded"), "label": ((), "int32")}
    splits = {"train": 7, "test": 5}

    def split(self, name: str) -> Listed:
        return {"train": Listed(0, 7), "test": Listed(100, 5)}[name]


def source(n: int = 101) -> ArraySource:
    arrays = {"label": np.arange(n, dtype=np.int32)}
    return ArraySource("toy", {"train": arrays, "test": {"label": np.arange(7, dtype=np.int32)}}, None)


def labels(found: Source, split: str) -> list[int]:
    records = found.split(split)
    assert len(records) == found.splits[split]
    batch = records.batch(np.arange(len(records)))["label"].tolist()
    assert batch == [int(records[i]["label"]) for i in range(len(records))]
    return batch


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train", list(range(101))),
        ("train[:10]", list(range(10))),
        ("train[10:]", list(range(10, 101))),
        ("train[-10:]", list(range(91, 101))),
        ("train[:-10]", list(range(91))),
        ("train[5:8]", [5, 6, 7]),
        ("train[:50%]", list(range(51))),  # 50.5 examples, rounded up
        ("train[50%:]", list(range(51, 101))),
        ("train[-25%:]", list(range(76, 101))),
        ("train[99%:101]", [100]),
        ("train[-101:1]+train[-100%:1]", [0, 0]),
        (" train[ :2 ] + test[5:] + train[-1:]", [0, 1, 5, 6, 100]),
    ],
)
def test_slices(text: str, wanted: list[int]) -> None:
    found = sliced(source(), {"mine": text})
    assert dict(found.splits) == {"mine": len(wanted)}
    assert labels(found, "mine") == wanted


@pytest.mark.parametrize("n", [1, 7, 10, 99, 101, 60_001])
@pytest.mark.parametrize("percent", [1, 10, 33, 50, 90, 99])
def test_two_parts_share_nothing_and_leave_nothing_out(n: int, percent: int) -> None:
    def size(text: str) -> int:
        try:
            return sliced(source(n), {"s": text}).splits["s"]
        except DataError:
            return 0

    assert size(f"train[:{percent}%]") + size(f"train[{percent}%:]") == n


def test_records_that_come_as_lists_keep_their_order() -> None:
    found = sliced(ListedSource(), {"mixed": "train[2:4]+test[1:3]+train[:1]"}).split("mixed")
    order = np.array([4, 0, 2, 3, 1, 2])
    batch = found.batch(order)
    wanted = [[2], [3], [101], [102], [0]]
    assert batch["image"] == [bytes(wanted[i]) for i in order]
    assert batch["label"].tolist() == [0, 2, 1, 2, 3, 1]
    assert found[3]["image"] == bytes([102])
    with pytest.raises(IndexError, match="record 5 of 5"):
        found[5]
    assert found.batch(np.zeros(0, np.int64))["image"] == []


def test_none_is_the_source_itself() -> None:
    one = source()
    assert sliced(one, {}) is one


def test_another_text_another_fingerprint() -> None:
    prints = {sliced(source(), {"train": text}).fingerprint for text in ("train", "train[:5]", "train[:6]")}
    assert len(prints) == 3
    assert (
        sliced(source(), {"a": "train[:5]"}).fingerprint == sliced(source(), {"a": " train[:5 ]"}).fingerprint
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian", "no split 'trian'. Did you mean 'train'?"),
        ("train[:0]", "'train[:0]' holds no example; split 'train' of source 'toy' has 101"),
        ("train[101:]", "holds no example"),
        (
            "train[:102]",
            "'train[:102]' reaches beyond split 'train' of source 'toy', which has 101 examples; expected",
        ),
        ("train[200:]", "reaches beyond"),
        ("train[-102:]", "expected a count of at most 101 or a percentage of at most 100%"),
        ("train[:150%]", "reaches beyond split 'train'"),
        ("test[-101%:]", "reaches beyond split 'test'"),
        (f"train[:{'9' * 5000}]", "expected a split such as"),
        ("train[:5]x", "expected a split such as"),
        ("train[50:40]", "holds no example"),
        ("train[1:2:3]", "config.data.splits.x is 'train[1:2:3]'; expected a split such as"),
        ("train[1.5%:]", "expected a split such as"),
        ("train[5]", "expected a split such as"),
        ("", "expected a split such as"),
        ("train+", "expected a split such as"),
    ],
)
def test_wrong_texts(text: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        sliced(source(), {"x": text})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train-full", "train 2", "2024.train", "größe"])
def test_splits_are_named_as_folders_are(name: str) -> None:
    arrays = {"label": np.arange(10, dtype=np.int32)}
    named = ArraySource("toy", {name: arrays}, None)
    assert labels(sliced(named, {"x": f"{name}[:20%] + {name} [ -1 : ]"}), "x") == [0, 1, 9]
