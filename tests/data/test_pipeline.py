from __future__ import annotations

import json
import threading

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import DataError
from tokenlab.data.dataset import Dataset
from tokenlab.data.loader import Prefetch
from tokenlab.data.pipeline import TrainStream, eval_batches, num_eval_batches
from tokenlab.data.source import ArraySource, DataConfig


def source(n: int = 23, *, side: int = 4) -> ArraySource:
    """A source whose labels are unique, so that a batch shows which examples it holds."""
    rng = np.random.default_rng(n)
    arrays = {
        "image": rng.uniform(-1, 1, (n, side, side, 1)).astype(np.float32),
        "label": np.arange(n, dtype=np.int32),
    }
    return ArraySource("toy", {"train": arrays, "test": arrays}, num_classes=n)


def changed(transform: str, n: int = 23) -> Dataset:
    return Dataset(source(n), DataConfig(name="toy", transform=transform))


def labels(stream: TrainStream, steps: range) -> list[int]:
    return [int(label) for step in steps for label in stream.batch(step)["label"]]


def rows_of(batch_size: int, index: int, processes: int) -> range:
    """The rows of one of several processes that share a batch in equal parts."""
    share = batch_size // processes
    return range(index * share, (index + 1) * share)


class TestTrainStream:
    @pytest.mark.parametrize("batch_size", [1, 4, 7, 22, 23])
    def test_every_epoch_holds_every_example_once(self, batch_size: int) -> None:
        stream = TrainStream(source(), "train", batch_size, seed=1)
        seen = labels(stream, range(23 * 3 // batch_size + 1))
        epochs = [seen[start : start + 23] for start in range(0, 69, 23)]
        for epoch in epochs:
            assert sorted(epoch) == list(range(23))
        assert len({tuple(epoch) for epoch in epochs}) == 3

    @given(
        n=st.integers(1, 40),
        share=st.integers(1, 8),
        processes=st.integers(1, 5),
        seed=st.integers(0, 2**64 - 1),
    )
    @settings(derandomize=True, deadline=None, max_examples=60)
    def test_any_sizes(self, n: int, share: int, processes: int, seed: int) -> None:
        batch_size = share * processes
        assume(batch_size <= n)
        toy = source(n, side=1)
        streams = [
            TrainStream(toy, "train", batch_size, seed=seed, rows=rows_of(batch_size, index, processes))
            for index in range(processes)
        ]
        steps = range(2 * n // batch_size + 1)
        seen = [int(i) for step in steps for stream in streams for i in stream.indices(step)]
        assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == list(range(n))
        assert seen == labels(TrainStream(toy, "train", batch_size, seed=seed), steps)

    def test_pure_function_of_seed_and_step(self) -> None:
        one = TrainStream(changed("shift(1)|rotate(10)"), "train", 5, seed=1)
        forward = [one.batch(step) for step in range(12)]
        two = TrainStream(changed("shift(1)|rotate(10)"), "train", 5, seed=1)
        for step in reversed(range(12)):  # any order, any number of times, another object
            assert_equal(two.batch(step), forward[step])
            assert_equal(one.batch(step), forward[step])
        other = TrainStream(source(), "train", 5, seed=2)
        assert labels(other, range(12)) != labels(one, range(12))

    def test_far_steps(self) -> None:
        stream = TrainStream(source(), "train", 5, seed=0)
        assert len(stream.batch(10**12)["label"]) == 5

    @pytest.mark.parametrize("processes", [2, 3, 6])
    def test_processes_share_the_batch_of_one(self, processes: int) -> None:
        def stream(index: int, count: int) -> TrainStream:
            dataset = changed("shift(1)|rotate(10)")
            return TrainStream(dataset, "train", 12, seed=1, rows=rows_of(12, index, count))

        for step in range(5):
            parts = [stream(index, processes).batch(step) for index in range(processes)]
            joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            assert_equal(joined, stream(0, 1).batch(step))

    def test_rows_need_not_be_neighbours(self) -> None:
        whole = TrainStream(changed("shift(1)|rotate(10)"), "train", 12, seed=1).batch(3)
        rows = [0, 3, 4, 11]
        some = TrainStream(changed("shift(1)|rotate(10)"), "train", 12, seed=1, rows=rows).batch(3)
        assert_equal(some, {key: array[rows] for key, array in whole.items()})

    def test_mask_spec_and_dtypes(self) -> None:
        batch = TrainStream(source(), "train", 6, seed=0, rows=rows_of(6, 1, 2)).batch(0)
        assert {key: (array.shape, array.dtype.name) for key, array in batch.items()} == {
            "image": ((3, 4, 4, 1), "float32"),
            "label": ((3,), "int32"),
            "mask": ((3,), "float32"),
        }
        assert batch["mask"].tolist() == [1, 1, 1]

    def test_golden_order(self) -> None:
        # A run that goes on in a newer version must see the same examples.
        assert labels(TrainStream(source(), "train", 8, seed=5), range(1, 4)) == [
            11,
            4,
            14,
            21,
            13,
            8,
            6,
            17,
            18,
            7,
            3,
            1,
            15,
            10,
            19,
            18,
            10,
            2,
            7,
            3,
            0,
            19,
            15,
            4,
        ]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"batch_size": 24},
                "batch_size 24 is larger than split 'train' of source 'toy'.*at most its 23",
            ),
            ({"batch_size": 0}, "batch_size is 0; expected an int >= 1"),
            ({"batch_size": 4.0}, "batch_size is 4.0; expected an int"),
            ({"batch_size": True}, "batch_size is True"),
            ({"rows": [2, 8]}, "rows 2 to 8 of a batch of 8; expected numbers from 0 to 7"),
            ({"rows": [-1, 2]}, "rows -1 to 2 of a batch"),
            (
                {"rows": [3, 2]},
                r"rows of a batch are \[3, 2\]; expected row numbers, each once and ascending",
            ),
            ({"rows": [2, 2]}, r"rows of a batch are \[2, 2\]"),
            ({"rows": []}, r"rows of a batch are \[\]"),
            ({"rows": [0.5]}, r"rows of a batch are \[0.5\]"),
            ({"seed": -3}, "seed is -3"),
            ({"split": "trian"}, "no split 'trian'. Did you mean 'train'?"),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, object], message: str) -> None:
        good = {"split": "train", "batch_size": 8, "seed": 0}
        with pytest.raises(DataError, match=message):
            TrainStream(source(), **{**good, **arguments})

    def test_negative_step(self) -> None:
        with pytest.raises(DataError, match="step is -1"):
            TrainStream(source(), "train", 4, seed=0).batch(-1)

    def test_nan_in_the_data_names_the_example(self) -> None:
        broken = source()
        broken.split("train").arrays["image"][17, 2, 1, 0] = np.nan
        stream = TrainStream(Dataset(broken, DataConfig(transform="rotate(5)")), "train", 23, seed=0)
        with pytest.raises(
            DataError, match="source 'toy', split 'train': key 'image' of example 17 holds NaN"
        ):
            stream.batch(0)


