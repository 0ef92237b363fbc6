"""grin: a router trained by an estimate of its true gradient, no token dropped (Liu et al. 2024, arXiv 2409.12136).

Claim: GRIN 16x3.8B, with 6.6B active parameters, averages 79.58 over 20 benchmarks, where dense models of 7B and 14B on
the same data average 75.74 and 78.46 (their table 2).

Choosing the top experts is not differentiable; usual training differentiates the weights alone and never learns what
another choice would have given. SparseMixer-v2 samples the expert and corrects the gradient by Heun's third-order rule.
With router logits z = X W_r [T, E], for each of K choices:

    candidates: all i not chosen yet with (z_max - z_i) / max(|z_i|, z_max) <= 2 r          (`rule="code"`)
                                  or   z_max - z_i <= r (|z_i| + |z_max|)                     (`rule="paper"`)
    p = softmax of z over the candidates; no gradient through who is one
    training:  D ~ p;  B ~ Bernoulli(1/4);  c = 1 if D is the argmax or B, else 1/3
    inference: D = argmax, c = 1
    y = sum over choices of c p_D expert_D(x), differentiated as if c were 1                  (algorithm 1)

so dL/dz_j = <dL/dy, expert_D(x)> p_D ([j = D] - p_j). Each choice has candidates of its own, and the K weights do not
sum to 1. `version="v2star"` is algorithm 2: softmax of z / 2, Bernoulli(5/8), and the gradient doubled.

The gradient is exact where the loss is linear in y, and biased otherwise because the argmax uses c = 1 (Euler's rule),
for the sake of experts trained at full strength. tests/methods/experts/test_grin.py enumerates both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tokenlab.core.errors import ConfigError, TokenLabError
from tokenlab.layers import experts as banks
from tokenlab.layers.context import Aux
from tokenlab.methods.experts.dropless import describe
from tokenlab.ops import route
from tokenlab.ops.dispatch import Sorted

Rule: TypeAlias = Literal["code", "paper"]
Version: TypeAlias = Literal["v2", "v2star"]

FULL = {"v2": 1 / 4, "v2star": 5 / 8}  # probability of B


class Draws(NamedTuple):
    """What chance decides in one choice.

    Attributes:
      gumbel: [..., E], standard Gumbel: the sample is argmax(z + gumbel) over candidates.
      uniform: [...] in [0, 1): B is uniform < probability.
    """

    gumbel: Array
    uniform: Array


class Mixed(NamedTuple):
    """The choices of every token.

    Attributes:
      expert: [..., K] int32.
      weight: [..., K], c p_D in value; its gradient is that of p_D (v2star: of 2 p_D).
      factor: [..., K], c (v2star: c / 2): the value over what is differentiated.
    """

    expert: Array
    weight: Array
    factor: Array


def masked_softmax(
    z: Array, r: float, rule: Rule = "code", available: Array | None = None
) -> tuple[Array, Array]:
    """p over the candidates, zeros elsewhere, and who is one: both [..., E]; the mask carries no gradient.

    Args:
      z: [..., E] logits, float32.
      r: how far a candidate may lie below the largest, >= 0; 0 leaves the argmax alone.
      rule: the authors' code or their paper, which differ a little.
      available: [..., E] bool, experts not chosen yet.

    Raises: TokenLabError for a negative r or an unknown rule.
    """
    if not r >= 0:
        raise TokenLabError(f"grin: r must be at least 0; got {r}.")
    if rule not in ("code", "paper"):
        raise TokenLabError(f"grin: rule must be 'code' or 'paper'; got {rule!r}.")
    still = lax.stop_gradient(z)
    top = jnp.max(
        still if available is None else jnp.where(available, still, -jnp.inf), axis=-1, keepdims=True
    )
    if rule == "code":
        scale = jnp.maximum(jnp.abs(still), top)
        near = (top - still) / jnp.where(scale > 0, scale, 1.0) <= 2 * r
    else:
        near = top - still <= r * (jnp.abs(still) + jnp.abs(top))
    near |= still == top
    mask = near if available is None else near & available
    return jax.nn.softmax(jnp.where(mask, z, -1e30), axis=-1), mask  # -inf would make 0 * inf in the gradient


def sparse_mixer(
    z: Array,
    k: int,
    r: float,
    *,
    draws: Sequence[Draws] | None = None,
    version: Version = "v2",
    rule: Rule = "code",
) -> Mixed:
    """SparseMixer-v2: sample K experts and their weights, or take the best ones.

    Args:
      z: [..., E] logits, float32.
      k: K, 1..E.
      r: see `masked_softmax`.
      draws: one for each choice, in training; None at inference.
      version: algorithm 1 or 2 of the paper.
      rule: see `masked_softmax`.

    Raises: TokenLabError for settings out of range, or logits that are concrete and not finite.
    """
    count = z.shape[-1]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= count:
        raise TokenLabError(f"grin: a token chooses k = {k} of {count} experts; k must be in 1..{count}.")
    if version not in FULL:
        raise TokenLabError(f"grin: version must be one of {', '.join(FULL)}; got {version!r}.")
    if draws is not None and len(draws) != k:
        raise TokenLabError(f"grin: {k} choices need {k} draws; got {len(draws)}.")
    if not isinstance(z, jax.core.Tracer) and not np.isfinite(np.asarray(z)).all():
        raise TokenLabError("grin: the router's logits are not all finite.")
    twice = 2.0 if version == "v2star" and draws is not None else 1.0
    if version == "v2star":
        z = z / 2
    available = jnp.ones(z.shape, bool)
    experts, weights, factors = [], [], []
    for choice in range(k):
        p, mask = masked_softmax(z, r, rule, available)
        best = jnp.argmax(jnp.where(available, z, -jnp.inf), axis=-1)
        if draws is None:
            chosen, c = best, jnp.ones(best.shape, z.dtype)
        else:
            chosen = jnp.argmax(jnp.where(mask, z + draws[choice].gumbel, -jnp.inf), axis=-1)
            full = (chosen == best) | (draws[choice].uniform < FULL[version])
            c = jnp.where(full, 1.0, 1 / 3).astype(z.dtype)
        p = twice * jnp.take_along_axis(p, chosen[..., None], axis=-1)[..., 0]
        value = c * p / twice
        experts.append(chosen.astype(jnp.int32))
        weights.append(p + lax.stop_gradient(value - p))
        factors.append(c / twice)
        available &= jnp.arange(count) != chosen[..., None]
    return Mixed(*(jnp.stack(each, axis=-1) for each in (experts, weights, factors)))


def draw(key: Array, shape: tuple[int, ...], k: int) -> tuple[Draws, ...]:
    """Draws for K choices among logits of `shape`; every choice has a key of its own."""
    pairs = [jax.random.split(each) for each in jax.random.split(key, k)]
    return tuple(Draws(jax.random.gumbel(a, shape), jax.random.uniform(b, shape[:-1])) for a, b in pairs)


class GRIN(nn.Module):
    """`GRIN(num_experts=16)(x)` on normed tokens [B, N, D]: the result, and losses, metrics and load.

    Attributes:
      num_experts: E.
      k: choices of each token, 1..E.
      r: how far below the best logit a candidate may lie, >= 0 (0.01 in the published model).
      version, rule: of SparseMixer, see above.
      expert_grad: experts get the gradient c p_D dL/dy ("code") or p_D dL/dy ("paper", algorithm 1).
      balance: weight of the balance loss over the whole batch, >= 0 (0.001).
      expert: what an expert is, see `tokenlab.layers.experts.bank`; None for an MLP of hidden width 4 D.
      shared: further experts that every token passes.
      same_init: all experts begin alike.
      implementation, exchange, transport: see `Dropless`.
    """

    num_experts: int
    k: int = 2
    r: float = 0.01
    version: Version = "v2"
    rule: Rule = "code"
    expert_grad: Literal["code", "paper"] = "code"
    balance: float = 0.001
    expert: nn.Module | None = None
    shared: int = 0
    same_init: bool = False
    implementation: Literal["ragged", "blocks", "dense", "megablox", "tokamax"] | None = None
    exchange: Literal["padded", "ragged", "gather"] | None = None
    transport: Literal["bfloat16"] | None = None

    def experts_per_token(self, tokens: int) -> float:
        """Experts computed for each token: K."""
        del tokens
        return float(self.k)

    @property
    def stochastic(self) -> bool:
        """Draws at random in training."""
        return True

    def axes(self) -> banks.Axes:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return banks.layer_axes(self, {"router": ("embed", None)})

    @nn.compact
    def __call__(self, x: Array, *, valid: Array | None = None, train: bool = False) -> tuple[Array, Aux]:
        """[B, N, D] -> [B, N, D] in x's dtype.

        Args:
          x: normed tokens.
          valid: [B, N] bool, False for padding: it is not computed and gets zeros.
          train: sample experts, losses on; it needs the rng "ffn".

        Raises: ShapeError for tokens that are not floating [B, N, D]; ConfigError, TokenLabError for settings out of
          range or an implementation that cannot run.
        """
        if not self.balance >= 0:
            raise ConfigError(f"grin: balance must be at least 0; got {self.balance}.")
        route.check_word("grin: expert_grad", self.expert_grad, ("code", "paper"))
        x = route.check_tokens(x, valid)
        banks.check_transport("grin", self.transport)
        count = self.num_experts
        bank = banks.layer_bank(self, x, train=train)
        logits = banks.router_kernel(self, x, count)
        with jax.named_scope("router"):
            draws = draw(self.make_rng("ffn"), logits.shape, self.k) if train else None
            chosen, weight, factor = sparse_mixer(
                logits, self.k, self.r, draws=draws, version=self.version, rule=self.rule
            )
            if valid is not None:
                chosen = jnp.where(valid[..., None], chosen, count)
                weight = jnp.where(valid[..., None], weight, 0.0)
            boost = 1 / factor if self.expert_grad == "paper" else None
            plan = Sorted(chosen, weight, count, self.transport, self.exchange, boost)
        y = banks.run(self, plan, bank, x, valid, train=train)
        return y, describe(logits, chosen, count, valid, balance=self.balance, z=0.0, train=train)


ffn = banks.as_ffn(
    GRIN,
    examples=(
        "block + block(ffn=grin(experts=4))",
        "block + block(ffn=grin(experts=3, k=1, r=0.2, version=v2star, expert_grad=paper, expert=swiglu))",
    ),
)
BENCHMARK = {"16 experts, top 2": "block*6 + block(ffn=grin(experts=16))*6"}
