"""Pictures as codes, in one file that also holds what gives pictures again: the npz that `tokenlab encode` writes.

meta             a JSON string: format, source, fingerprint, codes (K), grid [h, w], image [H, W, C], value_range
                 [low, high], model (the settings of `config.model`)
codes/SPLIT      uint16 [n, h, w], the pictures of a split in its order
decoder/PATH     float32, the leaf of the weights at PATH; those that decoding reads
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.models.state import flat

FORMAT = 1
MOST_CODES = 2**16
"""That uint16 can tell apart."""

_META = {
    "source": str,
    "fingerprint": str,
    "codes": int,
    "grid": list,
    "image": list,
    "value_range": list,
    "model": dict,
}


@dataclass(frozen=True, eq=False)
class Coded:
    """What such a file holds.

    Attributes:
      source, fingerprint: of the pictures.
      num_codes: K.
      grid: rows and columns of codes, (h, w).
      image: (H, W, C) of a picture.
      value_range: (low, high) of its values.
      model: settings of the model, `config.model` with its defaults filled in.
      codes: split -> uint16 [n, h, w].
      decoder: weights that decoding reads: nested dicts of float32 arrays.
    """

    source: str
    fingerprint: str
    num_codes: int
    grid: tuple[int, int]
    image: tuple[int, int, int]
    value_range: tuple[float, float]
    model: Mapping[str, Any]
    codes: Mapping[str, np.ndarray]
    decoder: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """The file. Raises ConfigError for more codes than uint16 holds."""
        check_fits(self.num_codes)
        meta = {
            "format": FORMAT,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "codes": self.num_codes,
            "grid": list(self.grid),
            "image": list(self.image),
            "value_range": list(self.value_range),
            "model": dict(self.model),
        }
        arrays = {"meta": np.array(json.dumps(meta))}
        arrays |= {f"codes/{split}": codes.astype(np.uint16) for split, codes in self.codes.items()}
        leaves = flat(self.decoder).items()
        arrays |= {f"decoder/{path}": np.asarray(leaf, np.float32) for path, leaf in leaves}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()


def check_fits(num_codes: int) -> None:
    """Raise a ConfigError for more codes than the file can tell apart."""
    if num_codes > MOST_CODES:
        raise ConfigError(
            f"a file of codes tells {MOST_CODES} of them apart, the model has {num_codes}: expected no more; train it "
            "with a smaller config.model.codes, or a smaller product of config.model.levels."
        )


def read(path: str | os.PathLike[str]) -> Coded:
    """Read such a file.

    Raises:
      DataError: it cannot be read, is cut short, of another kind or format, or contradicts itself.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            found = np.load(stream, allow_pickle=False)
            arrays = dict(found) if isinstance(found, np.lib.npyio.NpzFile) else {}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: {error}; expected a file that tokenlab encode wrote."
        ) from error
    meta = _meta(path, arrays)
    coded = Coded(
        source=meta["source"],
        fingerprint=meta["fingerprint"],
        num_codes=meta["codes"],
        grid=tuple(meta["grid"]),
        image=tuple(meta["image"]),
        value_range=tuple(meta["value_range"]),
        model=meta["model"],
        codes=_under("codes", arrays),
        decoder=_nested(_under("decoder", arrays)),
    )
    for split, codes in coded.codes.items():
        if codes.dtype != np.uint16 or codes.shape[1:] != coded.grid:
            raise DataError(
                f"{path}: codes/{split} is {codes.dtype}{list(codes.shape)}; expected uint16 [n, {coded.grid[0]}, "
                f"{coded.grid[1]}] as its meta says: encode the pictures again."
            )
        if codes.size and codes.max() >= coded.num_codes:
            raise DataError(
                f"{path}: codes/{split} holds code {codes.max()}; expected 0 to {coded.num_codes - 1} as its meta "
                "says: encode the pictures again."
            )
    return coded


def _meta(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The meta data, of the right keys and types."""
    try:
        meta = json.loads(str(arrays["meta"]))
    except (KeyError, ValueError):
        meta = None
    if not isinstance(meta, dict) or "format" not in meta:
        raise DataError(f"{path} has no meta data of codes; expected a file that tokenlab encode wrote.")
    if meta["format"] != FORMAT:
        raise DataError(
            f"{path} is of format {meta['format']!r}; this version reads {FORMAT}: encode the pictures again with it."
        )
    for key, kind in _META.items():
        value = meta.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"{path}: its meta has {key}={value!r}; expected a {kind.__name__}.")
    shapes = {"grid": (2, int), "image": (3, int), "value_range": (2, int | float)}
    for key, (length, kind) in shapes.items():
        if len(meta[key]) != length or not all(isinstance(entry, kind) for entry in meta[key]):
            raise DataError(f"{path}: its meta has {key}={meta[key]!r}; expected {length} numbers.")
    low, high = meta["value_range"]
    sizes = (*meta["grid"], *meta["image"])
    if min(sizes) < 1 or not 2 <= meta["codes"] <= MOST_CODES or not -math.inf < low < high < math.inf:
        raise DataError(f"{path}: its meta has sizes or a value range that no picture has: {meta}.")
    return meta


def _under(group: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    start = f"{group}/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def _nested(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested dicts of leaves by path."""
    found: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *groups, name = path.split("/")
        inner = found
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = leaf
    return found
