"""Patterns of parameter paths: * stands for any text, all else for itself."""

from __future__ import annotations

import re


def fits(path: str, pattern: str) -> bool:
    """Whether the pattern is of the whole path: "blocks/*/kernel" of "blocks/mlp/up/kernel", since * spans slashes.

    Nothing but * is special, so that a "?" or "[" in a pattern is an error where no parameter has such a name, and
    not another pattern.
    """
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), path, re.DOTALL) is not None
