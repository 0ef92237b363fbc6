"""Patches to tokens: a linear embedding, positions of any grid, and the special tokens in front."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ShapeError
from tokenlab.core.tokens import Tokens
from tokenlab.ops.position import resample_grid, sincos_2d

Position: TypeAlias = Literal["learned", "sincos", "rope", "none"]


def patchify(image: Array, patch: int) -> Array:
    """[B, h*p, w*p, C] -> [B, h*w, p*p*C], row by row; a pixel's place in a patch is (row, column, channel).

    Raises:
      ShapeError: the patch does not divide the image.
    """
    if image.ndim != 4:
        raise ShapeError(f"patchify: expected images [B, H, W, C], got shape {image.shape}.")
    rows, columns = image.shape[1:3]
    if rows % patch or columns % patch:
        raise ShapeError(
            f"patchify: patch {patch} does not divide the image {rows}x{columns}; "
            "choose a patch that divides both, or resize the images."
        )
    h, w = rows // patch, columns // patch
    split = image.reshape(-1, h, patch, w, patch, image.shape[-1])  # b h p w q c
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(-1, h * w, patch * patch * image.shape[-1])


def unpatchify(patches: Array, grid: tuple[int, int], channels: int) -> Array:
    """The inverse of `patchify`: [B, h*w, p*p*C] -> [B, h*p, w*p, C].

    Args:
      patches: row by row.
      grid: (h, w).
      channels: C.

    Raises:
      ShapeError: there are not h*w patches, or their values are no square of C channels.
    """
    h, w = grid
    side = math.isqrt(patches.shape[-1] // channels)
    if patches.ndim != 3 or patches.shape[1] != h * w or side * side * channels != patches.shape[-1]:
        raise ShapeError(
            f"unpatchify: got {patches.shape}; expected [B, {h * w}, p*p*{channels}] for a grid of {h}x{w}."
        )
    split = patches.reshape(-1, h, w, side, side, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(-1, h * side, w * side, channels)


class PatchEmbed(nn.Module):
    """Tokens of an image: [CLS, registers, patches].

    Attributes:
      width: D.
      patch: side p of a square patch in pixels.
      cls: put a learned CLS token first.
      registers: learned register tokens after it (Darcet et al. 2024, arXiv 2309.16588).
      position: "learned" table, "sincos" (Chen et al. 2021, arXiv 2104.02057), "rope" (coordinates for rotary
        attention), or "none". Special tokens get no position of their own: their embedding already is one.
      grid: (rows, columns) the positions are made for; on another grid a table is resampled, and rotations are
        computed at coordinates scaled to this grid.
      dtype: compute dtype.
    """

    width: int
    patch: int
    cls: bool
    registers: int
    position: Position
    grid: tuple[int, int]
    dtype: Any = jnp.float32

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "patch/kernel": (None, "embed"),
        "patch/bias": (None,),
    }

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        found = dict(self.AXES)
        if self.cls:
            found["cls"] = (None, None)
        if self.registers:
            found["registers"] = (None, None)
        if self.position == "learned":
            found["position"] = (None, "embed")
        return found

    @property
    def special(self) -> int:
        """Tokens in front of the patches: CLS and registers."""
        return int(self.cls) + self.registers

    @nn.compact
    def __call__(self, image: Array) -> Tokens:
        """[B, H, W, C] -> `Tokens` of [B, special + N, D], special tokens protected."""
        grid = (image.shape[1] // self.patch, image.shape[2] // self.patch)
        patches = patchify(image.astype(self.dtype), self.patch)
        x = nn.Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.lecun_normal(), name="patch")(
            patches
        )
        if self.position == "learned":
            init = nn.initializers.normal(0.02)
            table = self.param("position", init, (self.grid[0] * self.grid[1], self.width), jnp.float32)
            x = x + resample_grid(table, self.grid, grid).astype(self.dtype)
        elif self.position == "sincos":
            table = sincos_2d(*self.grid, self.width)
            x = x + resample_grid(table, self.grid, grid).astype(self.dtype)
        special = []
        if self.cls:
            special.append(self.param("cls", nn.initializers.normal(0.02), (1, self.width), jnp.float32))
        if self.registers:
            init = nn.initializers.normal(0.02)
            special.append(self.param("registers", init, (self.registers, self.width), jnp.float32))
        if special:
            lead = jnp.concatenate(special).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(lead, (x.shape[0], *lead.shape)), x], axis=1)
        batch, count = x.shape[:2]
        position = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
        coords = None
        if self.position == "rope":
            coords = jnp.broadcast_to(self.coordinates(grid), (batch, count, 2))
        return Tokens(x, position, coords, protected=self.special)

    def coordinates(self, grid: tuple[int, int]) -> Array:
        """Row and column of every token [special + N, 2], float32, scaled to the grid the positions are made for.

        Special tokens stand at 0, where a rotation is the identity; patches start at 1.
        """
        rows = 1 + jnp.arange(grid[0]) * (self.grid[0] / grid[0])
        columns = 1 + jnp.arange(grid[1]) * (self.grid[1] / grid[1])
        patches = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
        return jnp.concatenate([jnp.zeros((self.special, 2)), patches]).astype(jnp.float32)
