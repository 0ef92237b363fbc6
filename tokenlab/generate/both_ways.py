"""Both directions of a model of text and pictures: pictures of captions, captions of pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokenlab.core.errors import DataError, TokenLabError
from tokenlab.data.image_text import Grey, ImageTextVocabulary, Pixels
from tokenlab.data.pixels import decode
from tokenlab.generate.generator import Generator
from tokenlab.generate.grammar import Grammar
from tokenlab.models.decoder_lm import DecoderLM
from tokenlab.ops.sample import Sampling

CHUNK = 16
"""Most tokens of captions that are drawn before it is asked whether all have ended."""


class BothWays:
    """A trained model in both directions.

    Prompts are as documents of the data begin: a caption and BEGIN, or a whole picture. A prompt and what follows it
    have room in a row that the model was trained on.

    Args:
      model: a decoder that is `modal`.
      params: its weights.
      vocabulary: of its ids.
    """

    def __init__(self, model: DecoderLM, params: Any, vocabulary: ImageTextVocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.lost = 0
        """Tokens that some layer had no room for, the most of any prompt of the last call."""
        self._generators: dict[Any, Generator] = {}
        self.use(params)

    def use(self, params: Any) -> None:
        """Go on with other weights of the same model; nothing is compiled anew."""
        self._params = jax.device_put(params)
        for generator in self._generators.values():
            generator.use(self._params)

    @property
    def caption_room(self) -> int:
        """Tokens that a caption may have before a picture."""
        height, width = self.vocabulary.grid
        return self.model.length - height * width - 1

    def pictures(
        self, captions: Sequence[str], samples: int = 1, *, sampling: Sampling | None = None, seed: int = 0
    ) -> np.ndarray:
        """Pictures of captions, `samples` of each.

        Args:
          captions: B of them.
          samples: S, 1 or more.
          sampling: how codes are drawn.
          seed: of the draws.

        Returns:
          Codes, int32 [B, S, h, w].

        Raises:
          TokenLabError: no caption, an empty one, one with more than `caption_room` tokens, no count of samples, or as
            `Generator`.
          DataError: a caption that the tokenizer cannot encode.
        """
        check_samples(samples)
        encoded = self.encoded(captions)
        known = self.vocabulary
        height, width = known.grid
        generator = self._generator(
            prompt=self.caption_room + 1,
            new=height * width,
            sampling=sampling,
            chunk=height * width,
            pictures=True,
        )
        prompts = [np.append(ids, known.begin).astype(np.int32) for ids in encoded for _ in range(samples)]
        codes = generator(prompts, seed) - known.first_code
        self.lost = generator.lost
        return codes.reshape(len(encoded), samples, height, width)

    def captions(
        self, codes: np.ndarray, tokens: int | None = None, *, sampling: Sampling | None = None, seed: int = 0
    ) -> list[str]:
        """What is said of pictures.

        Args:
          codes: integers [B, h, w] in [0, K), B >= 1.
          tokens: most tokens of a caption; None for as many as a row has room for.
          sampling: how they are drawn.
          seed: of the draws.

        Returns:
          B texts, up to the end of the document.

        Raises:
          DataError: other codes. TokenLabError: as `Generator`.
        """
        known = self.vocabulary
        prompts = list(known.pictures(codes))
        most = len(prompts[0])
        new = self.model.length - most if tokens is None else tokens
        # Chunks that come out even: so no step is made behind the last token, which memories have no room for.
        chunk = next(size for size in range(CHUNK, 0, -1) if new < 1 or new % size == 0)
        generator = self._generator(
            prompt=most, new=new, sampling=sampling, end=known.end, chunk=chunk, pictures=False
        )
        found = generator(prompts, seed)
        self.lost = generator.lost
        return [known.decode(ids[ids != known.end]) for ids in found]

    def _generator(self, *, pictures: bool, **settings: Any) -> Generator:
        """The generator with these settings, made when it is first asked for."""
        key = (pictures, *settings.items())
        if key not in self._generators:
            grammar = Grammar.of(self.vocabulary, pictures=pictures)
            self._generators[key] = Generator(self.model, self._params, grammar=grammar, **settings)
        return self._generators[key]

    def encoded(self, captions: Sequence[str]) -> list[np.ndarray]:
        """The ids of captions, int32 [T] each. Raises as `pictures`."""
        if not len(captions):
            raise TokenLabError("generate: no caption is given; expected one or more.")
        found = list(self.vocabulary.encode_each(captions))
        for caption, ids in zip(captions, found, strict=True):
            if not 1 <= len(ids) <= self.caption_room:
                height, width = self.vocabulary.grid
                raise TokenLabError(
                    f"generate: the caption {_shortened(caption)} has {len(ids)} tokens; expected 1 to "
                    f"{self.caption_room}, since with its picture of {height} x {width} codes it has to fit into the "
                    f"{self.model.length} tokens of a row that the run was trained on."
                )
        return found


def read_image(path: str | os.PathLike[str], pixels: Pixels) -> np.ndarray:
    """The codes of a picture in a file, int [h, w]: its grey levels, at the size of the grid.

    Args:
      path: of a PNG, a JPEG or what else OpenCV reads.
      pixels: of the run.

    Raises:
      DataError: there is no such file, it is no picture, or only the model that made the codes could encode it.
    """
    if not isinstance(pixels, Grey):
        raise DataError(
            f"--image={path}: the run's pictures are codes of a trained tokenizer, and a file of codes holds its "
            "decoder but no encoder; take a picture of the run's own data with --example=N."
        )
    try:
        data = Path(path).expanduser().read_bytes()
        image = decode(data, (None, None, 3))
    except OSError as error:
        raise DataError(f"--image={path} cannot be read: {error.strerror}; expected a picture.") from error
    except DataError as error:
        raise DataError(f"--image={path}: {error}; expected a picture.") from error
    return pixels.encode((image.astype(np.float32) / 127.5 - 1)[None])[0]


def check_samples(samples: int) -> int:
    """The count. Raises TokenLabError unless it is a whole number of 1 or more."""
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise TokenLabError(f"samples is {samples!r}; expected a number of samples >= 1.")
    return samples


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
