"""Configuration: `ml_collections.ConfigDict` in files and on the command line, frozen dataclasses in code.

A file in configs/ defines `get_config(arg=None) -> ConfigDict`. `load` runs it, `override` applies
`--config.key=value`, and `to_dataclass` turns a part of the result into the frozen dataclass that some code
declares: a key nobody reads, a value of another type and a missing value are errors that name the key.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import math
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict

from tokenlab.core.errors import ConfigError, TokenLabError, suggest
from tokenlab.core.schema import describe, from_dataclass, plain, to_dataclass, wrong

__all__ = [
    "call",
    "diff",
    "flatten",
    "from_dataclass",
    "from_json",
    "load",
    "override",
    "to_dataclass",
    "to_json",
]

_ABSENT = object()


def load(spec: str | Path) -> ConfigDict:
    """The configuration of a Python file: what its `get_config()` returns.

    Args:
      spec: path of the file, or "path.py:arg" to call `get_config("arg")`; see `locate`.

    Raises:
      ConfigError: what `locate` raises, or the file defines no get_config, does not take (or needs) an argument,
        returns something else than a ConfigDict, or raises: the message then says what and in which line. A
        TokenLabError that it raises is passed on.
    """
    path, arg = locate(spec)
    config = call(path, "get_config", *(() if arg is None else (arg,)))
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config of {path} returns a {type(config).__name__}: expected a ConfigDict.")
    return config


def shipped() -> Path:
    """The folder of the configurations that come with the package: inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def locate(spec: str | Path) -> tuple[Path, str | None]:
    """The file of a configuration, and the argument that is given behind its name.

    A path that begins with `configs/` and is not there is looked for among those that come with the package, so that
    the commands of the documentation work in any folder.

    Raises:
      ConfigError: no such file, or no Python file.
    """
    file, has_arg, arg = str(spec).partition(".py:")
    path = Path(file + ".py" if has_arg else file)
    if path.suffix != ".py":
        raise ConfigError(f"config {str(spec)!r} is not a Python file: expected FILE.py or FILE.py:ARGUMENT.")
    folder = path.parent
    if not path.is_file() and path.parts[0] == "configs":
        own = shipped().joinpath(*path.parts[1:])
        if own.is_file():
            path = own
        elif not folder.is_dir():
            folder = own.parent
    if not path.is_file():
        others = [other.name for other in folder.glob("*.py")]
        near = suggest(path.name, others) if others else f" There is no Python file in {str(folder)!r}."
        raise ConfigError(f"config file {str(path)!r} does not exist.{near}")
    return path, arg if has_arg else None


def call(path: Path, function: str, *args: Any) -> Any:
    """What a function of a Python file returns, for one that is there.

    Raises:
      ConfigError: the file does not define it, it does not take the arguments, or something raises: the message then
        says what and in which line. A TokenLabError is passed on.
    """
    try:
        return _run(path, function, args)
    except TokenLabError:
        raise
    except Exception as error:
        raise ConfigError(f"{path}{_line_in(path, error)} raises {_one_line(error)}") from error


