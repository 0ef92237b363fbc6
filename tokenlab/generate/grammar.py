"""What may follow in a stream of text and pictures: a picture is BEGIN, exactly h w codes, and END.

    outside a picture       any id of text; BEGIN where pictures are wanted
    k > 0 codes to come     any code
    none to come            END

The state is one number a sequence, so it lives in a compiled step beside the memories of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from tokenlab.core.errors import TokenLabError
from tokenlab.core.modality import IMAGE, TEXT
from tokenlab.data.image_text import ImageTextVocabulary

OUTSIDE = -1
"""The state outside pictures; in them it is how many codes are still to come."""


@dataclass(frozen=True)
class Grammar:
    """Which ids may follow which, in the ids of an `ImageTextVocabulary`.

    Attributes:
      begin, end_image: ids before and after the codes of a picture; lower ones are text.
      first_code: id of code 0; higher ones are codes, too.
      outputs: V, ids that there are.
      per_picture: h w, codes of a picture.
      pictures: whether a picture may begin. One that a prompt has begun is finished in any case.
    """

    begin: int
    end_image: int
    first_code: int
    outputs: int
    per_picture: int
    pictures: bool = True

    @classmethod
    def of(cls, vocabulary: ImageTextVocabulary, *, pictures: bool = True) -> Grammar:
        """The grammar of a vocabulary."""
        height, width = vocabulary.grid
        ids = (vocabulary.begin, vocabulary.end_image, vocabulary.first_code, vocabulary.vocab_size)
        return cls(*ids, height * width, pictures)

    def modality(self, ids: Array) -> Array:
        """What each id stands for, int32 of the same shape."""
        return jnp.where(ids >= self.first_code, IMAGE, TEXT).astype(jnp.int32)

    def advance(self, left: Array, ids: Array) -> Array:
        """The state [B] int32 after one more id of each, [B], that was allowed."""
        within = jnp.where(ids == self.end_image, OUTSIDE, left - 1)
        begun = jnp.where(ids == self.begin, self.per_picture, OUTSIDE)
        return jnp.where(left == OUTSIDE, begun, within).astype(jnp.int32)

    def allow(self, left: Array, logits: Array) -> Array:
        """Logits [B, V] with -inf for what may not follow, by state [B]; the others are as they were."""
        ids = jnp.arange(self.outputs)
        text = ids <= self.begin if self.pictures else ids < self.begin
        left = left[:, None]
        may = jnp.where(left > 0, ids >= self.first_code, jnp.where(left == 0, ids == self.end_image, text))
        return jnp.where(may, logits, -jnp.inf)

    def after(self, ids: np.ndarray, what: str = "the prompt") -> int:
        """The state behind a prompt, on the host.

        Args:
          ids: int [T], of the vocabulary.
          what: the prompt, for messages.

        Raises:
          TokenLabError: an id that cannot stand where it stands.
        """
        left = OUTSIDE
        for at, value in enumerate(np.asarray(ids).tolist()):
            if left == OUTSIDE:
                fits, expected = value <= self.begin, "text, or the beginning of a picture"
                left = self.per_picture if value == self.begin else OUTSIDE
            elif left:
                fits, expected = (
                    value >= self.first_code,
                    f"a code, {left} of the picture being still to come",
                )
                left -= 1
            else:
                fits, expected = value == self.end_image, "the end of the picture, whose codes are all there"
                left = OUTSIDE
            if not fits:
                raise TokenLabError(
                    f"generate: {what} has {self._called(value)} at place {at}; expected {expected}."
                )
        return left

    def _called(self, value: int) -> str:
        if value >= self.first_code:
            return f"code {value - self.first_code}"
        named = {self.begin: "the beginning of a picture", self.end_image: "the end of a picture"}
        return named.get(value, f"id {value} of text")
