"""Imports point one way, and importing the package is cheap.

Every file of tokenlab/ is parsed, not imported: its static imports, and the dynamic ones (`import_module`,
`__import__`, `names.find("tokenlab.methods", ...)` and its like). A package may import itself and those before it in
ORDER; docs/architecture.md says why.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "tokenlab"
ORDER = (
    "core",
    "sharding",
    "ops",
    "cost",
    "layers",
    "methods",
    "models",
    "tasks",
    "data",
    "train",
    "evaluate",
    "generate",
    "compare",
    "bench",
    "interop",
    "launch",
    "commands",
    "cli",
    "__main__",
)
NAMES = f"{PACKAGE}.core.names"
RUNTIME = f"{PACKAGE}.sharding.runtime"  # has the parts of jax that are private and not to be done without
LOOKUPS = ("find", "find_attr", "list_modules")
DISTRIBUTIONS = {
    "absl": "absl-py",
    "array_record": "array_record",
    "cv2": "opencv-python-headless",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}  # where import and distribution differ


# For the sources of the test of this test.
IMPORT = "import_module"
NAMED = "from tokenlab.core import names\n"


class Import(NamedTuple):
    """A module that a file imports: where, and whether that happens as soon as the file is imported."""

    target: str
    line: int
    at_top: bool


class Unreadable(Exception):
    """A dynamic import whose target does not stand in the text."""


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of the package under `root`."""
    for file in sorted((root / PACKAGE).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


class Reader(ast.NodeVisitor):
    """Collects the imports of one file."""

    def __init__(self, module: str, is_package: bool, tree: ast.Module):
        self.package = module if is_package else module.rpartition(".")[0]
        self.found: list[Import] = []
        self.depth = 0  # of functions: what stands in one is not imported at once
        self.checking = 0  # of `if TYPE_CHECKING:`
        self.lookups: set[str] = set()  # what the functions of core/names.py are called here
        self.tree = tree
        self.visit(tree)

    def add(self, target: str, node: ast.AST) -> None:
        self.found.append(Import(target, node.lineno, not self.depth and not self.checking))

    def absolute(self, name: str, level: int) -> str:
        if not level:
            return name
        parts = self.package.split(".")
        return ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])])

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name == PACKAGE:  # what is taken from it says which package is meant
                for name in self.attributes_of(alias.asname or alias.name):
                    self.add(f"{PACKAGE}.{name}", node)
            else:
                self.add(alias.name, node)
            if alias.name == NAMES:
                self.lookups |= {f"{alias.asname or alias.name}.{lookup}" for lookup in LOOKUPS}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.absolute(node.module or "", node.level)
        for alias in node.names:
            full = f"{base}.{alias.name}"
            self.add(full, node)
            if full == NAMES:
                self.lookups |= {f"{alias.asname or alias.name}.{lookup}" for lookup in LOOKUPS}
            elif base == NAMES:
                self.lookups |= {alias.asname or alias.name} if alias.name in LOOKUPS else set()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        inside = "TYPE_CHECKING" in ast.unparse(node.test)
        self.checking += inside
        self.generic_visit(node)
        self.checking -= inside

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        if called.rpartition(".")[2] in ("import_module", "__import__"):
            for text in self.literals(node.args[:1]):
                dots = len(text) - len(text.lstrip("."))
                self.add(self.absolute(text.lstrip("."), dots), node)
        elif called in self.lookups:
            given = node.args[:1] or [keyword.value for keyword in node.keywords if keyword.arg == "package"]
            try:
                targets = self.literals(given)
            except Unreadable:
                # A constant or a parameter: whichever package it is, its name stands somewhere in this file.
                targets = sorted(self.dotted_texts())
                if not targets:
                    raise
            for target in targets:
                self.add(target, node)
        self.generic_visit(node)

    def literals(self, nodes: list[ast.expr]) -> list[str]:
        found = []
        for node in nodes:
            parts = node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
            for part in parts:
                if not (isinstance(part, ast.Constant) and isinstance(part.value, str)):
                    raise Unreadable(
                        f"line {node.lineno}: {ast.unparse(node)!r} is not a literal package name"
                    )
                found.append(part.value)
        return found

    def attributes_of(self, name: str) -> list[str]:
        found = {ast.unparse(node) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}
        return sorted({text.split(".")[1] for text in found if text.startswith(f"{name}.")})

    def dotted_texts(self) -> set[str]:
        texts = {node.value for node in ast.walk(self.tree) if isinstance(node, ast.Constant)}
        return {text for text in texts if isinstance(text, str) and re.fullmatch(rf"{PACKAGE}(\.\w+)+", text)}


