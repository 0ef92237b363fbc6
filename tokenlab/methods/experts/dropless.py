"""dropless: every token is computed by its K experts, whatever their load (Gale et al. 2022, arXiv 2211.15841).

Claim: MegaBlocks trains up to 40 % faster end to end than Tutel with padding to the largest load, and drops
no token (their abstract).

Tokens are sorted by expert and the experts' products run over groups of rows of different sizes (grouped products), so
there is no capacity, no dropped token and no padding. Over an `expert` mesh axis the sorted rows are exchanged.

    s = X W_r                                      X [N, D], W_r [D, E]
    gate "softmax":       g = softmax(s), weights are the K largest g
    gate "top_softmax":   weights are the softmax over the K largest s alone, summing to 1
    gate "sigmoid":       g = sigmoid(s), weights are the K largest g over their sum (K > 1)

With weights that sum to 1 and K = 1 the weight is the constant 1 and the router would learn nothing: that is refused.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.layers import experts as banks
from tokenlab.layers.context import Aux
from tokenlab.ops import route
from tokenlab.ops.dispatch import Sorted


class Dropless(nn.Module):
    """`Dropless(num_experts=8, k=2)(x)` on normed tokens [B, N, D]: the result, and losses, metrics and load.

    Attributes:
      num_experts: E.
      k: choices of each token, 1..E.
      gate: what the weights are, see above.
      balance: weight of the balance loss over the whole batch, >= 0.
      z: weight of the router's z-loss, >= 0.
      expert: what an expert is, see `tokenlab.layers.experts.bank`; None for an MLP of hidden width 4 D.
      shared: further experts that every token passes.
      same_init: all experts begin alike.
      implementation: of the grouped products, see `tokenlab.ops.grouped`.
      exchange: between devices, see `tokenlab.ops.exchange`.
      transport: "bfloat16" rounds tokens and results on their way; None keeps their dtype.
    """

    num_experts: int
    k: int = 2
    gate: Literal["softmax", "top_softmax", "sigmoid"] = "softmax"
    balance: float = 0.01
    z: float = 0.0
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

    def axes(self) -> banks.Axes:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return banks.layer_axes(self, {"router": ("embed", None)})

    @nn.compact
    def __call__(self, x: Array, *, valid: Array | None = None, train: bool = False) -> tuple[Array, Aux]:
        """[B, N, D] -> [B, N, D] in x's dtype.

        Args:
          x: normed tokens.
          valid: [B, N] bool, False for padding: it is not computed and gets zeros.
          train: losses on.

        Raises: ShapeError for tokens that are not floating [B, N, D]; ConfigError, TokenLabError for settings out of
          range or an implementation that cannot run.
        """
        if not (self.balance >= 0 and self.z >= 0):
            raise ConfigError(f"dropless: balance and z must be at least 0; got {self.balance} and {self.z}.")
        route.check_word("dropless: gate", self.gate, ("softmax", "top_softmax", "sigmoid"))
        if self.gate == "top_softmax" and self.k == 1:
            raise ConfigError(
                "dropless: with gate 'top_softmax' and k = 1 every weight is 1 and the router learns nothing; take "
                "'softmax' or 'sigmoid'."
            )
        x = route.check_tokens(x, valid)
        banks.check_transport("dropless", self.transport)
        count = self.num_experts
        bank = banks.layer_bank(self, x, train=train)
        logits = banks.router_kernel(self, x, count)
        with jax.named_scope("router"):
            chosen, weight = self._choose(logits)
            if valid is not None:
                chosen = jnp.where(valid[..., None], chosen, count)
                weight = jnp.where(valid[..., None], weight, 0.0)
            plan = Sorted(chosen, weight, count, self.transport, self.exchange)
        y = banks.run(self, plan, bank, x, valid, train=train)
        return y, describe(logits, chosen, count, valid, balance=self.balance, z=self.z, train=train)

    def _choose(self, logits: Array) -> tuple[Array, Array]:
        """Experts and weights, [B, N, K]."""
        if self.gate == "softmax":
            return route.choose(jax.nn.softmax(logits), self.k)
        if self.gate == "top_softmax":
            chosen, best = route.choose(logits, self.k)
            return chosen, jax.nn.softmax(best)
        chosen, best = route.choose(jax.nn.sigmoid(logits), self.k)
        return chosen, best / (best.sum(axis=-1, keepdims=True) + 1e-20) if self.k > 1 else best


def describe(
    logits: Array, chosen: Array, experts: int, valid: Array | None, *, balance: float, z: float, train: bool
) -> Aux:
    """Losses, metrics and load of a router that drops nothing."""
    probs = jax.nn.softmax(logits)
    losses = {}
    if balance:
        losses["balance_loss"] = balance * route.balance_loss(probs, chosen, valid)
    if z:
        losses["router_z_loss"] = z * route.z_loss(logits, valid)
    load = route.load(chosen, experts)
    metrics = {"router_entropy": route.entropy(probs, valid), "expert_load_max": experts * load.max()}
    return banks.report(losses, metrics, load, train=train)


ffn = banks.as_ffn(
    Dropless,
    examples=(
        "block + block(ffn=dropless(experts=4, k=2))",
        "block + block(ffn=dropless(experts=3, k=1, gate=sigmoid, expert=swiglu, z=0.001))",
    ),
)
BENCHMARK = {"8 experts": "block*6 + block(ffn=dropless(experts=8, k=1))*6"}
