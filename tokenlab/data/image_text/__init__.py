"""Early fusion: pictures as codes among text, in rows with a fixed number of each."""

from __future__ import annotations

from tokenlab.data.image_text.codec import Coded, Grey, Pixels, encode
from tokenlab.data.image_text.pairs import Pair, pairs
from tokenlab.data.image_text.source import (
    Document,
    ImageTextConfig,
    ImageTextSource,
    WithoutExamples,
    documents,
)
from tokenlab.data.image_text.vocabulary import ImageTextVocabulary, saved

__all__ = [
    "Coded",
    "Document",
    "Grey",
    "ImageTextConfig",
    "ImageTextSource",
    "ImageTextVocabulary",
    "Pair",
    "Pixels",
    "WithoutExamples",
    "documents",
    "encode",
    "pairs",
    "saved",
]
