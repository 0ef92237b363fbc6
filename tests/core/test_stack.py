"""The stack grammar: what it reads, what it refuses, and where the caret points."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import StackError
from tokenlab.core.stack import MAX_STEPS, Call, Repeat, Sequence, Span, parse, steps


@pytest.mark.parametrize(
    "text",
    [
        "block*12",
        "block*4 + keep(0.5, by=cls) + block*8",
        "block + skip(keep=0.5, by=random)(block)*10 + block",
        "block*2 + skip(keep=0.25, fuse=linear)(block*20) + block*2",
        "(block + mod(keep=0.125)(block))*6",
        "block*6 + block(ffn=soft_moe(experts=128))*6",
        "block(between=merge(8))*12",
        "f(-1, None, True, x=2.5)",
        "outer()(inner()(block))",
    ],
)
def test_canonical_spelling_reads_back(text):
    stack = parse(text)
    assert str(stack) == text
    assert parse(str(stack)).root == stack.root


def test_tree():
    root = parse("a + b(1, x=c)*2").root
    assert root == Sequence((Call("a"), Repeat(Call("b", (1,), (("x", Call("c")),)), 2)))
    assert steps(root) == 3
    assert steps(parse("skip(keep=0.5)(block*3)*2").root) == 8


def test_variables_become_numbers_and_are_counted():
    stack = parse("block*d + keep(k) + block", {"k": 0.5, "d": 3, "unused": 1})
    assert str(stack) == "block*3 + keep(0.5) + block"
    assert stack.used == {"k", "d"}


def test_line_breaks_count_as_blanks():
    assert str(parse("(block*4\n  + keep(0.5)\n  + block*8)")) == "block*4 + keep(0.5) + block*8"


# Each wrong text, the words of the message, and the columns under the caret.
WRONG = [
    ("block*4 + kee p(0.5)", "cannot be read", 14, None),
    ("block**2", "only '+'", 0, 8),
    ("block - keep(1)", "only '+'", 0, 15),
    ("4*block", "a repetition is written 'block*4'", 0, 1),
    ("block*0", ">= 1, got 0", 6, 7),
    ("block*1.5", ">= 1, got 1.5", 6, 9),
    ("block*True", ">= 1, got True", 6, 10),
    ("block*n", "stack_vars.n", 6, 7),
    ("block*99999", f"at most {MAX_STEPS}", 6, 11),
    ("block*4 + 3", "expected an item, got 3", 10, 11),
    ("skip(keep=0.5)(block, block)", "exactly one body, got 2", 0, 28),
    ("skip(keep=0.5)()", "exactly one body, got 0", 0, 16),
    ("skip(keep=0.5)(body=block)", "exactly one body", 0, 26),
    ("keep(0.5)(a)(b)", "a body is given once", 0, 15),
    ("keep('cls')", "write cls, without quotes", 5, 10),
    ("keep(*k)", "does not unpack", 5, 7),
    ("keep(**k)", "does not unpack", 7, 8),
    ("keep(x=1, x=2)", "given twice", None, None),
    ("keep([1])", "expected a number, a name", 5, 8),
    ("lambda: 1", "expected an item such as", 0, 9),
    ("a.b", "expected an item such as", 0, 3),
    ("block + __import__('os').system('x')", "expected a name before '('", 8, 36),
    ("bl\u00f6ck", "only ASCII", 2, 3),
    ("k", "is a number (stack_vars.k)", 0, 1),
]


@pytest.mark.parametrize(("text", "words", "start", "end"), WRONG)
def test_wrong_text_is_pointed_at(text, words, start, end):
    with pytest.raises(StackError) as caught:
        parse(text, {"k": 0.5})
    lines = str(caught.value).splitlines()
    assert words in lines[0] and lines[0].startswith("stack: ") and len(lines) == 3
    assert lines[1] == "  " + text
    if start is not None:
        assert lines[2].index("^") == start + 2
    if end is not None:
        assert lines[2] == "  " + " " * start + "^" * (end - start)


@pytest.mark.parametrize("text", ["", "   ", None, 12])
def test_nothing_to_read(text):
    with pytest.raises(StackError, match="expected an expression"):
        parse(text)


def test_limits():
    with pytest.raises(StackError, match="characters"):
        parse("block + " * 1000 + "block")
    with pytest.raises(StackError, match="at most 2000 are built"):
        parse("((block*20)*20)*20")
    with pytest.raises(StackError, match="nests deeper"):
        parse("f()(" * 17 + "block" + ")" * 17)
    with pytest.raises(StackError):
        parse("(" * 3000 + "block" + ")" * 3000)
    assert steps(parse("block + " * 400 + "block").root) == 401  # long is not deep


def test_caret_stays_in_view_of_long_expressions():
    stack = parse("block + " * 60 + "keep(0.5)")
    at = stack.text.index("keep")
    with pytest.raises(StackError) as caught:
        stack.fail(Span(at, at + 9), "no.")
    _, shown, caret = str(caught.value).splitlines()
    assert len(shown) < 130
    assert shown[caret.index("^") :].startswith("keep(0.5)")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="abk0159.()*+=, -'[]", max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        stack = parse(text)
    except StackError:
        return
    assert parse(str(stack)).root == stack.root


def test_python_is_not_heard() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(StackError):
            parse("keep(1or 2)")
    assert not heard
