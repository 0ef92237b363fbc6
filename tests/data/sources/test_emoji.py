"""Emoji: real pictures with their names, in splits that relatives do not cross."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.source import Source
from tokenlab.data.sources import emoji

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "image_text"


@pytest.fixture(scope="module")
def source() -> emoji.EmojiSource:
    return data.source_of({"name": "emoji", "size": 16})


def test_spec_splits_and_classes(source: emoji.EmojiSource) -> None:
    assert isinstance(source, Source)
    assert source.spec == {"image": ((16, 16, 3), "uint8"), "label": ((), "int32")}
    assert source.splits == {"train": 1538, "validation": 160, "test": 172}
    assert source.num_classes == 9 and source.class_names[3] == "Food & Drink"
    for split, count in source.splits.items():
        labels = source.split(split).batch(np.arange(count))["label"]
        assert set(labels.tolist()) == set(range(9))


def test_the_splits_never_move(source: emoji.EmojiSource) -> None:
    captions = "\n".join("\n".join(source.captions(split)) for split in source.splits)
    assert hashlib.sha256(captions.encode()).hexdigest()[:16] == "82ae99aebae4fd91"
    # Which also holds the decoded and averaged pictures.
    assert source.fingerprint == "emoji:d4d825bc480a92c3"


def test_captions_go_with_pictures_and_groups(source: emoji.EmojiSource) -> None:
    everything = {}
    for split, count in source.splits.items():
        batch, captions = source.split(split).batch(np.arange(count)), source.captions(split)
        assert len(captions) == count
        everything |= {
            caption: (image, source.class_names[label])
            for caption, image, label in zip(captions, batch["image"], batch["label"], strict=True)
        }
    assert len(everything) == 1870  # no name twice

    def colour(caption: str) -> np.ndarray:
        return everything[caption][0][6:10, 6:10].mean((0, 1))

    assert colour("red circle").argmax() == 0 and colour("green circle").argmax() == 1
    assert colour("blue circle").argmax() == 2 and colour("black circle").max() < 100
    assert everything["hot beverage"][1] == "Food & Drink" and everything["flag: Japan"][1] == "Flags"
    for image, _ in everything.values():
        assert image[0, 0].min() > 0  # on white, not on black
    assert np.mean([image[0, 0].min() for image, _ in everything.values()]) > 240


def test_sizes_are_averages_over_areas(source: emoji.EmojiSource) -> None:
    whole = data.source_of({"name": "emoji"})
    assert whole.spec["image"] == ((64, 64, 3), "uint8")
    some = np.array([0, 5, 99])
    large, small = (each.split("test").batch(some)["image"] for each in (whole, source))
    averages = large.reshape(3, 16, 4, 16, 4, 3).mean((2, 4))
    assert np.abs(averages - small).max() <= 0.5 + 1e-6
    assert whole.fingerprint != source.fingerprint
    assert whole.captions("test") == source.captions("test")


def test_relatives_share_a_split(source: emoji.EmojiSource) -> None:
    split_of = {caption: split for split in source.splits for caption in source.captions(split)}
    for caption in split_of:
        for who in ("man ", "woman "):
            if caption.removeprefix(who) in split_of:
                assert split_of[caption] == split_of[caption.removeprefix(who)], caption
    assert (
        split_of["flag: Norway"] == split_of["flag: Bouvet Island"] == split_of["flag: Svalbard & Jan Mayen"]
    )
    # No picture is in two splits.
    seen: dict[bytes, str] = {}
    for split, count in source.splits.items():
        for image in data.source_of({"name": "emoji"}).split(split).batch(np.arange(count))["image"]:
            assert seen.setdefault(image.tobytes(), split) == split


def test_families_by_hand() -> None:
    astronauts = [
        "1f468-200d-1f680.webp",
        "1f469-1f3fd-200d-1f680.webp",
        "1f9d1-200d-1f680.webp",
        "1f680.webp",
    ]
    files = [
        *astronauts,
        "1f1e6-1f1e8.webp",
        "2764-fe0f.webp",
        "1f468.webp",
        "1f469-1f3ff.webp",
        "1f4a9.webp",
    ]
    pictures = [bytes([i]) for i in range(9)]
    assert [emoji.shown(file) for file in files] == [
        *["1f680"] * 4, "1f1e6-1f1e8", "2764", "1f9d1", "1f9d1", "1f4a9",
    ]  # fmt: skip
    assert len(set(emoji.families(files, pictures))) == 5
    # The same picture joins two families, whichever of their members has it.
    pictures[8] = pictures[1]
    joined = emoji.families(files, pictures)
    assert len(set(joined)) == 4 and joined[8] == joined[0] == joined[3]
    found = emoji.split_indices(files, pictures)
    assert sorted(index for part in found.values() for index in part) == list(range(9))
    assert any({0, 1, 2, 3, 8} <= set(part) for part in found.values())


def test_they_are_files_of_the_package_with_their_licences() -> None:
    package = Path(data.__file__).parent
    assert emoji.FOLDER.is_relative_to(package)
    assert emoji.PICTURES.stat().st_size < 2_000_000 and emoji.CAPTIONS.stat().st_size < 20_000
    notice = (emoji.FOLDER / "NOTICE.md").read_text(encoding="utf-8")
    for name, begins in (("OFL-1.1", "Copyright 2022 Google"), ("Unicode-DFS-2016", "UNICODE, INC. LICENSE")):
        assert f"LICENSE.{name}.txt" in notice
        text = (emoji.FOLDER / f"LICENSE.{name}.txt").read_text(encoding="utf-8")
        assert text.startswith(begins) and "Permission is hereby granted, free of charge" in text


def test_they_are_the_shared_files() -> None:
    if not SHARED.is_dir():
        pytest.skip("../shared/data/image_text is not beside the checkout")
    assert emoji.PICTURES.read_bytes() == (SHARED / "emoji_noto_64.zip").read_bytes()


def test_they_are_ready_for_a_model() -> None:
    dataset = data.build({"name": "emoji", "size": 32, "transform": "flip_lr|value_range(-1, 1)"})
    assert dataset.spec["image"] == ((32, 32, 3), "float32")
    image = dataset.read("test", np.arange(8))["image"]
    assert -1 <= image.min() and image.max() == 1 and image.min() < -0.5


def test_mistakes(source: emoji.EmojiSource) -> None:
    with pytest.raises(ConfigError, match="config.data.size is 48.*expected one of 64, 32, 16"):
        data.build({"name": "emoji", "size": 48})
    with pytest.raises(DataError, match="has no split 'tests'. Did you mean 'test'?"):
        source.captions("tests")
