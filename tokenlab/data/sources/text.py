"""Text files: .txt, and .jsonl with a document a line, also .gz and .xz; the splits by pattern, or by a share of each.

    config.data.files = "books/**/*.txt"                                       shares of the documents
    config.data.files = {"train": "train/*.jsonl.xz", "validation": "dev.txt"}  a pattern for each split

Files are read in the order of their names, UTF-8 and nothing else, and taken as they are.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import lzma
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data.text import TextConfig, TextSource

FRACTIONS = {"train": 0.9, "validation": 0.05, "test": 0.05}
KINDS = (".txt", ".jsonl")
PACKED = {".gz": gzip.decompress, ".xz": lzma.decompress}

Patterns = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Config(TextConfig):
    """Text files.

    Attributes:
      files: a pattern such as "books/**/*.txt", several, or one or several for each split.
      key: of a .jsonl file's objects, under which the text stands.
      split_on: cuts a .txt file into documents, which do not hold it: "\\n\\n" for paragraphs. None: a file is one.
      fractions: where `files` does not say the splits: the share of the documents for each, of 1 together; None is
        {"train": 0.9, "validation": 0.05, "test": 0.05}. A document's split depends on its text alone, so that two
        equal ones are in the same, and a set that grows keeps what it had where it was.
    """

    files: str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]]
    key: str = "text"
    split_on: str | None = None
    fractions: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split_on == "":
            raise ConfigError("config.data.split_on is ''; expected a text between documents, or None.")
        check_fractions(self.files, self.fractions)


def check_fractions(files: Any, fractions: Mapping[str, float] | None) -> None:
    """Raise a ConfigError where shares of the documents make no sense, beside such `files` or at all."""
    if fractions is None:
        return
    if isinstance(files, Mapping):
        raise ConfigError(
            "config.data.fractions is set, and config.data.files has a pattern for each split; leave one of them out."
        )
    given = dict(fractions)
    if not given or min(given.values()) <= 0 or not math.isclose(sum(given.values()), 1.0):
        raise ConfigError(
            f"config.data.fractions is {given}; expected shares > 0 that are 1 together, such as {FRACTIONS}."
        )


def build(config: Config) -> TextSource:
    """The documents of `config.files`.

    Raises:
      ConfigError: `split_on` is set and no file is a .txt.
      DataError: a pattern matches no file, a file is of another kind, cannot be read or is in two splits, or a split
        has no document.
    """
    name, found = documents(config)
    return TextSource(name, found, config)


def documents(config: Config) -> tuple[str, dict[str, list[str]]]:
    """A name for the documents of `config.files`, and the documents by split; raises as `build`."""
    by_split = isinstance(config.files, Mapping)
    patterns = dict(config.files) if by_split else {"": config.files}
    found = {split: files_of(split, given) for split, given in patterns.items()}
    check_files(found, KINDS, "text")
    every = [path for paths in found.values() for path in paths]
    if config.split_on is not None and not any(suffix_of(path) == ".txt" for path in every):
        raise ConfigError(
            "config.data.split_on is set, and no file is a .txt, which it would cut; a .jsonl has a document a line."
        )
    texts = {
        split: [text for path in paths for text in _documents(path, config)] for split, paths in found.items()
    }
    if not by_split:
        texts = shared_out(texts[""], config.fractions or FRACTIONS)
    return "text " + named([path for paths in found.values() for path in paths]), texts


def named(paths: Sequence[str]) -> str:
    """A name for several files: that of the first, and how many more there are."""
    names = sorted({Path(path).name for path in paths})
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def shared_out(documents: Sequence[str], fractions: Mapping[str, float]) -> dict[str, list[str]]:
    """Documents by split; which is decided by the SHA-256 of each.

    Raises:
      DataError: a split gets none.
    """
    found: dict[str, list[str]] = {split: [] for split in fractions}
    splits = list(fractions)
    ends = [sum(list(fractions.values())[: i + 1]) for i in range(len(splits))]
    for text in documents:
        if not text.strip():
            continue
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        found[
            next((split for split, end in zip(splits, ends, strict=True) if place < end), splits[-1])
        ].append(text)
    total = sum(map(len, found.values()))
    for split, texts in found.items():
        if not texts:
            raise DataError(
                f"split {split!r} gets none of {total} documents; expected more of them (config.data.split_on cuts a "
                "file), larger config.data.fractions, or a pattern for each split in config.data.files."
            )
    return found


def files_of(split: str, patterns: Patterns) -> list[str]:
    """The files that match, in the order of their names; `split` is for messages. Raises DataError where none does."""
    key = f"config.data.files.{split}" if split else "config.data.files"
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = [path for path in matched if os.path.isfile(path)]
        if not files:
            why = "matches only folders" if matched else "matches no file"
            raise DataError(
                f"{key}: {pattern!r} {why}; expected a pattern of files such as 'books/**/*.txt'."
            )
        found.update(map(os.path.normpath, files))
    if not found:
        raise DataError(f"{key} is empty; expected one or more patterns of files.")
    return sorted(found)


def check_files(found: Mapping[str, Sequence[str]], kinds: Sequence[str], what: str) -> None:
    """Raise a DataError where there is no file, one is of none of `kinds`, or one is in two splits."""
    if not found:
        raise DataError("config.data.files is empty; expected a pattern of files, or one for each split.")
    seen: dict[str, str] = {}
    for split, paths in found.items():
        for path in paths:
            if suffix_of(path) not in kinds:
                raise DataError(
                    f"{path!r} is no {what} that is known here; expected {', '.join(kinds)}, each also .gz or .xz."
                )
            if path in seen:
                raise DataError(f"{path!r} is in splits {seen[path]!r} and {split!r}; expected it in one.")
            seen[path] = split


def suffix_of(path: str) -> str:
    """ ".txt" of "a.txt" and of "a.txt.xz"."""
    name = Path(path)
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def _documents(path: str, config: Config) -> Iterator[str]:
    text = contents(path)
    if suffix_of(path) == ".txt":
        yield from [text] if config.split_on is None else text.split(config.split_on)
        return
    # Not splitlines, which also cuts at characters that may stand within a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path!r}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: it is no JSON ({error}).") from error
        found = record.get(config.key) if isinstance(record, dict) else None
        if not isinstance(found, str):
            given = f"keys {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise DataError(
                f"{where}: it has {given}; expected an object with a text under {config.key!r} (config.data.key)."
            )
        try:
            found.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: character {error.start} of its text is a lone surrogate, no Unicode."
            ) from None
        yield found


def contents(path: str) -> str:
    """The text of a file, unpacked. Raises DataError where it cannot be read or is no UTF-8."""
    unpack = PACKED.get(Path(path).suffix)
    try:
        content = Path(path).read_bytes()
        content = content if unpack is None else unpack(content)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path!r} cannot be read: {error}.") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        inside = "" if unpack is None else " of what is packed in it"
        raise DataError(
            f"{path!r} is no UTF-8: byte {error.start}{inside} is 0x{content[error.start]:02x} ({error.reason}); "
            "write the file anew as UTF-8."
        ) from None
