"""A small configuration, programs that record how they are called, and words that no shell likes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tokenlab import launch

CONFIG = """
from dataclasses import dataclass, field
from typing import Any
from tokenlab.core.config import from_dataclass

@dataclass(frozen=True)
class Mesh:
    data: int = -1
    fsdp: int = 1

@dataclass(frozen=True)
class Run:
    batch_size: int = 64
    mesh: Mesh = field(default_factory=Mesh)
    vars: dict[str, Any] = field(default_factory=dict)

def get_config(arg=None):
    return from_dataclass(Run)
"""

PROGRAM = """\
#!{python} -IS
import json, os, sys
name = os.path.basename(sys.argv[0])
kept = {{key: text for key, text in os.environ.items() if key in {keys}}}
with open({log!r}, "a") as file:
    file.write(json.dumps([name, sys.argv[1:], kept, os.getcwd()]) + "\\n")
{more}
"""

HOSTILE = (
    "a b", "a'b", 'a"b', "$(touch pwned)", "`touch pwned`", "a\nb", "a\n  - b: c", "-rf", "--config.x=1",
    "é世\u2028😀", "a;touch pwned&b|c", "$HOME", "${HOME}", "$(HOME)", "$$(HOME)", "$$$", "a\\b\\", "!x", "*",
    "# c", "%j%%", "{x}", "\t", " lead and trail ", "~", "=", "'\"'\"'", "$'\\x24'", "yes", "1e3", "", "\x1b[31m",
)  # fmt: skip
FOLDER = '- it\'s "$(touch pwned)" é #%j {x}'
"""A folder's name; a line break and a colon are refused where it is one of PYTHONPATH or of a log."""
CHANGES = {f"vars.v{i}": text for i, text in enumerate(HOSTILE)}
ENVIRONMENT = {f"env.V{i}": text for i, text in enumerate(HOSTILE)}

GCLOUD = """
import shutil, subprocess
words = sys.argv[1:]
home = os.environ["HOME"]
value = [word.partition("=")[2] for word in words if word.startswith("--command=")]
if "describe" in words:
    states = open(home + "/states").read().split()
    print((states[0] if states else "ACTIVE").strip("-"))
    open(home + "/states", "w").write(" ".join(states[1:]))
elif "scp" in words:
    source, target = words[words.index("--recurse") + 1 :][:2]
    target = os.path.join(home, target.partition(":")[2], os.path.basename(source))
    shutil.copytree(source, target, dirs_exist_ok=True)
elif value:
    sys.exit(subprocess.run(["bash", "-c", value[0]], cwd=home).returncode)
"""
TPU = {"project": "p", "zone": "z", "topology": "v5e:4x4", "setup": "true", "python": "python3"}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "configs" / "some.py"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return path


@pytest.fixture
def few_files(monkeypatch):
    """Snapshots hold a file or two instead of the package."""
    monkeypatch.setattr("tokenlab.launch.snapshot._tree", lambda root: iter([("__init__.py", b"")]))
    monkeypatch.setattr("tokenlab.launch.snapshot._checkout", lambda path: None)


class Programs:
    """Programs that record how they are called, in a folder that is searched first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "calls.jsonl"
        folder.mkdir()

    def add(self, *names: str, more: str = "") -> None:
        keys = {"PYTHONPATH", "TOKENLAB_METHODS", *(f"V{i}" for i in range(len(HOSTILE)))}
        for name in names:
            file = self.folder / name
            file.write_text(PROGRAM.format(python=sys.executable, keys=keys, log=str(self.log), more=more))
            file.chmod(0o755)

    def calls(self, name: str = "") -> list[tuple[str, list[str], dict[str, str], str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [tuple(call) for call in map(json.loads, lines) if name in ("", call[0])]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name in ("PYTHONPATH", "TOKENLAB_METHODS"):
        monkeypatch.delenv(name, raising=False)
    return Programs(tmp_path / "bin")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that is launched from; nothing that a test launches may have made `pwned` anywhere in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not list(tmp_path.rglob("pwned"))


@pytest.fixture
def go(config, here, few_files):
    """Launch the small configuration."""

    def launched(
        target: str, workdir: str | Path = "runs/x", *, changes=None, dry_run=False, file=None, **settings
    ):
        words = {name: str(value) for name, value in settings.items() if name != "more"} | settings.get(
            "more", {}
        )
        return launch.run(
            target, str(file or config), str(workdir), changes=changes, settings=words, dry_run=dry_run
        )

    return launched


@pytest.fixture
def tpu(programs, tmp_path, monkeypatch):
    """gcloud with one machine: its home; `states` in it is what describe says, one after the other, then ACTIVE."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "states").write_text("")
    monkeypatch.setenv("HOME", str(home))
    programs.add("gcloud", more=GCLOUD)
    programs.add("sleep", "python3")
    return home
