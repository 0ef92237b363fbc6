"""One vocabulary of text and pictures.

    0 ... T - 1          ids of text, the end of a document among them
    T                    BEGIN, before the codes of a picture
    T + 1                END of them
    T + 2 ... T + 1 + K  the codes

An id is of the modality image when it is a code; what delimits a picture is text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tokenlab.core.errors import DataError
from tokenlab.core.modality import IMAGE, TEXT
from tokenlab.data.image_text.codec import Pixels, pixels_of
from tokenlab.data.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Ids, Tokenizer, checked_ids

KIND = "tokenlab image_text vocabulary"
FORMAT = 1


class ImageTextVocabulary:
    """Text and codes to ids and back; of text it is a `Tokenizer`.

    Args:
      text: tokenizer of text, T ids.
      codes: K, codes that there are.
      grid: (h, w), codes of a picture.
      codec: as `config.data.codec` says it.
      checksum: of the codes, where they are those of a file (`tokenlab.data.image_text.codec.checksum`); None where
        `codec` says all.

    Attributes:
      begin, end_image: ids of what stands before and after the codes of a picture.
      first_code: id of code 0.
      (those given; further: see `tokenlab.data.text.Tokenizer`)
    """

    def __init__(
        self, text: Tokenizer, codes: int, grid: tuple[int, int], codec: str, checksum: str | None = None
    ):
        self.text, self.codes, self.grid, self.codec = text, codes, (int(grid[0]), int(grid[1])), codec
        self.checksum = checksum
        self.name = f"{text.name} and {codec}"
        self.begin, self.end_image, self.first_code = (text.vocab_size + i for i in range(3))
        self.vocab_size = self.first_code + codes
        self.end, self.specials = text.end, text.specials
        self.byte_lengths = np.concatenate([text.byte_lengths, np.zeros(2 + codes, np.int32)])
        says = f"{text.fingerprint};{codes};{self.grid};{codec}"
        self.fingerprint = f"image_text:{hashlib.sha256(says.encode()).hexdigest()[:16]}"

    @property
    def pixels(self) -> Pixels | None:
        """What makes pictures of codes; None where that takes the model that made them."""
        return pixels_of(self.codec, self.grid)

    # ------------------------------------------------------------------------------------------ to ids

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return self.text.encode(text)

    def encode_each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """See `Tokenizer.encode_each`."""
        return self.text.encode_each(texts)

    def pictures(self, codes: np.ndarray) -> np.ndarray:
        """Pictures as ids, int32 [n, h w + 2]: BEGIN, the codes row by row, END.

        Args:
          codes: integers [n, h, w] in [0, K).

        Raises:
          DataError: other codes.
        """
        codes = np.asarray(codes)
        if codes.shape[1:] != self.grid or not 0 <= codes.min() <= codes.max() < self.codes:
            raise DataError(
                f"pictures have codes {list(codes.shape)} from {codes.min()} to {codes.max()}; expected "
                f"[n, {self.grid[0]}, {self.grid[1]}] from 0 to {self.codes - 1}."
            )
        inside = codes.reshape(len(codes), -1).astype(np.int32) + np.int32(self.first_code)
        return np.pad(inside, ((0, 0), (1, 1)), constant_values=((0, 0), (self.begin, self.end_image)))

    def modality(self, ids: np.ndarray) -> np.ndarray:
        """The modality of each id, int32 of the same shape."""
        return np.where(np.asarray(ids) >= self.first_code, IMAGE, TEXT).astype(np.int32)

    # ------------------------------------------------------------------------------------------ and back

    def to_bytes(self, ids: Ids) -> bytes:
        """The bytes of the text among ids [T]; a picture has none. Raises DataError for an id outside [0, V)."""
        ids = checked_ids(ids, self.vocab_size)
        return self.text.to_bytes(ids[ids < self.begin])

    def decode(self, ids: Ids) -> str:
        """The text among ids [T]. Raises as `to_bytes`."""
        ids = checked_ids(ids, self.vocab_size)
        return self.text.decode(ids[ids < self.begin])

    def parts(self, ids: Ids) -> list[str | np.ndarray]:
        """Text and pictures in their order.

        A picture is its codes, int32 [h, w]; codes that are not h w in a row, as a model may generate, are [T].

        Raises:
          DataError: an id outside [0, V).
        """
        ids = checked_ids(ids, self.vocab_size)
        of_picture = ids >= self.first_code
        found: list[str | np.ndarray] = []
        for run in np.split(ids, np.flatnonzero(np.diff(of_picture)) + 1):
            if len(run) and run[0] >= self.first_code:
                codes = (run - self.first_code).astype(np.int32)
                found.append(codes.reshape(self.grid) if codes.size == self.grid[0] * self.grid[1] else codes)
            elif text := self.decode(run):
                found.append(text)
        return found

    # ------------------------------------------------------------------------------------------ to a file

    def to_json(self) -> str:
        """What a run keeps, so that its ids mean the same one day; `config.data.tokenizer` can name such a file."""
        text = {"name": self.text.name}
        if isinstance(self.text, HuggingFaceTokenizer):
            text["json"] = self.text.to_json()
        says = {"kind": KIND, "format": FORMAT, "text": text}
        says |= {"codes": self.codes, "grid": list(self.grid), "codec": self.codec}
        if self.checksum is not None:
            says["checksum"] = self.checksum
        return json.dumps(says, indent=1)

    @classmethod
    def from_json(cls, text: str, name: str = "vocabulary") -> ImageTextVocabulary:
        """The vocabulary that `to_json` wrote.

        Args:
          text: of the file.
          name: for messages.

        Raises:
          DataError: the text is none of `to_json`.
        """
        says = _says(text)
        if says is None:
            raise DataError(f"{name!r} is no vocabulary of pictures and text, as a run keeps it.")
        if says.get("format") != FORMAT:
            raise DataError(
                f"{name!r} has format {says.get('format')!r}; this version reads format {FORMAT}."
            )
        try:
            of_text, codes, (height, width), codec = (says[key] for key in ("text", "codes", "grid", "codec"))
            known = of_text.get("json")
            words = ByteTokenizer() if known is None else HuggingFaceTokenizer(known, of_text["name"])
            return cls(words, int(codes), (int(height), int(width)), str(codec), says.get("checksum"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{name!r} is damaged: {type(error).__name__}: {error}; expected the file as a run kept it."
            ) from error


def saved(word: str) -> ImageTextVocabulary | None:
    """The vocabulary in the file that `config.data.tokenizer` names; None where it names something else.

    Raises:
      DataError: the file is such a vocabulary, and damaged.
    """
    file = Path(word).expanduser()
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None  # whoever reads it as a tokenizer says what is wrong
    return None if _says(text) is None else ImageTextVocabulary.from_json(text, word)


def _says(text: str) -> dict[str, Any] | None:
    """What the text of a file holds, when it is one of `ImageTextVocabulary.to_json`."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("kind") == KIND else None
