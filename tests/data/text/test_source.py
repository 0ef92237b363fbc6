from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError, TokenLabError
from tokenlab.data import Dataset, TextConfig, TextSource, TrainStream, eval_batches, num_eval_batches
from tokenlab.data.source import Source
from tokenlab.data.sources.mixture import MixtureSource
from tokenlab.data.splits import sliced
from tokenlab.data.text import ByteTokenizer, tokenizer

LENGTH = 16
RNG = np.random.default_rng(0)
WORDS = ("the", "cat", "sat", "on", "a", "mat", "고양이", "é")
DOCUMENTS = {
    "train": [f"<{i}> " + " ".join(RNG.choice(WORDS, RNG.integers(1, 9))) for i in range(40)],
    "validation": [f"[{i}] " + " ".join(RNG.choice(WORDS, RNG.integers(1, 9))) for i in range(7)],
}
BOTH = pytest.mark.parametrize("packing", ["stream", "fit"])


def made(documents: Any = None, **options: Any) -> TextSource:
    options = {"length": LENGTH, **options}
    return TextSource("tiny", documents or DOCUMENTS, TextConfig(name="tiny", **options))


def everything(source: Source | Dataset, split: str) -> dict[str, np.ndarray]:
    """All examples of a split."""
    return source.split(split).batch(np.arange(source.splits[split]))


@pytest.fixture(scope="module")
def saved_bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.train_bpe(DOCUMENTS["train"], 270).save(path)
    return str(path)


@pytest.fixture(scope="module")
def parts() -> list[TextSource]:
    """What a mixture is made of."""
    return [made(), made({"train": ["z" * 30, "yy"], "validation": ["x"]}, packing="fit")]


class TestExamples:
    @BOTH
    @pytest.mark.parametrize("isolate", [True, False])
    def test_keys_shapes_and_dtypes(self, packing: str, isolate: bool) -> None:
        source = made(packing=packing, isolate=isolate)
        assert isinstance(source, Source) and isinstance(source.tokenizer, ByteTokenizer)
        assert source.vocab_size == 257 and source.num_classes is None
        batch = everything(source, "train")
        assert batch.keys() == source.spec.keys()
        for key, (shape, dtype) in source.spec.items():
            assert shape == (LENGTH,) and batch[key].shape == (source.splits["train"], LENGTH)
            assert batch[key].dtype == dtype == ("float32" if key in ("weight", "bytes") else "int32")

    def test_by_hand(self) -> None:
        source = made({"train": ["ab", "é"]}, length=4)
        assert source.splits == {"train": 2}
        end = 256
        expected = {
            "ids": [[97, 98, end, 0xC3], [0xA9, 0, 0, 0]],
            "target": [[98, end, 0xC3, 0xA9], [end, 0, 0, 0]],
            "weight": [[1, 1, 0, 1], [1, 0, 0, 0]],
            "bytes": [[1, 0, 0, 1], [0, 0, 0, 0]],
            "segment": [[1, 1, 1, 2], [1, 0, 0, 0]],
            "position": [[0, 1, 2, 0], [0, 0, 0, 0]],
        }
        assert {key: array.tolist() for key, array in everything(source, "train").items()} == expected

    @BOTH
    def test_every_document_is_found_once(self, packing: str) -> None:
        source = made(packing=packing)
        for split, documents in DOCUMENTS.items():
            assert list(source.text(split)) == documents
            batch = everything(source, split)
            counted = batch["weight"] > 0
            # All symbols but each document's first, and each document's end.
            expected = [one for text in documents for one in [*text.encode()[1:], 256]]
            assert sorted(batch["target"][counted].tolist()) == sorted(expected)
            assert batch["bytes"].sum() == sum(len(text.encode()) - 1 for text in documents)

    @BOTH
    def test_weights(self, packing: str) -> None:
        batch = everything(made(packing=packing), "train")
        padding, after_end = batch["segment"] == 0, batch["ids"] == 256
        np.testing.assert_array_equal(batch["weight"] == 0, padding | after_end)
        assert (padding | after_end).any() and not batch["bytes"][batch["weight"] == 0].any()
        ends = batch["target"][batch["weight"] > 0] == 256
        assert ends.sum() == len(DOCUMENTS["train"])
        assert not batch["bytes"][batch["weight"] > 0][ends].any()
        for key, array in batch.items():
            assert not array[padding].any(), key

    @BOTH
    def test_without_borders_nothing_changes_but_segments_and_positions(self, packing: str) -> None:
        apart, joined = (
            everything(made(packing=packing, isolate=isolate), "train") for isolate in (True, False)
        )
        for key in ("ids", "target", "weight", "bytes"):
            np.testing.assert_array_equal(apart[key], joined[key])
        used = apart["segment"] > 0
        np.testing.assert_array_equal(joined["segment"], used.astype(np.int32))
        np.testing.assert_array_equal(joined["position"], np.where(used, np.arange(LENGTH), 0))
        assert apart["segment"].max() > 1

    @BOTH
    def test_bytes_are_those_of_the_tokens(self, packing: str, saved_bpe: str) -> None:
        source = made(packing=packing, tokenizer=saved_bpe)
        batch = everything(source, "validation")
        firsts = sum(
            len(source.tokenizer.to_bytes(source.tokenizer.encode(t)[:1])) for t in DOCUMENTS["validation"]
        )
        total = sum(len(text.encode()) for text in DOCUMENTS["validation"])
        assert batch["bytes"].sum() == total - firsts
        assert batch["bytes"].max() > 1
        assert list(source.text("validation")) == DOCUMENTS["validation"]

    def test_many_ids_are_kept_apart(self, tmp_path) -> None:
        """A vocabulary of more than 2**16 ids does not wrap around."""
        from tokenizers import Tokenizer, decoders, models

        library = Tokenizer(models.BPE(vocab={"a": 1, "b": 70_000, "<eos>": 70_001}, merges=[]))
        library.decoder = decoders.Fuse()
        library.add_special_tokens(["<eos>"])
        library.save(str(tmp_path / "t.json"))
        source = made({"train": ["ab"]}, tokenizer=str(tmp_path / "t.json"))
        assert everything(source, "train")["target"][0, :2].tolist() == [70_000, 70_001]

    def test_one_record_and_out_of_range(self) -> None:
        source = made()
        records, batch = source.split("train"), everything(source, "train")
        for key, value in records[3].items():
            np.testing.assert_array_equal(value, batch[key][3])
        for index in (-1, len(records)):
            with pytest.raises(IndexError):
                records[index]
        with pytest.raises(DataError, match="has no split 'tain'. Did you mean 'train'?"):
            source.split("tain")

    def test_a_batch_is_the_callers(self) -> None:
        source = made()
        for array in everything(source, "train").values():
            array[:] = 0
        assert everything(source, "train")["ids"].any()

    def test_documents_of_white_space_are_left_out(self) -> None:
        source = made({"train": ["", "a b", " \n\t", "c "]})
        assert list(source.text("train")) == ["a b", "c "]


