"""One wide token as J pieces of width D, for attention among tokens of width D, and back."""

from __future__ import annotations

import jax

from tokenlab.core.errors import ShapeError

__all__ = ["join_pieces", "split_pieces"]


def join_pieces(pieces: jax.Array) -> jax.Array:
    """[B, J, D] -> [B, J * D], the D features of piece 0 first. Raises ShapeError for another number of axes."""
    if pieces.ndim != 3:
        raise ShapeError(f"join_pieces: expected pieces [B, J, D], got shape {pieces.shape}.")
    return pieces.reshape(pieces.shape[0], -1)


def split_pieces(wide: jax.Array, count: int) -> jax.Array:
    """[B, J * D] -> [B, J, D] with J = `count`; undoes `join_pieces`.

    Raises ShapeError for another number of axes, or a width that is no multiple of `count`.
    """
    if wide.ndim != 2 or count < 1 or wide.shape[1] % count:
        raise ShapeError(
            f"split_pieces: shape {wide.shape} cannot be cut into {count} pieces; expected [B, J * D] with J = {count}."
        )
    return wide.reshape(wide.shape[0], count, -1)
