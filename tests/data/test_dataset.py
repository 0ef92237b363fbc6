from __future__ import annotations

import pickle

import cv2
import numpy as np
import pytest

from tokenlab.core.errors import DataError
from tokenlab.data import TrainStream, eval_batches
from tokenlab.data.dataset import Dataset
from tokenlab.data.draws import Purpose, uniform
from tokenlab.data.source import ArraySource, DataConfig, FileError

FIXED = (12, 10, 3)
AUGMENT = "decode|random_resized_crop(8)|flip_lr|randaugment(2, 5)|value_range(-1, 1)"
PLAIN = "decode|resize(8)|value_range(-1, 1)"


class Pictures:
    """Encoded pictures in memory, some of which may be wrong; counts what is read."""

    def __init__(self, data: list[bytes], unreadable: frozenset[int]):
        self.data, self.unreadable, self.reads = data, unreadable, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, object]:
        self.reads += 1
        if index in self.unreadable:
            raise DataError(f"record {index} is torn")
        return {"image": self.data[index], "label": np.int32(index)}

    def batch(self, indices: np.ndarray) -> dict[str, object]:
        rows = [self[int(i)] for i in indices]
        label = np.array([row["label"] for row in rows], np.int32)
        return {"image": [row["image"] for row in rows], "label": label}


class PictureSource:
    name, class_names, fingerprint = "pictures", None, "pictures"

    def __init__(
        self,
        n: int = 23,
        *,
        shape: tuple[int | None, int | None, int] = FIXED,
        corrupt: tuple[int, ...] = (),
        unreadable: tuple[int, ...] = (),
        classes: int | None = None,
    ):
        rng = np.random.default_rng(0)
        data = []
        for i in range(n):
            size = tuple(side or int(rng.integers(9, 20)) for side in shape[:2])
            pixels = rng.integers(0, 256, (*size, shape[2]), np.uint8)
            encoded = cv2.imencode(".png", pixels)[1].tobytes()
            data.append(encoded[:40] if i in corrupt else encoded)
        self.spec = {"image": (shape, "encoded"), "label": ((), "int32")}
        self.splits = {"train": n, "test": n}
        self.num_classes = n if classes is None else classes
        self.records = Pictures(data, frozenset(unreadable))

    def split(self, name: str) -> Pictures:
        return self.records


def dataset(source: PictureSource, transform: str = AUGMENT, **options: object) -> Dataset:
    return Dataset(source, DataConfig(transform=transform, eval_transform=PLAIN, **options))


