"""Expert parallelism for sorted rows: send each row to the device that holds its expert, and the result back.

Inside `jax.shard_map`. The devices along one mesh axis, or several, hold E / ways experts each, in order; every one has
R rows sorted by expert. Shapes are static, so a device makes room for the worst case, that all devices send it all
their rows: ways * R.

implementation: "padded" sends buffers of R rows to every device by `lax.all_to_all`: it runs everywhere, and moves and
holds `ways` times what is needed. "ragged" sends the rows alone by `lax.ragged_all_to_all`, which XLA:CPU does not
have. None picks "padded" on CPU and "ragged" elsewhere. "gather" sends nothing by expert: every device gets all tokens,
computes those of its own experts, and the results are added up; less travels where a token has more choices than there
are devices. It needs no `send`: see `tokenlab.ops.dispatch.Sorted`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from tokenlab.core.errors import ShapeError, TokenLabError, suggest
from tokenlab.sharding.target import target_platform

Exchange: TypeAlias = Literal["padded", "ragged", "gather"]
Axes: TypeAlias = str | tuple[str, ...]
EXCHANGES = ("padded", "ragged", "gather")


class Sent(NamedTuple):
    """What came from all devices, and what is needed to send it back.

    Attributes:
      rows: [ways * R, D], sorted by this device's experts; zeros behind the groups.
      sizes: [E / ways] int32.
      order: [ways * R], where each of the rows stood when it arrived.
      matrix: [ways, ways] int32, rows from (first) to (second) device.
    """

    rows: Array
    sizes: Array
    order: Array
    matrix: Array


def check_exchange(implementation: str | None) -> str:
    """The implementation to run. Raises TokenLabError when it is unknown or cannot run here."""
    cpu = target_platform() == "cpu"
    if implementation is None:
        return "padded" if cpu else "ragged"
    if implementation not in EXCHANGES:
        raise TokenLabError(
            f"exchange {implementation!r} is unknown.{suggest(str(implementation), EXCHANGES)}"
        )
    if implementation == "ragged" and cpu:
        raise TokenLabError(
            "exchange 'ragged' needs ragged-all-to-all, which XLA:CPU does not have; take 'padded'."
        )
    return implementation


def send(rows: Array, sizes: Array, axis: Axes, ways: int, *, implementation: Exchange | None = None) -> Sent:
    """Send rows to the owners of their experts.

    Args:
      rows: [R, D], sorted by expert; what stands behind the groups is not sent.
      sizes: [E] int32, E a multiple of `ways`.
      axis: mesh axis that the experts lie on, or axes, that of the farthest devices first.
      ways: its size, or their product.
      implementation: see the module.

    Raises: ShapeError when `ways` does not divide E, TokenLabError as `check_exchange`, and for "gather".
    """
    count, experts = rows.shape[0], sizes.shape[0]
    if experts % ways:
        raise ShapeError(f"{experts} experts cannot be split over {ways} devices of mesh axis {axis!r}.")
    chosen = check_exchange(implementation)
    if chosen == "gather":
        raise TokenLabError("exchange 'gather' sends no rows by expert; take 'padded' or 'ragged'.")
    per_owner = sizes.reshape(ways, experts // ways)
    arrived = lax.all_to_all(per_owner, axis, 0, 0)  # [from, my experts]
    matrix = lax.all_gather(per_owner.sum(axis=1), axis)
    if chosen == "padded":
        parcels = _parcels(rows, matrix[lax.axis_index(axis)])
        rows = lax.all_to_all(parcels, axis, 0, 0).reshape(ways * count, -1)
        expert = jax.vmap(lambda sizes: _group(sizes, count))(arrived).reshape(-1)
    else:
        me = lax.axis_index(axis)
        rows = _ragged(rows, jnp.zeros((ways * count, rows.shape[1]), rows.dtype), matrix, me, axis)
        group = _group(arrived.reshape(-1), ways * count)
        expert = jnp.where(group < experts, group % (experts // ways), experts // ways)
    order = jnp.argsort(expert, stable=True)
    there = (expert < experts // ways)[:, None]
    return Sent(jnp.where(there, rows, 0)[order], arrived.sum(axis=0), order, matrix)


def send_back(
    y: Array, sent: Sent, count: int, axis: Axes, *, implementation: Exchange | None = None
) -> Array:
    """Results of `sent.rows`, in that order, as [R, D'] where their rows came from; zeros behind the groups.

    Args:
      y: [ways * R, D'].
      sent: from `send`.
      count: R.
    """
    chosen = check_exchange(implementation)
    ways = sent.matrix.shape[0]
    arrived = jnp.zeros_like(y).at[sent.order].set(y, unique_indices=True)
    me = lax.axis_index(axis)
    mine = sent.matrix[me]
    if chosen == "padded":
        parcels = lax.all_to_all(arrived.reshape(ways, count, -1), axis, 0, 0)
        owner = _group(mine, count)
        place = jnp.arange(count) - (jnp.cumsum(mine) - mine)[jnp.minimum(owner, ways - 1)]
        back = parcels[jnp.minimum(owner, ways - 1), place]
    else:
        back = _ragged(arrived, jnp.zeros((count, y.shape[1]), y.dtype), sent.matrix.T, me, axis)
    return jnp.where((jnp.arange(count) < mine.sum())[:, None], back, 0)


def _parcels(rows: Array, sizes: Array) -> Array:
    """[R, D] in groups of `sizes` [ways] -> [ways, R, D], each group at the front of its parcel, zeros behind."""
    count = rows.shape[0]
    index = (jnp.cumsum(sizes) - sizes)[:, None] + jnp.arange(count)
    there = jnp.arange(count) < sizes[:, None]
    return jnp.where(there[..., None], rows[jnp.minimum(index, count - 1)], 0)


def _ragged(rows: Array, room: Array, matrix: Array, me: Array, axis: Axes) -> Array:
    """Send matrix[me, d] rows to each device d; they arrive in `room`, in the order of the senders."""
    before = jnp.cumsum(matrix, axis=0) - matrix  # [from, to]: where my rows begin at the receiver
    mine = matrix[me]
    return lax.ragged_all_to_all(
        rows, room, jnp.cumsum(mine) - mine, mine, before[me], matrix[:, me], axis_name=axis
    )


def _group(sizes: Array, rows: int) -> Array:
    """The group of each row, [rows] int32; the number of groups behind the last."""
    return jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right", method="compare_all").astype(
        jnp.int32
    )
