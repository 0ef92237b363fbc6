"""Patterns of paths: one character is special."""

from __future__ import annotations

import pytest

from tokenlab.core.patterns import fits


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("head/kernel", "head/kernel", True),
        ("head/kernel", "head", False),
        ("head/kernel", "head/*", True),
        ("head/kernel", "*kernel", True),
        ("blocks/mlp/up/kernel", "blocks/*/kernel", True),
        ("blocks/mlp/up/kernel", "*/up/*", True),
        ("blocks/mlp/up/kernel", "mlp/*", False),
        ("head/kernel", "hea?/kernel", False),
        ("head/kernel", "hea[d]/kernel", False),
        ("head/kernel", "head.kernel", False),
        ("a[0]?", "a[0]?", True),
        ("", "*", True),
    ],
)
def test_only_the_asterisk_is_special(path: str, pattern: str, expected: bool) -> None:
    assert fits(path, pattern) is expected
