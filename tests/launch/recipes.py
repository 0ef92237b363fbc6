"""The recipes of docs/launch.md, the text they print, and what stands in that text."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from unittest import mock

from tokenlab import cli, launch
from tokenlab.core import flags

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "launch.md"
GOLDEN = Path(__file__).parent / "golden"
HOME = Path("/path/to/tokenlab")


def recipes() -> dict[str, list[str]]:
    """Name -> words behind `tokenlab launch`; a target's second recipe is TARGET-2."""
    blocks = re.findall(
        r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    found: dict[str, list[str]] = {}
    for block in blocks:
        _, _, *words = shlex.split(block.replace("\\\n", " "))
        target = words[0].removeprefix("--target=")
        count = sum(name.startswith(target) for name in found)
        found[f"{target}-{count + 1}" if count else target] = words
    return found


def arguments(words: list[str]) -> dict:
    """Words of a recipe as arguments of `tokenlab.launch.run`."""
    given = flags.parse("launch", cli.COMMANDS["launch"], words)
    places = {name: given.values[name] for name in ("target", "config", "workdir")}
    return places | {
        "changes": given.overrides,
        "settings": given.settings,
        "dry_run": "dry-run" in given.switches,
    }


def planned(monkeypatch, **given) -> launch.Plan:
    """A dry run from the root of the checkout, in the environment of a user who has set nothing."""
    for name in ("PYTHONPATH", "XLA_FLAGS", "TOKENLAB_METHODS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    with mock.patch.object(sys, "executable", f"{ROOT}/.venv/bin/python"):
        return launch.run(**{**given, "dry_run": True})


def usual(text: str) -> str:
    """The text with the checkout at HOME, and a checksum of no code."""
    return re.sub(r"(\d{4})-[0-9a-f]{8}\b", r"\1-5f1d77aa", text.replace(str(ROOT), str(HOME)))


def scripts(text: str) -> list[str]:
    """Every shell script of what a launch prints: the files that begin with #!, and the commands at its end."""
    files, _, commands = re.sub(r"^# .*\n", "", text, count=1).rpartition("\n# run\n")
    found = [part for part in re.split(r"^# file .*\n", files, flags=re.MULTILINE) if part.startswith("#!")]
    return [*found, commands]