class TestFingerprint:
    def test_it_is_of_content_and_of_every_option(self, saved_bpe: str) -> None:
        changes: list[Callable[[], TextSource]] = [
            made,
            lambda: made({**DOCUMENTS, "train": DOCUMENTS["train"][::-1]}),
            lambda: made({"train": DOCUMENTS["validation"], "validation": DOCUMENTS["train"]}),
            lambda: made({"train": ["ab", "c"]}),
            lambda: made({"train": ["a", "bc"]}),
            lambda: made(length=LENGTH + 1),
            lambda: made(packing="fit"),
            lambda: made(isolate=False),
            lambda: made(tokenizer=saved_bpe),
        ]
        found = [make().fingerprint for make in changes]
        assert len(set(found)) == len(found)
        assert [make().fingerprint for make in changes] == found

    def test_training_a_vocabulary_again_is_the_same_data(self, saved_bpe: str) -> None:
        first, again = made(tokenizer="bpe(270)"), made(tokenizer="bpe(270)")
        assert first.fingerprint == again.fingerprint == made(tokenizer=saved_bpe).fingerprint
        for key, array in everything(first, "validation").items():
            np.testing.assert_array_equal(array, everything(again, "validation")[key])

    def test_a_vocabulary_is_trained_on_the_train_split(self) -> None:
        first = made(tokenizer="bpe(270)")
        other = made({**DOCUMENTS, "validation": ["something else entirely"] * 20}, tokenizer="bpe(270)")
        assert first.tokenizer.fingerprint == other.tokenizer.fingerprint


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"length": 1}, ConfigError, "config.data.length is 1; expected at least 2"),
            (
                {"transform": "flip_lr"},
                ConfigError,
                "config.data.transform is 'flip_lr'; .* of which text has none",
            ),
            (
                {"eval_transform": ""},
                ConfigError,
                "config.data.eval_transform is ''; .* of which text has none",
            ),
            ({"corrupt": "skip"}, ConfigError, "config.data.corrupt is 'skip'; expected 'stop'"),
            (
                {"packing": "best"},
                ConfigError,
                "config.data.packing is 'best'.*expected one of 'stream', 'fit'",
            ),
            ({"tokenizer": "bites"}, DataError, "there is no such file; .* Did you mean 'bytes'?"),
            ({"tokenizer": "bpe(10)"}, ConfigError, r"expected at least bpe\(257\)"),
            ({"split": "x"}, ConfigError, "has no key 'split'. Did you mean 'splits'?"),
        ],
    )
    def test_options(self, options: dict[str, Any], error: type[TokenLabError], message: str) -> None:
        with pytest.raises(error, match=message):
            data.build({"name": "shakespeare", **options})

    def test_splits_without_documents(self) -> None:
        with pytest.raises(DataError, match="source 'tiny' has no split"):
            TextSource("tiny", {}, TextConfig())
        with pytest.raises(DataError, match="split 'test' has no document; expected one or more"):
            made({"train": ["a"], "test": []})
        with pytest.raises(DataError, match="split 'test' has no document: 2 were given, .* white space"):
            made({"train": ["a"], "test": [" ", "\n"]})

    def test_a_vocabulary_needs_a_train_split(self) -> None:
        with pytest.raises(
            DataError, match=r"'bpe\(270\)', which is trained on split 'train', .* has only dev, test"
        ):
            made({"dev": ["a"], "test": ["b"]}, tokenizer="bpe(270)")

    def test_where_a_text_is_wrong(self) -> None:
        with pytest.raises(
            DataError, match="source 'tiny', split 'dev': a text is no Unicode: character 1 is the lone"
        ):
            made({"train": ["a"], "dev": ["b", "c\udfff"]})


