"""Labelled sentences and pairs from the sources of the Python standard library; no network is needed.

    kind="line"    is a line one of a docstring, or one of code?
    kind="pair"    does this docstring belong to this function? Half of the pairs are two that do, half a function with
                   the docstring of another one of the same split

Classes are equally frequent, and no module is in two splits, so that test lines are of modules nobody has seen. What
the text is, is said in `tokenlab.data.text.stdlib`: real text, but of the version of Python that runs. Neither task is
a known benchmark: a line of code is told from prose by its brackets, so an accuracy near 1 says little, and a pair asks
for shared words first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenlab.core.errors import ConfigError
from tokenlab.data.draws import Purpose, permutation
from tokenlab.data.text import stdlib
from tokenlab.data.text.sentences import Sentence, SentenceConfig, SentenceSource

SEED = 0
"""Of the order and of who is paired with whom: the same in every run."""

CLASSES = {"line": ("code", "docstring"), "pair": ("of another", "its own")}


@dataclass(frozen=True)
class Config(SentenceConfig):
    """Sentences of the Python standard library.

    Attributes:
      kind: "line" or "pair", see the module.
      examples: of the train split at most, at least 8; None for all. The other splits are whole.
    """

    kind: Literal["line", "pair"] = "line"
    examples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples is not None and self.examples < 8:
            raise ConfigError(f"config.data.examples is {self.examples}; expected at least 8, or None.")


def build(config: Config) -> SentenceSource:
    """The sentences. Raises DataError where Python is installed without its sources."""
    make = _lines if config.kind == "line" else _pairs
    sentences = {}
    for number, split in enumerate(stdlib.SHARES):
        most = config.examples if split == "train" else None
        sentences[split] = make(split, number, most)
    return SentenceSource(f"python_sentences {config.kind}", sentences, CLASSES[config.kind], config)


def _lines(split: str, number: int, most: int | None) -> list[Sentence]:
    prose, code = stdlib.lines(split)
    each = min(len(prose), len(code), *([] if most is None else [most // 2]))
    chosen = [
        [texts[i] for i in permutation(SEED, Purpose.SPLIT, 2 * number + label, len(texts))[:each]]
        for label, texts in enumerate((code, prose))
    ]
    return [
        Sentence(text, None, label) for both in zip(*chosen, strict=True) for label, text in enumerate(both)
    ]


def _pairs(split: str, number: int, most: int | None) -> list[Sentence]:
    found = stdlib.functions(split)
    order = permutation(SEED, Purpose.SPLIT, 8 + number, len(found)).tolist()
    order = order[: len(order) // 2 * 2 if most is None else most // 2 * 2]
    sentences = []
    # Every second function keeps its docstring; the others pass theirs on among themselves.
    others = order[1::2]
    for own, other, giver in zip(order[::2], others, [*others[1:], others[0]], strict=True):
        sentences.append(Sentence(found[own].signature, found[own].docstring, 1))
        sentences.append(Sentence(found[other].signature, found[giver].docstring, 0))
    return sentences
