"""The source `image_text`: digits, emoji and files of codes with captions, between embedded or other texts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.data import tiny_tfds
from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data import prepared
from tokenlab.data.image_text import documents
from tokenlab.data.sources import digits, image_text


def rows(config: dict, split: str) -> list[list]:
    """The parts of every document that holds a picture, row by row."""
    source = data.build({"name": "image_text", **config})
    records = source.split(split)
    found = []
    for row in range(len(records)):
        found += [
            document.parts
            for document in documents(records[row], source.tokenizer)
            if any(not isinstance(part, str) for part in document.parts)
        ]
    return found


@pytest.fixture(scope="module")
def source() -> data.Dataset:
    return data.build({"name": "image_text"})


def test_digits_between_plays(source: data.Dataset) -> None:
    """Everything comes with the package; a row is one half codes, exactly."""
    assert source.splits == {"train": 2514, "test": 720, "validation": 360}
    assert source.name == "digits and shakespeare" and source.vocab_size == 257 + 2 + 17
    for split, count in source.splits.items():
        batch = source.split(split).batch(np.arange(count))
        assert (batch["modality"].sum(1) == 64).all() and batch["ids"].shape == (count, 128)


def test_the_rows_never_move(source: data.Dataset) -> None:
    assert source.fingerprint == "digits and shakespeare:70eceff179e48287"


def test_every_digit_comes_back_with_its_name_twice(source: data.Dataset) -> None:
    pixels, labels = digits.load()
    own = digits.split_indices(labels)["validation"]
    names = {pixels[i].tobytes(): image_text.DIGITS[labels[i]] for i in own}
    found = []
    orders = set()
    for parts in rows({}, "validation"):
        picture_first = not isinstance(parts[0], str)
        codes, caption = parts if picture_first else parts[::-1]
        key = codes.astype(np.uint8).tobytes()
        assert caption in [phrase.format(names[key]) for phrase in image_text.PHRASES["digits"]]
        decoded = source.tokenizer.pixels.decode(codes)
        np.testing.assert_array_equal((decoded[..., 0] + 1) * 8, codes)
        found.append(key)
        orders.add((key, picture_first))
    assert sorted(found) == sorted([*names, *names]) and len(orders) == 2 * len(names)


def test_captions_use_every_phrase() -> None:
    plain = data.source_of({"name": "digits"})
    captions = image_text.captions_of("digits", plain, "train")
    counts = [sum(c.startswith(p) for c in captions) for p in ("the digit ", "a handwritten ", "number ")]
    assert min(counts) > 250 and sum(counts) < 1100
    assert image_text.captions_of("digits", plain, "train") == captions


def test_emoji_with_their_names() -> None:
    found = rows({"pictures": "emoji", "size": 16, "codec": "grey(8)", "length": 384}, "test")
    expected = data.source_of({"name": "emoji"}).captions("test")
    texts = [part for parts in found for part in parts if isinstance(part, str)]
    assert sorted(texts) == sorted([*expected, *expected])
    assert all(part.shape == (16, 16) for parts in found for part in parts if not isinstance(part, str))


def test_codes_of_a_file(tmp_path: Path) -> None:
    """As `tokenlab encode` writes it; its codes are those of the rows, its fingerprint must be that of the pictures."""
    emoji = data.source_of({"name": "emoji", "size": 32})
    meta = {"format": 1, "source": "emoji", "fingerprint": emoji.fingerprint, "codes": 300, "grid": [2, 2]}
    codes = {
        f"codes/{split}": (np.arange(n * 4) % 300).reshape(n, 2, 2).astype(np.uint16)
        for split, n in emoji.splits.items()
    }
    np.savez(tmp_path / "c.npz", meta=json.dumps({**meta, "image": [32, 32, 3]}), **codes)
    config = {"pictures": "emoji", "size": 32, "codec": str(tmp_path / "c.npz"), "length": 64}
    captions = emoji.captions("validation")
    for parts in rows(config, "validation"):
        caption, found = parts if isinstance(parts[0], str) else parts[::-1]
        np.testing.assert_array_equal(found, codes["codes/validation"][captions.index(caption)])
    with pytest.raises(
        DataError, match="codes file .* is of pictures 'emoji' with fingerprint .*config.data.size"
    ):
        data.build({"name": "image_text", **config, "size": 16})


def test_other_texts(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"words of {split}. " * 50)
    files = {split: str(tmp_path / f"{split}.txt") for split in ("train", "test")}
    source = data.build({"name": "image_text", "text": files})
    assert list(source.splits) == ["train", "test"] and source.name == "digits and text test.txt and 1 more"
    assert "words of test" in "".join(source.text("test"))
    with pytest.raises(DataError, match="config.data.files: 'nowhere.txt' matches no file"):
        data.build({"name": "image_text", "text": "nowhere.txt"})


def test_a_kept_vocabulary_needs_neither_pictures_nor_text(source: data.Dataset, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(source.tokenizer.to_json(), encoding="utf-8")
    config = {"name": "image_text", "tokenizer": str(file), "codec": "gone.npz", "text": "gone.txt"}
    known = data.without_examples(config)
    assert (known.vocab_size, known.spec) == (source.vocab_size, source.spec)
    assert known.tokenizer.decode([72, 105, 257, 270]) == "Hi"
    whole = data.build({"name": "image_text", "tokenizer": str(file)})
    assert whole.fingerprint == source.fingerprint
    assert data.without_examples({"name": "image_text"}).splits == source.splits


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"length": 84}, "config.data.length is 84, and 1 pictures .* take up to 85 tokens"),
        ({"pictures": "emoji", "size": 8}, "config.data.size is 8.*expected one of 64, 32, 16"),
        ({"size": 9}, "config.data.size is 9, and pictures of source 'digits' are 8 x 8"),
        ({"pictures": "cats"}, "config.data.pictures is 'cats'.*'digits', 'emoji', 'fashion_mnist'"),
        ({"packing": "fit"}, "has no key 'packing'"),
    ],
)
def test_mistakes(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data.build({"name": "image_text", **config})


def test_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small set under that name: its classes are the captions, its pictures are averaged to the size."""
    labels = [i % 3 for i in range(5010)]
    images = [np.full((8, 8, 1), 100 * label, np.uint8) for label in labels]
    tiny_tfds.make(
        tmp_path, name="fashion_mnist",
        images={"train": images, "test": images[:4]}, labels={"train": labels, "test": labels[:4]},
    )  # fmt: skip
    monkeypatch.setenv(prepared.DATA_DIR_VARIABLE, str(tmp_path))
    config = {"pictures": "fashion_mnist", "size": 2, "codec": "grey(256)", "length": 32}
    found = rows(config, "test")
    assert len(found) == 8
    for parts in found:
        caption, codes = parts if isinstance(parts[0], str) else parts[::-1]
        assert codes.shape == (2, 2) and (codes == 100 * ("cat", "dog", "owl").index(caption)).all()
    source = data.build({"name": "image_text", **config})
    assert source.splits == {"train": 20, "validation": 10_000, "test": 8}


def test_the_real_fashion_mnist() -> None:
    folder = os.environ.get(prepared.DATA_DIR_VARIABLE, "")
    if not folder or not Path(folder, "fashion_mnist").is_dir():
        pytest.skip(f"{prepared.DATA_DIR_VARIABLE} names no folder with fashion_mnist")
    source = data.source_of({**image_text.PICTURES["fashion_mnist"]})
    assert len(image_text.captions_of("fashion_mnist", source, "validation")) == 5000
    assert set(image_text.captions_of("fashion_mnist", source, "test")) == set(source.class_names)