def _run(path: Path, function: str, args: tuple[Any, ...]) -> Any:
    # Run, not imported: no stale bytecode when a sweep rewrites a file within a second.
    module = types.ModuleType(f"tokenlab_config_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where a dataclass that the file defines looks for its types
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{path} does not define {function}(arg=None).")
    signature = inspect.signature(found)
    try:
        signature.bind(*args)
    except TypeError:
        given = f"the argument {', '.join(map(repr, args))}" if args else "no argument"
        raise ConfigError(
            f"{path} defines {function}{signature}: it cannot be called with {given}."
        ) from None
    return found(*args)


def _line_in(path: Path, error: Exception) -> str:
    """Where in `path` an error came from, as " line N", or nothing."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f" line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f" line {lines[-1]}" if lines else ""


def _one_line(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(text.replace("\\n", " ").split())
    return f"{type(error).__name__}: {text}" if text else f"{type(error).__name__}."


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with some values replaced, as by `--config.key=value`.

    A text is read by the type of the value it replaces. Text stays text (quotes around it are taken off),
    True and true are a bool, a whole number serves for a float but a float not for an int, a tuple is written
    `4,4` or `(4, 4)`, and None is always None. Where there was None before, and in an open group such as
    `stack_vars`, the text is read as a Python literal if it is one, and else stays text.

    A change also takes its key out of the rules of the devices (`hardware` in the same group as the key's first part),
    so that it wins over them; a change in `mesh` takes all of `mesh` out, as its sizes belong together.

    Args:
      config: left as it is. In the copy, fields that refer to a changed field (`get_ref`) follow it.
      changes: dotted key without the leading "config." -> text, or a value of the right type.

    Raises:
      ConfigError: an unknown key (with the nearest one), a group where a field is meant, or a value of
        another type.
    """
    found = copy.deepcopy(config)
    for key, value in changes.items():
        *parents, name = key.split(".")
        group, path = found, "config"
        for parent in parents:
            _require_key(group, parent, path)
            group, path = group[parent], f"{path}.{parent}"
            if not isinstance(group, ConfigDict):
                raise ConfigError(f"config.{key} does not exist: {path} is a field, {group!r}, not a group.")
        if name not in group and not group.is_locked and name.isidentifier():
            group[name] = _literal(value)
        else:
            _require_key(group, name, path)
            _assign(group, name, value, f"{path}.{name}")
    for key in changes:
        _win_over_rules(found, key)
    return found


def _win_over_rules(config: ConfigDict, key: str) -> None:
    """Take a key that was changed out of what hardware rules set."""
    parts = key.split(".")
    for depth in range(len(parts)):
        group = config
        for parent in parts[:depth]:
            group = group[parent]
        rules, own = group.get("hardware") if isinstance(group, ConfigDict) else None, parts[depth:]
        if isinstance(rules, tuple) and own[0] != "hardware":
            gone = "mesh." if own[0] == "mesh" else ".".join(own)
            group["hardware"] = tuple(_without(rule, gone) for rule in rules)


def _without(rule: Any, gone: str) -> Any:
    """A rule without a key in its `set`, or without all that begin with `gone` where that ends in a dot."""
    if not isinstance(rule, Mapping | ConfigDict) or not isinstance(rule.get("set"), Mapping | ConfigDict):
        return rule
    stays = {
        k: v for k, v in rule["set"].items() if k != gone and not (gone[-1] == "." and k.startswith(gone))
    }
    return {**rule, "set": stays}


def _require_key(group: ConfigDict, name: str, path: str) -> None:
    if name not in group:
        raise ConfigError(f"{path} has no key {name!r}.{suggest(name, map(str, group.keys()))}")


def _assign(group: ConfigDict, name: str, value: Any, path: str) -> None:
    """Replace the existing `group[name]` by `value`, a text or a value of its type."""
    old, kind = group[name], group.get_type(name)
    if isinstance(old, ConfigDict):
        new = _literal(value)
        if old.is_locked or not isinstance(new, Mapping | ConfigDict):
            fields = ", ".join(f"{path}.{key}" for key in old.keys()) or f"{path}.KEY"
            raise ConfigError(f"{path} is a group, not a field; its fields: {fields}.")
        group[name] = ConfigDict(plain(new))
    elif not group.is_locked:
        new = _read_bool(value) if kind is bool else _literal(value)
        if type(new) is not type(old):
            del group[name]  # else ConfigDict would turn an int that replaces a float into a float
        group[name] = new
    elif kind in (object, type(None)):
        group[name] = _literal(value)
    else:
        group[name] = _typed(value, kind, path)


def _typed(value: Any, kind: type, path: str) -> Any:
    """A text read as `kind`, or a value checked against it."""
    if kind is str:
        return _checked(_literal(value) if value == "None" or _is_quoted(value) else value, str, path)
    if kind is bool:
        return _checked(_read_bool(value), bool, path)
    return _checked(_literal(value), kind, path)


def _checked(value: Any, kind: type, path: str) -> Any:
    if value is None:
        return None  # which fields may be None is known to their dataclass, not here
    if kind is float and type(value) is int:
        return float(value)
    if kind in (tuple, list) and type(value) in (tuple, list):
        return kind(value)
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    raise wrong(path, value, describe(kind))


def _read_bool(value: Any) -> Any:
    return {"true": True, "false": False}.get(value, _literal(value)) if isinstance(value, str) else value


def _is_quoted(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in ("'", '"') and isinstance(_literal(value), str)


def _literal(value: Any) -> Any:
    """A text that is a Python literal as its value; any other text, and whatever is no text, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def to_json(config: Mapping[str, Any] | ConfigDict, *, indent: int | None = 2) -> str:
    """The configuration as JSON text with sorted keys.

    JSON has no tuples: tuples and lists are both written as arrays, and `from_json` reads arrays as tuples.
    Everything else comes back exactly: floats by their shortest exact decimal, an int as an int, None, text.

    Raises:
      ConfigError: a value that JSON cannot hold exactly (an infinity, NaN, an object), or a key that is not
        text.
    """
    values = _jsonable(config, "config")
    return json.dumps(values, indent=indent, sort_keys=True, allow_nan=False, ensure_ascii=False)


def from_json(text: str, *, like: ConfigDict | None = None) -> ConfigDict:
    """Read back what `to_json` wrote.

    Args:
      text: JSON, one object.
      like: a configuration whose open groups (those that take new keys) are open in the result too. JSON does
        not say which are: without `like` the result is locked throughout.

    Raises:
      ConfigError: the text is not a JSON object.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the saved configuration cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the saved configuration is a JSON {type(values).__name__}: expected an object.")
    found = ConfigDict(_tuples(values)).lock()
    if like is not None:
        _open_like(found, like)
    return found


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every field, sorted; an empty group is a value, {}."""
    for key, value in sorted(config.items(), key=lambda item: str(item[0])):
        if isinstance(value, Mapping | ConfigDict) and len(value):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", plain(value)


def diff(a: Mapping[str, Any] | ConfigDict, b: Mapping[str, Any] | ConfigDict) -> list[str]:
    """What differs, one line "key: a -> b" a field, sorted; [] when nothing does.

    A tuple equals a list of the same items (JSON cannot tell them apart) and 1 equals 1.0, but True is not 1.
    """
    first, second = dict(flatten(a)), dict(flatten(b))
    lines = []
    for key in sorted(first.keys() | second.keys()):
        old, new = first.get(key, _ABSENT), second.get(key, _ABSENT)
        if not _equal(old, new):
            lines.append(f"{key}: {_show(old)} -> {_show(new)}")
    return lines


def _jsonable(value: Any, path: str) -> Any:
    if isinstance(value, Mapping | ConfigDict):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{path} has the key {key!r} ({type(key).__name__}): keys must be text.")
        return {key: _jsonable(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_jsonable(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        raise ConfigError(f"{path} is {value}, which JSON cannot hold: expected a finite number or None.")
    raise wrong(path, value, "a number, text, True, False, None, or a sequence or group of these")


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _open_like(group: ConfigDict, like: ConfigDict) -> None:
    if like.is_locked:
        group.lock()
    else:
        group.unlock()  # this opens the groups within as well; they follow
    for key, value in group.items():
        if isinstance(value, ConfigDict) and isinstance(like.get(key), ConfigDict):
            _open_like(value, like[key])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _show(value: Any) -> str:
    return "(absent)" if value is _ABSENT else repr(value)
