"""Text for language models: tokenizers, packing, the source that makes examples of documents, an n-gram baseline."""

from __future__ import annotations

from tokenlab.data.text.source import TextConfig, TextSource, Vocabulary
from tokenlab.data.text.tokenizer import ByteTokenizer, Decoder, HuggingFaceTokenizer, Tokenizer

__all__ = [
    "ByteTokenizer",
    "Decoder",
    "HuggingFaceTokenizer",
    "TextConfig",
    "TextSource",
    "Tokenizer",
    "Vocabulary",
]
