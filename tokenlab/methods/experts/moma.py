"""moma: every modality has experts of its own, which choose among its tokens (Lin et al. 2024, arXiv 2407.21770).

Claim: pre-training a 1.4B early-fusion model of text and image tokens with 4 text and 4 image experts reaches the loss
of its dense twin with 3.7 times fewer FLOPs (2.6 for text, 5.2 for images), where 8 experts for all tokens save 3.0
times (their abstract).

    1. The tokens of modality m, known from their ids, are told apart; nothing is learned here.
    2. s = sigmoid(X_m W_m)                  X_m [N_m, D], W_m [D, E_m]; for itself, no softmax over experts
    3. expert e of m takes its C_m = ceil(N_m capacity / E_m) tokens with the largest s[:, e]
    4. y[n] = sum over experts e that took n of s[n, e] * expert_e(x[n]);  zeros for a token that none took

With capacity 1 the experts of a modality compute as many tokens as it has: the layer costs what one expert costs as a
dense layer. A modality with a single expert has no router: all its tokens pass it with weight one ("1t1i"). `mixed`
experts take any token, whatever it stands for (the paper's baseline, "8x").

With `noise` logistic noise is added to the logits in training, for choosing and for weighing (their equation 5, where
it stands as the difference of two Gumbel variates): it makes experts differ that began as copies of one.

What an expert takes depends on later tokens. So each modality has auxiliary routers that learn from the tokens alone
who is taken (section 4.6):

    a = sigmoid(silu(X W_1) W_2)             W_1 [D, D/2], W_2 [D/2, E_m], no gradient to X; cross-entropy with "taken"

and outside training token n goes to expert e when a[n, e] > 1/2, weighted by s[n, e] as before; in whole sequences
while there is room for `room` times as many choices as in training, in generation always. Auxiliary routers may be
trained beside the model, to which they give no gradient (a norm that clips counts theirs), or after it (`decide=topk`
first); with `noise` better after it and without, or what they learn is who was taken by chance.

The paper ranks the tokens of a whole batch together; here it is those of `sequences` examples, one by default, so that
no result depends on what else is computed.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import get_abstract_mesh

from tokenlab.core.errors import ConfigError, ShapeError
from tokenlab.core.modality import MODALITIES
from tokenlab.layers import experts as banks
from tokenlab.layers.context import Aux
from tokenlab.ops import route
from tokenlab.ops.dispatch import Bank, Indexed, Sorted
from tokenlab.ops.modality import Lane, check_modality, gather_lane, lanes, left_out, own_tokens, scatter_lane


class Group(NamedTuple):
    """Experts that choose among the same tokens.

    Attributes:
      name: "text", "image" or "mixed".
      number: of their modality; None for all tokens.
      experts: E_m.
      share: of a sequence's tokens, for which places are kept.
    """

    name: str
    number: int | None
    experts: int
    share: float


class MoMa(nn.Module):
    """`MoMa(text=4, image=4)(x, modality=ids)` on normed tokens [B, N, D]: the result, and losses, metrics and load.

    Attributes:
      text, image: experts of each modality, both at least 1 unless there are mixed ones.
      mixed: experts of all tokens, in place of those.
      text_share: of the tokens of a sequence that are text, in (0, 1): places are kept for so many, and for the rest as
        images. Exact where the data packs rows to a fixed ratio; "left_out" counts tokens beyond it.
      slack: factor on both, at least 1, for sequences that differ. It costs as much more; `math.inf` has room for any.
      capacity: factor on C_m, > 0.
      sequences: examples whose tokens are ranked together, 1 or more; the batch must be a multiple.
      noise: factor on the logistic noise in training, >= 0; 1 is the paper's.
      decide: outside training: "auxiliary" routers, or still "topk", which looks ahead and is there to compare with. A
        model with "topk" has no auxiliary routers; one with "oracle" has them, teaches them, and does not ask them.
      weight: of the auxiliary routers' loss, >= 0.
      room: choices of a whole sequence outside training, as a multiple of those in training; at least 1. Tokens take it
        in order, and "left_out" counts those that came too late.
      expert: what an expert is, see `tokenlab.layers.experts.bank`; None for an MLP of hidden width 4 D.
      same_init: all experts of a modality begin alike.
      transport: "bfloat16" rounds tokens and results on their way to experts that choose; None keeps their dtype. The
        one expert of a modality is on every device, so its tokens go nowhere and are not rounded; where nobody chooses
        it must be None.
    """

    text: int = 0
    image: int = 0
    mixed: int = 0
    text_share: float = 0.5
    slack: float = 1.0
    capacity: float = 1.0
    sequences: int = 1
    noise: float = 0.0
    decide: Literal["auxiliary", "topk", "oracle"] = "auxiliary"
    weight: float = 0.01
    room: float = 1.5
    expert: nn.Module | None = None
    same_init: bool = False
    transport: Literal["bfloat16"] | None = None

    # ------------------------------------------------------------------------------------------ what it is to the stack

    @property
    def groups(self) -> tuple[Group, ...]:
        """The experts, by whom they choose among."""
        if self.mixed:
            return (Group("mixed", None, self.mixed, 1.0),)
        shares = (self.text_share, 1.0 - self.text_share)
        each = zip(MODALITIES, (self.text, self.image), shares, strict=True)
        return tuple(Group(name, number, count, share) for number, (name, count, share) in enumerate(each))

    @property
    def num_experts(self) -> int:
        """All of them together."""
        return sum(group.experts for group in self.groups)

    @property
    def routed(self) -> bool:
        """Whether anybody chooses."""
        return any(group.experts > 1 for group in self.groups)

    @property
    def causal(self) -> bool:
        """Outside training the auxiliary routers look at one token alone."""
        return self.decide == "auxiliary" or not self.routed

    @property
    def by_modality(self) -> bool:
        """Whether it must be told what tokens stand for."""
        return not self.mixed

    @property
    def stochastic(self) -> bool:
        """Draws at random in training."""
        return self.noise > 0 and self.routed

    def together(self, *, train: bool) -> int:
        """Examples whose tokens are ranked together, in training or outside it; a batch must be a multiple."""
        return self.sequences if train or not self.causal else 1

    def experts_per_token(self, tokens: int) -> float:
        """Experts computed in training for each token, places that stay empty included: sum of E_m C_m over N."""
        return sum(group.experts * self.places(group, tokens) for group in self.groups) / tokens

    def bound(self, group: Group, tokens: int) -> int:
        """N_m: the most tokens of its own that a group sees, of `tokens`."""
        wanted = self.slack * group.share * tokens
        return tokens if wanted >= tokens else max(1, math.ceil(round(wanted, 6)))

    def places(self, group: Group, tokens: int) -> int:
        """C_m of each expert, where as many tokens are there as may be."""
        return self.taken_of(group, self.bound(group, tokens))

    def taken_of(self, group: Group, tokens: int) -> int:
        """How many an expert takes of `tokens` that are its group's; at least one, and never more than there are."""
        if group.experts == 1:
            return tokens
        wanted = math.ceil(round(tokens * self.capacity / group.experts, 9))
        return min(tokens, max(1, wanted))

    def in_generation(self) -> MoMa:
        """The same with room for all: auxiliary routers then give a prompt what they give its tokens one by one."""
        return self.clone(room=math.inf, slack=1.0 if self.mixed else math.inf)

    def axes(self) -> banks.Axes:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        own = banks.default_expert(self.expert, 1)
        found: dict[str, tuple[str | None, ...]] = {}
        for group in self.groups:
            bank = banks.axes_of(own, f"experts_{group.name}")
            if group.experts == 1:  # every token of a modality needs it, wherever it is
                bank = {f"experts_{group.name}/{path}": (None, *axes) for path, axes in own.axes().items()}
            found |= bank
            if group.experts > 1:
                found[f"router_{group.name}"] = ("embed", None)
            if group.experts > 1 and self.decide != "topk":
                found[f"auxiliary_{group.name}_in"] = ("embed", None)
                found[f"auxiliary_{group.name}_out"] = (None, None)
        return found

    def _check(self) -> None:
        for name, least in (("text", 0), ("image", 0), ("mixed", 0), ("sequences", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"moma: {name} must be a whole number of at least {least}; got {value!r}.")
        if bool(self.mixed) == bool(self.text or self.image) or (
            not self.mixed and 0 in (self.text, self.image)
        ):
            raise ConfigError(
                "moma: give text and image experts, such as moma(text=4, image=4), or mixed ones alone; got "
                f"text={self.text}, image={self.image}, mixed={self.mixed}."
            )
        if not 0 < self.text_share < 1:
            raise ConfigError(f"moma: text_share must be between 0 and 1; got {self.text_share}.")
        for name, least in (("slack", 1), ("room", 1), ("noise", 0), ("weight", 0)):
            value = getattr(self, name)
            if not value >= least or (value == math.inf and least == 0):
                raise ConfigError(f"moma: {name} must be at least {least}; got {value}.")
        if not (math.isfinite(self.capacity) and self.capacity > 0):
            raise ConfigError(f"moma: capacity must be a number above 0; got {self.capacity}.")
        if self.mixed and (self.text_share, self.slack) != (0.5, 1.0):
            raise ConfigError(
                "moma: text_share and slack are of modalities; leave them where experts are mixed."
            )
        route.check_word("moma: decide", self.decide, ("auxiliary", "topk", "oracle"))
        banks.check_transport("moma", self.transport)
        if self.transport and not self.routed:
            raise ConfigError(
                f"moma: transport is {self.transport!r}, and where nobody chooses no token "
                "travels: leave it out."
            )

    # ------------------------------------------------------------------------------------------ the method

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        modality: Array | None = None,
        valid: Array | None = None,
        train: bool = False,
    ) -> tuple[Array, Aux]:
        """[B, N, D] -> [B, N, D] in x's dtype.

        Args:
          x: normed tokens.
          modality: [B, N], a whole number: 0 for text, 1 for images; needed unless experts are mixed.
          valid: [B, N] bool, False for padding: nobody takes it, and it gets zeros.
          train: experts choose; noise on, which needs the rng "ffn".

        Raises: ShapeError for tokens that are not floating [B, N, D], modalities that are not whole [B, N], or a batch
          that is no multiple of `sequences`; ConfigError for settings out of range, or auxiliary routers that are asked
          and were never trained (`weight=0.0`); TokenLabError for modalities that are concrete and unknown.
        """
        self._check()
        x = route.check_tokens(x, valid)
        if modality is None and self.is_initializing():
            modality = jnp.zeros(x.shape[:2], jnp.int32)
        if self.by_modality:
            if modality is None:
                raise ShapeError(
                    "moma: modality is None; expected [B, N], 0 for text and 1 for images (a batch's 'modality')."
                )
            check_modality(modality, x.shape[:2], len(MODALITIES), valid)
        else:
            modality = jnp.zeros(x.shape[:2], jnp.int32)
        if train or not self.causal:
            return self._chosen_by_experts(x, modality, valid, train=train)
        if self.routed and not self.weight and not self.is_initializing():
            raise ConfigError(
                "moma: auxiliary routers decide outside training, and with weight=0.0 they were never trained. Train "
                "them with a weight above 0, after the model where config.optimizer.only names them, or set "
                "decide=topk, which looks ahead."
            )
        return self._chosen_by_tokens(x, modality, valid)

    def _chosen_by_experts(
        self, x: Array, modality: Array, valid: Array | None, *, train: bool
    ) -> tuple[Array, Aux]:
        """Every expert takes the tokens of its group that it rates best."""
        shape = x.shape
        sequences = 1 if self.is_initializing() else self.sequences  # parameters are made with one example
        if shape[0] % sequences:
            raise ShapeError(
                f"moma: sequences={sequences} examples are ranked together; a batch of {shape[0]} is no multiple."
            )
        together = (shape[0] // sequences, sequences * shape[1])
        x, modality = x.reshape(*together, -1), modality.reshape(together)
        valid = None if valid is None else valid.reshape(together)
        tokens = x.shape[1]
        with jax.named_scope("lanes"):  # every layer of a step makes the same ones, of which XLA keeps one
            found = lanes(modality, [self.bound(group, tokens) for group in self.groups], valid)
        y, losses, metrics, load = jnp.zeros_like(x), [], {}, []
        times = jnp.zeros(together)  # experts that took each token
        for group, lane in zip(self.groups, found, strict=True):
            own = self._weights(group, x, train=train)
            token, plan = lane.index[:, None], Alone(lane)
            if own.router is not None:
                token, weight = self._take(group, own, lane, x, train=train)
                plan = Indexed(token, weight, tokens, self.transport)
            y = y + self._run(plan, own.bank, x)
            times += jax.vmap(lambda at: jnp.zeros(tokens).at[at.reshape(-1)].add(1.0, mode="drop"))(token)
            load.append((token < tokens).sum(axis=(0, 2)).astype(jnp.float32))
            if train and own.auxiliary is not None and self.weight:
                loss, metrics[f"moma_accuracy_{group.name}"] = _teach(own, lane, x, token)
                losses.append(self.weight * loss)
        there = jnp.ones(together, bool) if valid is None else valid
        total = jnp.maximum(there.sum(), 1)
        metrics |= {
            "left_out": left_out(found, valid).sum() / total,
            "dropped": ((times == 0) & there).sum() / total,
            "experts_per_token_max": times.max(axis=1).mean(),
        }
        share = jnp.concatenate(load)
        aux = banks.report(
            {"moma_loss": sum(losses)} if losses else {},
            metrics,
            share / jnp.maximum(share.sum(), 1),
            train=train,
        )
        return y.reshape(shape), aux

    def _take(self, group: Group, own: Weights, lane: Lane, x: Array, *, train: bool) -> tuple[Array, Array]:
        """The tokens each expert takes, [B, E_m, C_m] int32, N for an empty place; and their weights, float32."""
        with jax.named_scope("router"):
            logits = own.logits(x)
            if self.noise and train:
                logits += self.noise * jax.random.logistic(self.make_rng("ffn"), logits.shape)
            bound = lane.index.shape[1]
            places = self.taken_of(group, bound)
            gates = jax.nn.sigmoid(gather_lane(logits, lane))
            taken = route.experts_choice(gates, places, valid=lane.there)
            # Where fewer tokens are there than might be, each expert takes fewer.
            table = np.array([0, *(self.taken_of(group, count) for count in range(1, bound + 1))], np.int32)
            full = (jnp.arange(places) < jnp.asarray(table)[lane.count][:, None])[:, None]
            token = jax.vmap(lambda index, at: index[at])(lane.index, taken.token)
            return jnp.where(full, token, lane.tokens), jnp.where(full, taken.weight, 0.0)

    def _chosen_by_tokens(self, x: Array, modality: Array, valid: Array | None) -> tuple[Array, Aux]:
        """Every token goes to the experts that its auxiliary routers name, each by itself."""
        batch, tokens, _ = x.shape
        there = jnp.ones((batch, tokens), bool) if valid is None else valid
        found = lanes(modality, [self.bound(group, tokens) for group in self.groups], valid)
        y, load, late = jnp.zeros_like(x), [], there  # late: in no group, or beyond its room
        times = jnp.zeros(there.shape)  # experts that computed each token
        for group, lane in zip(self.groups, found, strict=True):
            own = self._weights(group, x, train=False)
            if own.router is None:
                member, plan = _inside(lane)[..., None], Alone(lane)
                late &= ~member[..., 0]
            else:
                named = own.foreseen(x) > 0
                if group.number is not None:
                    named &= own_tokens(modality, group.number, None)[..., None]
                mine = own_tokens(modality, group.number, None) if group.number is not None else there
                named &= there[..., None]
                most = group.experts * tokens
                room = min(most, math.ceil(min(self.room * group.experts * self.places(group, tokens), most)))
                before = jnp.cumsum(named.reshape(batch, -1), axis=1).reshape(named.shape)  # itself included
                member = named & (before <= room)
                late = jnp.where(mine, jnp.any(named & ~member, axis=-1), late)
                expert = jnp.where(member, jnp.arange(group.experts), group.experts)
                weight = jnp.where(member, jax.nn.sigmoid(own.logits(x)), 0.0)
                plan = Sorted(expert, weight, group.experts, self.transport, room=room)
            y = y + self._run(plan, own.bank, x)
            load.append(member.sum(axis=(0, 1)).astype(jnp.float32))
            times += member.sum(axis=-1)
        total = jnp.maximum(there.sum(), 1)
        share = jnp.concatenate(load)
        metrics = {
            "left_out": late.sum() / total,
            "dropped": ((times == 0) & there).sum() / total,
            "experts_per_token": times.sum() / total,
        }
        return y, banks.report({}, metrics, share / jnp.maximum(share.sum(), 1), train=False)

    def _weights(self, group: Group, x: Array, *, train: bool) -> Weights:
        """The parameters of a group."""
        name, width, count = group.name, x.shape[-1], group.experts
        expert = banks.default_expert(self.expert, width)
        bank = banks.bank(
            self, expert, count, width, name=f"experts_{name}", same_init=self.same_init, train=train
        )
        if count == 1:
            return Weights(bank, None, None)

        def kernel(name: str, rows: int, columns: int) -> Array:
            return self.param(name, nn.initializers.lecun_normal(), (rows, columns), jnp.float32)

        router, half, auxiliary = kernel(f"router_{name}", width, count), max(1, width // 2), None
        if self.decide != "topk":
            auxiliary = (
                kernel(f"auxiliary_{name}_in", width, half),
                kernel(f"auxiliary_{name}_out", half, count),
            )
        return Weights(bank, router, auxiliary)

    def _run(self, plan: Alone | Indexed | Sorted, bank: Bank, x: Array) -> Array:
        # The one example that parameters are made with cannot be split over a mesh.
        making = self.is_initializing() and not get_abstract_mesh().empty
        y = jnp.zeros_like(x) if making else plan.run(bank, x)
        if x.shape != y.shape:
            raise ShapeError(f"experts take and give [B, N, D]: from {x.shape} they made {y.shape}.")
        return y.astype(x.dtype)


class Alone(NamedTuple):
    """All tokens of a lane to its one expert, which every device holds: nothing travels along an `expert` axis."""

    lane: Lane

    def run(self, bank: Bank, x: Array) -> Array:
        """[B, N, D] -> [B, N, D]; zeros for tokens that are not in the lane."""
        rows = bank.buffers(bank.params, gather_lane(x, self.lane)[None])[0]
        return scatter_lane(jnp.zeros((*x.shape[:2], rows.shape[-1]), rows.dtype), self.lane, rows)


class Weights(NamedTuple):
    """Parameters of one group.

    Attributes:
      bank: its experts.
      router: [D, E_m]; None where nobody chooses.
      auxiliary: [D, D/2] and [D/2, E_m], or None.
    """

    bank: Bank
    router: Array | None
    auxiliary: tuple[Array, Array] | None

    def logits(self, x: Array) -> Array:
        """X W, [B, N, E_m], float32."""
        return x.astype(jnp.float32) @ self.router

    def foreseen(self, x: Array) -> Array:
        """Logits that tokens are taken, [B, N, E_m], float32; no gradient reaches the tokens."""
        into, out = self.auxiliary
        with jax.named_scope("auxiliary"):
            return jax.nn.silu(lax.stop_gradient(x).astype(jnp.float32) @ into) @ out


def _inside(lane: Lane) -> Array:
    """Which tokens are in the lane, [B, N] bool."""
    return jax.vmap(lambda at: jnp.zeros((lane.tokens,), bool).at[at].set(True, mode="drop"))(lane.index)


def _teach(own: Weights, lane: Lane, x: Array, token: Array) -> tuple[Array, Array]:
    """The auxiliary routers' cross-entropy with who was taken, and how often they are right; both scalars.

    token: [B, E_m, C_m], what each expert took.
    """

    def taken(at: Array) -> Array:
        return jnp.zeros((x.shape[1],), bool).at[at].set(True, mode="drop")

    with jax.named_scope("auxiliary"):
        member = gather_lane(jnp.moveaxis(jax.vmap(jax.vmap(taken))(token), 1, 2), lane)
        logit = gather_lane(own.foreseen(x), lane)
        each = optax.sigmoid_binary_cross_entropy(logit, member.astype(jnp.float32))
        counted = lane.there[..., None]
        total = jnp.maximum(counted.sum() * logit.shape[-1], 1)
        loss = jnp.sum(jnp.where(counted, each, 0.0)) / total
        return loss, jnp.sum(jnp.where(counted, (logit > 0) == member, False)) / total


ffn = banks.as_ffn(
    MoMa,
    examples=(
        "block + block(ffn=moma(mixed=4, capacity=2.0))",
        "block + block(ffn=moma(mixed=3, capacity=1.5, noise=1.0, decide=topk))",
    ),
)
BENCHMARK = {"8 mixed experts": "block*6 + block(ffn=moma(mixed=8))*6"}
