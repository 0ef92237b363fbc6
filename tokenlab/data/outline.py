"""What a model must know of data that need not be here: enough to compile for it and to count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenlab.core.errors import DataError
from tokenlab.data import build, resolve, without_examples
from tokenlab.data import transform as transforms
from tokenlab.data.source import ENCODED, Spec
from tokenlab.data.sources import tfds
from tokenlab.data.text import TextConfig
from tokenlab.data.text.source import spec_of
from tokenlab.data.text.tokenizer import trained_size
from tokenlab.data.transform import Transform


@dataclass(frozen=True)
class Outline:
    """Shapes and names of data.

    Attributes:
      name: of the source.
      spec: (shape, dtype) of each key of an example, as a model gets it.
      num_classes: of its labels, or None.
      vocab_size: of text, or None.
      eval_transform: of pictures, or None.
    """

    name: str
    spec: Spec
    num_classes: int | None = None
    vocab_size: int | None = None
    eval_transform: Transform | None = None


def outline(config: Mapping[str, Any]) -> Any:
    """What a model must know of the data that `config.data` names, which is read only where nothing else says it.

    Text with a tokenizer that is yet to be trained has as many ids as that is to have. A set of TFDS that is not
    prepared here has the features that TFDS's own code of it declares. All else is built.

    Raises:
      DataError: the data is not here, and nothing else says what it is.
      ConfigError, NameLookupError: as `tokenlab.data.build`.
    """
    resolved = resolve(config)
    if isinstance(resolved, TextConfig):
        size = trained_size(resolved.tokenizer)
        if size is not None:
            return Outline(resolved.name, spec_of(resolved.length, resolved.encoder), vocab_size=size)
        return without_examples(config)
    try:
        return build(config)
    except DataError:
        if not isinstance(resolved, tfds.Config) or (found := _declared(resolved)) is None:
            raise
        return found


def _declared(config: tfds.Config) -> Outline | None:
    """What the code of a TFDS set declares; None where TFDS has no such set, or none of one picture and one label."""
    import tensorflow_datasets as library

    try:
        info = library.builder(config.dataset).info
    except (
        Exception
    ):  # whatever TFDS raises for a name it does not know, or a set that takes more than its name
        return None
    pictures = {key: f for key, f in info.features.items() if isinstance(f, library.features.Image)}
    labels = {key: f for key, f in info.features.items() if isinstance(f, library.features.ClassLabel)}
    picture = config.image_key or (next(iter(pictures)) if len(pictures) == 1 else None)
    label = config.label_key or (next(iter(labels)) if len(labels) == 1 else None)
    if picture not in pictures:
        return None
    height, width, channels = pictures[picture].shape
    spec: dict[str, Any] = {"image": ((height, width, channels or 3), ENCODED)}
    if label in labels:
        spec["label"] = ((), "int32")
    text = transforms.default(spec) if config.eval_transform is None else config.eval_transform
    made = Transform(text, spec, key="config.data.eval_transform")
    return Outline(
        config.dataset, made.spec, labels[label].num_classes if label in labels else None, None, made
    )
