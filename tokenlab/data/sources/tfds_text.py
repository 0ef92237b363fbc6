"""The texts of a prepared TFDS set with array_record files, read without TensorFlow; a record is a document.

config.data = {"name": "tfds_text", "dataset": "tiny_shakespeare", "tokenizer": "bytes"}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tokenlab.core.errors import DataError, suggest
from tokenlab.data import prepared
from tokenlab.data.source import ENCODED
from tokenlab.data.sources import tfds
from tokenlab.data.text import TextConfig, TextSource

_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class Config(TextConfig):
    """The texts of a prepared TFDS set.

    Attributes:
      dataset: as of the source `tfds`: "tiny_shakespeare", "name:1.0.0", "name/config", or the folder of a set.
      data_dir: folder of prepared sets; None for the environment's TFDS_DATA_DIR, else TFDS's own default.
      text_key: which feature is the text; needed only where there are several.
    """

    dataset: str
    data_dir: str | None = None
    text_key: str | None = None


def build(config: Config) -> TextSource:
    """The documents of the set that `config.dataset` names, in its own splits.

    Raises:
      DataError: it is not there, its records are in another format, it holds no text, or a record cannot be read.
    """
    found = prepared.find(config.dataset, config.data_dir)
    if prepared.FORMAT not in found.file_formats:
        raise DataError(prepared.convert_hint(found))
    key = _key(found, config.text_key)
    documents = {split: list(_documents(found, split, key)) for split in found.splits}
    return TextSource(found.name, documents, config)


def texts(found: prepared.Prepared) -> list[str]:
    """The features of a set that are texts."""
    return [
        key
        for key, feature in found.features.items()
        if feature.kind == "text"
        or (feature.kind == "tensor" and feature.dtype == "string" and not feature.shape)
    ]


def _key(found: prepared.Prepared, given: str | None) -> str:
    """The feature that is the text."""
    where = f"TFDS set {found.name!r} {found.version}"
    listed = ", ".join(f"{key} ({feature})" for key, feature in found.features.items()) or "none"
    keys = texts(found)
    if given is not None:
        if given not in keys:
            raise DataError(f"{where} has no text {given!r}.{suggest(given, keys)} Its features: {listed}.")
        return given
    if len(keys) != 1:
        what = f"several texts: {', '.join(keys)}; set config.data.text_key" if keys else "no text"
        raise DataError(f"{where} holds {what}. Its features: {listed}.")
    return keys[0]


def _documents(found: prepared.Prepared, split: str, key: str) -> Iterator[str]:
    where = f"{found.name!r}, split {split!r}"
    records = tfds.TfdsRecords(where, found.splits[split], {key: tfds.Field(key, "bytes", (), ENCODED)})
    total = len(records) if found.splits[split] else 0
    for first in range(0, total, _CHUNK):
        contents = records.batch(np.arange(first, min(first + _CHUNK, total)))[key]
        for number, content in enumerate(contents, first):
            try:
                yield content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"TFDS set {where}: record {number} is no UTF-8: byte {error.start} is "
                    f"0x{content[error.start]:02x} ({error.reason})."
                ) from None
