"""The grammar of stacks: a transformer's depth as one line of text.

    block*4 + keep(0.5, by=cls) + block*8

`+` is sequence, `*n` repeats, a call gives arguments, and a second call wraps a body: `skip(keep=0.5)(block*2)`.
The text is parsed with `ast` and never evaluated. This module knows no layers: it turns text into a small tree of
`Call`, `Sequence` and `Repeat`, and points at the place when the text is wrong.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

from tokenlab.core.errors import StackError

MAX_CHARACTERS = 4_000
MAX_STEPS = 2_000
MAX_NESTING = 16


@dataclass(frozen=True)
class Span:
    """Where a node stands in the text: columns [start, end)."""

    start: int
    end: int


@dataclass(frozen=True)
class Call:
    """An item, a score or a layer by name, with its arguments and, where it wraps, its body."""

    name: str
    args: tuple[Value, ...] = ()
    kwargs: tuple[tuple[str, Value], ...] = ()
    body: Node | None = None
    span: Span = field(default=Span(0, 0), compare=False)

    def __str__(self) -> str:
        arguments = [_show(v) for v in self.args] + [f"{k}={_show(v)}" for k, v in self.kwargs]
        text = self.name + (f"({', '.join(arguments)})" if arguments else "")
        if self.body is None:
            return text
        return (text if arguments else text + "()") + f"({self.body})"


@dataclass(frozen=True)
class Sequence:
    """Parts one after the other: `a + b + c`."""

    parts: tuple[Node, ...]
    span: Span = field(default=Span(0, 0), compare=False)

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))


@dataclass(frozen=True)
class Repeat:
    """A body `times` times: `body*times`. Every repetition has weights of its own."""

    body: Node
    times: int
    span: Span = field(default=Span(0, 0), compare=False)

    def __str__(self) -> str:
        inner = f"({self.body})" if isinstance(self.body, Sequence) else str(self.body)
        return f"{inner}*{self.times}"


Node: TypeAlias = Call | Sequence | Repeat
Value: TypeAlias = int | float | bool | None | Call


@dataclass(frozen=True)
class Stack:
    """A parsed expression: the text as given, its tree, and the variables it used."""

    text: str
    root: Node
    used: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """The expression in canonical spelling, variables replaced by their numbers."""
        return str(self.root)

    def fail(self, span: Span, message: str) -> NoReturn:
        """Raise a `StackError` that shows `message` and a caret under `span`."""
        fail(self.text, span, message)


def fail(text: str, span: Span, message: str) -> NoReturn:
    """Raise a `StackError` with `message`, the expression, and carets under columns [span.start, span.end)."""
    start = max(0, min(span.start, len(text)))
    width = max(1, min(span.end, len(text)) - start)
    # A long expression is shown through a window, so that the caret stays on a terminal line.
    left = max(0, start - 60)
    shown = text[left : left + 118]
    lead = "..." if left else ""
    mark = " " * (len(lead) + start - left) + "^" * min(width, 118 - (start - left))
    raise StackError(f"stack: {message}\n  {lead}{shown}\n  {mark}")


def syntax_tree(text: str) -> ast.expr:
    """The text as Python would read an expression; nothing of it is run. Raises what `ast.parse` does."""
    with warnings.catch_warnings():  # Python warns of "1or 2", which is refused anyway
        warnings.simplefilter("ignore")
        return ast.parse(text, mode="eval").body


def parse(text: str, variables: Mapping[str, int | float] | None = None) -> Stack:
    """Parse a stack expression.

    Args:
      text: the expression, for example `"block*4 + keep(k) + block*8"`; line breaks count as blanks.
      variables: numbers that names may stand for, for example `{"k": 0.5}` (`config.stack_vars`).

    Returns:
      A `Stack`; `str()` of it is the canonical spelling.

    Raises:
      StackError: the text is empty, longer than 4,000 characters, not ASCII, nests deeper than 16, repeats to more
        than 2,000 steps, or is not of the grammar. The message has a caret under the place.
    """
    if not isinstance(text, str) or not text.strip():
        raise StackError(f"stack: expected an expression such as 'block*12', got {text!r}.")
    text = " ".join(text.split())
    if len(text) > MAX_CHARACTERS:
        raise StackError(
            f"stack: the expression has {len(text)} characters; at most {MAX_CHARACTERS} are read."
        )
    for column, character in enumerate(text):
        if not character.isascii():
            fail(text, Span(column, column + 1), f"only ASCII is read here, got {character!r}.")
    try:
        tree = syntax_tree(text)
    except SyntaxError as error:
        column = (error.offset or 1) - 1
        end = (error.end_offset or 0) - 1
        fail(text, Span(column, max(end, column + 1)), f"cannot be read: {error.msg}.")
    except (RecursionError, MemoryError, ValueError) as error:
        raise StackError(f"stack: cannot be read: {error or type(error).__name__}.") from None
    reader = _Reader(text, dict(variables or {}))
    root = reader.node(tree, depth=0)
    return Stack(text, root, frozenset(reader.used))


def steps(node: Node) -> int:
    """How many calls (blocks and items, bodies included) the expression expands to; a Python int >= 1."""
    match node:
        case Call():
            return 1 + (steps(node.body) if node.body is not None else 0)
        case Sequence():
            return sum(map(steps, node.parts))
        case Repeat():
            return node.times * steps(node.body)


class _Reader:
    """Turns Python's syntax tree into ours, or points at what is not of the grammar."""

    def __init__(self, text: str, variables: dict[str, int | float]):
        self.text = text
        self.variables = variables
        self.used: set[str] = set()

    def fail(self, tree: ast.AST, message: str) -> NoReturn:
        fail(self.text, _span(tree), message)

    def node(self, tree: ast.AST, depth: int) -> Node:
        if depth > MAX_NESTING:
            self.fail(tree, f"nests deeper than {MAX_NESTING}.")
        match tree:
            case ast.BinOp(op=ast.Add()):
                return self.sequence(tree, depth)
            case ast.BinOp(op=ast.Mult(), left=left, right=right):
                body = self.node(left, depth + 1)
                times = self.times(right)
                found = Repeat(body, times, _span(tree))
                if steps(found) > MAX_STEPS:
                    self.fail(tree, f"expands to {steps(found)} steps; at most {MAX_STEPS} are built.")
                return found
            case ast.Name() | ast.Call():
                return self.call(tree, depth)
            case ast.Constant():
                self.fail(tree, f"expected an item, got {tree.value!r}; a repetition is written 'block*4'.")
            case ast.BinOp():
                self.fail(tree, "only '+' (sequence) and '*' (repetition) join items.")
            case _:
                self.fail(tree, "expected an item such as block, keep(0.5) or skip(keep=0.5)(block).")

    def sequence(self, tree: ast.BinOp, depth: int) -> Sequence:
        # `a + b + c` parses to the left; walk it in a loop, so that a long sum is not a deep one.
        parts: list[ast.AST] = []
        rest: ast.AST = tree
        while isinstance(rest, ast.BinOp) and isinstance(rest.op, ast.Add):
            parts.append(rest.right)
            rest = rest.left
        parts.append(rest)
        found = Sequence(tuple(self.node(part, depth + 1) for part in reversed(parts)), _span(tree))
        if steps(found) > MAX_STEPS:
            self.fail(tree, f"expands to {steps(found)} steps; at most {MAX_STEPS} are built.")
        return found

    def times(self, tree: ast.AST) -> int:
        value = self.value(tree, depth=0)
        if isinstance(value, Call):
            self.fail(
                tree, f"expected a whole number of repetitions, got the name {value.name!r}{self.hint(value)}"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value:
            self.fail(tree, f"expected a whole number of repetitions >= 1, got {value!r}.")
        if value > MAX_STEPS:
            self.fail(tree, f"repeats {value} times; at most {MAX_STEPS} steps are built.")
        return value

    def hint(self, value: Call) -> str:
        return f"; give it a number with stack_vars.{value.name}."

    def call(self, tree: ast.AST, depth: int) -> Call:
        """`name`, `name(arguments)`, or `name(arguments)(body)`."""
        match tree:
            case ast.Name(id=name):
                if name in self.variables:
                    self.fail(tree, f"{name!r} is a number (stack_vars.{name}); expected an item here.")
                return Call(name, span=_span(tree))
            case ast.Call(func=ast.Name(id=name)):
                args, kwargs = self.arguments(tree, depth)
                return Call(name, args, kwargs, span=_span(tree))
            case ast.Call(func=ast.Call(func=ast.Name())):
                outer = self.call(tree.func, depth)
                bodies = [*tree.args, *(k.value for k in tree.keywords)]
                if len(bodies) != 1 or tree.keywords or isinstance(bodies[0], ast.Starred):
                    self.fail(
                        tree,
                        f"{outer.name} wraps exactly one body, got {len(bodies)}; join the parts with '+'.",
                    )
                body = self.node(tree.args[0], depth + 1)
                return Call(outer.name, outer.args, outer.kwargs, body, _span(tree))
            case ast.Call(func=ast.Call()):
                self.fail(tree, "a body is given once; nest wrappers instead: outer()(inner()(block)).")
            case _:
                self.fail(tree, "expected a name before '('.")

    def arguments(
        self, tree: ast.Call, depth: int
    ) -> tuple[tuple[Value, ...], tuple[tuple[str, Value], ...]]:
        args = []
        for argument in tree.args:
            if isinstance(argument, ast.Starred):
                self.fail(argument, "'*' does not unpack here.")
            args.append(self.value(argument, depth + 1))
        kwargs: dict[str, Value] = {}
        for keyword in tree.keywords:
            if keyword.arg is None:
                self.fail(keyword.value, "'**' does not unpack here.")
            if keyword.arg in kwargs:  # Python's own parser lets this pass in mode "eval"
                self.fail(keyword, f"{keyword.arg!r} is given twice.")
            kwargs[keyword.arg] = self.value(keyword.value, depth + 1)
        return tuple(args), tuple(kwargs.items())

    def value(self, tree: ast.AST, depth: int) -> Value:
        """A number, a bool, None, a variable's number, or a named thing such as `cls` or `soft_moe(experts=8)`."""
        if depth > MAX_NESTING:
            self.fail(tree, f"nests deeper than {MAX_NESTING}.")
        match tree:
            case ast.Constant(value=bool() | int() | float() | None):
                return tree.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.Name(id=name) if name in self.variables:
                self.used.add(name)
                return self.variables[name]
            case ast.Name(id=name):
                return Call(name, span=_span(tree))
            case ast.Call(func=ast.Name()):
                return self.call(tree, depth)
            case ast.Constant(value=str() as word):
                self.fail(tree, f"names stand bare here: write {word.strip() or 'a name'}, without quotes.")
            case _:
                self.fail(tree, "expected a number, a name, or a name with arguments.")


def _show(value: Value) -> str:
    return str(value) if isinstance(value, Call) else repr(value)


def _span(tree: ast.AST) -> Span:
    return Span(getattr(tree, "col_offset", 0), getattr(tree, "end_col_offset", 0) or 0)
