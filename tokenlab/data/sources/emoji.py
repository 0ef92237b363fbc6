"""1,870 emoji, 64 x 64 RGB on white, with their English names, nine groups; they come with the package.

The label is the group that Unicode puts an emoji in ("Food & Drink"), and the caption its name ("hot beverage"). The
pictures are those of Noto Color Emoji under OFL-1.1, the names Unicode's: see NOTICE.md beside the files.

Emoji that are drawn alike are in one split: those that differ only in who is shown (man, woman, person, a skin tone),
and those whose pictures are the same, such as the flags of Norway and of Bouvet Island. Which split is decided by a
hash of what they share, for about 80 %, 10 % and 10 % of the emoji.
"""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from tokenlab.data import pixels
from tokenlab.data.source import ArraySource, DataConfig, check_split

FOLDER = Path(__file__).parent.parent / "assets" / "emoji"
PICTURES, CAPTIONS = FOLDER / "pictures.zip", FOLDER / "captions.jsonl.xz"
SIDE = 64
FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}

WHO = frozenset({"1f468", "1f469", "1f9d1", "2640", "2642", *(f"1f3f{tone}" for tone in "bcdef")})
"""Code points that say who is shown: man, woman, person; the signs female and male; the five skin tones."""

JOINERS = frozenset({"200d", "fe0f"})
"""Code points that show nothing themselves: the zero-width joiner, and "as a picture"."""


@dataclass(frozen=True)
class Config(DataConfig):
    """Emoji.

    Attributes:
      size: rows and columns of a picture; smaller than 64 ones are averages over areas.
    """

    size: Literal[64, 32, 16] = 64


class Emoji(NamedTuple):
    """One emoji: the name of its file (its code points), what it shows, and where Unicode puts it."""

    file: str
    caption: str
    group: str


class EmojiSource(ArraySource):
    """The emoji as a `Source`, with captions.

    Args:
      emoji: of each split, in its order.
      splits: image uint8 [n, size, size, 3] and label int32 [n] of each.
      class_names: the groups.
    """

    def __init__(
        self,
        emoji: Mapping[str, Sequence[Emoji]],
        splits: Mapping[str, Mapping[str, np.ndarray]],
        class_names: tuple[str, ...],
    ):
        super().__init__("emoji", splits, len(class_names), class_names)
        self._captions = {split: tuple(each.caption for each in found) for split, found in emoji.items()}
        says = json.dumps([self.fingerprint, self._captions])
        self.fingerprint = f"emoji:{hashlib.sha256(says.encode()).hexdigest()[:16]}"

    def captions(self, split: str) -> tuple[str, ...]:
        """The name of each emoji of a split, in its order. Raises DataError: there is no such split."""
        check_split(self, split)
        return self._captions[split]


def build(config: Config) -> EmojiSource:
    """The emoji, with image uint8 [size, size, 3] and label int32 [] in [0, 9)."""
    return _emoji(config.size)


@functools.cache
def _emoji(size: int) -> EmojiSource:
    pictures, listed = _files()
    groups = tuple(dict.fromkeys(each.group for each in listed))
    splits = split_indices([each.file for each in listed], pictures)
    arrays = {}
    for split, indices in splits.items():
        decoded = [pixels.decode(pictures[i], (SIDE, SIDE, 3)) for i in indices]
        arrays[split] = {
            "image": np.stack([pixels.resized(image, size, size) for image in decoded]),
            "label": np.array([groups.index(listed[i].group) for i in indices], np.int32),
        }
    emoji = {split: [listed[i] for i in indices] for split, indices in splits.items()}
    return EmojiSource(emoji, arrays, groups)


@functools.cache
def _files() -> tuple[list[bytes], list[Emoji]]:
    """The pictures as WebP, and what is known of each, in Unicode's order."""
    lines = lzma.decompress(CAPTIONS.read_bytes()).decode("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    listed = [Emoji(each["file"], each["caption"], each["group"]) for each in found]
    with zipfile.ZipFile(PICTURES) as archive:
        return [archive.read(each.file) for each in listed], listed


def split_indices(files: Sequence[str], pictures: Sequence[bytes]) -> dict[str, list[int]]:
    """The split of each emoji: for each split the indices of its emoji, ascending.

    Args:
      files: names of the pictures' files, see `shown`.
      pictures: what is in them.
    """
    result: dict[str, list[int]] = {split: [] for split in FRACTIONS}
    ends = np.cumsum(list(FRACTIONS.values()))
    for index, family in enumerate(families(files, pictures)):
        digest = hashlib.sha256(family.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        split = min(int(np.searchsorted(ends, place, side="right")), len(ends) - 1)
        result[list(FRACTIONS)[split]].append(index)
    return result


def families(files: Sequence[str], pictures: Sequence[bytes]) -> list[str]:
    """A name for each emoji that it shares with those that are drawn alike; arguments as of `split_indices`."""
    leader: dict[str, str] = {}

    def first(name: str) -> str:
        while leader.get(name, name) != name:
            name = leader[name]
        return name

    owner: dict[bytes, str] = {}  # of a picture: what it was first seen to show
    for file, picture in zip(files, pictures, strict=True):
        one, other = first(shown(file)), first(owner.setdefault(picture, shown(file)))
        leader[max(one, other)] = min(one, other)
    return [first(shown(file)) for file in files]


def shown(file: str) -> str:
    """What an emoji shows, whoever does it: the code points of "1f468-200d-1f680.webp" but for the man, "1f680"."""
    points = [point for point in Path(file).stem.split("-") if point not in JOINERS]
    return "-".join([point for point in points if point not in WHO] or ["1f9d1"])
