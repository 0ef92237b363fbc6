"""What is done to an image, in one line: "decode|random_resized_crop(192)|flip_lr|value_range(-1, 1)".

Operations run from left to right. The text is parsed with `ast` and never evaluated, as a stack is. What happens to an
image depends on (seed, step, row in the global batch) alone, so a process that holds some of the rows changes them as
one process would that holds them all, and a run that goes on repeats nothing and leaves nothing out.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from tokenlab.core.errors import DataError, suggest
from tokenlab.core.stack import syntax_tree
from tokenlab.data import operations, pixels
from tokenlab.data.operations import Decode, Operation
from tokenlab.data.randaugment import RandAugment
from tokenlab.data.source import ENCODED, Spec

MAX_CHARACTERS = 1_000

IMAGE = "image"
"""The key that a transform changes."""

OPERATIONS: Mapping[str, type[Operation]] = {
    "decode": Decode,
    "resize": operations.Resize,
    "resize_small": operations.ResizeSmall,
    "central_crop": operations.CentralCrop,
    "random_crop": operations.RandomCrop,
    "random_resized_crop": operations.RandomResizedCrop,
    "flip_lr": operations.FlipLR,
    "shift": operations.Shift,
    "rotate": operations.Rotate,
    "scale": operations.Scale,
    "randaugment": RandAugment,
    "value_range": operations.ValueRange,
    "normalize": operations.Normalize,
}


class Transform:
    """A parsed transform text for the images of a source.

    Args:
      text: operations joined by "|"; "" changes nothing.
      spec: of the source's records; a text that is not empty needs a key "image".
      key: of the configuration, for messages.

    Attributes:
      text: as given.
      spec: of what comes out.
      draws: random numbers needed for each image.
      decodes: the first operation is `decode`.

    Raises:
      DataError: the text is not of this form, an operation or parameter is unknown or out of range, or an operation
        cannot take what comes to it. The message has a caret under the place.
    """

    def __init__(self, text: str, spec: Spec, *, key: str = "transform"):
        self.text = text
        steps = parse(text, key=key)
        self._operations = tuple(operation for operation, _, _ in steps)
        self.draws = sum(operation.random for operation in self._operations)
        self.decodes = bool(steps) and isinstance(self._operations[0], Decode)
        self.spec = dict(spec)
        if steps and IMAGE not in spec:
            raise DataError(f"{key} {text!r} needs an image; the data has {', '.join(sorted(spec))}")
        for operation, start, end in steps:
            try:
                self.spec[IMAGE] = operation.after(self.spec[IMAGE])
            except DataError as error:
                _fail(key, text.strip(), start, end, str(error))
        self._shape = spec[IMAGE][0] if IMAGE in spec else ()

    @property
    def value_range(self) -> tuple[float, float] | None:
        """(low, high) where the last operation is `value_range`; None where something else decides what values mean."""
        last = self._operations[-1] if self._operations else None
        return (float(last.low), float(last.high)) if isinstance(last, operations.ValueRange) else None

    def decode(self, data: bytes) -> np.ndarray:
        """The first operation alone: uint8 [R, C, channels]. Raises DataError, see `pixels.decode`."""
        return pixels.decode(data, self._shape)

    def __call__(self, image: Any, draws: np.ndarray | None, *, decoded: bool = False) -> np.ndarray:
        """One image, changed.

        Args:
          image: what the source gives: bytes or an array [R, C, channels].
          draws: float32 [self.draws] in [0, 1); None where nothing is random.
          decoded: `image` has been through `decode`.

        Raises:
          DataError: it cannot be decoded, or is too small for an operation.
        """
        place = 0
        for operation in self._operations:
            if isinstance(operation, Decode):
                image = image if decoded else self.decode(image)
                continue
            count = operation.random
            image = operation(image, draws[place : place + count] if count else _NONE)
            place += count
        return image


_NONE = np.zeros(0, np.float32)


def default(spec: Spec) -> str:
    """The transform that images of a source need and nothing more: decoding, and float32 values in [-1, 1]."""
    dtype = spec[IMAGE][1] if IMAGE in spec else ""
    return {ENCODED: "decode|value_range(-1, 1)", "uint8": "value_range(-1, 1)"}.get(dtype, "")


def parse(text: str, *, key: str = "transform") -> list[tuple[Operation, int, int]]:
    """The operations of a text in order, each with where it stands: (operation, first character, last + 1).

    Raises:
      DataError: with a caret under the place that is wrong.
    """
    if len(text) > MAX_CHARACTERS or not text.isascii():
        raise DataError(f"{key} has {len(text)} characters; expected at most {MAX_CHARACTERS}, plain ASCII")
    if "\n" in text:
        raise DataError(f"{key} {text!r} has a line break; expected one line")
    text = text.strip()
    if not text:
        return []
    try:
        tree = syntax_tree(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = (getattr(error, "offset", None) or 1) - 1
        _fail(key, text, column, column + 1, 'not of the form "name(number)|name(number)"')
    nodes: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        nodes.append(tree.right)
        tree = tree.left
    return [_operation(key, text, node) for node in [tree, *reversed(nodes)]]


def _operation(key: str, text: str, node: ast.expr) -> tuple[Operation, int, int]:
    start, end = node.col_offset, node.end_col_offset or node.col_offset
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        _fail(key, text, start, end, 'expected an operation such as "resize(224)"')
    name = node.func.id
    if name not in OPERATIONS:
        _fail(key, text, start, start + len(name), f"unknown operation {name!r}.{suggest(name, OPERATIONS)}")
    positional = [_value(key, text, value) for value in node.args]
    named = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in named:
            place = keyword.col_offset
            _fail(key, text, place, place + 1, f"{name} takes each parameter once, by its name")
        named[keyword.arg] = _value(key, text, keyword.value)
    signature = inspect.signature(OPERATIONS[name])
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        usage = ", ".join(map(_usage, signature.parameters.values()))
        _fail(key, text, start, end, f"{error}; expected {name}({usage})")
    for parameter, value in signature.bind(*positional, **named).arguments.items():
        if isinstance(value, str) and "str" not in str(signature.parameters[parameter].annotation):
            _fail(key, text, start, end, f"{name} has {parameter}={value}; expected a number")
    try:
        return OPERATIONS[name](*positional, **named), start, end
    except DataError as error:
        _fail(key, text, start, end, str(error))


def _usage(parameter: inspect.Parameter) -> str:
    if parameter.default is None:  # which nobody can give
        return f"[{parameter.name}]"
    return parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default}"


def _value(key: str, text: str, node: ast.expr) -> int | float | str:
    if isinstance(node, ast.Name):
        return node.id
    sign, value = 1, node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, value = -1, node.operand
    if (
        not isinstance(value, ast.Constant)
        or type(value.value) not in (int, float)
        or not abs(value.value) <= sys.float_info.max  # of ints too large for a float math.isfinite raises
    ):
        _fail(
            key,
            text,
            node.col_offset,
            node.end_col_offset or node.col_offset,
            "expected a finite number or a name",
        )
    return sign * value.value


def _fail(key: str, text: str, start: int, end: int, message: str) -> NoReturn:
    start = min(start, len(text))
    mark = " " * start + "^" * max(1, min(end, len(text)) - start)
    raise DataError(f"{key}: {message}\n  {text}\n  {mark}")