def equal(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


@pytest.mark.parametrize("shape", [FIXED, (None, None, 3), (9, None, 1)])
def test_kept_in_memory_or_read_each_time_is_the_same(shape: tuple[int | None, int | None, int]) -> None:
    source = PictureSource(shape=shape)
    kept, read = dataset(source), dataset(source, memory=0)
    indices = np.array([3, 3, 22, 0])
    draws = uniform(0, Purpose.AUGMENT, 0, (4, kept.train_transform.draws))
    equal(kept.read("train", indices, draws), read.read("train", indices, draws))
    equal(kept.read("test", indices), read.read("test", indices))
    assert kept.spec == {"image": ((8, 8, shape[2]), "float32"), "label": ((), "int32")}
    before = source.records.reads
    kept.read("train", indices, draws)
    assert source.records.reads == before  # from memory
    read.read("train", indices, draws)
    assert source.records.reads == before + 4


@pytest.mark.parametrize("memory", [0, None])
def test_records_are_opened_once(memory: int | None) -> None:
    """A source may read a whole file when its records are first asked for."""
    source = PictureSource()
    real, asked = source.split, []
    source.split = lambda name: asked.append(name) or real(name)
    found = dataset(source, memory=memory)
    stream = TrainStream(found, "train", 8, seed=0)
    asked.clear()
    for step in range(4):
        stream.batch(step)
        list(eval_batches(found, "test", 8))
    assert len([name for name in asked if name == "train"]) <= 1


def test_memory_has_a_limit() -> None:
    assert dataset(PictureSource(100), memory=1)._kept("train") is not None
    big = PictureSource(100, shape=(60, 60, 3))  # 1.03 MiB
    assert dataset(big, memory=1)._kept("train") is None
    assert dataset(big, memory=2)._kept("train") is not None
    assert dataset(big, workers=1, prefetch=1)._kept("train") is None  # each worker would keep its own


def test_the_same_picture_is_changed_in_another_way_in_every_row_and_step() -> None:
    stream = TrainStream(dataset(PictureSource(4)), "train", 4, seed=0)
    looks = {stream.batch(step)["image"][row].tobytes() for step in range(20) for row in range(4)}
    assert len(looks) == 80
    other = TrainStream(dataset(PictureSource(4)), "train", 4, seed=0)
    for step in (7, 3):
        equal(stream.batch(step), other.batch(step))


def test_a_worker_reads_the_same() -> None:
    stream = TrainStream(dataset(PictureSource()), "train", 6, seed=0)
    first = stream.batch(5)
    equal(pickle.loads(pickle.dumps(stream)).batch(5), first)


class TestCorruptRecords:
    def test_stop_names_the_record(self) -> None:
        for source, why in (
            (PictureSource(corrupt=(4,)), "its 40 bytes"),
            (PictureSource(unreadable=(4,)), "torn"),
        ):
            for memory in (0, None):
                with pytest.raises(DataError) as error:
                    list(eval_batches(dataset(source, memory=memory), "test", 8))
                text = str(error.value)
                assert "source 'pictures', split 'test', record 4: " in text and why in text
                assert "config.data.corrupt='skip'" in text and "\n" not in text

    @pytest.mark.parametrize("memory", [0, None])
    def test_skip_gives_no_weight(self, memory: int | None) -> None:
        source = PictureSource(corrupt=(4, 11), unreadable=(7,))
        found = dataset(source, corrupt="skip", memory=memory)
        batches = list(eval_batches(found, "test", 8))
        mask = np.concatenate([batch["mask"] for batch in batches])
        assert np.flatnonzero(mask[:23] == 0).tolist() == [4, 7, 11] and mask.sum() == 20
        whole = list(eval_batches(dataset(PictureSource()), "test", 8))
        for batch, well in zip(batches, whole, strict=True):
            good = batch["mask"] == 1
            np.testing.assert_array_equal(batch["image"][good], well["image"][good])
            assert (batch["image"][~good] == 0).all() and (batch["label"][~good] == 0).all()
        assert "its 40 bytes" in found.why("test", 4) and "torn" in found.why("test", 7)

    def test_training_goes_on_without_it(self) -> None:
        source = PictureSource(corrupt=(4,))
        stream = TrainStream(dataset(source, corrupt="skip"), "train", 23, seed=0)
        batch = stream.batch(0)
        assert stream.indices(0)[batch["mask"] == 0].tolist() == [4]

    @pytest.mark.parametrize("memory", [0, None])
    def test_a_batch_of_nothing_stops_training_and_no_evaluation(self, memory: int | None) -> None:
        source = PictureSource(corrupt=tuple(range(23)))
        found = dataset(source, corrupt="skip", memory=memory)
        stream = TrainStream(found, "train", 16, seed=0)
        with pytest.raises(
            DataError, match="none of 16 records of a batch can be read; source 'pictures', split"
        ):
            stream.batch(0)
        assert TrainStream(found, "train", 15, seed=0).batch(0)["mask"].sum() == 0  # may be chance
        assert sum(batch["mask"].sum() for batch in eval_batches(found, "test", 8)) == 0

    def test_what_is_kept_of_a_bad_record_does_not_grow(self) -> None:
        """An exception that is kept and raised again would hold on to every batch it was raised from."""
        found = dataset(PictureSource(corrupt=(4,)), corrupt="skip")
        list(eval_batches(found, "test", 8))
        kept = [value for value in found._kept("test")["image"] if not isinstance(value, np.ndarray)]
        assert len(kept) == 1 and isinstance(kept[0], str)
        assert not isinstance(kept[0], BaseException)

    def test_a_file_that_cannot_be_read_is_no_record_to_skip(self) -> None:
        source = PictureSource()

        def gone(indices: np.ndarray) -> None:
            raise FileError("file 'x' is gone")

        records = source.split("test")
        records.batch = gone
        source.split = lambda name: records
        with pytest.raises(FileError, match="^file 'x' is gone$"):
            list(eval_batches(dataset(source, corrupt="skip", memory=0), "test", 8))

    def test_labels_out_of_range_are_never_skipped(self) -> None:
        source = PictureSource(classes=10)
        with pytest.raises(DataError, match="label of example 10 is 10; expected 0 to 9"):
            list(eval_batches(dataset(source, corrupt="skip"), "test", 23))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            PictureSource(1),
            {"eval_transform": "decode|flip_lr"},
            "is random; expected operations that do the same",
        ),
        (
            PictureSource(1),
            {"eval_transform": ""},
            "is encoded[12, 10, 3] after config.data.eval_transform ''",
        ),
        (
            PictureSource(1, shape=(None, None, 3)),
            {"eval_transform": "decode|value_range(-1, 1)"},
            "is float32[None, None, 3] after",
        ),
        (
            PictureSource(1),
            {"transform": "decode|resize(4)|value_range(0, 1)", "eval_transform": PLAIN},
            "gives images float32[4, 4, 3], config.data.eval_transform 'decode|resize(8)|value_range(-1, 1)' "
            "float32[8, 8, 3]; they must be the same",
        ),
    ],
)
def test_transforms_that_do_not_fit(source: PictureSource, options: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as error:
        Dataset(source, DataConfig(**options))
    assert message in str(error.value)


def test_arrays_of_pixels_and_data_without_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    source = ArraySource("toy", {"train": {"image": pixels}}, None)
    batch = Dataset(source).read("train", np.array([2, 0]))
    np.testing.assert_allclose(batch["image"], pixels[[2, 0]] / 127.5 - 1, atol=1e-6)
    text = ArraySource("text", {"train": {"tokens": np.arange(12, dtype=np.int32).reshape(3, 4)}}, None)
    batch = Dataset(text).read("train", np.array([1]))
    assert batch["tokens"].tolist() == [[4, 5, 6, 7]] and batch["mask"].tolist() == [1]
    with pytest.raises(DataError, match="needs an image; the data has tokens"):
        Dataset(text, DataConfig(transform="flip_lr"))


class Mixed:
    """A source of two parts, the second three times as heavy."""

    name, num_classes, class_names, fingerprint = "mixed", None, None, "mixed"
    spec = {"label": ((), "int32")}
    splits = {"train": 130}
    sizes, weights = (100, 30), (1.0, 3.0)

    def parts(self, split: str) -> tuple[tuple[int, float], ...]:
        return tuple(zip(self.sizes, self.weights, strict=True))

    def split(self, name: str) -> object:
        arrays = {"label": np.arange(130, dtype=np.int32)}
        return ArraySource("x", {"train": arrays}, None).split("train")


class TestMixtures:
    def test_shares_hold_everywhere_and_every_part_is_read_by_epochs(self) -> None:
        stream = TrainStream(Mixed(), "train", 64, seed=0)
        seen = np.concatenate([stream.indices(step) for step in range(192)])  # three groups
        assert [(part < 100).mean() for part in np.split(seen, 3)] == [0.25, 0.25, 0.25]
        # A quarter of 64, standard deviation 3.4.
        assert max(abs((rows < 100).sum() - 16) for rows in seen.reshape(-1, 64)) < 17
        for first, size in ((0, 100), (100, 30)):
            part = seen[(seen >= first) & (seen < first + size)] - first
            for start in range(0, len(part) - size, size):
                assert sorted(part[start : start + size]) == list(range(size))

    @pytest.mark.parametrize("processes", [2, 4])
    def test_processes_share_the_batch_of_one(self, processes: int) -> None:
        for step in (0, 63, 64, 200):
            parts = [
                TrainStream(Mixed(), "train", 60, seed=3, rows=range(i, i + 60 // processes)).indices(step)
                for i in range(0, 60, 60 // processes)
            ]
            whole = TrainStream(Mixed(), "train", 60, seed=3).indices(step)
            assert np.concatenate(parts).tolist() == whole.tolist()

    def test_too_light_a_part(self) -> None:
        class Light(Mixed):
            weights = (1.0, 1e-5)

        with pytest.raises(
            DataError, match="part 1 of a mixture has weight 1e-05, the largest weight is 1.0"
        ):
            TrainStream(Light(), "train", 4, seed=0)
