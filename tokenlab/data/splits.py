"""Splits made of a source's own splits: `{"train": "train[:90%]", "validation": "train[90%:]"}`.

A part is `NAME` or `NAME[FROM:TO]`, and parts are joined by "+". FROM and TO are counts or percentages, negative ones
from the end, and none lies beyond the split; a percentage is rounded to the nearest example, so that `[:90%]` and
`[90%:]` share none and leave none out. A slice is of the order in which the source is stored: of classes one after the
other it holds only some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tokenlab.core.errors import DataError
from tokenlab.data.joined import JoinedRecords, Stretch
from tokenlab.data.source import Records, Source, check_split

_PLACE = r"-?\d{1,15}%?"
_PART = re.compile(
    # A split may be named after a folder, "train-full" or "train 2".
    rf"\s*(?P<name>[^\[\]+]+?)\s*(?:\[\s*(?P<start>{_PLACE})?\s*:\s*(?P<stop>{_PLACE})?\s*\])?\s*"
)


class SlicedSource:
    """A source with splits made of another's; everything else is the other's.

    Args:
      source: to take from.
      splits: name -> text, see the module.

    Raises:
      DataError: a text is not of this form, names a split that is not there, or stands for no example; or the source is
        a mixture, whose weights are those of its whole splits.
    """

    def __init__(self, source: Source, splits: Mapping[str, str]):
        if hasattr(source, "parts"):
            raise DataError(
                "config.data.splits is set for a mixture; expected it in the parts: config.data.parts[i]['splits']"
            )
        self.name, self.spec = source.name, source.spec
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.tokenizer = getattr(source, "tokenizer", None)
        self.vocab_size = getattr(source, "vocab_size", None)
        self._records = {name: _records(source, name, text) for name, text in splits.items()}
        self.splits = {name: len(records) for name, records in self._records.items()}
        texts = ";".join(f"{name}={''.join(text.split())}" for name, text in splits.items())
        self.fingerprint = f"{source.fingerprint}[{texts}]"

    def split(self, name: str) -> Records:
        """See `Source.split`."""
        check_split(self, name)
        return self._records[name]


def sliced(source: Source, splits: Mapping[str, str]) -> Source:
    """`source` with the splits that `splits` describes; `source` itself for {}. Raises as `SlicedSource`."""
    return SlicedSource(source, splits) if splits else source


def _records(source: Source, name: str, text: str) -> JoinedRecords:
    stretches = []
    for word in text.split("+"):
        found = _PART.fullmatch(word)
        if not found:
            raise DataError(
                f"config.data.splits.{name} is {text!r}; expected a split such as 'train', 'train[:90%]' or "
                "'train[-1000:]', or several joined by '+'"
            )
        records = source.split(found["name"])
        start = _place(found["start"], len(records), 0)
        stop = _place(found["stop"], len(records), len(records))
        if start is None or stop is None:
            raise DataError(
                f"config.data.splits.{name}: {word.strip()!r} reaches beyond split {found['name']!r} of source "
                f"{source.name!r}, which has {len(records)} examples; expected a count of at most {len(records)} or "
                "a percentage of at most 100%"
            )
        if start >= stop:
            raise DataError(
                f"config.data.splits.{name}: {word.strip()!r} holds no example; split {found['name']!r} of source "
                f"{source.name!r} has {len(records)}"
            )
        stretches.append(Stretch(records, start, stop))
    return JoinedRecords(stretches, source.spec)


def _place(text: str | None, size: int, default: int) -> int | None:
    """A count from 0 to `size`; None for a text that means one beyond."""
    if text is None:
        return default
    number = int(text.removesuffix("%"))
    if abs(number) > (100 if text.endswith("%") else size):
        return None
    # Whole numbers throughout: the same place on every machine.
    place = (2 * size * number + 100) // 200 if text.endswith("%") else number
    return place + size if text.startswith("-") else place
