"""Errors that speak to the user: one line that says what was given, what was expected and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TokenLabError(ValueError):
    """Base of every error TokenLab raises on purpose; the command line prints it as one line and exits with 2."""


class StackError(TokenLabError):
    """A stack expression that cannot be parsed or resolved; its message carries the place as a caret."""


class ConfigError(TokenLabError):
    """A configuration with an unknown key, a value of the wrong type or range, or one that does not fit the workdir."""


class NameLookupError(TokenLabError):
    """A name (method, item, model, task, optimizer, ...) that nothing answers to."""


class ShapeError(TokenLabError):
    """An array whose shape or dtype does not fit the function it was given to."""


class DataError(TokenLabError):
    """A data source, split or record that cannot be used."""


class CheckpointError(TokenLabError):
    """A checkpoint that cannot be read, or that does not fit the model it is loaded into."""


class ShardingError(TokenLabError):
    """A sharding rule that matches nothing, a leaf that no rule matches, or axes that collide or do not divide."""


class CostError(TokenLabError):
    """A program whose cost cannot be counted, because it holds an operation of unknown cost."""


class NonFiniteError(TokenLabError):
    """Training met a value that is not finite; the message names the step and the first such leaf."""


class StorageError(TokenLabError):
    """A bucket that does not exist, refuses, or cannot be reached."""


class HostsError(TokenLabError):
    """Processes of one job that do not find each other or disagree, or one of them that is gone or stuck."""


def suggest(name: str, options: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them.

    Returns " Did you mean 'x'?" when something is near, else " Known: a, b, c." (" Nothing is known here." when
    there are no options).
    """
    known = sorted(set(options))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(known)}." if known else " Nothing is known here."
