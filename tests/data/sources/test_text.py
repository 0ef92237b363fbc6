from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError, TokenLabError
from tokenlab.data import TextSource
from tokenlab.data.sources import text

PEPS = Path(__file__).resolve().parents[4] / "shared" / "data" / "text" / "peps.jsonl.xz"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(files: Any, **options: Any) -> TextSource:
    return data.source_of({"name": "text", "length": 8, "files": files, **options})


def lines(*texts: str, key: str = "text") -> str:
    return "".join(
        json.dumps({"id": i, key: each}, ensure_ascii=False) + "\n" for i, each in enumerate(texts)
    )


def test_txt_and_jsonl_plain_and_packed(here: Path) -> None:
    (here / "b.txt").write_text("plain é")
    (here / "a.txt.gz").write_bytes(gzip.compress(b"from gz\r\n"))
    (here / "c.txt.xz").write_bytes(lzma.compress(b"from xz"))
    (here / "d.jsonl").write_text(lines("one\u2028line", "two") + "\n")
    (here / "e.jsonl.gz").write_bytes(gzip.compress(lines("three").encode()))
    (here / "f.jsonl.xz").write_bytes(lzma.compress(lines("four").encode()))
    source = build({"train": ("*.txt*", "*.jsonl*")})
    expected = ["from gz\r\n", "plain é", "from xz", "one\u2028line", "two", "three", "four"]
    assert list(source.text("train")) == expected  # in the order of the files' names
    assert source.name == "text a.txt.gz and 5 more"


