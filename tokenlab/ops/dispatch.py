"""Dispatch: tokens to experts and back, in three forms that execute what a router decided.

    Weighted   each place of a buffer is a weighted mean of all tokens (Soft MoE); two products
    Indexed    each place holds one token or none (a capacity); gather and scatter-add
    Sorted     no buffers: the choices sorted by expert (no token dropped); grouped products

All have `dispatch(x)`, `combine(y)`, and `run(bank, x)`, which is both with the experts between them. The first two
make buffers [E, B, C, D], the last rows [B * N * K, D] and the size of each group.

On a mesh whose axes have experts on them (`tokenlab.sharding.axes`) the tokens are split over all devices, those along
which attention splits its heads too, but for devices that share an expert. Buffers are computed where their tokens are
and then handed over inside `jax.shard_map` (`tokenlab.ops.spread`): one all-to-all there, one back, and no expert's
weights move along those axes. `Sorted` sends its rows by `tokenlab.ops.exchange`. Who goes to which expert is decided
before, on whole examples, so it does not depend on the mesh.

`transport="bfloat16"` rounds what travels, tokens on the way in and results on the way out, and nothing else.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.ops import exchange
from tokenlab.ops.exchange import Exchange
from tokenlab.ops.route import Chosen, Taken
from tokenlab.ops.spread import Bank, Spread, places, spread, through_experts


@struct.dataclass
class Weighted:
    """Places are weighted means of tokens, results weighted means of places.

    Attributes:
      into: [B, N, E, C] weight of token n in place c of expert e.
      back: [B, N, E, C] weight of place c of expert e in the result of token n.
      transport: tokens and results are rounded to this dtype, as the authors do; means of them travel in the tokens'
        own dtype. None for no rounding.
    """

    into: Array
    back: Array
    transport: str | None = struct.field(pytree_node=False, default=None)

    def run(self, bank: Bank, x: Array) -> Array:
        """combine(experts(dispatch(x))): [B, N, D] -> [B, N, D']."""
        width = ((0, 0), (0, 0), (0, 0), (0, -self.into.shape[-1] % places(bank)))
        whole = self.replace(into=jnp.pad(self.into, width), back=jnp.pad(self.back, width))
        return whole.combine(through_experts(bank, whole.dispatch(x)))

    def dispatch(self, x: Array) -> Array:
        """[B, N, D] -> [E, B, C, D]."""
        x = _rounded(x, self.transport)
        batch, tokens, experts, places = self.into.shape
        into = jnp.moveaxis(self.into.astype(x.dtype), 1, -1).reshape(batch, -1, tokens)
        buffers = (into @ x).reshape(batch, experts, places, -1)
        return jnp.swapaxes(buffers, 0, 1)

    def combine(self, y: Array) -> Array:
        """[E, B, C, D] -> [B, N, D]."""
        y = jnp.swapaxes(_rounded(y, self.transport), 0, 1)
        batch, tokens, *_ = self.back.shape
        return self.back.astype(y.dtype).reshape(batch, tokens, -1) @ y.reshape(batch, -1, y.shape[-1])


@struct.dataclass
class Indexed:
    """Places hold single tokens. Its memory is that of the buffers and of E * C indices, whatever N is.

    Attributes:
      token: [B, E, C] int32; `tokens` for a place that is empty.
      weight: [B, E, C] float32, what the result of that place is multiplied by.
      tokens: N.
      transport: dtype of what travels, None for the tokens' own.
    """

    token: Array
    weight: Array
    tokens: int = struct.field(pytree_node=False)
    transport: str | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def of_choices(cls, chosen: Chosen, experts: int, places: int, transport: str | None = None) -> Indexed:
        """From tokens that chose: those whose place is at or beyond `places` are dropped.

        Raises: TokenLabError for experts that are concrete and not in 0..E.
        """
        _check_experts(chosen.expert, experts)
        batch, n, k = chosen.expert.shape
        address = jnp.where(chosen.place < places, chosen.expert * places + chosen.place, experts * places)
        owner = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], (n, k)).reshape(-1)

        def one(address: Array, weight: Array) -> tuple[Array, Array]:
            # Padding has expert E, so its address is beyond the buffers as well.
            how = {"mode": "drop", "unique_indices": True}
            token = jnp.full((experts * places,), n, jnp.int32).at[address].set(owner, **how)
            return token, jnp.zeros((experts * places,), weight.dtype).at[address].set(weight, **how)

        token, weight = jax.vmap(one)(address.reshape(batch, -1), chosen.weight.reshape(batch, -1))
        shape = (batch, experts, places)
        return cls(token.reshape(shape), weight.reshape(shape), n, transport)

    @classmethod
    def of_taken(cls, taken: Taken, tokens: int, transport: str | None = None) -> Indexed:
        """From experts that took tokens."""
        return cls(taken.token, taken.weight, tokens, transport)

    def weights(self) -> Weighted:
        """The same as `Weighted`, for small E * C, where products are faster than gathering."""
        there = jax.nn.one_hot(self.token, self.tokens, dtype=self.weight.dtype, axis=1)  # [B, N, E, C]
        return Weighted(there, there * self.weight[:, None], self.transport)

    def run(self, bank: Bank, x: Array) -> Array:
        """combine(experts(dispatch(x))): [B, N, D] -> [B, N, D']."""
        width = ((0, 0), (0, 0), (0, -self.token.shape[-1] % places(bank)))
        token = jnp.pad(self.token, width, constant_values=self.tokens)
        whole = self.replace(token=token, weight=jnp.pad(self.weight, width))
        return whole.combine(through_experts(bank, whole.dispatch(x), self.transport))

    def dispatch(self, x: Array) -> Array:
        """[B, N, D] -> [E, B, C, D]; empty places are zeros."""
        if x.shape[1] != self.tokens:
            raise ShapeError(f"dispatch: made for {self.tokens} tokens, got {x.shape[1]}.")
        x = _rounded(x, self.transport)
        rows = jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, self.token)
        return jnp.moveaxis(rows, 1, 0)

    def combine(self, y: Array) -> Array:
        """[E, B, C, D] -> [B, N, D]; tokens in no place get zeros."""
        dtype = y.dtype
        rows = jnp.moveaxis(_rounded(y, self.transport), 0, 1) * self.weight[..., None].astype(dtype)

        def one(token: Array, rows: Array) -> Array:
            empty = jnp.zeros((self.tokens, rows.shape[-1]), dtype)
            return empty.at[token.reshape(-1)].add(rows.reshape(-1, rows.shape[-1]), mode="drop")

        return jax.vmap(one)(self.token, rows)


