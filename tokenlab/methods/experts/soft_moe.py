"""soft_moe: experts that compute mixtures of all tokens (Puigcerver et al., ICLR 2024, arXiv 2308.00951).

Claim: Soft MoE B/16 with 128 experts beats ViT H/14 on JFT-4B (62.4 against 59.7 % precision at 1) with 10.5 times
fewer FLOPs at inference and in 5.7 times less time (the authors' abstract and table 1).

Hard routing drops tokens, sorts, and needs losses for balance. Here E experts have P slots each; a slot's input is a
mean of all N tokens, and a token's output a mean of all S = E P slots' results:

    logits = scale * unit(X) unit(mu)          X [N, D] normed tokens, mu [D, E, P], unit along D        (algorithm 2)
    dispatch = softmax of logits over tokens                                                             (equation 1)
    slots = dispatch^T X                       the tokens themselves are mixed, not unit(X)
    results[e] = expert_e(slots[e])                                                                      (equation 2)
    combine = softmax of logits over all slots
    Y = combine results                                                                                  (equation 3)

What it costs depends on S, not on E: 6 N S D for logits and both mixtures, 4 S D F for experts with hidden width F (the
dense layer: 4 N D F). Every output depends on every token, so it cannot serve a causal model.

The ablations of table 2: `dispatch` and `combine` may be "uniform" (plain means), or "identity" both (slot i computes
token i, S = N).
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.layers import experts as banks
from tokenlab.layers.context import Aux
from tokenlab.ops.dispatch import Indexed, Weighted
from tokenlab.ops.route import capacity, check_tokens, check_word, soft_weights, unit

Mixing: TypeAlias = Literal["soft", "uniform", "identity"]


class SoftRouter(nn.Module):
    """Logits and mixing weights, [B, N, E, P], float32.

    Attributes:
      num_experts: E.
      slots: P of each expert.
      noise: standard deviation of normal noise on the logits in training, >= 0.
    """

    num_experts: int
    slots: int
    noise: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, valid: Array | None = None, train: bool = False) -> tuple[Array, Array]:
        """[B, N, D] -> dispatch weights, summing to 1 over N, and combine weights, summing to 1 over (E, P).

        Raises: ShapeError for tokens that are not floating [B, N, D].
        """
        x = check_tokens(x, valid)
        shape = (x.shape[-1], self.num_experts, self.slots)
        mu = self.param("mu", nn.initializers.lecun_normal(), shape, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (), jnp.float32)
        tokens, mu = unit(x.astype(jnp.float32)), unit(mu, axis=0)
        if tokens.size < mu.size:  # the factor goes into the smaller of the two
            tokens = tokens * scale
        else:
            mu = mu * scale
        logits = jnp.einsum("bnd,dep->bnep", tokens, mu)
        if self.noise and train:
            logits += self.noise * jax.random.normal(self.make_rng("ffn"), logits.shape)
        return soft_weights(logits, valid)


class SoftMoE(nn.Module):
    """`SoftMoE(num_experts=128)(x)` on normed tokens [B, N, D]: the result, and an `Aux` of metrics.

    Attributes:
      num_experts: E.
      slots: P of each expert; None takes `capacity`.
      capacity: P = round(capacity * N / E), halves to even; by default 1.0, about as many slots as tokens.
      expert: what an expert is, see `tokenlab.layers.experts.bank`; None for an MLP of hidden width 4 D.
      shared: further experts that every token passes.
      dispatch, combine: "soft", or an ablation: "uniform", "identity" (both or none, S = N).
      noise: standard deviation of the noise on the logits in training, >= 0.
      same_init: all experts begin alike, and their slots part them (as in the published configurations).
      transport: "bfloat16" rounds tokens and results on their way; None keeps their dtype.
      similarity: also report how alike slots are; it builds an array [S, S] an example.
    """

    num_experts: int
    slots: int | None = None
    capacity: float | None = None
    expert: nn.Module | None = None
    shared: int = 0
    dispatch: Mixing = "soft"
    combine: Mixing = "soft"
    noise: float = 0.0
    same_init: bool = False
    transport: Literal["bfloat16"] | None = None
    similarity: bool = False

    @property
    def causal(self) -> bool:
        """Never: slots are means over the whole sequence."""
        return False

    def slots_of(self, tokens: int) -> int:
        """P for N tokens. Raises ConfigError, TokenLabError for settings out of range or a P of 0."""
        if self.slots is not None and self.capacity is not None:
            raise ConfigError(
                f"soft_moe: give slots or capacity, not both; got {self.slots} and {self.capacity}."
            )
        if self.slots is None:
            factor = 1.0 if self.capacity is None else self.capacity
            return capacity(tokens, self.num_experts, factor, rounding="round")
        if self.slots < 1 or self.num_experts < 1:
            raise ConfigError(
                f"soft_moe: experts and slots must be at least 1; got {self.num_experts} and {self.slots}."
            )
        return self.slots

    def experts_per_token(self, tokens: int) -> float:
        """Experts computed for each token: S / N."""
        return self.num_experts * self.slots_of(tokens) / tokens

    @property
    def stochastic(self) -> bool:
        """Draws at random in training."""
        return self.noise > 0

    def axes(self) -> banks.Axes:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        learned = {"router/mu": ("embed", None, None), "router/scale": ()}
        return banks.layer_axes(self, learned if self._learned else {})

    @property
    def _learned(self) -> bool:
        return "soft" in (self.dispatch, self.combine)

    @nn.compact
    def __call__(self, x: Array, *, valid: Array | None = None, train: bool = False) -> tuple[Array, Aux]:
        """[B, N, D] -> [B, N, D] in x's dtype.

        Args:
          x: normed tokens.
          valid: [B, N] bool, False for padding: it is mixed into no slot and gets zeros.
          train: noise on; it then needs the rng "ffn".

        Raises: ShapeError for tokens that are not floating [B, N, D], ConfigError for settings that contradict.
        """
        if not self.noise >= 0:
            raise ConfigError(f"soft_moe: noise must be at least 0; got {self.noise}.")
        for name in ("dispatch", "combine"):
            check_word(f"soft_moe: {name}", getattr(self, name), get_args(Mixing))
        if self.noise and not self._learned:
            raise ConfigError(
                f"soft_moe: noise is on the logits of a soft mixture; dispatch {self.dispatch!r} and combine "
                f"{self.combine!r} have none. Leave it out."
            )
        if self.similarity and "identity" in (self.dispatch, self.combine):
            raise ConfigError(
                "soft_moe: similarity is that of mixtures; 'identity' mixes nothing. Leave it out."
            )
        x = check_tokens(x, valid)
        banks.check_transport("soft_moe", self.transport)
        tokens, places = x.shape[1], self.slots_of(x.shape[1])
        bank = banks.layer_bank(self, x, train=train)
        metrics: dict[str, Array] = {"capacity_factor": jnp.float32(self.experts_per_token(tokens))}
        if "identity" in (self.dispatch, self.combine):
            plan = self._identity(x, places, valid)
        else:
            with jax.named_scope("router"):
                into, back = self._mixing(x, places, valid, train)
            plan = Weighted(into, back, self.transport)
            metrics |= self._describe(into, back)
        y = banks.run(self, plan, bank, x, valid, train=train)
        return y, banks.report({}, metrics, None, train=train)

    def _mixing(self, x: Array, places: int, valid: Array | None, train: bool) -> tuple[Array, Array]:
        """Dispatch and combine weights; the ablations replace one by the plain mean."""
        uniform = soft_weights(jnp.zeros((*x.shape[:2], self.num_experts, places)), valid)
        soft = uniform
        if self._learned:
            router = SoftRouter(self.num_experts, places, self.noise, name="router")
            soft = router(x, valid=valid, train=train)
        return (
            soft[0] if self.dispatch == "soft" else uniform[0],
            soft[1] if self.combine == "soft" else uniform[1],
        )

    def _identity(self, x: Array, places: int, valid: Array | None) -> Indexed:
        """Slot i holds token i."""
        batch, tokens, _ = x.shape
        if self.dispatch != self.combine or self.num_experts * places != tokens:
            raise ConfigError(
                f"soft_moe: 'identity' is for both dispatch and combine, with as many slots as tokens; got dispatch "
                f"{self.dispatch!r}, combine {self.combine!r}, {self.num_experts * places} slots, {tokens} tokens."
            )
        token = jnp.arange(tokens, dtype=jnp.int32).reshape(self.num_experts, places)
        token = jnp.broadcast_to(token, (batch, *token.shape))
        there = jnp.ones((batch, tokens)) if valid is None else valid.astype(jnp.float32)
        return Indexed(token, there.reshape(token.shape), tokens, self.transport)

    def _describe(self, into: Array, back: Array) -> dict[str, Array]:
        """How peaked the mixtures are, and on request how alike the slots are."""
        found = {"dispatch_max": into.max(axis=1).mean(), "combine_max": back.max(axis=(2, 3)).mean()}
        if self.similarity:
            slots = unit(into.reshape(*into.shape[:2], -1), axis=1)
            alike = jnp.einsum("bns,bnt->bst", slots, slots)
            count = alike.shape[-1]
            found["slot_similarity"] = ((alike.sum(axis=(1, 2)) - count) / max(1, count * (count - 1))).mean()
        return found


ffn = banks.as_ffn(
    SoftMoE,
    examples=(
        "block + block(ffn=soft_moe(experts=4, slots=2))",
        "block + block(ffn=soft_moe(experts=3, capacity=0.5, expert=swiglu, shared=1))",
    ),
)
BENCHMARK = {"28 experts": "block*6 + block(ffn=soft_moe(experts=28, slots=7))*6"}