class TestDataset:
    def test_it_knows_tokenizer_and_text(self) -> None:
        dataset = Dataset(made(), TextConfig())
        assert dataset.vocab_size == 257 and dataset.tokenizer is dataset.source.tokenizer
        assert dataset.spec == dataset.source.spec
        assert list(dataset.text("validation")) == DOCUMENTS["validation"]

    def test_pictures_have_none(self) -> None:
        dataset = data.build({"name": "digits"})
        assert dataset.vocab_size is None and dataset.tokenizer is None
        with pytest.raises(DataError, match="source 'digits' holds no text"):
            dataset.text("train")

    def test_a_transform_is_refused_wherever_it_is_given(self) -> None:
        with pytest.raises(DataError, match="'flip_lr' needs an image; the data has bytes, ids"):
            Dataset(made(), data.DataConfig(transform="flip_lr"))

    def test_order_is_a_function_of_the_step(self) -> None:
        whole = TrainStream(made(), "train", 8, seed=3)
        batches = [whole.batch(step) for step in range(6)]
        resumed = TrainStream(made(), "train", 8, seed=3)
        assert resumed.check(whole.state(4)) == 4
        for step in (4, 5, 0):
            for key, array in resumed.batch(step).items():
                np.testing.assert_array_equal(array, batches[step][key])
        assert not np.array_equal(batches[0]["ids"], TrainStream(made(), "train", 8, seed=4).batch(0)["ids"])

    def test_another_packing_does_not_go_on(self) -> None:
        state = TrainStream(made(), "train", 8, seed=3).state(4)
        with pytest.raises(
            DataError, match="the checkpoint's data state does not fit this run: fingerprint is"
        ):
            TrainStream(made(packing="fit"), "train", 8, seed=3).check(state)

    @BOTH
    def test_processes_share_each_batch(self, packing: str) -> None:
        source = made(packing=packing)
        whole = TrainStream(source, "train", 8, seed=3)
        halves = [TrainStream(source, "train", 8, seed=3, rows=range(4 * i, 4 * i + 4)) for i in range(2)]
        first, second = (stream.indices(1).tolist() for stream in halves)
        assert not set(first) & set(second)
        assert [*first, *second] == whole.indices(1).tolist()
        batches = [stream.batch(1) for stream in halves]
        for key, array in whole.batch(1).items():
            np.testing.assert_array_equal(array, np.concatenate([batch[key] for batch in batches]))

    @BOTH
    @pytest.mark.parametrize("processes", [1, 2])
    def test_evaluation_sees_everything_once_and_pads_with_zeros(self, packing: str, processes: int) -> None:
        source = made(packing=packing)
        batch_size, size = 6, source.splits["validation"]
        assert size % batch_size
        parts = [
            list(eval_batches(source, "validation", batch_size, rows=range(i, i + batch_size // processes)))
            for i in range(0, batch_size, batch_size // processes)
        ]
        assert len(parts[0]) == num_eval_batches(source, "validation", batch_size)
        rows = {
            key: np.concatenate([part[key] for together in zip(*parts, strict=True) for part in together])
            for key in (*source.spec, "mask")
        }
        assert rows["mask"].sum() == size
        for key, array in everything(source, "validation").items():
            np.testing.assert_array_equal(rows[key][rows["mask"] > 0], array)
            assert not rows[key][rows["mask"] == 0].any()

    def test_threads_and_workers_make_the_same(self, saved_bpe: str) -> None:
        source = made(tokenizer=saved_bpe)
        expected = [TrainStream(source, "train", 8, seed=0).batch(step)["ids"] for step in range(3)]
        # A worker gets the stream as a copy.
        stream = pickle.loads(pickle.dumps(TrainStream(source, "train", 8, seed=0)))
        with data.Prefetch(stream.batch, depth=2, threads=2) as batches:
            for ids, batch in zip(expected, itertools.islice(batches, 3), strict=True):
                np.testing.assert_array_equal(batch["ids"], ids)

    @pytest.mark.slow
    def test_a_worker_process_makes_the_same(self, saved_bpe: str) -> None:
        stream = TrainStream(made(tokenizer=saved_bpe), "train", 8, seed=0)
        with data.Prefetch(stream.batch, depth=2, workers=1) as batches:
            for step, batch in zip(range(2), batches, strict=False):
                np.testing.assert_array_equal(batch["ids"], stream.batch(step)["ids"])


class TestSlices:
    @BOTH
    def test_slices_count_examples(self, packing: str) -> None:
        source = made(packing=packing)
        found = sliced(source, {"train": "train[:75%]", "held": "train[75%:]", "validation": "validation"})
        dataset = Dataset(found, TextConfig())
        assert (dataset.vocab_size, dataset.tokenizer) == (257, source.tokenizer)
        assert dataset.splits["train"] + dataset.splits["held"] == source.splits["train"]
        both = [everything(dataset, split) for split in ("train", "held")]
        for key, array in everything(source, "train").items():
            np.testing.assert_array_equal(np.concatenate([each[key] for each in both]), array)

    def test_the_text_of_a_slice_is_what_its_examples_hold(self) -> None:
        source = made({"train": ["abcdefghij", "klmno", "pqrst"]}, length=4)
        found = sliced(source, {"train": "train[1:3]", "rest": "train[:1] + train[3:]"})
        # Tokens: abcd efgh ij.k lmno .pqr st. and each row's last target.
        assert list(found.split("train").text()) == ["efghij", "kl"]
        assert list(found.split("rest").text()) == ["abcde", "lmno", "pqrst"]
        part = sliced(found, {"part": "rest[1:2] + rest[:1]"})
        assert list(part.split("part").text()) == ["lmno", "abcde"]

    def test_whole_documents_of_a_slice_of_fitted_rows(self) -> None:
        source = made({"train": ["abcdefghij", "klm", "nop", "q"]}, length=4, packing="fit")
        rows = [["abcde"], ["efghi"], ["ij"], ["klm"], ["nop", "q"]]
        found = sliced(source, {f"row{i}": f"train[{i}:{i + 1}]" for i in range(source.splits["train"])})
        assert [list(found.split(split).text()) for split in found.splits] == rows
        assert list(source.text("train")) == ["abcdefghij", "klm", "nop", "q"]


class TestMixture:
    def test_examples_of_both_parts(self, parts: list[TextSource]) -> None:
        mixture = Dataset(MixtureSource(parts, [1.0, 3.0]))
        assert (mixture.vocab_size, mixture.tokenizer.fingerprint) == (257, "bytes")
        assert mixture.splits["train"] == sum(part.splits["train"] for part in parts)
        assert list(mixture.text("train")) == [*DOCUMENTS["train"], "z" * 30, "yy"]
        stream = TrainStream(mixture, "train", 16, seed=0)
        rows = np.concatenate([stream.batch(step)["ids"][:, 0] for step in range(256)])
        assert np.isin(rows, [ord("z"), ord("y")]).mean() == pytest.approx(0.75, abs=0.001)

    def test_by_configuration(self) -> None:
        part = {"name": "shakespeare", "length": 64, "weight": 1.0}
        found = data.build({"name": "mixture", "parts": (part, {**part, "splits": {"train": "train[:10%]"}})})
        assert list(found.splits) == ["train"] and found.vocab_size == 257
        assert found.splits["train"] == 15_686 + 1_569

    def test_parts_must_fit(self, parts: list[TextSource], saved_bpe: str) -> None:
        with pytest.raises(DataError, match="have different tokenizers, so that an id means another text"):
            MixtureSource([parts[0], made(tokenizer=saved_bpe)], [1.0, 1.0])
        with pytest.raises(DataError, match=r"key 'ids' is \[16\] and \[8\]; expected the same"):
            MixtureSource([parts[0], made(length=8)], [1.0, 1.0])
        with pytest.raises(DataError, match="have different keys"):
            MixtureSource([parts[0], data.source_of({"name": "digits"})], [1.0, 1.0])

    def test_slices_within_parts(self, parts: list[TextSource]) -> None:
        mixture = MixtureSource([sliced(parts[0], {"train": "train[:2]"}), parts[1]], [1.0, 1.0])
        nested = MixtureSource([mixture, parts[1]], [1.0, 1.0])
        assert list(nested.split("train").text())[-2:] == ["z" * 30, "yy"]
        assert "".join(list(mixture.split("train").text())[:-2]) == "".join(
            sliced(parts[0], {"train": "train[:2]"}).split("train").text()
        )
