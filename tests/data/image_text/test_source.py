"""Rows of pictures and text as examples: exact counts, targets, and back to captions, pictures and texts."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.data.image_text.pairs import CAPTIONS, CODES, GRID, TEXTS, K, N, coded, made
from tokenlab.core.errors import ConfigError, DataError, TokenLabError
from tokenlab.core.modality import IMAGE, TEXT
from tokenlab.data import Dataset, ImageTextConfig, TrainStream, eval_batches
from tokenlab.data.image_text import ImageTextSource, ImageTextVocabulary, WithoutExamples, documents
from tokenlab.data.source import Source
from tokenlab.data.sources.mixture import MixtureSource
from tokenlab.data.splits import sliced
from tokenlab.data.text import tokenizer

T, END, BEGIN, END_IMAGE, FIRST = 257, 256, 257, 258, 259
PER_PICTURE = GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def source() -> ImageTextSource:
    return made()


@pytest.fixture(scope="module")
def pairs() -> ImageTextSource:
    """Two pictures a row."""
    return made(length=34, pictures_per_row=2)


def everything(source: Source | Dataset, split: str = "train") -> dict[str, np.ndarray]:
    return source.split(split).batch(np.arange(source.splits[split]))


class TestExamples:
    @pytest.mark.parametrize("isolate", [True, False])
    def test_keys_shapes_and_dtypes(self, isolate: bool) -> None:
        source = made(isolate=isolate)
        assert isinstance(source, Source) and isinstance(source.tokenizer, ImageTextVocabulary)
        assert source.vocab_size == T + 2 + K and source.num_classes is None
        assert source.splits == {"train": 22, "dev": 8}
        batch = everything(source)
        assert batch.keys() == source.spec.keys()
        for key, (shape, dtype) in source.spec.items():
            assert shape == (N,) and batch[key].shape == (22, N)
            assert batch[key].dtype == dtype == ("float32" if key in ("weight", "bytes") else "int32")

    @pytest.mark.parametrize(("length", "pictures"), [(11, 1), (N, 1), (34, 2), (50, 3)])
    def test_every_row_has_as_many_codes(self, length: int, pictures: int) -> None:
        source = made(length=length, pictures_per_row=pictures)
        for split in source.splits:
            batch = everything(source, split)
            for key in ("modality", "target_modality"):
                assert set(batch[key].sum(1).tolist()) == {pictures * PER_PICTURE}
            assert set((batch["ids"] == BEGIN).sum(1).tolist()) == {pictures}
            assert batch["weight"].all() and batch["segment"].min() == 1

    def test_modality_is_of_the_ids(self, source: ImageTextSource) -> None:
        batch = everything(source)
        for ids, modality in (("ids", "modality"), ("target", "target_modality")):
            np.testing.assert_array_equal(batch[modality], np.where(batch[ids] >= FIRST, IMAGE, TEXT))
            assert batch[ids].min() >= 0 and batch[ids].max() < source.vocab_size
        of_text = batch["bytes"] > 0
        np.testing.assert_array_equal(of_text, batch["target"] < 256)
        assert set(np.unique(batch["bytes"])) == {0, 1}

    def test_a_target_is_the_next_token_of_the_same_document(self, source: ImageTextSource) -> None:
        batch = everything(source)
        same = batch["segment"][:, 1:] == batch["segment"][:, :-1]
        np.testing.assert_array_equal(batch["target"][:, :-1][same], batch["ids"][:, 1:][same])
        np.testing.assert_array_equal(
            batch["position"][:, 1:], np.where(same, batch["position"][:, :-1] + 1, 0)
        )
        assert not (batch["ids"] == END).any()
        # Each row has one document with a picture, so one end of one at least.
        assert ((batch["target"] == END).sum(1) >= 1).all()

    def test_both_documents_of_every_pair_come_back(self, source: ImageTextSource) -> None:
        for split in source.splits:
            found: Counter = Counter()
            for row in range(source.splits[split]):
                of_row = documents(source.split(split)[row], source.tokenizer)
                assert sum(document.tokens for document in of_row) == N
                for document in of_row:
                    kinds = [isinstance(part, str) for part in document.parts]
                    if False not in kinds:
                        continue
                    assert document.ends and len(kinds) == 2
                    text, codes = document.parts if kinds[0] else document.parts[::-1]
                    assert codes.shape == GRID
                    found[text, codes.tobytes(), kinds[0]] += 1
            expected = Counter(
                (caption, codes.astype(np.int32).tobytes(), order)
                for caption, codes in zip(CAPTIONS[split], CODES[split], strict=True)
                for order in (True, False)
            )
            assert found == expected

    def test_texts_go_on_from_row_to_row(self, source: ImageTextSource) -> None:
        ids = []
        for row in range(source.splits["train"]):
            record = source.split("train")[row]
            for segment in range(1, int(record["segment"].max()) + 1):
                own = record["ids"][record["segment"] == segment]
                if BEGIN not in own:
                    ids += own.tolist()
        whole = [byte for text in TEXTS["train"] if text.strip() for byte in text.encode()]
        assert len(ids) < len(whole) and ids == whole[: len(ids)]
        assert source.split("train").text_read == pytest.approx(len(ids) / len(whole))

    def test_short_texts_begin_anew(self, source: ImageTextSource) -> None:
        records = source.split("dev")
        assert records.text_read > 3
        texts = [document.parts for row in range(8) for document in documents(records[row], source.tokenizer)]
        joined = "".join(parts[0] for parts in texts if len(parts) == 1)
        assert joined.startswith("tinyshort onetinyshort one")

    def test_without_borders_nothing_changes_but_segments_and_positions(
        self, source: ImageTextSource
    ) -> None:
        apart, joined = everything(source), everything(made(isolate=False))
        for key in apart.keys() - {"segment", "position"}:
            np.testing.assert_array_equal(apart[key], joined[key])
        assert (joined["segment"] == 1).all() and (joined["position"] == np.arange(N)).all()
        assert apart["segment"].max() > 1

    def test_ends_tell_the_documents_of_one_segment_apart(self, source: ImageTextSource) -> None:
        records = made(isolate=False).split("train")
        for row in range(len(records)):
            record = records[row]
            found = documents(record, source.tokenizer)
            assert sum(document.tokens for document in found) == N
            assert all(document.ends for document in found[:-1])
            assert len(found) == (record["target"] == END).sum() + (record["target"][-1] != END)

    def test_two_pictures_of_a_row_are_of_different_pairs(self, pairs: ImageTextSource) -> None:
        assert pairs.splits == {"train": 11, "dev": 4}
        for row in range(11):
            parts = [p for d in documents(pairs.split("train")[row], pairs.tokenizer) for p in d.parts]
            captions = [part for part in parts if isinstance(part, str) and part in CAPTIONS["train"]]
            assert len(captions) == len(set(captions)) == 2

    def test_the_last_row_is_filled_up_with_the_first_documents(self) -> None:
        source = made(length=50, pictures_per_row=3)
        assert source.splits == {"train": 8, "dev": 3}
        codes = [p.tobytes() for row in range(8) for d in documents(source.split("train")[row], source.tokenizer)
                 for p in d.parts if not isinstance(p, str)]  # fmt: skip
        assert len(codes) == 24 and Counter(Counter(codes).values()) == {2: 9, 3: 2}

    def test_a_saved_tokenizer(self, tmp_path) -> None:
        text = tokenizer.train_bpe(TEXTS["train"], 262)
        text.save(tmp_path / "t.json")
        saved, trained = (made(tokenizer=word) for word in (str(tmp_path / "t.json"), "bpe(262)"))
        assert saved.tokenizer.begin == trained.tokenizer.begin == 262
        batch = everything(trained)
        assert batch["bytes"].max() > 1 and (batch["modality"].sum(1) == PER_PICTURE).all()

    def test_one_record_and_out_of_range(self, source: ImageTextSource) -> None:
        records, batch = source.split("train"), everything(source)
        for key, value in records[3].items():
            np.testing.assert_array_equal(value, batch[key][3])
        for index in (-1, len(records)):
            with pytest.raises(IndexError):
                records[index]
        with pytest.raises(DataError, match="has no split 'tain'. Did you mean 'train'?"):
            source.split("tain")


class TestFingerprint:
    def test_it_is_of_content_and_of_every_option(self) -> None:
        moved = {**CODES, "train": CODES["train"][::-1]}
        renamed = {**CAPTIONS, "train": CAPTIONS["train"][::-1]}
        found = [
            made(), made(length=N + 1), made(pictures_per_row=2), made(isolate=False), made(tokenizer="bpe(262)"),
            made(pictures=coded(splits=moved)), made(captions=renamed), made(pictures=coded(codes=K + 1)),
            made(pictures=coded(fingerprint="g")), made(texts={**TEXTS, "train": TEXTS["train"][::-1]}),
            made(texts={"train": TEXTS["train"]}),
        ]  # fmt: skip
        assert len({source.fingerprint for source in found}) == len(found)
        assert (
            made().fingerprint == made(pictures=coded(name="moved.npz")).fingerprint == found[0].fingerprint
        )


class TestPipeline:
    def test_a_dataset_knows_the_vocabulary(self, source: ImageTextSource) -> None:
        dataset = Dataset(source, ImageTextConfig())
        assert dataset.vocab_size == T + 2 + K and dataset.tokenizer is source.tokenizer
        assert dataset.spec == source.spec
        assert next(iter(dataset.text("train"))) == "0w 1w 2w 3w 4w "

    def test_order_is_a_function_of_the_step(self, source: ImageTextSource) -> None:
        whole = TrainStream(source, "train", 8, seed=3)
        resumed = TrainStream(pickle.loads(pickle.dumps(made())), "train", 8, seed=3)
        assert resumed.check(whole.state(4)) == 4
        for key, array in resumed.batch(4).items():
            np.testing.assert_array_equal(array, whole.batch(4)[key])
        with pytest.raises(DataError, match="does not fit this run: fingerprint is"):
            TrainStream(made(isolate=False), "train", 8, seed=3).check(whole.state(4))

    def test_evaluation_sees_every_row_once(self, source: ImageTextSource) -> None:
        batches = list(eval_batches(source, "dev", 3))
        ids = np.concatenate([batch["ids"][batch["mask"] > 0] for batch in batches])
        np.testing.assert_array_equal(ids, everything(source, "dev")["ids"])

    def test_slices_and_mixtures(self, source: ImageTextSource) -> None:
        part = sliced(source, {"train": "train[:3]"})
        assert part.vocab_size == source.vocab_size and len(part.split("train")) == 3
        assert next(iter(part.split("train").text())) == "0w 1w 2w 3w 4w "
        mixture = MixtureSource([source, made(length=N, captions=CAPTIONS)], [1.0, 2.0])
        assert mixture.vocab_size == source.vocab_size and mixture.splits["train"] == 44
        with pytest.raises(DataError, match="have different tokenizers"):
            MixtureSource([source, made(pictures=coded(name="other.npz"))], [1.0, 1.0])


class TestKept:
    def test_a_kept_vocabulary_is_enough_for_a_model(self, source: ImageTextSource, tmp_path) -> None:
        file = tmp_path / "tokenizer.json"
        file.write_text(source.tokenizer.to_json(), encoding="utf-8")
        again = made(tokenizer=str(file))
        assert again.fingerprint == source.fingerprint
        known = WithoutExamples(ImageTextConfig(name="tiny", length=N), again.tokenizer)
        assert known.spec == source.spec and known.vocab_size == source.vocab_size
        with pytest.raises(
            DataError, match=r"is of pictures of 2 x 2 codes out of 5; .* gives 2 x 2 out of 6"
        ):
            made(tokenizer=str(file), pictures=coded(codes=6))


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"length": 1}, ConfigError, "config.data.length is 1; expected at least 2"),
            ({"pictures_per_row": 0}, ConfigError, "config.data.pictures_per_row is 0; expected at least 1"),
            (
                {"length": 10},
                ConfigError,
                "config.data.length is 10, and 1 pictures .* take up to 11 tokens in split 'train': 2 x 2 codes, 2 "
                "delimiters and a caption of up to 5 each",
            ),
            ({"length": 21, "pictures_per_row": 2}, ConfigError, "take up to 22 tokens"),
            (
                {"pictures_per_row": 5, "length": 99},
                DataError,
                "split 'dev' has 4 pictures, fewer than the 5",
            ),
            ({"tokenizer": "bites"}, DataError, "there is no such file; .* Did you mean 'bytes'?"),
            (
                {"transform": "flip_lr"},
                ConfigError,
                "of which a row of codes and text has none: leave it out",
            ),
            ({"corrupt": "skip"}, ConfigError, "config.data.corrupt is 'skip'; expected 'stop'"),
            (
                {"texts": {"test": ["a"]}},
                DataError,
                "pictures have the splits train, dev, texts test; expected one",
            ),
            ({"texts": {"dev": [" "]}}, DataError, "split 'dev' has no text to fill rows with"),
            ({"texts": {"dev": ["a\udfff"]}}, DataError, "split 'dev': a text is no Unicode"),
            (
                {"texts": {"dev": ["abc"]}, "tokenizer": "bpe(262)"},
                DataError,
                r"trained on split 'train', and source 'tiny' has only dev",
            ),
            (
                {"captions": {**CAPTIONS, "dev": ("a",)}},
                DataError,
                "split 'dev': 4 pictures have 1 captions; expected one each",
            ),
            (
                {"captions": {**CAPTIONS, "dev": ("a", "b", " ", "c")}},
                DataError,
                "split 'dev': the caption of picture 2 is ' '; expected text",
            ),
        ],
    )
    def test_options(self, options: dict[str, Any], error: type[TokenLabError], message: str) -> None:
        with pytest.raises(error, match=message):
            made(**options)

    def test_the_longest_row_that_fits(self) -> None:
        source = made(length=11)
        assert (everything(source)["modality"].sum(1) == PER_PICTURE).all()
