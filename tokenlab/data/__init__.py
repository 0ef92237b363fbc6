"""Data: sources by name, transforms, and the pipeline that makes batches of them as a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenlab.core import config as core_config
from tokenlab.core import names
from tokenlab.data.dataset import Dataset
from tokenlab.data.image_text import (
    ImageTextConfig,
    ImageTextSource,
    ImageTextVocabulary,
    WithoutExamples,
    saved,
)
from tokenlab.data.loader import Prefetch
from tokenlab.data.pipeline import TrainStream, eval_batches, num_eval_batches
from tokenlab.data.source import (
    ArrayRecords,
    ArraySource,
    Batch,
    DataConfig,
    Records,
    Source,
    Spec,
    check_name,
)
from tokenlab.data.splits import sliced
from tokenlab.data.text import TextConfig, TextSource, Tokenizer, Vocabulary
from tokenlab.data.transform import Transform

__all__ = [
    "ArrayRecords",
    "ArraySource",
    "Batch",
    "DataConfig",
    "Dataset",
    "ImageTextConfig",
    "ImageTextSource",
    "ImageTextVocabulary",
    "Prefetch",
    "Records",
    "Source",
    "Spec",
    "TextConfig",
    "TextSource",
    "Tokenizer",
    "TrainStream",
    "Transform",
    "Vocabulary",
    "build",
    "eval_batches",
    "num_eval_batches",
    "resolve",
    "sliced",
    "source_of",
    "without_examples",
]

SOURCES = "tokenlab.data.sources"


def resolve(config: Mapping[str, Any]) -> DataConfig:
    """`config.data` as the frozen `Config` of the source it names, with defaults for what is not given.

    Raises:
      ConfigError: a key is unknown to that source, or a value has the wrong type.
      NameLookupError: there is no such source.
    """
    name = config.get("name", DataConfig.name)
    check_name(name, names.list_modules(SOURCES), "config.data.name")
    return core_config.to_dataclass(names.find_attr(SOURCES, name, "Config"), config, path="config.data")


def source_of(config: Mapping[str, Any]) -> Source:
    """The records that `config.data` names, with the splits it makes of them; nothing is done to images.

    Raises:
      ConfigError, NameLookupError: as `resolve`.
      DataError: the source cannot be read, or `config.data.splits` does not fit it.
    """
    resolved = resolve(config)
    source: Source = names.find_attr(SOURCES, resolved.name, "build")(resolved)
    return sliced(source, resolved.splits)


def without_examples(config: Mapping[str, Any]) -> Any:
    """What a model must know of the data: of text `name`, `spec`, `tokenizer` and `vocab_size`, and no file is read.

    So it is of pictures and text whose vocabulary a run has kept. Other data, and text whose tokenizer is yet to be
    trained on it, are built.

    Raises: as `build`.
    """
    resolved = resolve(config)
    if isinstance(resolved, TextConfig) and not resolved.tokenizer.startswith("bpe("):
        return Vocabulary(resolved)
    if isinstance(resolved, ImageTextConfig) and (kept := saved(resolved.tokenizer)):
        return WithoutExamples(resolved, kept)
    return build(config)


def build(config: Mapping[str, Any]) -> Dataset:
    """The examples that `config.data` describes.

    Raises:
      ConfigError, NameLookupError, DataError: as `source_of`, or a transform does not fit the images.
    """
    return Dataset(source_of(config), resolve(config))
