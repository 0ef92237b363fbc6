"""The sources of the Python standard library as text, a module a document; no network is needed.

What it holds is said in `tokenlab.data.text.stdlib`: 8 of 10 modules are for training, and two versions of Python have
two data sets. On Python 3.11 it is 4.1 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenlab.data.text import TextConfig, TextSource, stdlib


@dataclass(frozen=True)
class Config(TextConfig):
    """The Python standard library has no options but those of every text."""


def build(config: Config) -> TextSource:
    """The modules, one document each. Raises DataError where Python is installed without its sources."""
    documents = {split: list(found.values()) for split, found in stdlib.modules().items()}
    return TextSource("python_text", documents, config)
