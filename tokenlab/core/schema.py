"""Between `ml_collections.ConfigDict` and frozen dataclasses: every key and every type is checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from ml_collections import config_dict
from ml_collections.config_dict import ConfigDict

from tokenlab.core.errors import ConfigError, TokenLabError, suggest

T = TypeVar("T")


def to_dataclass(cls: type[T], mapping: Mapping[str, Any] | ConfigDict, path: str = "config") -> T:
    """Build the frozen dataclass `cls` from a mapping, checking every key and type, nested ones too.

    Understood are bool, int, float, str, None, Literal, unions, tuple, list, Sequence, dict, Mapping, Any,
    nested dataclasses, and any other class by isinstance. A list serves for a tuple and an int for a float
    (not where the union also names int); a bool is no int, and a float is no int.

    Args:
      cls: a dataclass.
      mapping: its values by field name; fields left out take their defaults.
      path: dotted name of `mapping`, for messages.

    Raises:
      ConfigError: an unknown key (with the nearest field), a missing field, a value of the wrong type, or a
        plain ValueError or TypeError of the class's own `__post_init__`, with the path before it. A
        TokenLabError passes.
    """
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping | ConfigDict):
        raise wrong(
            path, mapping, f"a group of fields ({', '.join(f.name for f in dataclasses.fields(cls))})"
        )
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in mapping.items():
        if key not in fields:
            raise ConfigError(f"{path} has no key {key!r}.{suggest(str(key), fields)}")
        values[key] = _convert(value, hints[key], f"{path}.{key}")
    for name, field in fields.items():
        if name not in values and not _has_default(field):
            raise ConfigError(f"{path}.{name} is missing: expected {describe(hints[name])}.")
    try:
        return cls(**values)
    except TokenLabError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def from_dataclass(source: Any) -> ConfigDict:
    """The ConfigDict of a dataclass: of the defaults of a class, or of the values of an instance.

    The result is locked: assigning an unknown key is an error. Fields of type dict or Mapping stay open for new keys.
    A field that may be None takes None or a value of its type, and one that may be an int or a float keeps an int an
    int. A field without default is None until it is set. As with every ConfigDict, copy it with `copy.deepcopy`.
    """
    found, opened = _from_dataclass(source)
    found.lock()
    for group in opened:
        group.unlock()
    return found


def _from_dataclass(source: Any) -> tuple[ConfigDict, list[ConfigDict]]:
    cls = source if isinstance(source, type) else type(source)
    hints = typing.get_type_hints(cls)
    found, opened = ConfigDict(), []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        if source is not cls:
            value = getattr(source, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = None if field.default is dataclasses.MISSING else field.default
        options = [option for option in _options(hints[field.name]) if option is not type(None)]
        if dataclasses.is_dataclass(value):
            value, inner = _from_dataclass(value)
            opened += inner
        elif isinstance(value, Mapping):
            value = ConfigDict(plain(value))
            opened.append(value)
        elif value is not None and (len(options) > 1 or options == [Any]):
            # As a plain field it would turn an int assigned to a float into a float, and 1 and 1.0 differ.
            value = config_dict.FieldReference(value, field_type=object)
        elif value is None:
            single = options[0] if len(options) == 1 and options[0] in (int, float, str) else object
            value = config_dict.placeholder(single)
        found[field.name] = value
    return found, opened


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as type `hint`, or a ConfigError naming `path`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, path)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        near = suggest(value, map(str, args)) if isinstance(value, str) else ""
        raise wrong(path, value, describe(hint), near if "mean" in near else "")
    kind = origin or hint
    if kind in (Any, object):
        return plain(value)
    if dataclasses.is_dataclass(kind):
        return to_dataclass(kind, value, path)
    if kind in (dict, Mapping):
        return _convert_dict(value, hint, path)
    if kind in (tuple, list, Sequence):
        return _convert_sequence(value, hint, path)
    if kind is None or kind is type(None):
        if value is None:
            return None
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise wrong(path, value, describe(hint))


def _convert_union(value: Any, hint: Any, path: str) -> Any:
    options = _options(hint)
    for option in options:  # the exact type first, so that `int | float` keeps an int an int
        if type(value) is option:
            return value
    groups = [option for option in options if dataclasses.is_dataclass(option)]
    if len(groups) == 1 and isinstance(value, Mapping | ConfigDict):
        return to_dataclass(groups[0], value, path)  # its own message says more than that of the union
    for option in options:
        try:
            return _convert(value, option, path)
        except ConfigError:
            continue
    raise wrong(path, value, describe(hint))


def _convert_dict(value: Any, hint: Any, path: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping | ConfigDict):
        raise wrong(path, value, describe(hint))
    key_hint, value_hint = typing.get_args(hint) or (Any, Any)
    found = {}
    for key, item in value.items():
        found[_convert(key, key_hint, f"{path}, key {key!r}")] = _convert(item, value_hint, f"{path}.{key}")
    return found


def _convert_sequence(value: Any, hint: Any, path: str) -> tuple[Any, ...] | list[Any]:
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if not isinstance(value, tuple | list):
        raise wrong(path, value, describe(hint))
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise wrong(path, value, describe(hint))
        hints = args
    else:
        hints = (args[0] if args else Any,) * len(value)
    pairs = enumerate(zip(value, hints, strict=True))
    items = [_convert(item, each, f"{path}[{i}]") for i, (item, each) in pairs]
    return items if kind is list else tuple(items)


def plain(value: Any) -> Any:
    """ConfigDicts within as plain dicts."""
    if isinstance(value, ConfigDict | Mapping):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def describe(hint: Any) -> str:
    """A type as a user would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if hint is None or hint is type(None):
        return "None"
    if hint in (dict, Mapping) or origin in (dict, Mapping):
        return "a group of keys and values"
    if origin in (tuple, list, Sequence) and args:
        if origin is tuple and args[-1] is not Ellipsis:
            return f"({', '.join(map(describe, args))})"
        return f"a sequence of {describe(args[0])}"
    return {bool: "True or False", tuple: "a sequence", list: "a sequence", Any: "anything"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def wrong(path: str, value: Any, expected: str, more: str = "") -> ConfigError:
    """The error to raise for a value that is not what was expected."""
    shown = repr(plain(value))
    if len(shown) > 80:
        shown = shown[:77] + "..."
    kind = "" if value is None else f" ({'dict' if isinstance(value, ConfigDict) else type(value).__name__})"
    return ConfigError(f"{path} is {shown}{kind}: expected {expected}.{more}")
