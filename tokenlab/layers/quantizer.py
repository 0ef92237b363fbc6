"""Quantisers: features to codes of a finite set and back, as modules of one interface; see `tokenlab.ops.quantize`.

    quantizer(z) -> Quantized(z_q, codes, losses, metrics)
    quantizer.lookup(codes) -> z_q
    quantizer.codes_count

Both look at features through a few dimensions: `down` is a linear map to them, `up` one back from the code. Codes in
few dimensions (factorized codes, Yu et al. 2021, arXiv 2110.04627, section 3.2) are what keeps a codebook in use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.ops import quantize
from tokenlab.ops.quantize import Distance
from tokenlab.sharding.constrain import constrain

Axes = Mapping[str, tuple[str | None, ...]]

DECODING = ("codebook", "up")
"""Parameters that `lookup` reads."""


class Quantized(NamedTuple):
    """What a quantiser makes of features [B, ..., D].

    Attributes:
      z_q: what the codes stand for, [B, ..., D], with the gradient of the features.
      codes: [B, ...] int32 in [0, codes_count).
      losses: name -> float32 scalar, weighted already.
      metrics: name -> (sum, count), as `tokenlab.layers.context.Aux` has them: "batch_perplexity" and
        "batch_codes_used" of the codes of this batch (`tokenlab.ops.quantize.Usage`), and for VQ "code_distance".
    """

    z_q: Array
    codes: Array
    losses: Mapping[str, Array]
    metrics: Mapping[str, tuple[Array, Array]]


class _Quantizer(nn.Module):
    """What both have in common: the maps into and out of the codes' dimensions, and how codes are told of.

    Attributes:
      features: D.
      dtype: compute dtype of the two maps; codes are chosen in float32.
    """

    features: int
    dtype: Any = jnp.float32

    @property
    def codes_count(self) -> int:
        """How many codes there are."""
        raise TypeError(f"{type(self).__name__} does not define codes_count.")

    @property
    def code_width(self) -> int:
        """Dimensions of a code."""
        raise TypeError(f"{type(self).__name__} does not define code_width.")

    def axes(self) -> Axes:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return {
            "down/kernel": ("embed", None),
            "down/bias": (None,),
            "up/kernel": (None, "embed"),
            "up/bias": (None,),
        }

    def setup(self) -> None:
        """Declares the two maps."""
        self.down = nn.Dense(self.code_width, dtype=self.dtype)
        self.up = nn.Dense(self.features, dtype=self.dtype)

    def _used(self, codes: Array, weight: Array | None) -> dict[str, tuple[Array, Array]]:
        found = quantize.usage(quantize.histogram(codes, self.codes_count, weight))
        one = jnp.float32(1)
        return {"batch_perplexity": (found.perplexity, one), "batch_codes_used": (found.used, one)}


class VQ(_Quantizer):
    """The nearest of K learned codes (van den Oord et al. 2017, arXiv 1711.00937).

    Attributes:
      codes: K, at least 2.
      width: dimensions of a code, at least 1.
      distance: "cosine", features and codes on the unit sphere as in ViT-VQGAN (Yu et al. 2021), or "euclidean".
      commitment: weight beta of the loss that keeps features near their codes, >= 0.
    """

    codes: int = 512
    width: int = 4
    distance: Distance = "cosine"
    commitment: float = 0.25

    @property
    def codes_count(self) -> int:
        """How many codes there are."""
        return self.codes

    @property
    def code_width(self) -> int:
        """Dimensions of a code."""
        return self.width

    def axes(self) -> Axes:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return {**super().axes(), "codebook": ("embed", None)}

    def setup(self) -> None:
        """Declares the two maps and the codebook."""
        if self.codes < 2 or self.width < 1:
            raise ConfigError(
                f"a codebook has at least 2 codes of at least 1 dimension; got {self.codes} of {self.width}."
            )
        if not self.commitment >= 0:
            raise ConfigError(f"commitment must be at least 0; got {self.commitment}.")
        super().setup()
        # Both ends of a distance begin at the same scale: `down` keeps that of normed features, which is 1.
        self.codebook = self.param(
            "codebook", nn.initializers.normal(1.0), (self.codes, self.width), jnp.float32
        )

    def _rows(self, codes: Array) -> Array:
        table = constrain(
            self.codebook, None, None
        )  # whole on each device: rows are then taken where codes lie
        return self._placed(table)[codes]

    def _placed(self, x: Array) -> Array:
        """On the unit sphere, where angles are compared."""
        return quantize.unit(x) if self.distance == "cosine" else x.astype(jnp.float32)

    def __call__(self, z: Array, weight: Array | None = None) -> Quantized:
        """Quantise features.

        Args:
          z: [B, ..., D].
          weight: [B] of each example in losses and metrics, 0 for one that only fills the batch; None for ones.
        """
        low = self._placed(self.down(z))
        codes = quantize.nearest(low, constrain(self.codebook, None, None), self.distance)
        rows = self._rows(codes)
        far = quantize.distances(low, rows)
        losses = {
            "codebook_loss": _mean(far.codebook, weight),
            "commitment_loss": self.commitment * _mean(far.commitment, weight),
        }
        metrics = {
            **self._used(codes, weight),
            "code_distance": (jax.lax.stop_gradient(losses["codebook_loss"]), jnp.float32(1)),
        }
        return Quantized(self.up(quantize.straight_through(low, rows)), codes, losses, metrics)

    def lookup(self, codes: Array) -> Array:
        """[...] int32 -> what the codes stand for, [..., D]."""
        return self.up(self._rows(codes))


class FSQ(_Quantizer):
    """Each of a few dimensions rounded to its levels (Mentzer et al. 2023, arXiv 2309.15505): no codebook, no loss.

    Attributes:
      levels: of each dimension, at least 2; their product is the number of codes. The paper's (table 1): (8, 6, 5)
        for 2**8, (8, 5, 5, 5) for 2**10, (7, 5, 5, 5, 5) for 2**12, (8, 8, 8, 6, 5) for 2**14.
    """

    levels: tuple[int, ...] = (8, 6, 5)

    @property
    def codes_count(self) -> int:
        """How many codes there are."""
        return math.prod(self.levels)

    @property
    def code_width(self) -> int:
        """Dimensions of a code."""
        return len(self.levels)

    def setup(self) -> None:
        """Declares the two maps."""
        quantize.check_levels(self.levels)
        super().setup()

    def __call__(self, z: Array, weight: Array | None = None) -> Quantized:
        """Quantise features; arguments as `VQ`."""
        low = quantize.fsq(self.down(z), self.levels)
        codes = quantize.fsq_codes(jax.lax.stop_gradient(low), self.levels)
        return Quantized(self.up(low), codes, {}, self._used(codes, weight))

    def lookup(self, codes: Array) -> Array:
        """[...] int32 -> what the codes stand for, [..., D]."""
        return self.up(quantize.fsq_values(codes, self.levels))


def _mean(each: Array, weight: Array | None) -> Array:
    """Of [B, ...] over everything, examples weighing `weight` [B]."""
    over = each.reshape(each.shape[0], -1).mean(axis=1)
    if weight is None:
        return over.mean()
    return jnp.sum(over * weight) / jnp.maximum(jnp.sum(weight), 1.0)
