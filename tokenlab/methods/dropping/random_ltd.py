"""random_ltd: random layerwise token dropping in training (Yao et al. 2022, arXiv 2211.11586).

Claim: GPT-3 1.3B pre-trained with a third less compute and a quarter less time at like zero-shot accuracy (abstract).

Every layer but the first and the last computes only a random subset of the tokens, each layer and each example its own;
the others go around it. There is no score, no token is special, nothing is learned, and the trained model is the dense
one. With x [B, N, D] the input of such a layer and K kept:

    S [B, K]: distinct positions, uniform, ascending           section 3.1
    x[b, S[b]] <- layer(x[b, S[b]])                            attention inside sees the K alone, in their order
    x[b, others] <- x[b, others]                               exactly

    block + random_ltd(k)(block)*22 + block                    k from `config.stack_vars`

K rises to N along a straight line in multiples of q, which ends dense (section 3.2, `linear_keep_schedule`): in a
configuration "linear(128, 2048, until=66.7%, multiple=16)". Each value is a program to compile, so that a few values do
(`values=8`; `bucketed`). The learning rate follows the layer tokens, which are what is computed (section 4):
`config.optimizer.schedule.clock = "layer_tokens"`, or `layer_token_lr`.

Positions, masks of padding and documents go with their tokens; rotary positions are those in the whole sequence. Here a
body of two blocks, `random_ltd(k)(block*2)`, gives both one subset: an ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.core.ramp import Ramp
from tokenlab.core.tokens import Tokens
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.item import Amount, Body, Item, Params, kept
from tokenlab.ops import carry, select


def random_token_indices(key: Array, *, layers: int, batch: int, n: int, k: int, protected: int = 0) -> Array:
    """K positions for every layer and example, each subset of that size as likely as any other.

    Args:
      key: a `jax.random.key`.
      layers, batch: how many draws.
      n: N, positions to draw from.
      k: K, in 1..N - protected.
      protected: the first so many are always there, in addition to the K.

    Returns:
      [layers, B, protected + K] int32, ascending and distinct in each row.

    Raises:
      TokenLabError: K or `protected` out of range.
    """
    scores = select.random_scores(key, layers * batch, n)
    return select.top_k(scores, k, protected=protected).reshape(layers, batch, protected + k)


@dataclass(frozen=True)
class RandomLTD(Item):
    """`random_ltd(64)(block)`: 64 random tokens go through the block, in training alone.

    Attributes:
      keep: K, an int in 1..present or a fraction in (0, 1] of the tokens present. With all, the body runs as it is.
      protect: the tokens that a model protects (CLS, registers) are always there, and K counts the others; by
        default they are dropped like any other, as in the paper.
      train_only: True by default; False also drops in evaluation, the same tokens at every call.
    """

    keep: Amount
    protect: bool = False

    wraps: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True
    examples: ClassVar[tuple[str, ...]] = (
        "block + random_ltd(7)(block)*2 + block",
        "block + random_ltd(0.5, protect=True)(block*2)",
        "random_ltd(1.0)(block) + block",
    )

    train_only: bool = field(default=True, kw_only=True)

    @property
    def causal(self) -> bool:
        """Which tokens go through depends on no token."""
        return True

    def inside(self, present: int, protected: int) -> int:
        """K, and the protected tokens where they are."""
        protected = protected if self.protect else 0
        return protected + kept(self.keep, present, protected, "random_ltd: keep")

    def inside_protected(self, protected: int) -> int:
        """None, unless they stay."""
        return protected if self.protect else 0

    def __call__(
        self,
        params: Params,
        tokens: Tokens,
        context: Context,
        readings: Mapping[str, Array],
        key: Array,
        body: Body | None = None,
    ) -> tuple[Tokens, Aux]:
        """[B, N, ...] -> [B, N, ...]; tokens that are not drawn come out as they went in."""
        del params, context, readings
        inside = self.inside_protected(tokens.protected)
        whole = tokens.replace(protected=inside)
        if body.count == tokens.count:
            done, aux = body(whole)
            return done.replace(protected=tokens.protected), aux
        (indices,) = random_token_indices(
            key, layers=1, batch=tokens.batch, n=tokens.count, k=body.count - inside, protected=inside
        )
        done, aux = body(carry.take(whole, indices))
        return carry.restore(tokens, done, indices), aux


def ltd_layers(layers: int, chosen: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers that drop: all but the first and the last of `layers`, or those chosen, checked.

    Raises:
      ConfigError: fewer than three layers to choose from, or chosen ones that are none, doubled or out of range.
    """
    found = tuple(range(1, layers - 1)) if chosen is None else tuple(chosen)
    if not found or len(set(found)) < len(found) or not all(0 <= layer < layers for layer in found):
        raise ConfigError(
            f"random-LTD: the dropping layers are {list(found)} of {layers}: expected at least one, distinct, in "
            f"0..{layers - 1}."
        )
    return found


