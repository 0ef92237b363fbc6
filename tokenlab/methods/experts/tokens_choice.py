"""tokens_choice: every token goes to its K best experts, as long as there is room (V-MoE, arXiv 2106.05974).

Claim (Riquelme et al., NeurIPS 2021): V-MoE-L/16 matches ViT-H/14 on JFT-300M with under half of its training compute;
with batch-priority routing a capacity of 1/2 costs little (their figures 1 and 5).

    g = softmax(X W_r + noise)                     X [N, D], W_r [D, E]; noise ~ N(0, (noise / E)^2) in training
    experts of token n: the K largest g[n]; weights g, not renormalised
    y[n] = sum over its experts e with room of g[n, e] * expert_e(x[n])

Each expert has C = ceil(N K capacity / E) places an example. All first choices queue before all second ones, each in
the order of the sequence, or with `batch_priority` by the largest gate. A token without a place gets zeros here and
goes on by the residual alone.

Balance: importance and load losses (their appendix A), GShard's, the router's z-loss, each weighted here and added
once; or `bias`: a number an expert, added to gates for choosing only, that rises while the expert gets too little (Wang
et al. 2024, arXiv 2408.15664). It is a parameter whose gradient is minus the sign of what is missing, so the optimizer
moves it: under Adam by about its learning rate a step, under SGD by `bias` times that.

`noops` stand among the experts and compute nothing: a token that chooses one goes on by the residual alone because the
router said so, and not because a queue was full (integrated mixture-of-depths-and-experts, Raposo et al. 2024, arXiv
2404.02258). Balance counts them as experts, so with n of them E / (E + n) of all choices are computed.
"""

from __future__ import annotations

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from tokenlab.core.errors import ConfigError
from tokenlab.layers import experts as banks
from tokenlab.layers.context import Aux
from tokenlab.ops import route
from tokenlab.ops.dispatch import Indexed, Sorted


