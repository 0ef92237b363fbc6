"""Pictures as codes: grey levels that are exact where they can be, and files that are checked before they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError, TokenLabError
from tokenlab.data import Dataset, ImageTextConfig, TrainStream
from tokenlab.data.image_text import Grey, ImageTextSource, Pixels, encode
from tokenlab.data.image_text.codec import checksum
from tokenlab.data.source import ArraySource

RNG = np.random.default_rng(0)


def pictures(side: int = 4, channels: int = 1) -> ArraySource:
    """A source of seven small pictures."""
    splits = {
        split: {"image": RNG.integers(0, 256, (n, side, side, channels)).astype(np.uint8)}
        for split, n in (("train", 5), ("test", 2))
    }
    return ArraySource("tiny", splits, None)


SOURCE = pictures()


def written(folder: Path, *, of: ArraySource = SOURCE, drop: str = "", **changes: Any) -> str:
    """A file of codes of a source, with arrays or parts of its meta in other forms."""
    meta: dict[str, Any] = {
        "format": 1, "source": of.name, "fingerprint": of.fingerprint, "codes": 9,
        "grid": [2, 3], "image": [4, 4, 1], "value_range": [-1, 1],
    }  # fmt: skip
    arrays: dict[str, Any] = {
        f"codes/{split}": (np.arange(n * 6) % 9).reshape(n, 2, 3).astype(np.uint16)
        for split, n in of.splits.items()
    }
    arrays["decoder/conv/kernel"] = np.ones((3, 3), np.float32)
    for key, value in changes.items():
        if key in meta:
            meta[key] = value
        else:
            arrays[key.replace("__", "/")] = value
    arrays.setdefault("meta", np.array(json.dumps(meta)))
    arrays.pop(drop, None)
    path = folder / "codes.npz"
    np.savez(path, **arrays)
    return str(path)


class TestGrey:
    def test_seventeen_levels_keep_digits_exactly(self) -> None:
        source = data.source_of({"name": "digits"})
        coded = encode("grey(17)", source)
        assert (coded.codes, coded.grid) == (17, (8, 8)) and isinstance(coded.pixels, Pixels)
        for split, count in source.splits.items():
            images = source.split(split).batch(np.arange(count))["image"]
            assert coded.splits[split].dtype == np.uint16
            np.testing.assert_array_equal(coded.pixels.decode(coded.splits[split]), images)

    def test_the_nearest_level_of_the_average(self) -> None:
        coded = encode("grey(4)", SOURCE, size=2)
        images = SOURCE.split("train").batch(np.arange(5))["image"][..., 0] / 255  # 0 to 1
        averages = images.reshape(5, 2, 2, 2, 2).mean((2, 4))
        levels = np.abs(averages[..., None] - np.arange(4) / 3).argmin(-1)
        np.testing.assert_array_equal(coded.splits["train"], levels)
        assert coded.pixels.image == (2, 2, 1)
        again = coded.pixels.decode(coded.splits["train"])
        assert again.dtype == np.float32
        np.testing.assert_allclose(again[..., 0], levels / 3 * 2 - 1, atol=1e-6)

    def test_colours_become_their_brightness(self) -> None:
        grey = Grey(256, (1, 1))
        colours = np.eye(3, dtype=np.float32).reshape(3, 1, 1, 3) * 2 - 1
        assert grey.encode(colours).reshape(-1).tolist() == [76, 150, 29]

    def test_what_is_beyond_the_range_is_the_last_level(self) -> None:
        assert Grey(5, (1, 2)).encode(np.array([[[[-1.2], [1.3]]]], np.float32)).tolist() == [[[0, 4]]]

    def test_the_fingerprint_is_of_pictures_and_levels(self) -> None:
        found = [
            encode("grey(4)", SOURCE), encode("grey(5)", SOURCE), encode("grey(4)", SOURCE, size=2),
            encode("grey(4)", pictures()),
        ]  # fmt: skip
        assert len({coded.fingerprint for coded in found}) == 4
        assert encode("grey(4)", SOURCE).fingerprint == found[0].fingerprint

    @pytest.mark.parametrize(
        ("word", "size", "error", "message"),
        [
            ("grey(1)", None, ConfigError, r"config.data.codec is 'grey\(1\)'; expected 2 to 256 levels"),
            ("grey(257)", None, ConfigError, "expected 2 to 256 levels"),
            ("grey(4)", 5, ConfigError, "config.data.size is 5, and pictures of source 'tiny' are 4 x 4"),
            ("grey(4)", 0, ConfigError, "config.data.size is 0, .* expected 1 to 4, or None"),
            ("gray(4)", None, DataError, r"config.data.codec is 'gray\(4\)', and there is no such file"),
        ],
    )
    def test_mistakes(self, word: str, size: int | None, error: type[TokenLabError], message: str) -> None:
        with pytest.raises(error, match=message):
            encode(word, SOURCE, size)

    def test_four_channels_have_no_grey(self) -> None:
        with pytest.raises(DataError, match="has pictures of 4 channels; expected 1 or 3"):
            encode("grey(4)", pictures(channels=4))

    @pytest.mark.parametrize(
        ("codes", "message"),
        [
            (np.zeros((2, 3), int), r"codes are int64\[2, 3\]; expected integers \[..., 2, 2\]"),
            (np.zeros((2, 2)), "codes are float64"),
            (np.full((2, 2), 4), "they are 4 to 4; expected 0 to 3"),
            (np.full((2, 2), -1), "they are -1 to -1; expected 0 to 3"),
        ],
    )
    def test_codes_that_are_none(self, codes: np.ndarray, message: str) -> None:
        with pytest.raises(DataError, match=message):
            Grey(4, (2, 2)).decode(codes)


class TestFile:
    def test_the_checksum_is_of_codes_and_splits_in_any_order(self) -> None:
        """For a file of the same K and grid, which names alone do not tell from another."""
        codes = {"a": np.arange(6, dtype=np.uint16).reshape(1, 2, 3), "b": np.ones((1, 2, 3), np.uint16)}
        changed = {**codes, "b": np.full((1, 2, 3), 2, np.uint16)}
        swapped = {"a": codes["b"], "b": codes["a"]}
        turned = {**codes, "a": codes["a"].reshape(1, 3, 2)}
        assert checksum(codes) == checksum(dict(reversed(codes.items())))
        assert len({checksum(each) for each in (codes, changed, swapped, turned)}) == 4

    def test_codes_of_every_split(self, tmp_path: Path) -> None:
        path = written(tmp_path)
        coded = encode(path, SOURCE)
        assert (coded.name, coded.codes, coded.grid, coded.pixels) == (path, 9, (2, 3), None)
        assert list(coded.splits) == ["train", "test"]
        np.testing.assert_array_equal(coded.splits["test"].reshape(-1), np.arange(12) % 9)
        assert encode(path, SOURCE, size=4).fingerprint == coded.fingerprint

    def test_the_fingerprint_is_of_the_codes_and_not_of_the_path(self, tmp_path: Path) -> None:
        found = []
        for name, codes in (("a", 0), ("b", 0), ("c", 1)):
            (tmp_path / name).mkdir()
            path = written(tmp_path / name, codes__test=np.full((2, 2, 3), codes, np.uint16))
            found.append(encode(path, SOURCE).fingerprint)
        assert found[0] == found[1] != found[2]

    def test_a_file_that_was_written_anew_is_noticed_on_resume(self, tmp_path: Path) -> None:
        """As many codes of as many pictures, and one of them is another."""

        def stream(path: str) -> TrainStream:
            config = ImageTextConfig(name="tiny", length=24)
            captions = {split: [f"n{i}" for i in range(n)] for split, n in SOURCE.splits.items()}
            source = ImageTextSource(
                "tiny", encode(path, SOURCE), captions, dict.fromkeys(captions, ["some text"]), config
            )
            return TrainStream(Dataset(source), "train", 2, seed=0)

        before = stream(written(tmp_path))
        assert stream(str(tmp_path / "codes.npz")).check(before.state(3)) == 3
        other = (np.arange(30) % 9).reshape(5, 2, 3).astype(np.uint16)
        other[-1, -1, -1] = 8 - other[-1, -1, -1]
        after = stream(written(tmp_path, codes__train=other))
        with pytest.raises(DataError, match="does not fit this run: fingerprint"):
            after.check(before.state(3))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"fingerprint": "tiny:1"},
                "of pictures 'tiny' with fingerprint 'tiny:1'; those here are 'tiny' with",
            ),
            ({"format": 2}, "its format is 2; this version reads format 1"),
            ({"codes": 8}, "codes/train: they are 0 to 8; expected 0 to 7"),
            ({"codes": 1}, "'meta' says codes 1; expected texts"),
            ({"codes": 2**16 + 1}, "'meta' says codes 65537"),
            ({"codes": True}, "'meta' says codes True"),
            ({"grid": [6]}, r"'meta' says grid \[6\]"),
            ({"grid": [3, 2]}, r"codes/train is uint16\[5, 2, 3\]; expected uint16\[5, 3, 2\]"),
            ({"image": [4, 4, 0]}, r"'meta' says image \[4, 4, 0\]"),
            ({"source": None}, "'meta' says source None"),
            (
                {"codes__test": np.zeros((3, 2, 3), np.uint16)},
                r"codes/test is uint16\[3, 2, 3\]; expected uint16\[2",
            ),
            ({"codes__test": np.zeros((2, 2, 3), np.int64)}, r"codes/test is int64\[2, 2, 3\]"),
            (
                {"codes__extra": np.zeros((2, 2, 3), np.uint16)},
                "has the splits train, test, extra; expected those",
            ),
            ({"drop": "codes/test"}, "has the splits train; expected those of source 'tiny', train, test"),
            ({"drop": "meta"}, "has no 'meta'; expected a file that `tokenlab encode` has written"),
            ({"meta": np.array("{")}, "'meta' is no JSON text"),
            ({"meta": np.array("[1]")}, r"its format is \[1\]"),
        ],
    )
    def test_what_does_not_fit_is_told(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        path = written(tmp_path, **changes)
        with pytest.raises(DataError, match=message):
            encode(path, SOURCE)

    def test_another_size(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"config.data.size is 8, and codes file .* \[4, 4, 1\]"):
            encode(written(tmp_path), SOURCE, size=8)

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        whole = Path(written(tmp_path))
        cut = tmp_path / "cut.npz"
        cut.write_bytes(whole.read_bytes()[:-40])
        with pytest.raises(
            DataError, match="codes file .*cut.npz' cannot be read: no .npz file, or it is cut off"
        ):
            encode(str(cut), SOURCE)
        torn = tmp_path / "torn.npz"
        content = bytearray(whole.read_bytes())
        content[60:80] = b"\0" * 20
        torn.write_bytes(bytes(content))
        with pytest.raises(DataError, match="codes file .*torn.npz' cannot be read"):
            encode(str(torn), SOURCE)
        np.savez(tmp_path / "objects.npz", meta=np.array([{}], object))
        with pytest.raises(DataError, match="cannot be read: Object arrays cannot be loaded"):
            encode(str(tmp_path / "objects.npz"), SOURCE)
