"""Data: sources by name, augmentation, and the pipeline that makes batches of them as a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenlab.core import config as core_config
from tokenlab.core import names
from tokenlab.data.augment import Augment
from tokenlab.data.pipeline import Prefetch, TrainStream, eval_batches, num_eval_batches
from tokenlab.data.source import ArrayRecords, ArraySource, Batch, DataConfig, Records, Source, Spec

__all__ = [
    "ArrayRecords",
    "ArraySource",
    "Augment",
    "Batch",
    "DataConfig",
    "Prefetch",
    "Records",
    "Source",
    "Spec",
    "TrainStream",
    "build",
    "eval_batches",
    "num_eval_batches",
    "resolve",
]

SOURCES = "tokenlab.data.sources"


def resolve(config: Mapping[str, Any]) -> DataConfig:
    """`config.data` as the frozen `Config` of the source it names, with defaults for what is not given.

    Raises:
      ConfigError: a key is unknown to that source, or a value has the wrong type.
      NameLookupError: there is no such source.
    """
    name = config.get("name", DataConfig.name)
    return core_config.to_dataclass(names.find_attr(SOURCES, name, "Config"), config, path="config.data")


def build(config: Mapping[str, Any]) -> Source:
    """The source that `config.data` names.

    Raises:
      ConfigError, NameLookupError: as `resolve`.
      DataError: the source cannot be read, or `config.data.augment` does not fit it.
    """
    resolved = resolve(config)
    source: Source = names.find_attr(SOURCES, resolved.name, "build")(resolved)
    Augment(resolved.augment, source.spec)
    return source