def imports(module: str, file: Path) -> list[Import]:
    """What a file imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    return Reader(module, file.name == "__init__.py", tree).found


def part_of(module: str) -> str:
    """The package directly under tokenlab/ that a module stands in; "" for tokenlab itself."""
    return ".".join(module.split(".")[1:2])


def wrong_directions(root: Path) -> list[str]:
    """Every import that points the wrong way, one line each."""
    found = []
    parts = {part_of(module) for module, _ in modules(root)}
    for module, file in modules(root):
        part = part_of(module)
        if part and part not in ORDER:
            found.append(f"{module}: {part!r} has no place in ORDER")
            continue
        if module == NAMES:
            continue  # the one place that imports by computed names
        try:
            wanted = imports(module, file)
        except Unreadable as error:
            found.append(f"{module} {error}")
            continue
        allowed = ORDER[: ORDER.index(part) + 1] if part else ORDER[:1]
        for target, line, _ in wanted:
            if target.partition(".")[0] != PACKAGE:
                continue
            to = part_of(target)
            if to in allowed or target == f"{PACKAGE}.__version__":
                continue
            why = f"imports {target}" if to in parts else f"imports {target} by way of the lazy top level"
            found.append(f"{module} line {line} {why}")
    return found


def outside_libraries(root: Path, at_top: bool) -> dict[str, list[str]]:
    """Distribution -> modules that import it as soon as they are imported (or later, inside a function)."""
    found: dict[str, list[str]] = {}
    for module, file in modules(root):
        if module != NAMES:
            for each in imports(module, file):
                top = each.target.partition(".")[0]
                if each.at_top == at_top and top != PACKAGE and top not in sys.stdlib_module_names:
                    found.setdefault(DISTRIBUTIONS.get(top, top.replace("_", "-")).lower(), []).append(module)
    return found


def declared() -> tuple[set[str], set[str]]:
    """Distributions of the core dependencies, and of the optional ones, in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def distributions(lines: list[str]) -> set[str]:
        return {re.match(r"[\w.\-]+", line)[0].lower() for line in lines}

    optional = project.get("optional-dependencies", {})
    return distributions(project["dependencies"]), set().union(*map(distributions, optional.values()))


def test_imports_point_one_way():
    assert wrong_directions(ROOT) == []


def test_only_core_dependencies_are_imported_at_once():
    core, _ = declared()
    found = outside_libraries(ROOT, at_top=True)
    assert found, "no import was found at all"
    assert {name: where for name, where in found.items() if name not in core} == {}


def test_libraries_imported_inside_functions_are_declared():
    core, optional = declared()
    found = outside_libraries(ROOT, at_top=False)
    assert {name: where for name, where in found.items() if name not in core | optional} == {}


def test_no_private_modules_of_other_libraries():
    private = [
        f"{module} line {each.line}: {each.target}"
        for module, file in modules(ROOT)
        if module not in (NAMES, RUNTIME)
        for each in imports(module, file)
        if not each.target.startswith((PACKAGE, "__future__")) and re.search(r"\._", each.target)
    ]
    assert private == []


@pytest.mark.parametrize(
    "statement",
    [
        "import tokenlab",
        "import tokenlab.core",
        "from tokenlab.core import config, errors, names, schema, stack",
        "import tokenlab.cli",
    ],
)
def test_the_light_part_does_not_import_jax(statement):
    code = f"import sys; {statement}; sys.exit(int(bool({{'jax', 'numpy', 'flax'}} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


