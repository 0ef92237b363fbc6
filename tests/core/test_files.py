from __future__ import annotations

from pathlib import Path

import pytest

from tokenlab.core.errors import ConfigError
from tokenlab.core.files import check_writable


def test_nothing_stays_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.json").write_text("old")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "old.json", tmp_path / "new.json", "new.json"):
        check_writable(path, "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "none" / "a.png", tmp_path / "file" / "a.png", Path("/proc/a.png")):
        with pytest.raises(
            ConfigError, match=r"--png=.* cannot be written: expected a file in a folder"
        ) as error:
            check_writable(path, "--png")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