class TokensChoice(nn.Module):
    """`TokensChoice(num_experts=8, k=2)(x)` on normed tokens [B, N, D]: the result, and losses, metrics and load.

    Attributes:
      num_experts: E.
      k: choices of each token, 1..E + n.
      capacity: factor on an even spread that sets the places of an expert, > 0; `math.inf` computes every choice, for
        which a stack has `dropless`.
      eval_capacity: the same outside training; None for `capacity`. Generation drops none, see `in_generation`.
      multiple_of: places are raised to a multiple of this.
      batch_priority: the surest tokens get their places first.
      noise: the router's in training, divided by E; >= 0.
      importance, load, gshard, z: weights of the losses, >= 0; `load` needs noise.
      bias: balance by a bias in place of losses; the size of its gradient, 0 for none.
      expert: what an expert is, see `tokenlab.layers.experts.bank`; None for an MLP of hidden width 4 D.
      noops: n, experts that compute nothing, at least 0.
      shared: further experts that every token passes.
      form: "indexed" gathers, "weighted" multiplies by one-hot arrays [B, N, E, C].
      same_init: all experts begin alike.
      transport: "bfloat16" rounds tokens and results on their way; None keeps their dtype.
    """

    num_experts: int
    k: int = 1
    capacity: float = 1.05
    eval_capacity: float | None = None
    multiple_of: int = 1
    batch_priority: bool = False
    noise: float = 1.0
    importance: float = 0.005
    load: float = 0.005
    gshard: float = 0.0
    z: float = 0.0
    bias: float = 0.0
    expert: nn.Module | None = None
    noops: int = 0
    shared: int = 0
    form: Literal["indexed", "weighted"] = "indexed"
    same_init: bool = False
    transport: Literal["bfloat16"] | None = None

    @property
    def causal(self) -> bool:
        """Whether a token's room depends on earlier tokens alone: first choices only, in the order of the sequence.

        Room is made for the tokens at hand, so where a whole sequence drops some, generation, which drops none, gives
        other logits.
        """
        return self.k == 1 and not self.batch_priority

    def in_generation(self) -> TokensChoice:
        """The same layer with room for all: a prompt gives what its tokens give one by one, whatever is beside it."""
        return self.clone(eval_capacity=math.inf, form="indexed")

    def experts_per_token(self, tokens: int) -> float:
        """Experts that each token is computed by when choices are spread evenly: K E / (E + n)."""
        del tokens
        return self.k * self.num_experts / (self.num_experts + self.noops)

    @property
    def stochastic(self) -> bool:
        """Draws at random in training."""
        return self.noise > 0

    def axes(self) -> banks.Axes:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        bias = {"bias": (None,)} if self.bias else {}
        return banks.layer_axes(self, {"router": ("embed", None), **bias})

    def _check(self) -> None:
        for name in ("noise", "importance", "load", "gshard", "z", "bias", "noops"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"tokens_choice: {name} must be at least 0; got {getattr(self, name)}.")
        if isinstance(self.noops, bool) or not isinstance(self.noops, int):
            raise ConfigError(f"tokens_choice: noops must be a whole number; got {self.noops!r}.")
        route.check_word("tokens_choice: form", self.form, ("indexed", "weighted"))
        if self.load and not self.noise:
            raise ConfigError(
                "tokens_choice: the load loss exists only with router noise; set load=0.0, or noise."
            )

    @nn.compact
    def __call__(self, x: Array, *, valid: Array | None = None, train: bool = False) -> tuple[Array, Aux]:
        """[B, N, D] -> [B, N, D] in x's dtype; each example is a group.

        Args:
          x: normed tokens.
          valid: [B, N] bool, False for padding: it takes no place and gets zeros.
          train: noise and losses on; noise needs the rng "ffn".

        Raises: ShapeError for tokens that are not floating [B, N, D]; ConfigError, TokenLabError for settings out of
          range.
        """
        self._check()
        x = route.check_tokens(x, valid)
        banks.check_transport("tokens_choice", self.transport)
        tokens, real = x.shape[1], self.num_experts
        count = real + self.noops
        bank = banks.layer_bank(self, x, train=train)
        logits = banks.router_kernel(self, x, count)
        with jax.named_scope("router"):
            noisy = logits
            if self.noise and train:
                noisy = logits + self.noise / count * jax.random.normal(self.make_rng("ffn"), logits.shape)
            gates = jax.nn.softmax(noisy)
            factor = self.capacity if train or self.eval_capacity is None else self.eval_capacity
            places = tokens  # an expert gets each token once, at most
            if factor != math.inf:
                places = route.capacity(tokens, count, factor, choices=self.k, multiple_of=self.multiple_of)
            bias = self.param("bias", nn.initializers.zeros, (count,), jnp.float32) if self.bias else None
            chosen = route.tokens_choice(
                gates,
                self.k,
                batch_priority=self.batch_priority,
                valid=valid,
                rank_by=None if bias is None else gates + bias,
            )
            computed = chosen._replace(expert=jnp.minimum(chosen.expert, real))
            if factor == math.inf and self.form == "indexed":
                plan = Sorted(computed.expert, computed.weight, real, self.transport)
            else:
                plan = Indexed.of_choices(computed, real, places, self.transport)
                plan = plan if self.form == "indexed" else plan.weights()
        y = banks.run(self, plan, bank, x, valid, train=train)

        kept = chosen.place < places
        asked = chosen.expert < real  # padding and those content with a no-op ask for nothing
        metrics = {
            "capacity_factor": jnp.float32(places * count / (tokens * self.k)),
            "dropped": 1.0 - (kept & asked).sum() / jnp.maximum(asked.sum(), 1),
            "router_entropy": route.entropy(gates, valid),
        }
        wanted = route.load(chosen.expert, count)
        metrics["expert_load_max"] = count * wanted[:real].max()
        if self.noops:
            metrics["noop_share"] = wanted[real:].sum()
        losses = self._losses(logits, noisy, gates, chosen.expert, valid) if train else {}
        if bias is not None:
            missing = lax.stop_gradient(jnp.sign(1.0 / count - wanted))
            losses["router_bias"] = -self.bias * jnp.sum(
                (bias - lax.stop_gradient(bias)) * missing
            )  # of value 0
        load = route.load(computed.expert, real, kept & asked)
        return y, banks.report(losses, metrics, load, train=train)

    def _losses(
        self, logits: Array, noisy: Array, gates: Array, expert: Array, valid: Array | None
    ) -> dict[str, Array]:
        """Those with a weight, weighted."""
        found = {}
        if self.importance:
            found["importance_loss"] = self.importance * route.importance_loss(jax.nn.softmax(logits), valid)
        if self.load:
            std = self.noise / logits.shape[-1]
            found["load_loss"] = self.load * route.load_loss(logits, noisy, self.k, std, valid)
        if self.gshard:
            found["gshard_loss"] = self.gshard * route.gshard_loss(gates, expert, valid)
        if self.z:
            found["router_z_loss"] = self.z * route.z_loss(logits, valid)
        return found


ffn = banks.as_ffn(
    TokensChoice,
    examples=(
        "block + block(ffn=tokens_choice(experts=4, k=2, capacity=0.75))",
        "block + block(ffn=tokens_choice(experts=3, batch_priority=True, bias=0.001, importance=0.0, "
        "load=0.0, form=weighted))",
        "block + block(ffn=tokens_choice(experts=3, noops=1))",
    ),
)
BENCHMARK = {"8 experts": "block*6 + block(ffn=tokens_choice(experts=8, capacity=1.0))*6"}