class TestTheTest:
    """A tree with one import of each kind, right and wrong."""

    @pytest.fixture
    def tree(self, tmp_path):
        def write(files: dict[str, str]) -> Path:
            for part in ("core", "ops", "layers", "methods/family", "models", "cost"):
                folder = tmp_path / PACKAGE / part
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "__init__.py").touch()
            (tmp_path / PACKAGE / "__init__.py").write_text("from tokenlab.core import names\n")
            (tmp_path / PACKAGE / "core" / "names.py").write_text(
                "import importlib\nimportlib.import_module(X)\n"
            )
            for name, text in files.items():
                (tmp_path / PACKAGE / name).write_text(text)
            return tmp_path

        return write

    @pytest.mark.parametrize(
        ("file", "text"),
        [
            ("models/vit.py", "from tokenlab.core import names\nnames.find('tokenlab.methods', 'x')\n"),
            (
                "models/vit.py",
                "from tokenlab.core.names import find as f\nf(package='tokenlab.methods', name='x')\n",
            ),
            (
                "models/vit.py",
                "from tokenlab.core import names\nP = ('tokenlab.layers',)\nnames.find(P, 'x')\n",
            ),
            (
                "models/vit.py",
                "from ..layers import block\nfrom . import other\nimport tokenlab.methods.family.x\n",
            ),
            ("methods/family/x.py", "from tokenlab.layers.block import Block\nfrom ...ops import select\n"),
            ("layers/block.py", "from tokenlab import ops\nimport numpy as np\n"),
            ("layers/block.py", "d = {}\nd.find('tokenlab.methods')\n"),
            ("cli.py", "from tokenlab import __version__, models\n"),
            ("ops/a.py", "import tokenlab\nprint(tokenlab.__version__)\n"),
            ("__init__.py", "__version__ = '1'\nfrom tokenlab.core import names\n"),
        ],
    )
    def test_right_ones_pass(self, tree, file, text):
        assert wrong_directions(tree({file: text})) == []

    @pytest.mark.parametrize(
        ("file", "text", "line"),
        [
            ("core/a.py", "import tokenlab.ops\n", "tokenlab.core.a line 1 imports tokenlab.ops"),
            ("core/a.py", "from tokenlab import ops\n", "tokenlab.core.a line 1 imports tokenlab.ops"),
            ("core/a.py", "import tokenlab as t\nt.ops.f()\n", "tokenlab.core.a line 1 imports tokenlab.ops"),
            ("ops/a.py", "from tokenlab.layers.block import B\n", "line 1 imports tokenlab.layers.block"),
            ("ops/a.py", "from ..layers import block\n", "tokenlab.ops.a line 1 imports tokenlab.layers.block"),
            ("ops/__init__.py", "from ..layers import block\n", "tokenlab.ops line 1 imports tokenlab.layers.block"),
            ("ops/a.py", "def f():\n    from tokenlab.cost import x\n", "line 2 imports tokenlab.cost.x"),
            ("ops/a.py", "if TYPE_CHECKING:\n    import tokenlab.layers\n", "line 2 imports tokenlab.layers"),
            ("ops/a.py", f"from importlib import import_module\n{IMPORT}('tokenlab.layers')\n", "imports tokenlab.l"),
            ("ops/a.py", f"import importlib as i\ni.{IMPORT}('..layers', 'tokenlab.ops')\n", "imports tokenlab.l"),
            ("ops/a.py", "__import__('tokenlab.layers')\n", "tokenlab.ops.a line 1 imports tokenlab.layers"),
            ("ops/a.py", f"import importlib\nimportlib.{IMPORT}(f'tokenlab.{{x}}')\n", "is not a literal"),
            ("layers/a.py", f"{NAMED}names.find('tokenlab.methods', 'x')\n", "line 2 imports tokenlab.methods"),
            ("layers/a.py", f"{NAMED}names.find(['tokenlab.ops', 'tokenlab.methods'], 'x')\n", "tokenlab.methods"),
            ("layers/a.py", f"{NAMED}P = {{1: 'tokenlab.methods'}}\nnames.find(P[1], 'x')\n", "imports tokenlab.m"),
            ("layers/a.py", f"{NAMED}def f(p):\n    names.find(p, 'x')\n", "is not a literal"),
            ("layers/a.py", "from ..core import names as n\nn.find_attr('tokenlab.methods', 'x')\n", "line 2"),
            ("layers/a.py", "from tokenlab.core.names import find\nfind('tokenlab.methods', 'x')\n", "line 2 imports"),
            ("layers/a.py", f"import {NAMES}\n{NAMES}.list_modules('tokenlab.models')\n", "imports tokenlab.models"),
            ("models/a.py", "from tokenlab import SoftMoE\n", "imports tokenlab.SoftMoE by way of the lazy"),
            ("models/a.py", "import tokenlab\ntokenlab.SoftMoE()\n", "imports tokenlab.SoftMoE by way of the lazy"),
            ("newpart/a.py", "", "tokenlab.newpart.a: 'newpart' has no place in ORDER"),
            ("__init__.py", "from tokenlab.models import vit\n", "tokenlab line 1 imports tokenlab.models.vit"),
        ],
    )  # fmt: skip
    def test_wrong_ones_are_caught(self, tree, tmp_path, file, text, line):
        (tmp_path / PACKAGE / "newpart").mkdir(parents=True)
        found = wrong_directions(tree({file: text}))
        assert len(found) == 1
        assert line in found[0]

    def test_libraries(self, tree):
        root = tree(
            {
                "ops/a.py": "import os, torch\nfrom sklearn import datasets\n",
                "ops/b.py": "def f():\n    import ml_collections\nif TYPE_CHECKING:\n    import wandb\n",
                "ops/c.py": "try:\n    import triton.language\nexcept OSError:\n    pass\nclass C:\n    import torch\n",
            }
        )
        ops = f"{PACKAGE}.ops"
        assert outside_libraries(root, at_top=True) == {
            "torch": [f"{ops}.a", f"{ops}.c"],
            "scikit-learn": [f"{ops}.a"],
            "triton": [f"{ops}.c"],
        }
        assert outside_libraries(root, at_top=False) == {
            "ml-collections": [f"{ops}.b"],
            "wandb": [f"{ops}.b"],
        }
