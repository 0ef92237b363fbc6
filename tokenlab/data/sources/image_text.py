"""Pictures as codes with captions, and text between them, in rows for early-fusion models; digits with Shakespeare.

A picture is the codes that `config.data.codec` makes of it, between two delimiters, before or behind its caption; every
picture is there in both orders. Rows hold `pictures_per_row` of them and are filled with text, so that each has the
same number of codes and of other tokens. Emoji and Fashion-MNIST with their names, and other texts, are options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tokenlab.core import config as core_config
from tokenlab.core import names
from tokenlab.data.image_text import ImageTextConfig, ImageTextSource, encode
from tokenlab.data.image_text.rows import Draw, words
from tokenlab.data.source import Source
from tokenlab.data.sources import shakespeare, text
from tokenlab.data.splits import sliced

SOURCES = "tokenlab.data.sources"
PICTURES: Mapping[str, Mapping[str, Any]] = {
    "digits": {"name": "digits"},
    "emoji": {"name": "emoji"},
    "fashion_mnist": {
        "name": "tfds",
        "dataset": "fashion_mnist",
        "splits": {"train": "train[:-5000]", "validation": "train[-5000:]", "test": "test"},
    },
}
"""`config.data` of the pictures; a tokenizer that is trained on them has to read the same."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES: Mapping[str, tuple[str, ...]] = {
    "digits": ("{}", "the digit {}", "a handwritten {}", "number {}"),
    "fashion_mnist": ("{}",),
}
"""Captions of a class, of which a draw for each picture takes one."""

SHAKESPEARE = "shakespeare"


@dataclass(frozen=True)
class Config(ImageTextConfig):
    """Pictures and text.

    Attributes:
      pictures: "digits" (captions such as "the digit seven"), "emoji" (their names) or "fashion_mnist" (the classes;
        read from where `tfds` finds them).
      size: rows and columns of a picture: 64, 32 or 16 for emoji; for grey levels of others any that is not larger
        than they are. None leaves them as they are.
      text: what stands between them: "shakespeare", or patterns of files as `config.data.files` of the source `text`.
    """

    pictures: Literal["digits", "emoji", "fashion_mnist"] = "digits"
    size: int | None = None
    text: str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]] = SHAKESPEARE


def build(config: Config) -> ImageTextSource:
    """The rows that `config` describes.

    Raises:
      ConfigError: a size, a codec or a length that does not fit the pictures.
      DataError: pictures, codes or texts cannot be read, or do not fit each other.
    """
    source = _pictures(config)
    coded = encode(config.codec, source, config.size)
    captions = {split: captions_of(config.pictures, source, split) for split in source.splits}
    name, texts = SHAKESPEARE, {split: [whole] for split, whole in shakespeare.texts().items()}
    if config.text != SHAKESPEARE:
        name, texts = text.documents(text.Config(files=config.text))
    return ImageTextSource(f"{config.pictures} and {name}", coded, captions, texts, config)


def _pictures(config: Config) -> Source:
    """The pictures; emoji have the size already, others are brought to it when they are encoded."""
    settings = dict(PICTURES[config.pictures])
    cls = names.find_attr(SOURCES, settings["name"], "Config")
    if config.pictures == "emoji" and config.size is not None:
        settings["size"] = config.size
    resolved = core_config.to_dataclass(cls, settings, path="config.data")
    found = names.find_attr(SOURCES, resolved.name, "build")(resolved)
    return sliced(found, resolved.splits)


def captions_of(pictures: str, source: Source, split: str) -> tuple[str, ...]:
    """The caption of each picture of a split, in its order.

    Args:
      pictures: a key of `PICTURES`.
      source: of them.
      split: of the source.
    """
    if pictures not in PHRASES:
        return source.captions(split)  # type: ignore[attr-defined]
    count = source.splits[split]
    classes = DIGITS if pictures == "digits" else source.class_names
    labels = source.split(split).batch(np.arange(count))["label"]
    phrases = words(Draw.PHRASE, count) % np.uint64(len(PHRASES[pictures]))
    return tuple(
        PHRASES[pictures][int(phrase)].format(classes[int(label)])
        for phrase, label in zip(phrases, labels, strict=True)
    )
