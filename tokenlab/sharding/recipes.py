"""Recipes: named ways to lay a model out over devices, each a Python file in configs/sharding/.

Such a file defines `get_mesh(...)`, which returns values of `tokenlab.train.config.MeshConfig`: sizes of mesh axes, -1
among them, and rules. `config.mesh.recipe = "fsdp_expert:8"` takes what `get_mesh(8)` of fsdp_expert.py says.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenlab.core.config import call, shipped
from tokenlab.core.errors import ConfigError, suggest

FOLDER = Path("configs/sharding")
"""Of the recipes: those that come with the package, then those of the folder that the program is started in."""


def files() -> dict[str, Path]:
    """The recipes there are: name -> file."""
    found: dict[str, Path] = {}
    for folder in (shipped() / FOLDER.name, FOLDER):
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith("_"):
                found.setdefault(path.stem, path)
    return found


def read(text: str) -> dict[str, Any]:
    """What a recipe says of the mesh.

    Args:
      text: "NAME", or "NAME:4,16" for arguments, Python literals, of its `get_mesh`.

    Raises:
      ConfigError: no such recipe (with the nearest), arguments that it does not take, or it returns no group of values.
    """
    name, colon, given = text.partition(":")
    known = files()
    if name not in known:
        raise ConfigError(
            f"config.mesh.recipe is {text!r}: there is no {FOLDER}/{name}.py.{suggest(name, known)}"
        )
    try:
        arguments = [ast.literal_eval(part.strip()) for part in given.split(",")] if colon else []
    except (ValueError, SyntaxError):
        raise ConfigError(
            f"config.mesh.recipe is {text!r}: expected numbers behind the colon, such as {name}:4."
        ) from None
    values = call(known[name], "get_mesh", *arguments)
    if not isinstance(values, Mapping) or "recipe" in values:
        raise ConfigError(
            f"get_mesh of {known[name]} returns {values!r}: expected values of config.mesh but recipe, such as "
            "{'data': 1, 'fsdp': -1}."
        )
    return dict(values)