@struct.dataclass
class Sorted:
    """Every choice is computed; rows of one expert stand together.

    Attributes:
      expert: [B, N, K] int32 in 0..E-1; E for padding, which is not computed.
      weight: [B, N, K] float32.
      experts: E.
      transport: dtype of what travels between devices, None for the tokens' own.
      exchange: see `tokenlab.ops.exchange`.
      boost: [B, N, K]; experts get the gradient of each choice multiplied by it (for GRIN). None for 1.
      room: rows kept for an example's choices, where padding leaves fewer than N K; no example may have more. None for
        N K.
      everywhere: every device holds all experts, so that no token travels along the `expert` axis.
    """

    expert: Array
    weight: Array
    experts: int = struct.field(pytree_node=False)
    transport: str | None = struct.field(pytree_node=False, default=None)
    exchange: Exchange | None = struct.field(pytree_node=False, default=None)
    boost: Array | None = None
    room: int | None = struct.field(pytree_node=False, default=None)
    everywhere: bool = struct.field(pytree_node=False, default=False)

    def order(self) -> tuple[Array, Array]:
        """Indices of choices, sorted by expert, in the order of tokens within one, [B * N * K]; sizes [E]."""
        flat = self.expert.reshape(-1)
        sizes = (flat[:, None] == jnp.arange(self.experts)).sum(axis=0, dtype=jnp.int32)
        return jnp.argsort(flat, stable=True), sizes

    def dispatch(self, x: Array) -> tuple[Array, Array]:
        """[B, N, D] -> rows [B * N * K, D], or [B * room, D], and the sizes of their groups, [E] int32.

        Raises: ShapeError for other tokens than the plan was made for, TokenLabError for experts that are concrete and
          not in 0..E.
        """
        if x.shape[:2] != self.expert.shape[:2]:
            raise ShapeError(f"dispatch: made for tokens {self.expert.shape[:2]}, got {x.shape[:2]}.")
        _check_experts(self.expert, self.experts)
        order, sizes = self.order()
        if self.room is not None:
            order = order[: self.room * len(x)]
        x = _rounded(x, self.transport)
        return x.reshape(-1, x.shape[-1])[order // self.expert.shape[-1]], sizes

    def combine(self, y: Array) -> Array:
        """The experts' results for the rows of `dispatch` -> [B, N, D]."""
        order, sizes = self.order()
        batch, n, k = self.expert.shape
        y = _rounded(y, self.transport)
        there = jnp.arange(y.shape[0]) < sizes.sum()
        y = jnp.where(there[:, None], y, 0)
        by_choice = y.at[jnp.argsort(order)].get(mode="fill", fill_value=0).reshape(batch, n, k, -1)
        if self.boost is not None:  # the value is unchanged, bit for bit: what is added is 0
            still = jax.lax.stop_gradient(by_choice)
            by_choice = still + (by_choice - still) * self.boost[..., None].astype(y.dtype)
        return jnp.einsum("bnk,bnkd->bnd", self.weight.astype(y.dtype), by_choice)

    def run(self, bank: Bank, x: Array) -> Array:
        """combine(experts(dispatch(x))): [B, N, D] -> [B, N, D'], every device sorting its own rows."""
        exchange.check_exchange(self.exchange)  # a name is never ignored, also where nothing is exchanged
        over = spread(bank, everywhere=self.everywhere)
        if not (over.batch or over.tokens or over.experts or over.tensor):
            return self._local(bank, bank.params, x, self, over)
        over.check(self.experts, len(x))
        given, padded = self._padded(x, -x.shape[1] % over.ways(over.tokens))
        rows = over.spec()
        local = jax.shard_map(
            lambda params, x, own: self._local(bank, over.own(bank, params), x, own, over),
            in_specs=(over.specs(bank), rows, jax.tree.map(lambda _: rows, padded)),
            out_specs=rows,
            axis_names=over.manual,
            check_vma=False,
        )
        return local(over.sent(bank), given, padded)[:, : x.shape[1]]

    def _padded(self, x: Array, count: int) -> tuple[Array, Sorted]:
        """With so many tokens more in every example, which no expert computes."""
        if not count:
            return x, self

        def more(leaf: Array | None, value: int) -> Array | None:
            width = ((0, 0), (0, count), (0, 0))
            return None if leaf is None else jnp.pad(leaf, width, constant_values=value)

        expert, weight, boost = more(self.expert, self.experts), more(self.weight, 0), more(self.boost, 1)
        return more(x, 0), self.replace(expert=expert, weight=weight, boost=boost)

    def _local(self, bank: Bank, params: Any, x: Array, own: Sorted, over: Spread) -> Array:
        """On the tokens of one device, `own`, with its part of the experts."""
        ways = over.ways(over.experts)
        how = exchange.check_exchange(self.exchange)
        travels = self.transport or x.dtype
        if how == "gather" and ways > 1:
            mine = jax.lax.axis_index(over.experts) * (self.experts // ways)
            x = over.join(x.astype(travels), over.experts).astype(x.dtype)
            own = jax.tree.map(lambda leaf: over.join(leaf, over.experts), own)
            held = (own.expert >= mine) & (own.expert < mine + self.experts // ways)
            expert = jnp.where(held, own.expert - mine, self.experts // ways)
            own = own.replace(expert=expert, experts=self.experts // ways)
            rows, sizes = own.dispatch(x)
            return over.add_up(own.combine(bank.groups(params, rows, sizes)), over.experts)
        if over.joined:
            x = over.join(x)
            own = jax.tree.map(over.join, own)
        rows, sizes = own.dispatch(x)
        if ways == 1:
            return over.add_up(own.combine(bank.groups(params, rows, sizes)))
        sent = exchange.send(rows.astype(travels), sizes, over.experts, ways, implementation=how)
        y = bank.groups(params, sent.rows.astype(x.dtype), sent.sizes)
        back = exchange.send_back(y.astype(travels), sent, len(rows), over.experts, implementation=how)
        return over.add_up(own.combine(back.astype(y.dtype)))


def _check_experts(expert: Array, experts: int) -> None:
    if not isinstance(expert, jax.core.Tracer):
        known = np.asarray(expert)
        if known.size and not (0 <= known.min() and known.max() <= experts):
            raise TokenLabError(
                f"experts are 0..{experts - 1}, or {experts} for padding; got {known.min()}..{known.max()}."
            )


def _rounded(x: Array, transport: str | None) -> Array:
    return x if transport is None else x.astype(transport).astype(x.dtype)
