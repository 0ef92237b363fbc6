"""What the recipes of docs/launch.md print is what golden/ holds: TOKENLAB_UPDATE_GOLDEN=1 writes it anew."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.launch.recipes import GOLDEN, HOME, PAGE, arguments, planned, recipes, scripts, usual
from tokenlab import launch
from tokenlab.core import names
from tokenlab.launch.front import descriptions
from tokenlab.launch.job import TargetConfig

UPDATE = "TOKENLAB_UPDATE_GOLDEN"
RECIPES = recipes()
CONFIGS = {
    module.name: names.find("tokenlab.launch", module.dotted.rpartition(".")[2]).Config
    for module in launch.targets()
}

each_recipe = pytest.mark.parametrize("name", RECIPES)


@each_recipe
def test_dry_run(name, monkeypatch, capsys):
    planned(monkeypatch, **arguments(RECIPES[name]))
    printed = usual(capsys.readouterr().out)
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get(UPDATE):
        golden.write_text(printed, encoding="utf-8")
    assert printed == golden.read_text(encoding="utf-8"), f"{UPDATE}=1 writes it anew"
    for script in scripts(printed):
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), script


def test_every_target_has_a_recipe_and_every_golden_is_of_one():
    assert {words[0].removeprefix("--target=") for words in RECIPES.values()} == set(CONFIGS)
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == sorted(RECIPES)
    assert all("--dry-run" in words for words in RECIPES.values()), (
        "whoever copies one launches nothing at once"
    )


def test_what_the_page_shows_is_printed():
    page = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"^```text from=([\w-]+)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(shown) >= 2
    for name, text in shown:
        assert text in (GOLDEN / f"{name}.txt").read_text(encoding="utf-8"), name


def table(cls, hidden=frozenset()) -> str:
    """The settings of a target in Markdown."""
    config = CONFIGS.get(cls, cls)
    fields = {name: field for name, field in config.__dataclass_fields__.items() if name not in hidden}
    lines = ["| setting | default | |", "|---|---|---|"]
    for name, field in fields.items():
        group = "Mapping" in str(field.type)
        default = "" if group else "required" if "MISSING" in repr(field.default) else f"`{field.default!r}`"
        default = "" if default == "`''`" else default.replace("'", "")
        lines.append(f"| `{name}{'.NAME' if group else ''}` | {default} | {descriptions(config)[name]} |")
    return "\n".join(lines)


@pytest.mark.parametrize("target", ["every target", *CONFIGS])
def test_the_page_has_the_settings(target):
    common = set(TargetConfig.__dataclass_fields__)
    wanted = table(TargetConfig) if target == "every target" else table(target, common)
    assert f"### {target}\n\n{wanted}\n" in PAGE.read_text(encoding="utf-8"), f"### {target}\n\n{wanted}\n"


def test_a_checkout_elsewhere_prints_the_same():
    assert usual(f"{HOME}/runs/x/launch/0003-0123abcd") == f"{HOME}/runs/x/launch/0003-5f1d77aa"
