"""Nothing that is loaded can run code: no pickle, or anything built on it, on the way of data, weights and checkpoints.

Configurations are the exception, and docs/architecture.md says so: they are Python files.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch"}
CONFIGS = "tokenlab/core/config.py"


def found_in(text: str) -> list[str]:
    """What in a module's text reads pickles, or might: line and reason."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
                found.append(f"{node.lineno}: {called} without allow_pickle=False")
            elif given.get("allow_pickle", "False") != "False":
                found.append(f"{node.lineno}: allow_pickle={given['allow_pickle']}")
            if called in ("eval", "exec", "__import__"):
                found.append(f"{node.lineno}: {called}")
    return found


def test_no_pickle_is_read_anywhere() -> None:
    files = sorted((ROOT / "tokenlab").rglob("*.py"))
    assert len(files) > 100
    found = [(str(file.relative_to(ROOT)), each) for file in files for each in found_in(file.read_text())]
    assert [each for each in found if each[0] != CONFIGS] == []
    assert [each.partition(": ")[2] for file, each in found if file == CONFIGS] == ["exec"]


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "def f():\n    from pickle import loads",
        "import torch",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "from numpy import load\nload('x', allow_pickle=flag)",
        "eval('1')",
    ],
)
def test_the_check_finds_it(text: str) -> None:
    assert found_in(text)


def test_the_docs_say_that_configurations_are_code() -> None:
    assert "configurations are Python files" in " ".join(
        (ROOT / "docs" / "architecture.md").read_text().split()
    )
