from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tokenlab import data
from tokenlab.data import prepared
from tokenlab.data.sources import shakespeare


def test_splits() -> None:
    source = data.source_of({"name": "shakespeare"})
    texts = {split: list(source.text(split)) for split in source.splits}
    assert {split: [len(text) for text in found] for split, found in texts.items()} == {
        "train": [1_003_854],
        "validation": [55_770],
        "test": [55_770],
    }
    whole = "".join(text for found in texts.values() for text in found)
    assert whole.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")
    assert whole.endswith("Whiles thou art waking.\n")
    # As github.com/karpathy/char-rnn has it.
    assert hashlib.sha256(whole.encode()).hexdigest() == SHA256


SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_examples() -> None:
    source = data.build({"name": "shakespeare"})
    assert source.splits == {"train": 3_922, "validation": 218, "test": 218}
    first = source.split("train")[0]
    assert source.tokenizer.decode(first["ids"]).startswith("First Citizen:\n")
    assert first["weight"].all() and first["bytes"].all() and first["segment"].max() == 1


def test_it_is_a_file_of_the_package() -> None:
    """Where the wheel takes files from, and small enough to be there."""
    package = Path(data.__file__).parent
    assert shakespeare.FILE.is_relative_to(package) and shakespeare.FILE.stat().st_size < 400_000


def test_it_is_the_set_of_tfds() -> None:
    folder = os.environ.get(prepared.DATA_DIR_VARIABLE, "")
    if not Path(folder, "tiny_shakespeare").is_dir() or not folder:
        pytest.skip(f"{prepared.DATA_DIR_VARIABLE} names no folder with tiny_shakespeare")
    theirs = data.source_of({"name": "tfds_text", "dataset": "tiny_shakespeare"})
    ours = data.source_of({"name": "shakespeare"})
    for split in ("train", "validation", "test"):
        assert list(theirs.text(split)) == list(ours.text(split))
