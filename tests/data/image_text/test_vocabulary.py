"""One vocabulary of text and codes: where ids stand, what they mean, and that a run can keep it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.image_text import pairs
from tokenlab.core.errors import DataError
from tokenlab.data.image_text import Grey, ImageTextVocabulary, saved
from tokenlab.data.image_text.codec import checksum
from tokenlab.data.text import ByteTokenizer, Decoder, Tokenizer, tokenizer

GRID = (2, 3)
CODES = np.array([[0, 1, 2], [4, 3, 0]])


@pytest.fixture(scope="module")
def known() -> ImageTextVocabulary:
    return ImageTextVocabulary(ByteTokenizer(), 5, GRID, "grey(5)")


@pytest.fixture(scope="module")
def of_bpe() -> ImageTextVocabulary:
    text = tokenizer.train_bpe(["the cat sat on the mat, the cat"], 262)
    return ImageTextVocabulary(text, 5, GRID, "codes.npz")


def test_where_ids_stand(known: ImageTextVocabulary) -> None:
    assert isinstance(known, Tokenizer)
    assert (known.end, known.begin, known.end_image, known.first_code, known.vocab_size) == (
        256,
        257,
        258,
        259,
        264,
    )
    both = known.pictures(np.stack([CODES, CODES[::-1]]).astype(np.uint16))
    assert both[0].tolist() == [257, 259, 260, 261, 263, 262, 259, 258]
    assert both[1].tolist() == [257, 263, 262, 259, 259, 260, 261, 258] and both.dtype == np.int32
    ids = np.arange(known.vocab_size)
    assert known.modality(ids).tolist() == [0] * 259 + [1] * 5 and known.modality(ids).dtype == np.int32
    assert known.byte_lengths.tolist() == [1] * 256 + [0] * 8
    assert known.encode("é").tolist() == [0xC3, 0xA9]


def test_text_and_pictures_come_back(known: ImageTextVocabulary, of_bpe: ImageTextVocabulary) -> None:
    for vocabulary in (known, of_bpe):
        ids = [
            *vocabulary.encode("the cat"),
            *vocabulary.pictures(np.stack([CODES, CODES[::-1]])).reshape(-1),
        ]
        parts = vocabulary.parts([*ids, vocabulary.end, *vocabulary.encode(" sat")])
        assert [part if isinstance(part, str) else part.tolist() for part in parts] == [
            "the cat", CODES.tolist(), CODES[::-1].tolist(), " sat",
        ]  # fmt: skip
        assert vocabulary.decode(ids) == "the cat" and vocabulary.to_bytes(ids) == b"the cat"
        assert Decoder(vocabulary).push(ids) == "the cat"


def test_parts_of_what_a_model_may_generate(known: ImageTextVocabulary) -> None:
    assert known.parts([]) == []
    short = known.parts([65, known.begin, known.first_code, 66])
    assert short[0] == "A" and short[1].tolist() == [0] and short[2] == "B"
    assert [part.shape for part in known.parts(np.full(7, known.first_code))] == [(7,)]
    assert known.parts([known.begin, known.end_image, known.end]) == []


def test_pixels_of_grey_levels(known: ImageTextVocabulary, of_bpe: ImageTextVocabulary) -> None:
    assert known.pixels == Grey(5, GRID) and of_bpe.pixels is None
    np.testing.assert_array_equal(known.pixels.decode(CODES)[..., 0], CODES / 2 - 1)


def test_a_file_keeps_all_of_it(
    known: ImageTextVocabulary, of_bpe: ImageTextVocabulary, tmp_path: Path
) -> None:
    for vocabulary in (known, of_bpe):
        file = tmp_path / "tokenizer.json"
        file.write_text(vocabulary.to_json(), encoding="utf-8")
        again = saved(str(file))
        assert (again.fingerprint, again.name) == (vocabulary.fingerprint, vocabulary.name)
        assert (again.codes, again.grid, again.codec) == (5, GRID, vocabulary.codec)
        assert again.encode("the mat").tolist() == vocabulary.encode("the mat").tolist()
        assert again.to_json() == vocabulary.to_json()


def test_other_files_are_none(of_bpe: ImageTextVocabulary, tmp_path: Path) -> None:
    assert saved("bytes") is None and saved(str(tmp_path)) is None
    of_bpe.text.save(tmp_path / "t.json")
    assert saved(str(tmp_path / "t.json")) is None
    (tmp_path / "x").write_bytes(b"\xff")
    assert saved(str(tmp_path / "x")) is None


def test_the_checksum_of_a_file_is_kept() -> None:
    """A vocabulary that was kept before there was one has none."""
    of_file = pairs.made().tokenizer
    assert of_file.checksum == checksum(pairs.CODES)
    assert ImageTextVocabulary.from_json(of_file.to_json()).checksum == of_file.checksum
    says = json.loads(of_file.to_json())
    del says["checksum"]
    assert ImageTextVocabulary.from_json(json.dumps(says)).checksum is None
    grey = pairs.coded(name="grey(5)", pixels=Grey(5, pairs.GRID))
    assert pairs.made(pictures=grey).tokenizer.checksum is None


def test_fingerprints_differ(known: ImageTextVocabulary, of_bpe: ImageTextVocabulary) -> None:
    text = known.text
    others = [
        known, of_bpe, ImageTextVocabulary(text, 6, GRID, "grey(5)"), ImageTextVocabulary(text, 5, (3, 2), "grey(5)"),
        ImageTextVocabulary(text, 5, GRID, "codes.npz"),
    ]  # fmt: skip
    assert len({vocabulary.fingerprint for vocabulary in others}) == len(others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; this version reads format 1"),
        ({"grid": [1]}, "is damaged: ValueError"),
        ({"codes": None}, "is damaged: TypeError"),
        ({"text": {"name": "x", "json": "{"}}, "it is no tokenizer.json"),
        ({"kind": "else"}, "is no vocabulary of pictures and text"),
    ],
)
def test_damaged_files(change: dict[str, Any], message: str, known: ImageTextVocabulary) -> None:
    text = json.dumps({**json.loads(known.to_json()), **change})
    with pytest.raises(DataError, match=message):
        ImageTextVocabulary.from_json(text)
    with pytest.raises(DataError, match="is no vocabulary"):
        ImageTextVocabulary.from_json("{")


def test_what_is_no_picture_and_no_id(known: ImageTextVocabulary) -> None:
    for wrong in (CODES[:1], CODES + 1, CODES - 1):
        with pytest.raises(DataError, match=r"pictures have codes .*; expected \[n, 2, 3\] from 0 to 4"):
            known.pictures(wrong[None])
    for call in (known.parts, known.decode, known.to_bytes):
        with pytest.raises(DataError, match="id 264 is no token; expected 0 to 263"):
            call([264])
