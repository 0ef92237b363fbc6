"""Labelled sentences and pairs: how an example is put together, what is cut, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.source import Source, check_batch
from tokenlab.data.sources import python_sentences
from tokenlab.data.text import stdlib
from tokenlab.data.text.sentences import Sentence, SentenceConfig, SentenceSource, kept_of_pair

PAD, CLS, SEP = 257, 258, 256
SENTENCES = {
    "train": [Sentence("abc", None, 0), Sentence("long text", "x", 1), Sentence("a", "longer text", 1)],
    "test": [Sentence("é", "b", 0)],
}


def made(sentences=SENTENCES, **options) -> SentenceSource:
    return SentenceSource(
        "tiny", sentences, ("no", "yes"), SentenceConfig(name="tiny", **{"length": 10, **options})
    )


def test_an_example_is_cls_a_text_and_an_end_and_of_a_pair_another() -> None:
    source = made(length=16)
    rows = source.split("train").batch(np.arange(3))
    check_batch(rows, source, "train", np.arange(3))
    assert isinstance(source, Source) and source.num_classes == 2 and source.vocab_size == 260
    first = [CLS, *b"abc", SEP]
    assert rows["ids"][0].tolist() == first + [PAD] * 11
    pair = [CLS, *b"long text", SEP, *b"x", SEP]
    assert rows["ids"][1].tolist() == pair + [PAD] * 3
    assert rows["length"].tolist() == [5, 13, 15] and rows["label"].tolist() == [0, 1, 1]
    assert rows["type"][0].sum() == 0
    assert rows["type"][1].tolist() == [0] * 11 + [1, 1] + [0] * 3
    assert source.split("test")[0]["ids"].tolist()[:3] == [CLS, *"é".encode()]
    assert source.cut == {"train": 0, "test": 0}


def test_of_what_is_too_long_the_longer_text_is_cut_first() -> None:
    source = made()
    rows = source.split("train").batch(np.arange(3))
    assert bytes(rows["ids"][1][1:7].astype(np.uint8)) == b"long t"
    assert rows["ids"][1].tolist()[7:] == [SEP, ord("x"), SEP]
    assert bytes(rows["ids"][2][3:9].astype(np.uint8)) == b"longer"
    assert source.cut["train"] == 2
    assert [kept_of_pair(a, b, 7) for a, b in ((3, 4), (9, 2), (2, 9), (9, 9))] == [
        (3, 4),
        (5, 2),
        (2, 5),
        (4, 3),
    ]
    assert kept_of_pair(9, 0, 7) == (7, 0)


@pytest.mark.parametrize(
    ("sentences", "options", "error", "says"),
    [
        ({}, {}, DataError, "has no split"),
        ({"train": []}, {}, DataError, "split 'train' has no text"),
        ({"train": [Sentence("a", None, 2)]}, {}, DataError, "has the label 2; expected 0 to 1"),
        ({"test": SENTENCES["test"]}, {"tokenizer": "bpe(300)"}, DataError, "is trained on split 'train'"),
        (SENTENCES, {"length": 3}, ConfigError, "config.data.length is 3; expected at least 4"),
        (SENTENCES, {"transform": "flip_lr"}, ConfigError, "config.data.transform"),
        (SENTENCES, {"tokenizer": "nowhere.json"}, DataError, "there is no such file"),
    ],
)
def test_what_is_refused(sentences, options, error, says) -> None:
    with pytest.raises(error, match=says):
        made(sentences, **options)


def test_a_change_of_the_data_changes_the_fingerprint() -> None:
    other = {**SENTENCES, "test": [Sentence("é", "b", 1)]}
    joined = {**SENTENCES, "test": [Sentence("éb", "", 0)]}
    assert (
        len(
            {
                made().fingerprint,
                made(other).fingerprint,
                made(joined).fingerprint,
                made(length=12).fingerprint,
            }
        )
        == 4
    )
    assert made().fingerprint == made().fingerprint


@pytest.mark.parametrize("kind", ["line", "pair"])
def test_sentences_of_the_standard_library(kind: str) -> None:
    source = data.build({"name": "python_sentences", "kind": kind, "examples": 200})
    assert source.splits["train"] == 200 and min(source.splits.values()) >= 50
    for split in source.splits:
        rows = source.split(split).batch(np.arange(source.splits[split]))
        assert Counter(rows["label"].tolist()) == {0: len(rows["label"]) // 2, 1: len(rows["label"]) // 2}
        assert (rows["type"].any(axis=1) == (kind == "pair")).all()
    assert source.class_names == python_sentences.CLASSES[kind]


def test_lines_and_functions_are_what_they_are_said_to_be() -> None:
    text = stdlib.modules()["test"]["fnmatch"]
    prose, code = stdlib.lines("test")
    assert "def fnmatchcase(name, pat):" in code and "if pat is None:" not in prose
    assert "Test whether FILENAME matches PATTERN, including case." in prose and "including case." in text
    assert not set(prose) & set(code) or len(set(prose) & set(code)) < 5
    own = {one.signature: one.docstring for one in stdlib.functions("test")}
    assert own["def filter(names, pat):"].startswith("Construct a list from those elements")
    pairs = python_sentences.build(
        python_sentences.Config(name="python_sentences", kind="pair", length=256, examples=8)
    )
    decode = pairs.tokenizer.decode
    known = {(one.signature, one.docstring) for one in stdlib.functions("test")}
    for row in (pairs.split("test")[i] for i in range(20)):
        second = row["type"] == 1
        first = (np.arange(256) < row["length"]) & ~second
        texts = (
            decode(row["ids"][first][row["ids"][first] < 256]),
            decode(row["ids"][second][row["ids"][second] < 256]),
        )
        if row["length"] < 256:
            assert (texts in known) is bool(row["label"])


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match="config.data.examples is 7; expected at least 8"):
        data.resolve({"name": "python_sentences", "examples": 7})
