"""Routing: which expert computes which token, with what weight, and what keeps the experts balanced.

Gates [B, N, E] come in; indices and weights go out, which `tokenlab.ops.dispatch` executes. An example is a group:
tokens of different examples do not compete. Rankings are stable sorts, so ties go to the lower index, and nothing is
gathered across a sharded batch (see `tokenlab.ops.select`).

Letters: B examples, N tokens, E experts, K choices of a token, P slots of an expert (soft), C places in an expert's
buffer (hard).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tokenlab.core.errors import ConfigError, ShapeError, TokenLabError, suggest

Rounding: TypeAlias = Literal["ceil", "round"]

EPS = 1e-6  # of `unit`; that of the reference


class Chosen(NamedTuple):
    """Every token chose K experts.

    Attributes:
      expert: [B, N, K] int32 in 0..E-1, best first; E for padding.
      place: [B, N, K] int32, place in that expert's buffer; at or beyond the capacity the choice is dropped.
      weight: [B, N, K] float32, what the expert's result is multiplied by.
    """

    expert: Array
    place: Array
    weight: Array


class Taken(NamedTuple):
    """Every expert took C tokens.

    Attributes:
      token: [B, E, C] int32 in 0..N-1, best first.
      weight: [B, E, C] float32; 0 for padding.
    """

    token: Array
    weight: Array


def capacity(
    tokens: int,
    experts: int,
    factor: float,
    *,
    choices: int = 1,
    rounding: Rounding = "ceil",
    multiple_of: int = 1,
) -> int:
    """Places in each expert's buffer: C = tokens * choices * factor / experts, rounded, raised to a multiple.

    Args:
      tokens: N of a group.
      experts: E.
      factor: 1.0 is room for an even spread; > 0.
      choices: K.
      rounding: "ceil", or "round" to the nearest, halves to even (as Python).
      multiple_of: C is raised to a multiple of this; it changes what is computed, so log `C * E / (N * K)`.

    Raises: TokenLabError for numbers out of range, or a capacity below 1.
    """
    for name, value in (("tokens", tokens), ("experts", experts), ("choices", choices)):
        if value < 1:
            raise TokenLabError(f"{name} must be at least 1; got {value}.")
    if not (math.isfinite(factor) and factor > 0):
        raise TokenLabError(f"the capacity factor must be a number above 0; got {factor}.")
    check_word("rounding", rounding, ("ceil", "round"))
    if multiple_of < 1:
        raise TokenLabError(f"multiple_of must be at least 1; got {multiple_of}.")
    exact = tokens * choices * factor / experts
    places = math.ceil(round(exact, 9)) if rounding == "ceil" else round(exact)
    if places < 1:
        raise TokenLabError(
            f"the capacity rounds to {places}: {tokens} tokens x {choices} choices x factor {factor} / {experts} "
            f"experts is {exact:.3g}; use fewer experts or a larger factor."
        )
    return -(-places // multiple_of) * multiple_of


def unit(x: Array, axis: int = -1) -> Array:
    """x / sqrt(sum of squares + 1e-6) along `axis`."""
    return x * lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + EPS)


def soft_weights(logits: Array, valid: Array | None = None) -> tuple[Array, Array]:
    """Soft MoE: dispatch weights, a softmax over tokens, and combine weights, a softmax over slots.

    Args:
      logits: [B, N, E, P], float32.
      valid: [B, N] bool; padding is in no slot and gets zeros. An example of padding alone gives zeros, too.

    Returns:
      dispatch [B, N, E, P], summing to 1 over N; combine [B, N, E, P], summing to 1 over (E, P).
    """
    if valid is not None:
        there = valid[:, :, None, None]
        logits = jnp.where(there, logits, jnp.finfo(logits.dtype).min)
    # Each along the last axis of an array laid out for it: on CPU that is faster than reducing across rows.
    dispatch = jnp.moveaxis(jax.nn.softmax(jnp.moveaxis(logits, 1, -1), axis=-1), -1, 1)
    combine = jax.nn.softmax(logits.reshape(*logits.shape[:2], -1), axis=-1).reshape(logits.shape)
    if valid is not None:
        dispatch, combine = jnp.where(there, dispatch, 0.0), jnp.where(there, combine, 0.0)
    return dispatch, combine


def best(gates: Array, k: int) -> Array:
    """Indices of the k largest along the last axis, best first, ties to the lower: [..., k] int32, no gradient."""
    return jnp.argsort(-lax.stop_gradient(gates), axis=-1, stable=True)[..., :k].astype(jnp.int32)


def choose(gates: Array, k: int, *, rank_by: Array | None = None) -> tuple[Array, Array]:
    """The k best experts of every token, and their gates.

    Args:
      gates: [..., E].
      rank_by: [..., E], ranked by in place of the gates (for a bias that balances).

    Returns: expert [..., k] int32; weight [..., k], with the gates' gradient.
    """
    _check_k(k, gates.shape[-1])
    expert = best(gates if rank_by is None else rank_by, k)
    return expert, jnp.take_along_axis(gates, expert, axis=-1)


def place(expert: Array, *, priority: Array | None = None) -> Array:
    """Place of every choice in its expert's buffer: all first choices of the group before all second ones.

    Args:
      expert: [B, N, K] int32; choices of what is no expert (E) queue among themselves.
      priority: [B, N]; tokens with the larger come first (batch-priority routing, Riquelme et al. 2021, section 4).
        None: in the order of the sequence.

    Returns: [B, N, K] int32, 0 for the first in a buffer.
    """

    def one(expert: Array, priority: Array | None) -> Array:
        n, k = expert.shape
        order = jnp.arange(n) if priority is None else jnp.argsort(-lax.stop_gradient(priority), stable=True)
        wanted = expert[order].T.reshape(-1)  # [K * N], choice by choice
        queue = jnp.argsort(wanted, stable=True)  # entries expert by expert, in order of arrival
        first = jnp.searchsorted(wanted[queue], wanted[queue], side="left", method="sort")
        rank = jnp.arange(n * k) - first
        places = jnp.zeros((n * k,), jnp.int32).at[queue].set(rank.astype(jnp.int32), unique_indices=True)
        by_arrival = places.reshape(k, n).T
        return jnp.zeros((n, k), jnp.int32).at[order].set(by_arrival, unique_indices=True)

    if priority is None:
        return jax.vmap(lambda e: one(e, None))(expert)
    return jax.vmap(one)(expert, priority)


def tokens_choice(
    gates: Array,
    k: int,
    *,
    batch_priority: bool = False,
    valid: Array | None = None,
    rank_by: Array | None = None,
) -> Chosen:
    """Every token takes its k best experts and queues for a place with each.

    Args:
      gates: [B, N, E], float32. The weights are the gates, not renormalised over the k.
      batch_priority: tokens with a larger best gate queue first, so that the least sure ones are dropped.
      valid: [B, N] bool; padding takes no place and has weight 0.
      rank_by: see `choose`.

    Raises: TokenLabError unless 1 <= k <= E.
    """
    num_experts = gates.shape[-1]
    expert, weight = choose(gates, k, rank_by=rank_by)
    priority = jnp.max(gates, axis=-1) if batch_priority else None
    if valid is not None:
        expert = jnp.where(valid[..., None], expert, num_experts)
        weight = jnp.where(valid[..., None], weight, 0.0)
    return Chosen(expert, place(expert, priority=priority), weight)


def experts_choice(gates: Array, places: int, *, valid: Array | None = None) -> Taken:
    """Every expert takes the `places` tokens with the largest gate for it.

    Args:
      gates: [B, N, E], float32, >= 0.
      places: C, 1..N.
      valid: [B, N] bool; padding is taken last and has weight 0.

    Raises: TokenLabError unless 1 <= places <= N.
    """
    n = gates.shape[1]
    if not 1 <= places <= n:
        raise TokenLabError(f"each expert takes {places} tokens, of {n} there are; expected 1..{n}.")
    if valid is not None:
        gates = jnp.where(valid[..., None], gates, -1.0)
    by_expert = jnp.swapaxes(gates, 1, 2)
    token = best(by_expert, places)
    weight = jnp.take_along_axis(by_expert, token, axis=-1)
    return Taken(token, weight if valid is None else jnp.maximum(weight, 0.0))


def _check_k(k: int, experts: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= experts:
        raise TokenLabError(
            f"a token chooses k = {k} of {experts} experts; k must be a whole number in 1..{experts}."
        )


def check_word(what: str, word: str, known: Iterable[str]) -> None:
    """Raise ConfigError unless `word` is one of `known`; `what` names the setting, such as "dropless: gate"."""
    options = list(known)
    if word not in options:
        raise ConfigError(f"{what} {word!r} is unknown.{suggest(str(word), options)}")


def check_tokens(x: Array, valid: Array | None) -> Array:
    """x with zeros in padding, so that nothing there, NaN neither, can reach a sum over tokens.

    Raises ShapeError unless x is floating [B, N, D], none of the three 0, and `valid` bool [B, N] with a valid token in
    every example. The last can only be seen where `valid` is a concrete array; inside a compiled program such an
    example gives zeros.
    """
    if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(
            f"a router takes tokens [B, N, D] of a floating dtype; got {x.dtype}{list(x.shape)}."
        )
    if 0 in x.shape:
        raise ShapeError(f"a router takes at least one token; got {x.dtype}{list(x.shape)}.")
    if valid is None:
        return x
    if valid.shape != x.shape[:2] or valid.dtype != jnp.bool_:
        raise ShapeError(f"valid is {valid.dtype}{list(valid.shape)}; expected bool{list(x.shape[:2])}.")
    if not isinstance(valid, jax.core.Tracer):
        some = np.asarray(valid).any(axis=1)
        if not some.all():
            row = int(some.argmin())
            raise ShapeError(
                f"example {row} is padding alone (valid is False throughout); leave it out of the batch."
            )
    return jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))


# Balance. Means and sums run over valid tokens; all take float32 and return scalars that the caller weights.


def importance_loss(gates: Array, valid: Array | None = None) -> Array:
    """(std / mean)^2 over experts of the gates summed over a group, mean over groups (Shazeer et al. 2017, eq. 6).

    gates: [B, N, E], softmax of the logits without noise.
    """
    kept = gates if valid is None else jnp.where(valid[..., None], gates, 0.0)
    return jnp.mean(_squared_variation(kept.sum(axis=1)))


def load_loss(clean: Array, noisy: Array, k: int, std: float, valid: Array | None = None) -> Array:
    """(std / mean)^2 over experts of the chance that a token would choose them, were its noise drawn anew.

    Riquelme et al. 2021 (arXiv 2106.05974), appendix A: with thr the k-th largest noisy logit of the token,
    p(e) = 1 - Phi((thr - clean_e) / std), averaged over the group's tokens. Gradient flows through thr.

    Args:
      clean, noisy: [B, N, E] logits.
      std: of the noise that was added, > 0; the loss exists only with noise.
    """
    if not std > 0:
        raise TokenLabError(f"the load loss needs router noise; its std is {std}.")
    threshold = jnp.take_along_axis(noisy, best(noisy, k)[..., k - 1 :], axis=-1)
    chance = 1.0 - jax.scipy.stats.norm.cdf((threshold - clean) / std)
    return jnp.mean(_squared_variation(_token_mean(chance, valid)))


def gshard_loss(gates: Array, expert: Array, valid: Array | None = None) -> Array:
    """E^2 mean_e(f_e g_e), f the share of first choices (no gradient), g the mean gate; mean over groups.

    Lepikhin et al. 2020 (arXiv 2006.16668), eq. 4. gates: [B, N, E]; expert: [B, N, K].
    """
    num_experts = gates.shape[-1]
    first = jax.nn.one_hot(expert[..., 0], num_experts)
    return num_experts**2 * jnp.mean(_token_mean(first, valid) * _token_mean(gates, valid))


def balance_loss(probs: Array, expert: Array, valid: Array | None = None) -> Array:
    """E sum_e f_e p_e over the whole batch: 1 when choices and probabilities are spread evenly.

    f_e is expert e's share of all choices (no gradient), p_e the mean of softmax over all tokens (Fedus et al. 2021,
    arXiv 2101.03961, eq. 4; global over the batch as in GRIN, arXiv 2409.12136, section 3.3).

    Args:
      probs: [B, N, E].
      expert: [B, N, K]; E for padding.
    """
    num_experts = probs.shape[-1]
    chosen = jax.nn.one_hot(expert, num_experts).sum(axis=-2)  # padding: zeros
    share = chosen.sum(axis=(0, 1)) / jnp.maximum(chosen.sum(), 1.0)
    kept = probs if valid is None else jnp.where(valid[..., None], probs, 0.0)
    count = probs.shape[0] * probs.shape[1] if valid is None else jnp.maximum(valid.sum(), 1)
    return num_experts * jnp.sum(lax.stop_gradient(share) * kept.sum(axis=(0, 1)) / count)


def z_loss(logits: Array, valid: Array | None = None) -> Array:
    """Mean over tokens of logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906, eq. 5). logits: [B, N, E]."""
    squares = jax.nn.logsumexp(logits, axis=-1) ** 2
    if valid is None:
        return jnp.mean(squares)
    return jnp.sum(jnp.where(valid, squares, 0.0)) / jnp.maximum(valid.sum(), 1)


def load(expert: Array, num_experts: int, kept: Array | None = None) -> Array:
    """Share of all choices that each expert got, [E] float32, summing to 1.

    Args:
      expert: [B, N, K]; E for padding.
      kept: [B, N, K] bool; False for choices that were dropped.
    """
    counted = jax.nn.one_hot(expert, num_experts)
    if kept is not None:
        counted = jnp.where(kept[..., None], counted, 0.0)
    total = counted.sum(axis=tuple(range(counted.ndim - 1)))
    return total / jnp.maximum(total.sum(), 1.0)


def entropy(probs: Array, valid: Array | None = None) -> Array:
    """Mean entropy of the routers' softmax over the last axis, in nats. probs: [B, N, E]."""
    each = -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)
    if valid is None:
        return jnp.mean(each)
    return jnp.sum(jnp.where(valid, each, 0.0)) / jnp.maximum(valid.sum(), 1)


def _squared_variation(x: Array) -> Array:
    """(std / mean)^2 along the last axis; 0 where all are 0."""
    mean = jnp.mean(x, axis=-1)
    return jnp.var(x, axis=-1) / jnp.where(mean == 0, 1.0, mean) ** 2


def _token_mean(x: Array, valid: Array | None) -> Array:
    """Mean over the tokens of each group: [B, N, E] -> [B, E]."""
    if valid is None:
        return jnp.mean(x, axis=1)
    kept = jnp.where(valid[..., None], x, 0.0).sum(axis=1)
    return kept / jnp.maximum(valid.sum(axis=1), 1)[:, None]
