"""What became of the patches of one image, as pixels: numpy in, numpy out, so that each region can be tested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenlab.core.errors import ShapeError

DROPPED = np.array([196, 202, 214], np.uint8)
STRIPE = np.array([120, 130, 152], np.uint8)
GONE = np.array([226, 229, 237], np.uint8)
GONE_STRIPE = np.array([203, 208, 221], np.uint8)
THROUGH = np.array([0, 114, 178], np.uint8)
SIDE = 192
"""Height of a painted image in pixels, as near as whole-numbered enlargement comes; a larger one stays as it is."""

AROUND = 0.7
"""How much of a patch that goes around a body gives way to white."""

GROUPS = np.array(
    [
        [219, 109, 0], [0, 109, 219], [0, 146, 146], [255, 109, 182], [255, 255, 109],
        [109, 182, 255], [36, 255, 36], [146, 0, 0], [182, 109, 255], [146, 73, 0],
        [255, 182, 219], [182, 219, 255], [73, 0, 146],
    ],
    np.uint8,
)  # fmt: skip
"""Outlines of merged groups: the colours of a palette for colour-blind readers that show on black and on white."""


@dataclass(frozen=True)
class Patches:
    """What became of M patches of one image at one reduction.

    Attributes:
      before: index of the token that carries each patch before it, -1 where none does, [M] int.
      after: the same after it; for a wrapper, of the tokens its body sees.
      inside: True when `after` is about the body of a wrapper: what is not there goes around, and is not lost.
    """

    before: np.ndarray
    after: np.ndarray
    inside: bool = False

    @property
    def gone(self) -> np.ndarray:
        """[M] bool: was not there before."""
        return self.before < 0

    @property
    def left(self) -> np.ndarray:
        """[M] bool: dropped here, or going around the body."""
        return (self.before >= 0) & (self.after < 0)

    @property
    def present(self) -> np.ndarray:
        """[M] bool: carried on."""
        return self.after >= 0

    def groups(self) -> list[np.ndarray]:
        """Patches that share a token, two or more: indices ascending, the groups by their first patch."""
        groups: dict[int, list[int]] = {}
        for patch, token in enumerate(self.after):
            if token >= 0:
                groups.setdefault(int(token), []).append(patch)
        return [np.array(members) for members in groups.values() if len(members) > 1]

    @property
    def merged(self) -> np.ndarray:
        """[M] bool: shares its token."""
        found = np.zeros(len(self.after), bool)
        for members in self.groups():
            found[members] = True
        return found


def image_to_rgb(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """[H, W, C] floats in [low, high], C 1 (grey) or 3, as uint8 [H, W, 3]; low is black.

    Raises:
      ShapeError: another number of channels.
    """
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ShapeError(f"a picture is drawn of images [H, W, 1] or [H, W, 3]; got {list(image.shape)}.")
    span = high - low if high > low else 1.0
    scaled = np.clip((image.astype(np.float64) - low) / span, 0.0, 1.0)
    return np.broadcast_to(np.rint(scaled * 255).astype(np.uint8), (*image.shape[:2], 3)).copy()


def pixel_range(images: np.ndarray) -> tuple[float, float]:
    """The values that stand for black and white: the narrowest usual range that holds them, or their own.

    So pictures of one data set look alike whatever is in them. Usual are [0, 1], [-1, 1] and [0, 255].
    """
    low, high = float(images.min()), float(images.max())
    for usual in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        if usual[0] <= low and high <= usual[1]:
            return usual
    return low, high


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel as a square of `factor` x `factor`."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def factor_for(height: int) -> int:
    """How many times larger an image of so many pixels is drawn: to about `SIDE`, in whole numbers."""
    return max(1, round(SIDE / height))


def cells(picture: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A view [rows, columns, p, q, 3] of a picture [rows * p, columns * q, 3]; writing to it writes to the picture.

    Raises:
      ShapeError: the grid does not divide the picture.
    """
    rows, columns = grid
    height, width = picture.shape[:2]
    if height % rows or width % columns:
        raise ShapeError(
            f"a grid of {rows} x {columns} patches does not divide a picture of {height} x {width}."
        )
    p, q = height // rows, width // columns
    return picture.reshape(rows, p, columns, q, 3).transpose(0, 2, 1, 3, 4)


