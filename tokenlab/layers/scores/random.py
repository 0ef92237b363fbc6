"""random: every token is as likely to be kept as any other (random-LTD, Yao et al. 2022, arXiv 2211.11586)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jax import Array

from tokenlab.core.tokens import Tokens
from tokenlab.layers.item import Params, Score
from tokenlab.ops.select import random_scores


@dataclass(frozen=True)
class Random(Score):
    """Uniform draws in [0, 1), anew for every occurrence and step; in evaluation the same at every call."""

    stochastic: ClassVar[bool] = True
    causal: ClassVar[bool] = True

    def __call__(self, params: Params, tokens: Tokens, readings: Mapping[str, Array], key: Array) -> Array:
        """[B, N], float32."""
        del params, readings
        return random_scores(key, tokens.batch, tokens.count)


score = Random
