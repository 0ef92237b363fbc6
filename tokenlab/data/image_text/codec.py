"""Pictures as codes: grey levels, or the codes that a trained tokenizer of pictures has written to a file.

`config.data.codec` is one word: "grey(17)" (a pixel is a code, one of so many levels), or the path of a .npz file that
`tokenlab encode` has written, with

    meta            a JSON text: {"format": 1, "source": name of the pictures' source, "fingerprint": that source's,
                    "codes": K, "grid": [h, w], "image": [H, W, C], ...}
    codes/SPLIT     uint16 [n, h, w], a picture a row, in the order of the split; for every split of the source

Further arrays are those of the decoder and are not read here.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.data import pixels
from tokenlab.data.dataset import Dataset
from tokenlab.data.source import Source

FORMAT = 1
MOST_LEVELS = 256
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey (ITU-R BT.601)."""

META, PREFIX = "meta", "codes/"
_GREY = re.compile(r"grey\(\s*(\d{1,9})\s*\)")
_CHUNK = 1024


@runtime_checkable
class Pixels(Protocol):
    """What makes pictures of codes.

    Attributes:
      codes: K; codes are in [0, K).
      grid: (h, w), codes of a picture.
      image: (H, W, C) of a picture.
    """

    codes: int
    grid: tuple[int, int]
    image: tuple[int, int, int]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes [..., h, w] as pictures, float32 [..., H, W, C] in [-1, 1]. Raises DataError for other codes."""
        ...


@dataclass(frozen=True)
class Grey:
    """Grey levels from -1 to 1, evenly spaced; a pixel is a code. See `Pixels`.

    Attributes:
      codes: K, levels.
      grid: (h, w), rows and columns of a picture.
    """

    codes: int
    grid: tuple[int, int]

    @property
    def image(self) -> tuple[int, int, int]:
        """(h, w, 1)."""
        return (*self.grid, 1)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """The level nearest to each pixel, uint16 [n, h, w].

        Args:
          images: float32 [n, H, W, C] in [-1, 1], C 1 or 3; averaged over areas where the grid is smaller.
        """
        small = np.stack([pixels.resized(image, *self.grid) for image in images])
        grey = small[..., 0] if small.shape[-1] == 1 else small @ np.array(LUMA, np.float32)
        levels = np.rint((grey + 1) / 2 * (self.codes - 1))
        return np.clip(levels, 0, self.codes - 1).astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See `Pixels.decode`."""
        codes = np.asarray(codes)
        if codes.shape[-2:] != self.grid or codes.dtype.kind not in "iu":
            raise DataError(
                f"codes are {codes.dtype}{list(codes.shape)}; expected integers [..., {self.grid[0]}, {self.grid[1]}]."
            )
        _check_range(codes, self.codes, "the codes")
        return (codes / np.float32(self.codes - 1) * 2 - 1).astype(np.float32)[..., None]


@dataclass(frozen=True, eq=False)
class Coded:
    """The pictures of a source as codes.

    Attributes:
      name: as `config.data.codec` says it.
      codes: K; codes are in [0, K).
      grid: (h, w), codes of a picture.
      splits: uint16 [n, h, w] by split, in the source's order.
      fingerprint: two with the same one have the same codes.
      pixels: makes pictures of codes; None where that takes the model that made them.
    """

    name: str
    codes: int
    grid: tuple[int, int]
    splits: Mapping[str, np.ndarray]
    fingerprint: str
    pixels: Pixels | None = None


def pixels_of(word: str, grid: tuple[int, int]) -> Pixels | None:
    """What makes pictures of the codes of `config.data.codec`; None where that takes the model that made them."""
    found = _GREY.fullmatch(word.strip())
    return Grey(int(found[1]), grid) if found else None


def encode(word: str, source: Source, size: int | None = None) -> Coded:
    """The pictures of a source as the codes that `config.data.codec` names.

    Args:
      word: "grey(L)" or a path.
      source: of pictures.
      size: rows and columns that pictures are brought to; None for those they have. A file must be of that size.

    Raises:
      ConfigError: a number of levels or a size that makes no sense.
      DataError: the pictures cannot be read, there is no such file, or it is not one of codes of these pictures.
    """
    if found := _GREY.fullmatch(word.strip()):
        return _in_grey(word, int(found[1]), source, size)
    return _from_file(word, source, size)


