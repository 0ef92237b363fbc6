"""Tiny Shakespeare, 1.1 MB from the plays; it comes with the package, so no network is needed.

The splits are those of TFDS's `tiny_shakespeare`: the first 90 % of the characters for training, 5 % for validation and
5 % for the test, each one document. The text is in the public domain.

Source: Karpathy, char-rnn, 2015, github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt.
"""

from __future__ import annotations

import functools
import lzma
from dataclasses import dataclass
from pathlib import Path

from tokenlab.data.text import TextConfig, TextSource

FILE = Path(__file__).parent.parent / "assets" / "tiny_shakespeare.txt.xz"
SPLITS = {"train": 1_003_854, "validation": 55_770, "test": 55_770}
"""Characters, each a byte, of each split; they follow one another in the file."""


@dataclass(frozen=True)
class Config(TextConfig):
    """Tiny Shakespeare has no options but those of every text."""


def build(config: Config) -> TextSource:
    """The plays, one document a split."""
    return TextSource("shakespeare", {split: [text] for split, text in texts().items()}, config)


@functools.cache
def texts() -> dict[str, str]:
    """The text of each split."""
    text = lzma.decompress(FILE.read_bytes()).decode("ascii")
    found, start = {}, 0
    for split, size in SPLITS.items():
        found[split] = text[start : start + size]
        start += size
    return found