def linear_keep_schedule(step: int, *, k_min: int, k_max: int, require_steps: int, multiple: int = 1) -> int:
    """K at a step: floor(step (K_max - K_min) / T + K_min), down to a multiple, at most K_max (section 3.2).

    In integers, exactly. A K_max that is no multiple is reached when the line has passed the multiple behind it; a
    K_min that is none begins at the multiple below.

    Args:
      step: steps already done, >= 0.
      k_min, k_max: 1 <= K_min < K_max; K_min = K_max is the constant.
      require_steps: T >= 1.
      multiple: q >= 1, and at most K_min where K_min < K_max: no step may have 0 tokens.

    Raises:
      ConfigError: an argument out of range.
    """
    if not 1 <= k_min <= k_max:
        raise ConfigError(f"random-LTD: k_min is {k_min} and k_max {k_max}: expected 1 <= k_min <= k_max.")
    if step < 0 or require_steps < 1 or multiple < 1:
        raise ConfigError(
            f"random-LTD: step {step}, require_steps {require_steps} and multiple {multiple}: expected at least 0, 1 "
            "and 1."
        )
    if k_min == k_max:
        return k_max
    if k_min < multiple:
        raise ConfigError(
            f"random-LTD: k_min is {k_min}, which multiple {multiple} rounds down to 0 tokens: expected at least "
            f"{multiple}."
        )
    return Ramp(k_min, k_max, 0, require_steps, multiple=multiple).at(step)


def bucketed(
    schedule: Callable[[int], int], buckets: int, *, k_min: int, k_max: int, multiple: int = 1
) -> Callable[[int], int]:
    """`schedule` in at most so many values, each a program to compile: evenly spaced from K_min to K_max.

    A value is the largest of them that is not above the schedule's, so that no step computes more than without.

    Args:
      schedule: of the step, from K_min to K_max.
      buckets: values, >= 2.
      k_min, k_max: 1 <= K_min < K_max.
      multiple: all values but K_max are multiples of it, rounded down.

    Raises:
      ConfigError: an argument out of range.
    """
    if buckets < 2 or not 1 <= k_min < k_max or multiple < 1:
        raise ConfigError(
            f"random-LTD: {buckets} buckets from {k_min} to {k_max} in multiples of {multiple}: expected at least 2 "
            "buckets, 1 <= k_min < k_max and a multiple >= 1."
        )
    spaced = (k_min + place * (k_max - k_min) // (buckets - 1) for place in range(buckets - 1))
    values = sorted({max(value - value % multiple, 1) for value in spaced} | {k_max})
    return lambda step: max([value for value in values if value <= schedule(step)], default=values[0])


def layer_tokens(batch: int, n: int, k: int, layers: int, ltd_layers: int) -> int:
    """Tokens that enter layers in one step: B (K L_r + N (L - L_r)), section 4.

    Raises:
      ConfigError: K not in 1..N, or L_r not in 0..L.
    """
    _check_counts(n, k, layers, ltd_layers)
    return batch * (k * ltd_layers + n * (layers - ltd_layers))


def effective_tokens(n: int, k: int, layers: int, ltd_layers: int) -> int:
    """The mean of them over layers for one example, in whole tokens: floor((N (L - L_r) + K L_r) / L), as Megatron.

    Raises:
      ConfigError: as `layer_tokens`.
    """
    _check_counts(n, k, layers, ltd_layers)
    return (n * (layers - ltd_layers) + k * ltd_layers) // layers


def _check_counts(n: int, k: int, layers: int, ltd_layers: int) -> None:
    if not 1 <= k <= n or not 0 <= ltd_layers <= layers:
        raise ConfigError(
            f"random-LTD: k is {k} of n {n} and ltd_layers {ltd_layers} of {layers}: expected k in 1..n and "
            "ltd_layers in 0..layers."
        )


def layer_token_lr(
    consumed: Array | int | float,
    *,
    peak: float,
    floor: float,
    warmup_tokens: float,
    total_tokens: float,
    decay: Literal["cosine", "linear"] = "cosine",
) -> Array:
    """The learning rate after so many tokens (section 4; Megatron-DeepSpeed's `get_lr` with token counts).

    With c consumed and W warm-up tokens, T in all and u = (c - W) / (T - W):

        peak c / W                                      up to W
        floor + (peak - floor) (1 + cos(pi u)) / 2      cosine
        floor + (peak - floor) (1 - u)                  linear
        floor                                           beyond T

    Args:
      consumed: c >= 0, any shape; counts that are not JAX arrays are taken exactly.
      peak, floor: peak >= floor >= 0.
      warmup_tokens, total_tokens: 0 <= W < T.
      decay: "cosine" or "linear".

    Returns:
      float32, shaped like `consumed`.

    Raises:
      ConfigError: an argument out of range.
    """
    if not 0 <= warmup_tokens < total_tokens:
        raise ConfigError(
            f"random-LTD: warmup_tokens is {warmup_tokens} of total_tokens {total_tokens}: expected 0 or more, "
            "and less than all."
        )
    if not 0 <= floor <= peak or decay not in ("cosine", "linear"):
        raise ConfigError(
            f"random-LTD: floor {floor}, peak {peak} and decay {decay!r}: expected 0 <= floor <= peak and 'cosine' or "
            "'linear'."
        )
    if not isinstance(consumed, Array):  # on the host counts beyond 2^24 are exact
        consumed = np.asarray(consumed, np.float64)
    left = jnp.clip((total_tokens - consumed) / (total_tokens - warmup_tokens), 0.0, 1.0)
    if decay == "cosine":
        left = jnp.sin(jnp.pi / 2 * left) ** 2  # is (1 + cos(pi u)) / 2, and exact where that is nearly 0
    rate = floor + left * (peak - floor)
    if warmup_tokens:
        rate = jnp.where(consumed <= warmup_tokens, peak * consumed / warmup_tokens, rate)
    return jnp.asarray(rate, jnp.float32)


item = RandomLTD
BENCHMARK = {
    "half of 10 of 12": "block + random_ltd(0.5)(block)*10 + block",
    "half of 10 of 12, CLS always": "block + random_ltd(0.5, protect=True)(block)*10 + block",
}