def _in_grey(word: str, levels: int, source: Source, size: int | None) -> Coded:
    if not 2 <= levels <= MOST_LEVELS:
        raise ConfigError(
            f"config.data.codec is {word!r}; expected 2 to {MOST_LEVELS} levels, such as 'grey(17)'."
        )
    read = Dataset(source)
    height, width, channels = read.spec["image"][0]
    if channels not in (1, 3):
        raise DataError(
            f"source {source.name!r} has pictures of {channels} channels; expected 1 or 3 for {word!r}."
        )
    if size is not None and not 1 <= size <= min(height, width):
        raise ConfigError(
            f"config.data.size is {size}, and pictures of source {source.name!r} are {height} x {width}; expected 1 to "
            f"{min(height, width)}, or None to leave them as they are."
        )
    grey = Grey(levels, (height, width) if size is None else (size, size))
    splits = {}
    for split, count in source.splits.items():
        chunks = [np.arange(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
        splits[split] = np.concatenate([grey.encode(read.read(split, chunk)["image"]) for chunk in chunks])
    return Coded(word, levels, grey.grid, splits, _digest(source.fingerprint, splits), grey)


def _from_file(path: str, source: Source, size: int | None) -> Coded:
    file = Path(path).expanduser()
    arrays = _arrays(file, path)
    where = f"codes file {path!r}"
    meta = _meta(arrays.pop(META), where)
    anew = "write it anew with `tokenlab encode --workdir=RUN --out=FILE`"
    if meta["fingerprint"] != source.fingerprint:
        raise DataError(
            f"{where} is of pictures {meta['source']!r} with fingerprint {meta['fingerprint']!r}; those here are "
            f"{source.name!r} with {source.fingerprint!r}. Set config.data.pictures and config.data.size to what the "
            f"tokenizer was trained on, or {anew}, of a run on these pictures."
        )
    if size is not None and tuple(meta["image"][:2]) != (size, size):
        raise ConfigError(
            f"config.data.size is {size}, and {where} is of pictures {meta['image']}; expected that size, or None."
        )
    missing, foreign = source.splits.keys() - arrays.keys(), arrays.keys() - source.splits.keys()
    if missing or foreign:
        raise DataError(
            f"{where} has the splits {', '.join(arrays) or 'none'}; expected those of source {source.name!r}, "
            f"{', '.join(source.splits)}: {anew}, without --split."
        )
    height, width = meta["grid"]
    for split, count in source.splits.items():
        codes, expected = arrays[split], [count, height, width]
        if codes.dtype != np.uint16 or list(codes.shape) != expected:
            raise DataError(
                f"{where}: {PREFIX}{split} is {codes.dtype}{list(codes.shape)}; expected uint16{expected}: {anew}."
            )
        _check_range(codes, meta["codes"], f"{where}: {PREFIX}{split}")
    splits = {split: arrays[split] for split in source.splits}
    return Coded(path, meta["codes"], (height, width), splits, _digest(source.fingerprint, splits))


def _arrays(file: Path, path: str) -> dict[str, np.ndarray]:
    """`meta` and the codes by split."""
    if not file.is_file():
        raise DataError(
            f"config.data.codec is {path!r}, and there is no such file; expected 'grey(17)' or the path of a file that "
            "`tokenlab encode` has written."
        )
    found = {}
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("no .npz file, or it is cut off")
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            for key in arrays.files:
                if key == META or key.startswith(PREFIX):
                    found[key.removeprefix(PREFIX)] = arrays[key]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"codes file {path!r} cannot be read: {' '.join(str(error).split())}.") from error
    if META not in found:
        raise DataError(
            f"codes file {path!r} has no {META!r}; expected a file that `tokenlab encode` has written."
        )
    return found


def _meta(array: np.ndarray, where: str) -> dict[str, Any]:
    """What the file says of its codes, checked."""
    try:
        meta = json.loads(array.item())
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: {META!r} is no JSON text; expected that of `tokenlab encode`.") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        given = meta.get("format") if isinstance(meta, dict) else meta
        raise DataError(f"{where}: its format is {given!r}; this version reads format {FORMAT}.")
    wrong = [key for key in ("source", "fingerprint") if not isinstance(meta.get(key), str)]
    wrong += [key for key, size in (("grid", 2), ("image", 3)) if not _counts(meta.get(key), size)]
    if not _counts([meta.get("codes")], 1) or not 2 <= meta["codes"] <= 2**16:
        wrong.append("codes")
    if wrong:
        said = ", ".join(f"{key} {meta.get(key)!r}" for key in wrong)
        raise DataError(
            f"{where}: {META!r} says {said}; expected texts as source and fingerprint, codes from 2 to {2**16}, "
            "grid [h, w] and image [H, W, C]."
        )
    return meta


def _counts(value: object, size: int) -> bool:
    """Whether it is a list of `size` whole numbers of 1 or more."""
    return (
        isinstance(value, list)
        and len(value) == size
        and all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in value)
    )


def _check_range(codes: np.ndarray, count: int, what: str) -> None:
    if codes.size and not 0 <= codes.min() <= codes.max() < count:
        raise DataError(f"{what}: they are {codes.min()} to {codes.max()}; expected 0 to {count - 1}.")


def checksum(splits: Mapping[str, np.ndarray]) -> str:
    """Of codes by split, whatever the order of the splits: what a run keeps to know its file of codes again."""
    digest = hashlib.sha256()
    for split in sorted(splits):
        codes = np.ascontiguousarray(splits[split], np.uint16)
        digest.update(f"{split}:{codes.shape};".encode())
        digest.update(codes)
    return digest.hexdigest()


def _digest(source: str, splits: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(source.encode())
    for split, codes in splits.items():
        digest.update(f"{split}:{codes.shape};".encode())
        digest.update(np.ascontiguousarray(codes))
    return digest.hexdigest()[:16]
