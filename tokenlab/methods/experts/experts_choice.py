"""experts_choice: every expert takes the tokens it rates best (Zhou et al., NeurIPS 2022, arXiv 2202.09368).

Claim: language models of 8B parameters and 64 experts train more than twice as fast as with Switch or GShard routing
(the authors' abstract).

    g = softmax(X W_r) over experts                X [N, D], W_r [D, E]
    expert e takes the C = round(N capacity / E) tokens with the largest g[:, e]
    y[n] = sum over experts e that took n of g[n, e] * expert_e(x[n])

Every expert is full, so nothing needs balancing; a token may be taken by several experts, or by none, and then goes on
by the residual alone. What a token gets depends on the others of its example, later ones too: it cannot serve a causal
model as it is.

`score="sigmoid"` rates every expert for itself (as MoMa does, arXiv 2407.21770).
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
from tokenlab.ops.dispatch import Indexed


class ExpertsChoice(nn.Module):
    """`ExpertsChoice(num_experts=8)(x)` on normed tokens [B, N, D]: the result, and metrics.

    Attributes:
      num_experts: E.
      capacity: C = round(N capacity / E), halves to even: the mean number of experts a token; > 0.
      multiple_of: C is raised to a multiple of this.
      score: "softmax" over experts, or "sigmoid" of each.
      noise: standard deviation of the noise on the logits in training, divided by E; >= 0.
      expert: what an expert is, see `tokenlab.layers.experts.bank`; None for an MLP of hidden width 4 D.
      shared: further experts that every token passes.
      form: "indexed" gathers, "weighted" multiplies by one-hot arrays [B, N, E, C].
      same_init: all experts begin alike.
      transport: "bfloat16" rounds tokens and results on their way; None keeps their dtype.
    """

    num_experts: int
    capacity: float = 1.0
    multiple_of: int = 1
    score: Literal["softmax", "sigmoid"] = "softmax"
    noise: float = 0.0
    expert: nn.Module | None = None
    shared: int = 0
    form: Literal["indexed", "weighted"] = "indexed"
    same_init: bool = False
    transport: Literal["bfloat16"] | None = None

    @property
    def causal(self) -> bool:
        """Never: an expert compares all tokens of the sequence."""
        return False

    def places(self, tokens: int) -> int:
        """C for N tokens. Raises TokenLabError when it rounds to nothing."""
        return route.capacity(
            tokens, self.num_experts, self.capacity, rounding="round", multiple_of=self.multiple_of
        )

    def experts_per_token(self, tokens: int) -> float:
        """Experts computed for each token, on average: E C / N."""
        return self.num_experts * self.places(tokens) / tokens

    @property
    def stochastic(self) -> bool:
        """Draws at random in training."""
        return self.noise > 0

    def axes(self) -> banks.Axes:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return banks.layer_axes(self, {"router": ("embed", None)})

    @nn.compact
    def __call__(self, x: Array, *, valid: Array | None = None, train: bool = False) -> tuple[Array, Aux]:
        """[B, N, D] -> [B, N, D] in x's dtype; each example is a group.

        Args:
          x: normed tokens.
          valid: [B, N] bool, False for padding: it is taken last, without weight.
          train: noise on; it then needs the rng "ffn".

        Raises: ShapeError for tokens that are not floating [B, N, D]; ConfigError, TokenLabError for settings out of
          range.
        """
        if not self.noise >= 0:
            raise ConfigError(f"experts_choice: noise must be at least 0; got {self.noise}.")
        route.check_word("experts_choice: score", self.score, ("softmax", "sigmoid"))
        route.check_word("experts_choice: form", self.form, ("indexed", "weighted"))
        x = route.check_tokens(x, valid)
        banks.check_transport("experts_choice", self.transport)
        tokens, count = x.shape[1], self.num_experts
        bank = banks.layer_bank(self, x, train=train)
        logits = banks.router_kernel(self, x, count)
        with jax.named_scope("router"):
            if self.noise and train:
                logits += self.noise / count * jax.random.normal(self.make_rng("ffn"), logits.shape)
            gates = jax.nn.softmax(logits) if self.score == "softmax" else jax.nn.sigmoid(logits)
            places = self.places(tokens)
            taken = route.experts_choice(gates, places, valid=valid)
            plan = Indexed.of_taken(taken, tokens, self.transport)
        plan = plan if self.form == "indexed" else plan.weights()
        y = banks.run(self, plan, bank, x, valid, train=train)

        taken_by = jax.vmap(lambda token: jnp.zeros(tokens).at[token].add(1.0))
        times = taken_by(taken.token.reshape(len(x), -1))  # [B, N]: experts that took the token
        there = jnp.ones_like(times) if valid is None else valid.astype(times.dtype)
        metrics = {
            "capacity_factor": jnp.float32(self.experts_per_token(tokens)),
            "dropped": ((times == 0) * there).sum() / jnp.maximum(there.sum(), 1),
            "experts_per_token_max": times.max(axis=1).mean(),
            "router_entropy": route.entropy(jax.nn.softmax(logits), valid),
        }
        load = (taken.weight > 0).sum(axis=(0, 2)).astype(jnp.float32)
        return y, banks.report({}, metrics, load / jnp.maximum(load.sum(), 1), train=train)


ffn = banks.as_ffn(
    ExpertsChoice,
    examples=(
        "block + block(ffn=experts_choice(experts=4))",
        "block + block(ffn=experts_choice(experts=3, capacity=2.0, score=sigmoid, form=weighted))",
    ),
)
BENCHMARK = {"8 experts": "block*6 + block(ffn=experts_choice(experts=8))*6"}