def test_patterns_in_folders_and_no_file_twice(here: Path) -> None:
    for name in ("x/1.txt", "x/y/2.txt", "x/y/z/3.txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    source = build({"train": ["x/**/*.txt", "./x/y/2.txt"]})
    assert list(source.text("train")) == ["x/1.txt", "x/y/2.txt", "x/y/z/3.txt"]


def test_a_pattern_for_each_split(here: Path) -> None:
    for name in ("train-1", "train-2", "dev"):
        (here / f"{name}.txt").write_text(name)
    source = build({"train": "train-*.txt", "validation": "dev.txt"})
    assert {split: list(source.text(split)) for split in source.splits} == {
        "train": ["train-1", "train-2"],
        "validation": ["dev"],
    }


def test_split_on_cuts_files_into_documents(here: Path) -> None:
    (here / "a.txt").write_text("one\n\ntwo\nlines\n\n\n\nthree")
    assert list(build({"train": "a.txt"}).text("train")) == ["one\n\ntwo\nlines\n\n\n\nthree"]
    assert list(build({"train": "a.txt"}, split_on="\n\n").text("train")) == ["one", "two\nlines", "three"]


def test_another_key(here: Path) -> None:
    (here / "a.jsonl").write_text(lines("x", key="body"))
    assert list(build({"train": "a.jsonl"}, key="body").text("train")) == ["x"]


class TestFractions:
    TEXTS = [f"document {i}" for i in range(2000)]

    def test_every_document_is_in_one_split(self) -> None:
        found = text.shared_out(self.TEXTS, text.FRACTIONS)
        assert sorted(each for texts in found.values() for each in texts) == sorted(self.TEXTS)
        for split, fraction in text.FRACTIONS.items():
            assert len(found[split]) / len(self.TEXTS) == pytest.approx(fraction, abs=0.02)
            # The order is that of the documents.
            assert found[split] == [each for each in self.TEXTS if each in set(found[split])]

    def test_a_documents_split_depends_on_nothing_else(self) -> None:
        whole = text.shared_out(self.TEXTS, text.FRACTIONS)
        part = text.shared_out([*self.TEXTS[1000:], *self.TEXTS[1000:]], text.FRACTIONS)
        for split, texts in part.items():
            assert set(texts) == set(whole[split]) & set(self.TEXTS[1000:])
            assert len(texts) == 2 * len(set(texts))

    def test_by_configuration(self, here: Path) -> None:
        (here / "a.jsonl").write_text(lines(*self.TEXTS[:200]))
        source = build("*.jsonl", fractions={"train": 0.5, "test": 0.5})
        assert list(source.splits) == ["train", "test"]
        assert len(list(source.text("train"))) + len(list(source.text("test"))) == 200
        assert set(build("*.jsonl").splits) == {"train", "validation", "test"}

    def test_a_split_with_no_document(self, here: Path) -> None:
        (here / "a.txt").write_text("only one")
        with pytest.raises(
            DataError, match=r"split '\w+' gets none of 1 documents; expected more of them \(config.data.s"
        ):
            build("a.txt")
        assert build("a.txt", fractions={"train": 1.0}).splits == {"train": 1}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"files": "no*.txt"}, DataError, r"^config.data.files: 'no\*.txt' matches no file; expected a pattern"),
        ({"files": {"train": "a.txt", "dev": "no"}}, DataError, "^config.data.files.dev: 'no' matches no file"),
        ({"files": ("a.txt", "no")}, DataError, "^config.data.files: 'no' matches no file"),
        ({"files": "folder"}, DataError, "'folder' matches only folders"),
        ({"files": ()}, DataError, "config.data.files is empty"),
        ({"files": {}}, DataError, "config.data.files is empty"),
        ({"files": "a.csv"}, DataError, "'a.csv' is no text that is known here; expected .txt, .jsonl, each also .gz"),
        ({"files": {"train": "a.txt", "dev": "*.txt"}}, DataError, "'a.txt' is in splits 'train' and 'dev'"),
        ({"files": {"train": "latin.txt"}}, DataError, r"^'latin.txt' is no UTF-8: byte 3 is 0xe9 \(.*\); write"),
        ({"files": {"train": "l.txt.gz"}}, DataError, "'l.txt.gz' is no UTF-8: byte 3 of what is packed in it is 0xe9"),
        ({"files": {"train": "cut.txt.gz"}}, DataError, "'cut.txt.gz' cannot be read: "),
        ({"files": {"train": "cut.txt.xz"}}, DataError, "'cut.txt.xz' cannot be read: "),
        ({"files": {"train": "not.txt.gz"}}, DataError, "'not.txt.gz' cannot be read: Not a gzipped file"),
        ({"files": {"train": "bad.jsonl"}}, DataError, "^'bad.jsonl', line 3: it is no JSON"),
        ({"files": {"train": "good.jsonl"}, "key": "txt"}, DataError, "line 1: it has keys id, text; .*'txt'"),
        ({"files": {"train": "number.jsonl"}}, DataError, "line 1: it has keys text; expected an object with a text"),
        ({"files": {"train": "list.jsonl"}}, DataError, "line 1: it has a list; expected an object with a text"),
        ({"files": {"train": "lone.jsonl"}}, DataError, "line 1: character 1 of its text is a lone surrogate"),
        ({"files": {"train": "empty.txt"}}, DataError, "split 'train' has no document: 1 were given"),
        ({"files": {"train": "a.txt"}, "split_on": ""}, ConfigError, "config.data.split_on is ''"),
        ({"files": {"train": "good.jsonl"}, "split_on": "x"}, ConfigError, "split_on is set, and no file is a .txt"),
        ({"files": {"train": "a.txt"}, "fractions": {"train": 1.0}}, ConfigError, "leave one of them out"),
        ({"files": "a.txt", "fractions": {"train": 0.5}}, ConfigError, "fractions is .*that are 1 together"),
        ({"files": "a.txt", "fractions": {"train": 1.5, "dev": -0.5}}, ConfigError, "expected shares > 0"),
        ({"files": "a.txt", "fractions": {}}, ConfigError, "expected shares > 0"),
        ({"files": "a.txt", "length": 1}, ConfigError, "config.data.length is 1"),
        ({"files": 3}, ConfigError, "config.data.files is 3"),
        ({}, ConfigError, "config.data.files is missing"),
    ],
)  # fmt: skip
def test_mistakes(here: Path, options: dict[str, Any], error: type[TokenLabError], message: str) -> None:
    (here / "folder").mkdir()
    (here / "a.txt").write_text("text")
    (here / "a.csv").write_text("text")
    (here / "empty.txt").write_text("  \n")
    (here / "latin.txt").write_bytes("café au lait".encode("latin-1"))
    (here / "l.txt.gz").write_bytes(gzip.compress("café au lait".encode("latin-1")))
    (here / "cut.txt.gz").write_bytes(gzip.compress(b"abc" * 100)[:-12])
    (here / "cut.txt.xz").write_bytes(lzma.compress(b"abc" * 100)[:-12])
    (here / "not.txt.gz").write_bytes(b"abc")
    (here / "good.jsonl").write_text(lines("x"))
    (here / "bad.jsonl").write_text(lines("x") + "\n{'text': 1}\n")
    (here / "number.jsonl").write_text('{"text": 3}\n')
    (here / "list.jsonl").write_text("[1]\n")
    (here / "lone.jsonl").write_text('{"text": "x\\ud800"}\n')
    with pytest.raises(error, match=message):
        data.build({"name": "text", **options})


@pytest.mark.skipif(
    not PEPS.exists(), reason="peps.jsonl.xz is not in ../shared/data/text beside the checkout"
)
def test_python_enhancement_proposals() -> None:
    """740 real documents, cut, packed and found again."""
    records = [json.loads(line)["text"] for line in lzma.open(PEPS, "rt", encoding="utf-8")]
    for packing, most in (("stream", 0.002), ("fit", 0.005)):
        source = build(str(PEPS), length=1024, packing=packing)
        found = [each for split in source.splits for each in source.text(split)]
        assert sorted(found) == sorted(each for each in records if each.strip())
        batch = source.split("validation").batch(np.arange(source.splits["validation"]))
        assert (batch["segment"] == 0).mean() < most
        assert (batch["weight"] * (batch["target"] == 256)).sum() == len(list(source.text("validation")))
