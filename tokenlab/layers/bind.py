"""Give a call in a stack expression to the class or function it names: arguments by position and name, with types.

The types are the annotations of the fields or parameters. Whatever does not fit is an error with a caret under it.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import flax.linen as nn

from tokenlab.core.errors import TokenLabError, suggest
from tokenlab.core.stack import Call, Stack, Value
from tokenlab.layers.item import Item, Score
from tokenlab.layers.special import Special


class Resolver(Protocol):
    """Finds what a name in a stack stands for. Raises NameLookupError with a suggestion.

    `tokenlab.models.Names` is the one in use; it lives further down the imports, since it finds methods.
    """

    def item(self, name: str) -> type[Item]:
        """The class of stack item `name`."""

    def score(self, name: str) -> type[Score]:
        """The class of score `name`."""

    def ffn(self, name: str) -> Callable[..., Any]:
        """The factory `ffn(defaults, **arguments)` of feed-forward layer `name`."""

    def special(self, name: str) -> Callable[..., Special]:
        """The factory `special(defaults, **arguments)` of what feeds special tokens, by `name`."""


def bind(stack: Stack, call: Call, target: Callable[..., Any], resolver: Resolver, *given: Any) -> Any:
    """Call `target(*given, **arguments of the call)`, checked against its signature.

    Args:
      stack: the expression, for error messages.
      call: the call in it.
      target: a dataclass or a function with annotated parameters.
      resolver: finds scores by name.
      given: leading arguments that the stack's user does not write.

    Raises:
      StackError: an unknown, doubled, missing or ill-typed argument, or whatever the target refuses.
    """
    hints = typing.get_type_hints(target)
    parameters = list(inspect.signature(target).parameters.values())[len(given) :]
    named = {p.name: p for p in parameters}
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments: dict[str, Any] = {}
    if len(call.args) > len(positional):
        stack.fail(
            call.span,
            f"{call.name} takes at most {len(positional)} arguments without a name, got {len(call.args)}; "
            f"its arguments are {_signature(parameters)}.",
        )
    for name, value in [*zip(positional, call.args, strict=False), *call.kwargs]:
        if name not in named:
            stack.fail(call.span, f"{call.name} has no argument {name!r}.{suggest(name, named)}")
        if name in arguments:
            stack.fail(call.span, f"{call.name}: {name!r} is given twice.")
        hint = hints.get(name, Any)
        if isinstance(value, Call) and any(
            inspect.isclass(each) and issubclass(each, nn.Module) for each in _options(hint)
        ):
            arguments[name] = build_ffn(stack, value, resolver, *given)
        else:
            arguments[name] = convert(stack, call, name, value, hint, resolver)
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in arguments]
    if missing:
        stack.fail(call.span, f"{call.name} needs {missing[0]!r}: {call.name}({_signature(parameters)}).")
    try:
        return target(*given, **arguments)
    except TokenLabError as error:
        stack.fail(call.span, str(error))


def convert(stack: Stack, call: Call, name: str, value: Value, hint: Any, resolver: Resolver) -> Any:
    """`value` as the annotated type `hint`, or a StackError that says what was expected."""
    options = _options(hint)
    span = value.span if isinstance(value, Call) else call.span
    if isinstance(value, Call):
        if any(inspect.isclass(option) and issubclass(option, Score) for option in options):
            return build_score(stack, value, resolver)
        words = [word for option in options for word in _words(option)]
        if words and value.name in words and not value.args and not value.kwargs:
            return value.name
        if words:
            stack.fail(span, f"{call.name}: {name} must be one of {', '.join(words)}; got {value}.")
        stack.fail(
            span,
            f"{call.name}: {name} must be {_expected(options)}; got the name {value}. "
            f"A name stands for a number once stack_vars.{value.name} is set.",
        )
    if value is None and type(None) in options:
        return None
    if isinstance(value, bool):
        if bool in options:
            return value
    elif isinstance(value, int) and int in options:
        return value
    elif isinstance(value, int | float) and float in options and math.isfinite(value):
        return float(value)
    elif Any in options:
        return value
    stack.fail(span, f"{call.name}: {name} must be {_expected(options)}; got {value!r}.")


def build_score(stack: Stack, call: Call, resolver: Resolver) -> Score:
    """The score a name such as `cls` or `learned` stands for."""
    try:
        found = resolver.score(call.name)
    except TokenLabError as error:
        stack.fail(call.span, str(error))
    return bind(stack, call, found, resolver)


def build_ffn(stack: Stack, call: Call, resolver: Resolver, *given: Any) -> nn.Module:
    """The feed-forward layer a name such as `mlp` or `soft_moe(experts=8)` stands for."""
    try:
        factory = resolver.ffn(call.name)
    except TokenLabError as error:
        stack.fail(call.span, str(error))
    return bind(stack, call, factory, resolver, *given)


def build_special(stack: Stack, call: Call, resolver: Resolver, *given: Any) -> Special:
    """What a name such as `jumbo` or `jumbo(mult=2)` feeds special tokens with."""
    try:
        factory = resolver.special(call.name)
    except TokenLabError as error:
        stack.fail(call.span, str(error))
    return bind(stack, call, factory, resolver, *given)


def build_item(stack: Stack, call: Call, resolver: Resolver) -> Item:
    """The item a call stands for; its body, if it has one, is not looked into."""
    try:
        found = resolver.item(call.name)
    except TokenLabError as error:
        stack.fail(call.span, str(error))
    if found.wraps and call.body is None:
        stack.fail(call.span, f"{call.name} wraps a body: write {call.name}(...)(block).")
    if not found.wraps and call.body is not None:
        stack.fail(call.span, f"{call.name} takes no body; join it with '+'.")
    return bind(stack, call, found, resolver)


def _signature(parameters: list[inspect.Parameter]) -> str:
    def show(parameter: inspect.Parameter) -> str:
        default = parameter.default
        if default is parameter.empty:
            return parameter.name
        if isinstance(default, Score):
            return f"{parameter.name}={type(default).__name__.lower()}"
        return f"{parameter.name}={default!r}"

    return ", ".join(map(show, parameters))


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _words(option: Any) -> tuple[str, ...]:
    return tuple(typing.get_args(option)) if typing.get_origin(option) is Literal else ()


def _expected(options: tuple[Any, ...]) -> str:
    if int in options and float in options:
        return "a count (int) or a fraction (float)"
    names: Mapping[Any, str] = {
        int: "a whole number",
        float: "a finite number",
        bool: "True or False",
        type(None): "None",
    }
    known = [names[option] for option in options if option in names]
    known += ["a score, such as norm" for o in options if inspect.isclass(o) and issubclass(o, Score)]
    known += [f"one of {', '.join(_words(option))}" for option in options if _words(option)]
    return " or ".join(known) or "something else"
