"""Mixtures: several sources as one, each with a weight that says how often training draws from it.

    config.data.parts = (
        {"name": "tfds", "dataset": "clothing_small", "weight": 3.0},
        {"name": "folder", "path": "photographs", "weight": 1.0, "splits": {"train": "train[:90%]"}},
    )

A split holds the records of the first part, then those of the second, and so on; the mixture has the splits that all
parts have. Evaluation sees every record once, whatever the weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tokenlab.core import config as core_config
from tokenlab.core import names
from tokenlab.core.errors import ConfigError, DataError, suggest
from tokenlab.data.joined import JoinedRecords, Stretch
from tokenlab.data.source import ENCODED, DataConfig, Records, Source, Spec, check_name, check_split
from tokenlab.data.splits import sliced
from tokenlab.data.text.tokenizer import Tokenizer

SOURCES = "tokenlab.data.sources"
OF_A_PART = ("name", "splits")
"""Fields of `DataConfig` that a part may have; the others are about the pipeline, which the parts share."""


@dataclass(frozen=True, kw_only=True)
class Config(DataConfig):
    """Several sources as one.

    Attributes:
      parts: a config.data each, with "weight", a number > 0: training draws a part with a probability in proportion.
      labels: "same": a label means the same in each part, which have equally many classes; "offset": the classes of
        the parts follow one another.
    """

    parts: tuple[Mapping[str, Any], ...]
    labels: Literal["same", "offset"] = "same"


def build(config: Config) -> MixtureSource:
    """The mixture of `config.parts`.

    Raises:
      ConfigError: a part has an unknown key, no weight, or an option of the pipeline.
      DataError: a part cannot be built, or the parts do not fit each other.
    """
    if not config.parts:
        raise ConfigError(
            "config.data.parts is empty: expected one or more parts, each with a name and a weight."
        )
    built = [_part(part, f"config.data.parts[{i}]") for i, part in enumerate(config.parts)]
    return MixtureSource([source for source, _ in built], [weight for _, weight in built], config.labels)


def _part(part: Mapping[str, Any], path: str) -> tuple[Source, float]:
    """The source that a part describes, and its weight."""
    rest = dict(part)
    for key in ("name", "weight"):
        if key not in rest:
            raise ConfigError(
                f"{path}.{key} is missing: expected a source's name and a weight in every part."
            )
    weight, name = rest.pop("weight"), rest["name"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ConfigError(f"{path}.weight is {weight!r}: expected a number > 0.")
    if not isinstance(name, str):
        raise ConfigError(f"{path}.name is {name!r}: expected the name of a source.")
    shared = {field.name for field in fields(DataConfig)} - set(OF_A_PART)
    for key in rest:
        if key in shared:
            raise ConfigError(
                f"{path}.{key} is about the pipeline, which the parts share: set config.data.{key}."
            )
    check_name(name, names.list_modules(SOURCES), f"{path}.name")
    cls = names.find_attr(SOURCES, name, "Config")
    allowed = {field.name for field in fields(cls)} - shared | {"weight"}  # type: ignore[arg-type]
    for key in rest:
        if key not in allowed:
            raise ConfigError(f"{path} has no key {key!r}.{suggest(str(key), allowed)}")
    resolved = core_config.to_dataclass(cls, rest, path=path)
    source = names.find_attr(SOURCES, name, "build")(resolved)
    return sliced(source, resolved.splits), float(weight)


class MixtureSource:
    """Several sources as one `Source`.

    Args:
      sources: the parts.
      weights: of each, > 0.
      labels: "same" or "offset", see `Config`.

    Raises:
      DataError: the parts have no split in common, or differ in keys, dtypes, shapes (other than the height and width
        of images), tokenizers or classes.
    """

    def __init__(self, sources: list[Source], weights: list[float], labels: str = "same"):
        self.name = f"mixture of {', '.join(source.name for source in sources)}"
        self.spec: Spec = _spec(sources)
        self._sources, self._weights = sources, tuple(weights)
        self.tokenizer = _tokenizer(sources)
        self.vocab_size = self.tokenizer.vocab_size if self.tokenizer else None
        common = [name for name in sources[0].splits if all(name in source.splits for source in sources)]
        if not common:
            given = "; ".join(f"{source.name!r}: {', '.join(source.splits)}" for source in sources)
            raise DataError(
                f"the parts of the mixture have no split in common: {given}. Set splits in a part."
            )
        self.splits = {name: sum(source.splits[name] for source in sources) for name in common}
        if labels == "offset":
            self.num_classes, self.class_names, self._offsets = _offset(sources)
        else:
            self.num_classes, self.class_names = _same(sources)
            self._offsets = (0,) * len(sources)
        says = f"{labels};" + ";".join(
            f"{source.fingerprint}*{weight!r}" for source, weight in zip(sources, weights, strict=True)
        )
        self.fingerprint = f"mixture:{hashlib.sha256(says.encode()).hexdigest()[:16]}"

    def parts(self, split: str) -> tuple[tuple[int, float], ...]:
        """(number of records, weight) of each part of a split, in the order in which the records follow.

        A part that is a mixture itself stands for its own parts, which share its weight.
        """
        check_split(self, split)
        found: list[tuple[int, float]] = []
        for source, weight in zip(self._sources, self._weights, strict=True):
            own = source.parts(split) if isinstance(source, MixtureSource) else ((source.splits[split], 1.0),)
            largest = max(share for _, share in own)  # a sum of large ones may be more than a float holds
            whole = math.fsum(share / largest for _, share in own)
            found += [(size, weight * (share / largest) / whole) for size, share in own]
        return tuple(found)

    def split(self, name: str) -> Records:
        """See `Source.split`."""
        check_split(self, name)
        stretches = [
            Stretch(source.split(name), 0, source.splits[name], offset)
            for source, offset in zip(self._sources, self._offsets, strict=True)
        ]
        return JoinedRecords(stretches, self.spec)


def _spec(sources: list[Source]) -> Spec:
    """The spec of all parts; heights and widths in which they differ are None."""
    first, *others = sources
    spec = dict(first.spec)
    for source in others:
        between = f"parts {first.name!r} and {source.name!r} of the mixture"
        if source.spec.keys() != spec.keys():
            raise DataError(f"{between} have different keys: {sorted(spec)} and {sorted(source.spec)}.")
        for key, (shape, dtype) in source.spec.items():
            known, expected = spec[key]
            if dtype != expected:
                hint = "; decode one of them beforehand" if ENCODED in (dtype, expected) else ""
                raise DataError(f"{between}: key {key!r} is {expected} and {dtype}; expected the same{hint}.")
            # Only a picture's height and width may differ.
            free = 2 if key == "image" and len(shape) == len(known) == 3 else 0
            if shape[free:] != known[free:] or len(shape) != len(known):
                raise DataError(
                    f"{between}: key {key!r} is {list(known)} and {list(shape)}; expected the same."
                )
            sizes = (a if a == b else None for a, b in zip(known[:free], shape[:free], strict=True))
            spec[key] = ((*sizes, *shape[free:]), dtype)
    return spec


def _tokenizer(sources: list[Source]) -> Tokenizer | None:
    """The tokenizer of all parts, or None where they are no text."""
    first, *others = [getattr(source, "tokenizer", None) for source in sources]
    for source, other in zip(sources[1:], others, strict=True):
        if first is not None and (other is None or other.fingerprint != first.fingerprint):
            raise DataError(
                f"parts {sources[0].name!r} and {source.name!r} of the mixture have different tokenizers, so that an "
                "id means another text in each; expected the same in every part: 'bytes', or one tokenizer.json "
                "(bpe(V) is trained on each part's own text)."
            )
    return first


def _same(sources: list[Source]) -> tuple[int | None, tuple[str, ...] | None]:
    numbers = {source.num_classes for source in sources}
    if len(numbers) != 1:
        given = ", ".join(f"{source.name!r} has {source.num_classes}" for source in sources)
        raise DataError(
            f'the parts have different numbers of classes: {given}; expected labels="offset", or the same.'
        )
    named = [source for source in sources if source.class_names is not None]
    for source in named[1:]:
        if source.class_names != named[0].class_names:
            raise DataError(
                f"parts {named[0].name!r} and {source.name!r} name their classes differently: {named[0].class_names} "
                f'and {source.class_names}; expected labels="offset", or the same.'
            )
    return numbers.pop(), named[0].class_names if named else None


def _offset(sources: list[Source]) -> tuple[int, tuple[str, ...] | None, tuple[int, ...]]:
    offsets = [0]
    for source in sources:
        if source.num_classes is None:
            raise DataError(
                f'part {source.name!r} has no classes; labels="offset" expects them in every part.'
            )
        offsets.append(offsets[-1] + source.num_classes)
    given = [source.class_names for source in sources]
    class_names = tuple(name for each in given for name in each) if all(given) else None  # type: ignore[union-attr]
    return offsets[-1], class_names, tuple(offsets[:-1])
