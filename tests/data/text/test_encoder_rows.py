"""Rows for an encoder: CLS, words, special tokens, and that nothing of the text is lost or moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data import TextConfig, TextSource
from tokenlab.data.text import tokenizer
from tokenlab.data.text.encoder_rows import Words
from tokenlab.data.text.show import show_lines

N = 16
DOCUMENTS = {
    "train": [
        "def f(x_1):  return x_1",
        "Der Fluß ist 고양이 long.",
        "a b",
        "one two three four five six seven",
    ]
    * 3,
    "test": ["x = 1\n\ny"],
}


def made(**options) -> TextSource:
    options = {"length": N, "encoder": True, **options}
    return TextSource("tiny", DOCUMENTS, TextConfig(name="tiny", **options))


def words_of(source: TextSource, row: dict[str, np.ndarray]) -> list[str]:
    numbers = row["word"]
    return [
        source.tokenizer.to_bytes(row["ids"][numbers == n]).decode("utf-8", "replace")
        for n in range(1, numbers.max() + 1)
    ]


@pytest.mark.parametrize("word", ["bytes", "bpe(280)"])
def test_words_are_runs_of_letters_or_signs_with_the_spaces_before_them(word: str) -> None:
    source = made(tokenizer=word, length=64)
    known = {"def", " f", "(", "x_1", "):", "  return", " x_1"}
    found = words_of(source, source.split("train")[0])
    assert found[: len(known)] == ["def", " f", "(", "x_1", "):", "  return", " x_1"]
    assert "Der" in found and " Fluß" in found and " 고양이" in found and " long" in found and "." in found


@pytest.mark.parametrize("packing", ["stream", "fit"])
@pytest.mark.parametrize("isolate", [True, False])
def test_rows_are_those_of_a_decoder_behind_cls(packing: str, isolate: bool) -> None:
    source = made(packing=packing, isolate=isolate)
    plain = TextSource(
        "tiny", DOCUMENTS, TextConfig(name="tiny", length=N - 1, packing=packing, isolate=isolate)
    )
    assert source.splits == plain.splits and source.vocab_size == 260
    every = np.arange(len(source.split("train")))
    rows, other = source.split("train").batch(every), plain.split("train").batch(every)
    assert {key: (leaf.shape[1:], leaf.dtype.name) for key, leaf in rows.items()} == dict(source.spec)
    pad, cls, sep, mask = source.tokenizer.specials
    assert (rows["ids"][:, 0] == cls).all() and (rows["mask_id"] == mask).all() and sep == plain.tokenizer.end
    assert (rows["special_ids"] == np.array([pad, cls, sep, mask])).all()
    inside = other["segment"] > 0
    np.testing.assert_array_equal(rows["ids"][:, 1:], np.where(inside, other["ids"], pad))
    np.testing.assert_array_equal(rows["segment"][:, 1:], other["segment"])
    assert (rows["segment"][:, 0] == 1).all() and (rows["position"][:, 0] == 0).all()
    moved = other["position"] + (other["segment"] == 1)
    np.testing.assert_array_equal(rows["position"][:, 1:], moved)
    special = np.isin(rows["ids"], [pad, cls, sep])
    np.testing.assert_array_equal(rows["word"] == 0, special)
    np.testing.assert_array_equal(rows["bytes"], 1.0 * ~special)


def test_no_word_is_of_two_documents() -> None:
    source = made(packing="fit", isolate=False, length=32)
    rows = source.split("train").batch(np.arange(len(source.split("train"))))
    isolated = made(packing="fit", length=32).split("train").batch(np.arange(len(rows["ids"])))
    np.testing.assert_array_equal(rows["word"], isolated["word"])
    for word, segment in zip(isolated["word"], isolated["segment"], strict=True):
        for number in range(1, word.max() + 1):
            assert len(set(segment[word == number])) == 1


def test_bytes_of_a_split_are_counted_once() -> None:
    source = made(tokenizer="bpe(280)")
    rows = source.split("train").batch(np.arange(len(source.split("train"))))
    assert rows["bytes"].sum() == sum(len(text.encode()) for text in DOCUMENTS["train"])


def test_a_vocabulary_made_here_has_what_an_encoder_needs_and_keeps_its_size(tmp_path: Path) -> None:
    bpe = tokenizer.build("bpe(280)", DOCUMENTS["train"], encoder=True)
    assert bpe.vocab_size == 280 and len(set(bpe.specials)) == 4 and bpe.specials.sep == bpe.end
    assert (bpe.byte_lengths[list(bpe.specials)] == 0).all()
    bpe.save(tmp_path / "tokenizer.json")
    loaded = tokenizer.build(str(tmp_path / "tokenizer.json"), (), encoder=True)
    assert loaded.specials == bpe.specials and loaded.fingerprint == bpe.fingerprint
    text = "<|mask|> is text, [CLS] too"
    assert loaded.decode(loaded.encode(text)) == text and bpe.specials.mask not in loaded.encode(text)
    plain = tokenizer.ByteTokenizer()
    assert plain.specials is None and tokenizer.ByteTokenizer(True).fingerprint != plain.fingerprint


def test_a_saved_vocabulary_without_a_mask_is_refused(tmp_path: Path) -> None:
    tokenizer.train_bpe(DOCUMENTS["train"], 270).save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"cannot serve an encoder: .*mask: <\|mask\|> or \[MASK\] or <mask>"):
        made(tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"expected at least bpe\(260\): .*padding, CLS, the mask"):
        made(tokenizer="bpe(259)")


def test_words_of_a_tokenizer_without_bytes_for_an_id() -> None:
    """Ids that stand for nothing are in no word, and begin none."""
    known = tokenizer.ByteTokenizer(True)
    ids = np.array([[258, 97, 98, 256, 98, 32, 32, 99, 33, 33, 257]])
    found = Words(known).number(ids, np.ones_like(ids))
    assert found.tolist() == [[0, 1, 1, 0, 2, 3, 3, 3, 4, 4, 0]]


def test_the_standard_library_is_text_by_modules() -> None:
    source = data.build({"name": "python_text", "length": 64, "encoder": True})
    assert set(source.splits) == {"train", "validation", "test"}
    assert any("def " in text for text in source.text("validation"))
    again = data.build({"name": "python_text", "length": 64, "encoder": True})
    assert again.fingerprint == source.fingerprint


@pytest.mark.parametrize("kind", ["rows", "sentences"])
def test_what_show_prints(kind: str) -> None:
    if kind == "rows":
        source = data.build({"name": "shakespeare", "length": 32, "encoder": True})
        wanted = ["bytes, 260 ids; 32 tokens an example", "'First Citizen:", "0: 32 tokens"]
    else:
        source = data.build({"name": "python_sentences", "kind": "pair", "examples": 40})
        wanted = [
            "train",
            "40 examples;",
            "cut to their length",
            "of another, its own",
            "of another: ",
            " | ",
        ]
    lines = "\n".join(show_lines(source, "train"))
    assert [part for part in wanted if part not in lines] == []
