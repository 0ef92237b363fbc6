"""series_csv: windows, what follows them and classes; splits in time without leaks; files that cannot be read."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections.config_dict import ConfigDict

from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.sources import series_csv

ROWS = 100
VALUES = np.stack([np.arange(ROWS), 50 - 2.0 * np.arange(ROWS), np.full(ROWS, 3.0)], axis=1)


def write(path: Path, values: np.ndarray = VALUES, header: str = "date,up,down,flat") -> str:
    lines = [header, *(f"d{i}," + ",".join(map(repr, map(float, row))) for i, row in enumerate(values))]
    content = ("\n".join(lines) + "\n").encode()
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(content)
    path.write_bytes(packed)
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("series") / "a.csv")


def build(*files: str, **settings: Any) -> Any:
    settings = {"window": 8, "horizon": 4, "rows": {"train": 60, "validation": 15, "test": 20}, **settings}
    return data.build({"name": "series_csv", "files": files, **settings})


def raw(source: Any, scaled: np.ndarray) -> np.ndarray:
    """Channels in the units of the file."""
    return scaled * source.source.deviation + source.source.mean


def whole(source: Any, split: str) -> Any:
    return source.read(split, np.arange(source.splits[split]))


def test_windows_and_what_follows_them(file: str) -> None:
    source = build(file)
    assert source.spec == {"series": ((8, 3), "float32"), "target": ((4, 3), "float32")}
    assert source.splits == {"train": 60 - 12 + 1, "validation": 15 - 4 + 1, "test": 20 - 4 + 1}
    batch = whole(source, "train")
    joined = raw(source, np.concatenate([batch["series"], batch["target"]], axis=1))
    for number, window in enumerate(joined):
        np.testing.assert_allclose(window, VALUES[number : number + 12], atol=1e-4)
    one = source.split("train")[7]
    np.testing.assert_array_equal(one["target"], batch["target"][7])


def test_nothing_of_the_future_is_learned_from(file: str, tmp_path: Path) -> None:
    """Scaled by the training rows; what is predicted is of its split alone, and every row of it is once the first."""
    source = build(file)
    np.testing.assert_allclose(source.source.mean, VALUES[:60].mean(axis=0))
    np.testing.assert_allclose(source.source.deviation, [VALUES[:60, 0].std(), VALUES[:60, 1].std(), 1.0])
    for split, (begin, end) in {"train": (8, 60), "validation": (60, 75), "test": (75, 95)}.items():
        rows = raw(source, whole(source, split)["target"])[:, :, 0].round().astype(int)
        assert rows.min() == begin and rows.max() == end - 1
        np.testing.assert_array_equal(rows[:, 0], np.arange(begin, end - 3))
        inputs = raw(source, whole(source, split)["series"])[:, :, 0].round().astype(int)
        np.testing.assert_array_equal(inputs[:, -1], rows[:, 0] - 1)
    later = VALUES.copy()
    later[60:] = 1e6
    changed = build(write(tmp_path / "later.csv", later))
    np.testing.assert_array_equal(whole(changed, "train")["target"], whole(source, "train")["target"])
    assert changed.fingerprint != source.fingerprint


def test_the_test_comes_last_whatever_order_a_configuration_has(file: str) -> None:
    """A ConfigDict sorts its keys, and "test" goes before "train" there."""
    config = ConfigDict({"name": "series_csv", "files": (file,), "window": 8, "horizon": 4})
    config.rows = ConfigDict({"train": 60, "validation": 15, "test": 20})
    assert next(iter(config.rows)) == "test"
    found, expected = data.build(config), build(file)
    assert found.splits == expected.splits and found.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(whole(found, "test")["target"], whole(expected, "test")["target"])


def test_classes_are_files_and_windows_stay_in_their_split(file: str, tmp_path: Path) -> None:
    other = write(tmp_path / "b.csv.xz", VALUES + 1000)
    source = build(file, other, horizon=0, stride=3)
    assert source.num_classes == 2 and source.class_names == ("a", "b")
    assert source.spec == {"series": ((8, 3), "float32"), "label": ((), "int32")}
    for split, (begin, end) in {"train": (0, 60), "validation": (60, 75), "test": (75, 95)}.items():
        batch = whole(source, split)
        rows = raw(source, batch["series"])[:, :, 0] - 1000 * batch["label"][:, None]
        assert rows.min().round() == begin and rows.max().round() <= end - 1
        assert (np.diff(rows[batch["label"] == 0, 0]).round() == 3).all()
        assert np.bincount(batch["label"]).min() > 0
    np.testing.assert_allclose(source.source.mean[0], VALUES[:60, 0].mean() + 500)


def test_columns_shares_and_packed_files(file: str, tmp_path: Path) -> None:
    packed = write(tmp_path / "a.csv.gz")
    source = build(packed, columns=("down", "up"), rows=None)
    assert source.source.columns == ("down", "up") and source.splits["train"] == 70 - 11
    first = raw(source, whole(source, "train")["series"])[0]
    np.testing.assert_allclose(first, VALUES[:8, [1, 0]], atol=1e-4)
    assert series_csv.bounds_of(100, {"test": 0.2, "train": 0.7, "validation": 0.1}, "") == {
        "train": (0, 70),
        "validation": (70, 80),
        "test": (80, 100),
    }


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"window": 0}, ConfigError, "window is 0; expected at least 1"),
        ({"stride": 0}, ConfigError, "stride is 0; expected at least 1"),
        ({"horizon": -1}, ConfigError, "horizon is -1; expected at least 0"),
        ({"horizon": 0}, ConfigError, "there is one file; expected two or more"),
        ({"rows": {"train": 0.9, "test": 0.2}}, ConfigError, "shares > 0 of at most 1 together"),
        ({"rows": {"train": 10, "test": 0.2}}, ConfigError, "all counts >= 1 or all shares"),
        ({"rows": {"test": 10}}, ConfigError, "expected of 'train', and of 'validation'"),
        ({"rows": {"train": 10, "dev": 10}}, ConfigError, "expected of 'train', and of 'validation'"),
        ({"rows": {"train": 90, "test": 90}}, DataError, "has 100 rows; config.data.rows asks for 180"),
        (
            {"rows": {"train": 90, "test": 3}},
            DataError,
            "split 'test' of .* has 3 rows and room for no window",
        ),
        ({"window": 70}, DataError, "split 'train' of .* room for no window of 70 and 4 rows"),
        ({"columns": ("upp",)}, DataError, "has no column 'upp' .*; it has date, up, down, flat"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(file: str, settings: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        build(file, **settings)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"date,a\n", "has 1 lines; expected a line of names"),
        (b"date\nd0\n", "has one column"),
        (b"date,a\nd0,1\nd1,x\n", "line 3, column 'a': 'x' is no finite number"),
        (b"date,a\nd0,1\nd1,nan\n", "line 3, column 'a': 'nan' is no finite number"),
        (b"date,a\nd0,1\nd1,1,2\n", "line 3: 3 cells; expected 2"),
        (b"date,a\nd0,\xff\n", "cannot be read"),
    ],
    ids=str,
)
def test_files_that_do_not_fit(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(DataError, match=says):
        series_csv.read(str(tmp_path / "bad.csv"))


@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n", "\r\n\r\n"])
def test_empty_lines_at_the_end_are_no_rows(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text("date,a\nd0,1\nd1,2" + end, newline="")
    np.testing.assert_array_equal(series_csv.read(str(path)).values, [[1], [2]])
    path.write_text("date,a\nd0,1\n\nd1,2" + end, newline="")
    with pytest.raises(DataError, match="line 3: 0 cells; expected 2"):
        series_csv.read(str(path))


def test_files_that_are_not_there_or_unlike(file: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'none.csv' cannot be read: .*No such file"):
        build("none.csv")
    with pytest.raises(DataError, match=r"has columns x, y, z, .* up, down, flat; expected the same"):
        build(file, write(tmp_path / "b.csv", header="date,x,y,z"))
    with pytest.raises(ConfigError, match="expected one or more paths"):
        series_csv.Config(name="series_csv", files="a.csv")
