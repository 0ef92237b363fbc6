"""The sources of the Python standard library as real text that every installation has, without a network.

Modules are the .py files that lie directly in the library's folder, in the order of their names, without those that
begin with an underscore. Which text that is depends on the version of Python; a run keeps a fingerprint of it and says
when it changes. The sources are under the PSF licence; nothing of them is in this package.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

from tokenlab.core.errors import DataError

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
"""Of the modules. The split of a module depends on its name alone."""


class Function(NamedTuple):
    """A function or class: its first line of code without the indentation, and the first paragraph of its docstring."""

    signature: str
    docstring: str


@functools.cache
def modules() -> dict[str, dict[str, str]]:
    """The source of each module by split and name. Raises DataError where there is no source."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    found: dict[str, dict[str, str]] = {split: {} for split in SHARES}
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a link to nowhere, or one of the few modules in another encoding
        if text.strip():
            found[split_of(path.stem)][path.stem] = text
    empty = [split for split, sources in found.items() if not sources]
    if empty:
        raise DataError(
            f"the Python standard library has {len(files)} modules as source in {str(folder)!r}, and split "
            f"{empty[0]!r} gets none; expected an installation with its .py files."
        )
    return found


def split_of(name: str) -> str:
    """The split that a module of this name is in."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "test"


@functools.cache
def lines(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Lines of docstrings and lines of code of a split, each once, in their order, without indentation.

    A line counts that has three words or more. Lines of code are none with a comment or within any string of several
    lines.
    """
    prose: dict[str, None] = {}
    code: dict[str, None] = {}
    for text, tree in zip(modules()[split].values(), _trees(split), strict=True):
        of_docstrings, of_strings = _string_lines(tree)
        for number, line in enumerate(text.split("\n"), 1):
            shown = line.strip().strip('"').strip()
            if len(shown.split()) < 3:
                continue
            if number in of_docstrings:
                prose[shown] = None
            elif number not in of_strings and "#" not in shown:
                code[shown] = None
    return tuple(prose), tuple(code)


@functools.cache
def functions(split: str) -> tuple[Function, ...]:
    """Functions and classes of a split that have a docstring, in their order."""
    found: dict[Function, None] = {}
    for text, tree in zip(modules()[split].values(), _trees(split), strict=True):
        code = text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            docstring = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(docstring.split()) >= 3:
                found[Function(code[node.lineno - 1].strip(), docstring)] = None
    return tuple(found)


@functools.cache
def _trees(split: str) -> tuple[ast.Module, ...]:
    """The modules of a split, parsed, in their order."""
    return tuple(ast.parse(text) for text in modules()[split].values())


def _string_lines(tree: ast.AST) -> tuple[set[int], set[int]]:
    """Numbers of the lines within docstrings, and within all strings of several lines and docstrings."""
    docstrings: set[int] = set()
    strings: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                docstrings.update(range(value.lineno, value.end_lineno + 1))
        if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno > node.lineno:
            strings.update(range(node.lineno, node.end_lineno + 1))
    return docstrings, strings | docstrings
