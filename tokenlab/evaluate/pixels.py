"""The pixels of a run on pictures and text: grey levels are pixels, and a file of codes keeps its decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenlab.core.errors import DataError
from tokenlab.data.image_text import ImageTextVocabulary, Pixels
from tokenlab.data.image_text.codec import checksum, pixels_of
from tokenlab.models import codes_file
from tokenlab.models.vq_image import Decoder


@dataclass(frozen=True, eq=False)
class Decoded:
    """Pictures of a trained tokenizer; see `Pixels`.

    Attributes:
      decoder: of a file of codes.
    """

    decoder: Decoder

    @property
    def codes(self) -> int:
        """K."""
        return self.decoder.model.codes_count

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return self.decoder.model.grid

    @property
    def image(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.decoder.model.image

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See `Pixels.decode`."""
        codes = np.asarray(codes)
        fits = codes.shape[-2:] == self.grid and codes.dtype.kind in "iu"
        if not fits or (codes.size and not 0 <= codes.min() <= codes.max() < self.codes):
            span = f" from {codes.min()} to {codes.max()}" if codes.size else ""
            raise DataError(
                f"codes are {codes.dtype}{list(codes.shape)}{span}; expected integers [..., {self.grid[0]}, "
                f"{self.grid[1]}] from 0 to {self.codes - 1}."
            )
        low, high = self.decoder.value_range
        found = np.asarray(self.decoder(codes.reshape(-1, *self.grid)))
        scaled = np.clip((found - low) / (high - low) * 2 - 1, -1, 1)
        return scaled.reshape(*codes.shape[:-2], *self.image).astype(np.float32)


def pixels_for(vocabulary: ImageTextVocabulary, codec: str) -> Pixels:
    """What makes pictures of the codes of a vocabulary.

    Args:
      vocabulary: of the run.
      codec: `config.data.codec`. A file is looked for at that path, in the current folder if it is a relative one.

    Raises:
      DataError: there is no such file any more, it holds no decoder, or other codes than the run was trained on.
    """
    if found := pixels_of(codec, vocabulary.grid):
        return found
    file = Path(codec).expanduser()
    if not file.is_file():
        raise DataError(
            f"the run's pictures are codes of the file {codec!r}, whose decoder makes pixels of them, and there is no "
            f"such file (seen from {Path.cwd()}); put it back, or say where it is with --config.data.codec=FILE."
        )
    coded = codes_file.read(file)
    decoded = Decoded(Decoder.of(coded, what=str(file)))
    if (decoded.codes, decoded.grid) != (vocabulary.codes, vocabulary.grid):
        raise DataError(
            f"codes file {codec!r} is of {decoded.grid[0]} x {decoded.grid[1]} codes out of {decoded.codes}; the run "
            f"knows {vocabulary.grid[0]} x {vocabulary.grid[1]} out of {vocabulary.codes}. Expected the file it was "
            f"trained with, {vocabulary.codec!r}."
        )
    if vocabulary.checksum not in (None, checksum(coded.codes)):
        raise DataError(
            f"codes file {codec!r} holds other codes than the run was trained on: it was written anew since, and its "
            f"decoder would make other pictures of the same codes. Expected the file it was trained with, "
            f"{vocabulary.codec!r}; put it back, or say where it is with --config.data.codec=FILE."
        )
    return decoded