def paint(image: np.ndarray, grid: tuple[int, int], patches: Patches) -> np.ndarray:
    """One cell of tokens.png.

    Patches that were gone before are pale; those dropped here are striped. Around a body, patches are faded, and
    those that pass through it outlined. Patches that share a token show their average colour within one outline.

    Args:
      image: uint8 [H, W, 3].
      grid: (rows, columns) of patches, M of them, in the order of reading.
      patches: what became of them.

    Returns:
      uint8 [f * H, f * W, 3], with f = `factor_for(H)`.

    Raises:
      ShapeError: the grid does not divide the image, or has not M patches.
    """
    rows, columns = grid
    if len(patches.after) != rows * columns:
        raise ShapeError(f"a grid of {rows} x {columns} patches cannot show {len(patches.after)} patches.")
    picture = enlarge(image, factor_for(image.shape[0]))
    view = cells(picture, grid)

    def at(patch: int) -> np.ndarray:
        return view[divmod(int(patch), columns)]

    stripes = _stripes(view.shape[2:4])[..., None]
    for patch in np.flatnonzero(patches.gone):
        at(patch)[:] = np.where(stripes[:, ::-1], GONE_STRIPE, GONE)
    for patch in np.flatnonzero(patches.left):
        cell = at(patch)
        cell[:] = _fade(cell) if patches.inside else np.where(stripes, STRIPE, DROPPED)
    groups = patches.groups()
    for members in groups:
        color = np.mean([at(patch) for patch in members], axis=(0, 1, 2))
        for patch in members:
            at(patch)[:] = np.rint(color).astype(np.uint8)
    if patches.inside:
        for patch in np.flatnonzero(patches.present):
            _outline(at(patch), THROUGH, (True,) * 4)
    label = np.full(rows * columns, -1)
    for number, members in enumerate(groups):
        label[members] = number
    colors = _colors(label.reshape(grid), len(groups))
    for number, members in enumerate(groups):
        for patch in members:
            _outline(at(patch), GROUPS[colors[number]], _borders(label.reshape(grid), patch))
    return picture


def _fade(cell: np.ndarray) -> np.ndarray:
    return np.rint(cell * (1 - AROUND) + 255 * AROUND).astype(np.uint8)


def _stripes(shape: tuple[int, int]) -> np.ndarray:
    """Diagonal stripes that go on from one patch into the next where patches are square: bool [p, q]."""
    period = max(4, shape[0] // 2)
    y, x = np.indices(shape)
    return (x + y) % period < max(1, period // 4)


def _outline(cell: np.ndarray, color: np.ndarray, sides: tuple[bool, bool, bool, bool]) -> None:
    """Paint the (top, bottom, left, right) edges of a cell [p, q, 3]."""
    width = max(1, min(cell.shape[:2]) // 8)
    top, bottom, left, right = sides
    if top:
        cell[:width] = color
    if bottom:
        cell[-width:] = color
    if left:
        cell[:, :width] = color
    if right:
        cell[:, -width:] = color


def _borders(label: np.ndarray, patch: int) -> tuple[bool, bool, bool, bool]:
    """Which edges of a patch its group ends at: (top, bottom, left, right)."""
    row, column = divmod(int(patch), label.shape[1])
    return tuple(
        not (0 <= y < label.shape[0] and 0 <= x < label.shape[1]) or label[y, x] != label[row, column]
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    )


def _colors(label: np.ndarray, count: int) -> list[int]:
    """A colour for each group so that groups that touch differ where the colours suffice; the least used first."""
    touching: list[set[int]] = [set() for _ in range(count)]
    for a, b in ((label[:-1], label[1:]), (label[:, :-1], label[:, 1:])):
        for one, other in zip(a.ravel(), b.ravel(), strict=True):
            if one != other and one >= 0 and other >= 0:
                touching[one].add(int(other))
                touching[other].add(int(one))
    chosen: list[int] = []
    used = [0] * len(GROUPS)
    for number in range(count):
        taken = {chosen[other] for other in touching[number] if other < number}
        options = [color for color in range(len(GROUPS)) if color not in taken] or list(range(len(GROUPS)))
        color = min(options, key=lambda option: (used[option], option))
        chosen.append(color)
        used[color] += 1
    return chosen
