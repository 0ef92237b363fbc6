"""The manifest: any change to any listed file is found, and so is any change to the manifest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tokenlab.core.errors import CheckpointError
from tokenlab.train import manifest

RECORD = {
    "format": 1,
    "step": 40,
    "leaves": {},
    "metrics": {"accuracy": 0.5},
    "best": None,
    "meta": {"tokens": 12},
}
UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed checkpoint of made-up files."""
    folder = tmp_path / "40"
    draw = np.random.default_rng(0)
    for name, size in (
        ("_METADATA", 100),
        ("d/a7", 500),
        ("process_0/d/b7", 300),
        ("empty", 0),
        *((n, 9) for n in UNLISTED),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(draw.bytes(size))
    manifest.seal(folder, json.dumps(RECORD))
    return folder


def listed(folder: Path) -> dict[Path, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in UNLISTED)
    return {path: path.read_bytes() for path in files}


def test_a_sealed_folder_is_whole_and_read_back(folder: Path) -> None:
    assert manifest.damage(folder) is None
    assert manifest.read_record(folder) == RECORD
    assert len(listed(folder)) == 6


def test_a_flip_of_any_bit_of_any_byte_is_found(folder: Path) -> None:
    for path, original in listed(folder).items():
        for place in range(len(original)):
            damaged = bytearray(original)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            assert manifest.damage(folder) is not None, (path, place)
        path.write_bytes(original)
    assert manifest.damage(folder) is None


def test_a_file_cut_short_anywhere_or_grown_is_found(folder: Path) -> None:
    for path, original in listed(folder).items():
        for length in range(len(original)):
            path.write_bytes(original[:length])
            assert manifest.damage(folder) is not None, (path, length)
        path.write_bytes(original + b"\n")
        assert manifest.damage(folder) is not None, path
        path.write_bytes(original)


def test_a_missing_file_is_named(folder: Path) -> None:
    for path, original in listed(folder).items():
        path.unlink()
        assert manifest.damage(folder) == f"{path.relative_to(folder)} is missing"
        path.write_bytes(original)
    shutil.rmtree(folder / "process_0")
    assert manifest.damage(folder) == "process_0/d/b7 is missing"
    shutil.rmtree(folder)
    assert manifest.damage(folder) == "manifest.sha256 is missing"


def test_lines_of_the_manifest_that_swap_or_vanish(folder: Path) -> None:
    path = folder / manifest.MANIFEST
    *lines, meta, end = path.read_bytes().split(b"\n")
    assert end == b"" and meta.endswith(b"  meta.json")
    swapped = [lines[0][:64] + lines[1][64:], lines[1][:64] + lines[0][64:], *lines[2:], meta, b""]
    path.write_bytes(b"\n".join(swapped))
    assert manifest.damage(folder) is not None
    path.write_bytes(b"\n".join([*lines, b""]))
    assert manifest.damage(folder) == "manifest.sha256 is cut short"
    path.write_bytes(b"")
    assert manifest.damage(folder) == "manifest.sha256 is cut short"


def test_what_orbax_writes_after_the_manifest_and_what_others_add_is_no_damage(folder: Path) -> None:
    for name in (*UNLISTED, ".nfs0001"):
        (folder / name).write_text("anything")
        assert manifest.damage(folder) is None
        (folder / name).unlink()
        assert manifest.damage(folder) is None


def test_sha256sum_reads_the_manifest(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", manifest.MANIFEST]
    assert subprocess.run(command, cwd=folder).returncode == 0
    (folder / "d" / "a7").write_text("")
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1


def test_a_record_that_cannot_be_read_is_an_error(folder: Path) -> None:
    for text, message in (
        ("{", r"checkpoint .*40 is damaged \(meta.json: "),
        ("[]", "is damaged"),
        ("{}", "is damaged"),
        ('{"format": 2}', "has format 2, expected 1; read it with the version of TokenLab"),
    ):
        (folder / manifest.META).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            manifest.read_record(folder)


def test_steps_are_folders_with_a_number(tmp_path: Path) -> None:
    for name in ("3", "20", "100", "20.damaged-1", "5.orbax-checkpoint-tmp", "7.deleted", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "30").write_text("a file")
    assert manifest.committed_steps(tmp_path) == [3, 20, 100]
    assert manifest.committed_steps(tmp_path / "nowhere") == []


def test_the_best_is_the_earliest_of_equals() -> None:
    values = {40: 0.9, 10: 0.5, 30: 0.9, 20: None}
    assert (manifest.best_of(values, "max"), manifest.best_of(values, "min")) == (30, 10)
    assert manifest.best_of({10: None}, "max") is None


def test_long_errors_become_one_line() -> None:
    assert manifest.one_line(OSError("a\n  b\tc [tensorstore_spec='{...}']")) == "a b c"
    assert manifest.one_line(ValueError("x" * 1000 + os.linesep + "y")).startswith("x" * 100)
    assert len(manifest.one_line(ValueError("x" * 1000))) == 400
    assert manifest.one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
