"""A small source of pictures and text for tests, made of nothing but numbers drawn once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenlab.data.image_text import Coded, ImageTextConfig, ImageTextSource

N, GRID, K = 24, (2, 2), 5
RNG = np.random.default_rng(0)
CODES = {split: RNG.integers(0, K, (n, *GRID)).astype(np.uint16) for split, n in (("train", 11), ("dev", 4))}
CAPTIONS = {
    split: tuple(f"{split[0]}{i} é"[: 3 + i % 3] for i in range(len(found))) for split, found in CODES.items()
}
TEXTS: Mapping[str, Sequence[str]] = {
    "train": [" ".join(f"{i}w" for i in range(120)), "  ", "second text 고양이 of the corpus " * 3],
    "dev": ["tiny", "short one"],
}


def coded(**changes: Any) -> Coded:
    """The pictures."""
    return Coded(
        **{"name": "file.npz", "codes": K, "grid": GRID, "splits": CODES, "fingerprint": "f", **changes}
    )


def made(
    *, pictures: Coded | None = None, captions: Any = None, texts: Any = None, **options: Any
) -> ImageTextSource:
    """The source, with options of its configuration or other parts."""
    config = ImageTextConfig(name="tiny", **{"length": N, **options})
    return ImageTextSource("tiny", pictures or coded(), captions or CAPTIONS, texts or TEXTS, config)
