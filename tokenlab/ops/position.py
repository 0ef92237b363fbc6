"""Positions: rotary embedding by carried coordinates, the fixed 2-D table, and resampling a learned table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.core.errors import ShapeError, TokenLabError


def rope(x: jax.Array, coords: jax.Array, theta: float = 10_000.0) -> jax.Array:
    """Rotate queries or keys by their positions (rotary embedding, Su et al., arXiv 2104.09864, eq. 15).

    Feature i of the first half is paired with feature i of the second half ("rotate half", as GPT-NeoX and LLaMA
    checkpoints have it) and turned by coords * theta^(-2i/Dh). With A coordinate axes, Dh is cut into A equal parts
    and part a turns by axis a. The product of a rotated query and key depends on the difference of their coords only.
    Reads the coordinates that tokens carry, so it stays right when tokens were dropped or reordered.

    Args:
      x: [B, N, H, Dh] float; Dh divisible by 2A.
      coords: [B, N] or [B, N, A], int or float positions. Angles are computed in float32.
      theta: base of the frequencies, > 0.

    Returns: [B, N, H, Dh] in x's dtype. Coordinate 0 leaves x unchanged.

    Raises: ShapeError for shapes that do not fit, TokenLabError for theta <= 0.
    """
    x, coords = jnp.asarray(x), jnp.asarray(coords)
    if x.ndim != 4 or coords.ndim not in (2, 3) or coords.shape[:2] != x.shape[:2]:
        raise ShapeError(
            f"x {x.shape} and coords {coords.shape} do not fit; expected [B, N, H, Dh] and [B, N] or [B, N, A]."
        )
    if not theta > 0:
        raise TokenLabError(
            f"theta is {theta!r}; the base of the frequencies must be above 0 (10000 is usual)."
        )
    coords = coords[..., None] if coords.ndim == 2 else coords
    axes, width = coords.shape[2], x.shape[3]
    if axes == 0 or width % (2 * axes):
        raise ShapeError(
            f"a head width of {width} cannot be cut into {axes} axes of pairs; it must be a multiple of {2 * axes}."
        )
    half = width // axes // 2
    frequency = jnp.asarray(float(theta) ** (-np.arange(half) / half), jnp.float32)
    angle = coords.astype(jnp.float32)[:, :, None, :, None] * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32).reshape(*x.shape[:3], axes, 2 * half), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def sincos_2d(rows: int, cols: int, width: int) -> jax.Array:
    """The fixed 2-D position table, [rows * cols, D] float32, in raster order.

    A quarter of the width each: sin and cos of the column, sin and cos of the row, with frequencies from 1 down to
    1/10000 (Beyer et al., "Better plain ViT baselines for ImageNet-1k", arXiv 2205.01580).

    Raises: ShapeError unless width is a multiple of 4, at least 8, and the grid is not empty.
    """
    if width < 8 or width % 4:
        raise ShapeError(f"width is {width}; the 2-D sin-cos table needs a multiple of 4, at least 8.")
    if rows < 1 or cols < 1:
        raise ShapeError(f"the grid is {rows} x {cols}; both sides must be at least 1.")
    quarter = width // 4
    frequency = 10_000.0 ** (-np.arange(quarter) / (quarter - 1))
    row, col = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    parts = [turn(side.reshape(-1, 1) * frequency) for side in (col, row) for turn in (np.sin, np.cos)]
    return jnp.asarray(np.concatenate(parts, axis=1), jnp.float32)


def resample_grid(table: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """A learned position table for another grid: bicubic (Keys, a = -0.5), antialiased when it shrinks.

    Args:
      table: [N, D] with N = old rows * old columns, raster order. Rows of special tokens (CLS, registers) are cut off
        before and put back after by the caller.
      old, new: (rows, columns).

    Returns: [new rows * new columns, D] in the table's dtype, computed in float32; the table itself when the grids
    are equal.

    Raises: ShapeError when the table does not have one row a cell of the old grid, or a grid is empty.
    """
    table = jnp.asarray(table)
    (old_rows, old_cols), (new_rows, new_cols) = old, new
    if min(old_rows, old_cols, new_rows, new_cols) < 1:
        raise ShapeError(f"cannot resample from {old} to {new}; every side must be at least 1.")
    if table.ndim != 2 or table.shape[0] != old_rows * old_cols:
        raise ShapeError(
            f"table has shape {table.shape}; a {old_rows} x {old_cols} grid needs [{old_rows * old_cols}, D] "
            "(cut off the rows of special tokens first)."
        )
    if (old_rows, old_cols) == (new_rows, new_cols):
        return table
    width = table.shape[1]
    grid = table.astype(jnp.float32).reshape(old_rows, old_cols, width)
    grid = jax.image.resize(grid, (new_rows, new_cols, width), method="bicubic", antialias=True)
    return grid.reshape(new_rows * new_cols, width).astype(table.dtype)