class TestState:
    def stream(self, **changes: object) -> TrainStream:
        arguments = {"source": changed("shift(1)"), "split": "train", "batch_size": 6, "seed": 1}
        return TrainStream(**{**arguments, **changes})

    def test_round_trip_through_json(self) -> None:
        state = json.loads(json.dumps(self.stream().state(41)))
        assert self.stream().check(state) == 41
        assert self.stream(rows=rows_of(6, 1, 3)).check(state) == 41

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"batch_size": 3}, "batch_size is 3 and was 6"),
            ({"seed": 2}, "seed is 2 and was 1"),
            ({"source": source()}, r"transform is '' and was 'shift\(1\)'"),
            ({"split": "test"}, "split is 'test' and was 'train'"),
            ({"source": source(24)}, "fingerprint is 'toy:.*' and was 'toy:"),
        ],
    )
    def test_another_run_is_told(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(DataError, match=message):
            self.stream(**changes).check(self.stream().state(41))

    @pytest.mark.parametrize("step", [None, -1, 1.0, True, "4"])
    def test_bad_step(self, step: object) -> None:
        with pytest.raises(DataError, match="its step is"):
            self.stream().check({**self.stream().state(0), "step": step})

    def test_empty_state(self) -> None:
        with pytest.raises(DataError, match="seed is 1 and was None"):
            self.stream().check({})


class TestEvalBatches:
    @pytest.mark.parametrize("batch_size", [1, 4, 6, 23, 24, 60])
    @pytest.mark.parametrize("processes", [1, 2, 3])
    def test_exact_counts(self, batch_size: int, processes: int) -> None:
        batch_size *= processes
        parts = [
            list(eval_batches(source(), "test", batch_size, rows=rows_of(batch_size, index, processes)))
            for index in range(processes)
        ]
        assert {len(part) for part in parts} == {num_eval_batches(source(), "test", batch_size)}
        seen = []
        for shards in zip(*parts, strict=True):
            for shard in shards:
                assert {len(array) for array in shard.values()} == {batch_size // processes}
                real = shard["mask"] == 1
                assert ((shard["mask"] == 0) | real).all()
                seen += shard["label"][real].tolist()
                assert not shard["image"][~real].any() and not shard["label"][~real].any()
        assert seen == list(range(23))

    def test_dtypes_in_the_padded_batch_too(self) -> None:
        for batch in eval_batches(source(), "test", 20):
            assert {key: array.dtype.name for key, array in batch.items()} == {
                "image": "float32",
                "label": "int32",
                "mask": "float32",
            }

    def test_errors_come_at_the_call(self) -> None:
        with pytest.raises(DataError, match="no split 'tests'"):
            eval_batches(source(), "tests", 4)
        with pytest.raises(DataError, match="batch_size is 0"):
            eval_batches(source(), "test", 0)
        with pytest.raises(DataError, match="batch_size is 0"):
            num_eval_batches(source(), "test", 0)
        with pytest.raises(DataError, match="rows 3 to 5 of a batch of 5"):
            eval_batches(source(), "test", 5, rows=[3, 5])

    def test_nan_is_found(self) -> None:
        broken = source()
        broken.split("test").arrays["image"][22] = np.nan
        with pytest.raises(DataError, match="example 22"):
            list(eval_batches(broken, "test", 10))


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenlab-data")]


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
class TestPrefetch:
    def test_the_same_batches(self, depth: int) -> None:
        stream = TrainStream(
            source(),
            "train",
            5,
            seed=1,
        )
        with Prefetch(stream.batch, 3, stop=12, depth=depth) as batches:
            for step, batch in zip(range(3, 12), batches, strict=True):
                assert_equal(batch, stream.batch(step))
        assert not data_threads()

    def test_put_is_applied(self, depth: int) -> None:
        stream = TrainStream(source(), "train", 4, seed=1)
        with (
            jax.transfer_guard("disallow"),
            Prefetch(stream.batch, stop=3, depth=depth, put=jax.device_put) as batches,
        ):
            for step, batch in enumerate(batches):
                assert isinstance(batch["image"], jax.Array)
                assert_equal(jax.device_get(batch), stream.batch(step))

    def test_makes_no_more_than_asked(self, depth: int) -> None:
        made: list[int] = []

        def make(step: int) -> int:
            made.append(step)
            return step

        with Prefetch(make, 5, stop=8, depth=depth) as numbers:
            assert list(numbers) == [5, 6, 7]
        assert made == [5, 6, 7]
        made.clear()
        with Prefetch(make, depth=depth) as numbers:
            assert [next(numbers), next(numbers)] == [0, 1]
        assert made == list(range(len(made))) and 2 <= len(made) <= 2 + depth

    def test_an_error_arrives_at_its_step_and_unchanged(self, depth: int) -> None:
        error = DataError("source 'toy': example 2 is broken")

        def make(step: int) -> int:
            if step == 2:
                raise error
            return step

        with pytest.raises(DataError) as caught, Prefetch(make, depth=depth) as numbers:
            assert [next(numbers), next(numbers)] == [0, 1]
            next(numbers)
        assert caught.value is error
        assert not data_threads()

    def test_an_error_in_the_loop_ends_the_thread(self, depth: int) -> None:
        with pytest.raises(KeyboardInterrupt), Prefetch(lambda step: step, depth=depth) as numbers:
            next(numbers)
            raise KeyboardInterrupt
        assert not data_threads()

    def test_closed_is_over(self, depth: int) -> None:
        numbers = Prefetch(lambda step: step, depth=depth)
        assert next(numbers) == 0
        numbers.close()
        numbers.close()
        assert list(numbers) == []

    def test_runs_ahead_in_a_thread(self, depth: int) -> None:
        made = [threading.Event() for _ in range(depth + 1)]
        names: set[str] = set()

        def make(step: int) -> int:
            names.add(threading.current_thread().name)
            if step < len(made):
                made[step].set()
            return step

        with Prefetch(make, depth=depth) as numbers:
            next(numbers)
            for event in made:  # without another `next`
                assert event.wait(timeout=60)
        assert all(name.startswith("tokenlab-data") for name in names) == (depth > 0)


@pytest.mark.parametrize("depth", [-1, 1.5, True])
def test_bad_depth(depth: object) -> None:
    with pytest.raises(DataError, match="prefetch is .*; expected an int >= 0"):
        Prefetch(lambda step: step, depth=depth)


def assert_equal(given: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert given.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(given[key], expected[key])
