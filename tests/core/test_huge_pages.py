"""Huge pages: when the process starts again for them, and that it does so once, as it was."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tokenlab.core import huge_pages

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, os, sys
from pathlib import Path
from tokenlab.core import huge_pages

huge_pages.SETTING = Path(sys.argv[1])
print(os.getpid(), flush=True)
huge_pages.ensure()
print(json.dumps([os.environ.get(huge_pages.VARIABLE), os.getpid(), sys.argv[1:], sys.warnoptions]), flush=True)
"""


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Linux with glibc 2.36 that waits to be asked for huge pages."""
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "SETTING", setting)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    return setting


def test_useful_where_the_kernel_waits_to_be_asked(there: Path) -> None:
    assert huge_pages.useful()


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]", ""])
def test_not_where_the_kernel_has_decided(there: Path, setting: str) -> None:
    there.write_text(setting)
    assert not huge_pages.useful()


@pytest.mark.parametrize("library", [("glibc", "2.31"), ("", ""), ("musl", "2.40"), ("glibc", "odd")])
def test_not_where_the_library_knows_nothing_of_them(
    there: Path, monkeypatch: pytest.MonkeyPatch, library: tuple[str, str]
) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: library)
    assert not huge_pages.useful()


def test_not_without_the_kernels_file_nor_elsewhere(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there.unlink()
    assert not huge_pages.useful()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not huge_pages.useful()


@pytest.mark.parametrize("own", ["", "glibc.malloc.check=1"])
def test_what_the_user_has_set_stays(there: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    monkeypatch.setenv(huge_pages.VARIABLE, own)
    assert not huge_pages.useful()
    huge_pages.ensure()
    assert os.environ[huge_pages.VARIABLE] == own


def test_starts_again_once_with_its_arguments_and_flags(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        pytest.skip("huge pages are asked for through glibc on Linux; this is another system")
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    environment = {name: value for name, value in os.environ.items() if name != huge_pages.VARIABLE}
    arguments = [str(tmp_path / "enabled"), "--flag=a b", "", "ü"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *arguments],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert json.loads(last) == [huge_pages.TUNABLE, int(first), arguments, ["error"]]
    assert done.stderr == ""
