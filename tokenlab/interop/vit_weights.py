"""Weights of a Vision Transformer by the names of another library -> the state and settings of `tokenlab.models.vit`.

Arrays in, arrays out: nothing here reads or writes a file. PyTorch keeps kernels as [out, in] and patches as
[D, C, p, p]; here they are [in, out] and [p * p * C, D], and blocks are stacked along a first axis [L, ...].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenlab.core.errors import CheckpointError
from tokenlab.interop.layouts import Layout, recognise, short
from tokenlab.models.vit import SIZES


@dataclass(frozen=True, eq=False)
class Weights:
    """A ViT from outside.

    Attributes:
      layout: whose names the weights had.
      settings: of `ViTConfig`, as the weights imply them; "num_heads" among them only where they tell it.
      conventional: settings that no array tells, as models of this layout usually have them.
      depth: number of blocks L.
      block: one of them in a stack.
      channels: of the images.
      classes: of the classifier; None when there is none.
      notes: what is to be told, one line each.
      source: where the weights are from, for messages.
    """

    layout: Layout
    settings: Mapping[str, Any]
    conventional: Mapping[str, Any]
    depth: int
    block: str
    channels: int
    classes: int | None
    notes: tuple[str, ...]
    source: str
    _state: Mapping[str, Any]

    def state(self, num_heads: int) -> dict[str, Any]:
        """Nested dicts of float32 arrays as `ViT.init` makes them; without head/classifier where there is none.

        Raises:
          CheckpointError: the width is not a multiple of `num_heads` H.
        """
        width = self.settings["width"]
        if num_heads < 1 or width % num_heads:
            raise CheckpointError(
                f"{self.source}: width {width} cannot be split into {num_heads} heads; "
                "give config.model.num_heads as the model was trained with."
            )
        blocks = dict(self._state["blocks"])
        attention, size = dict(blocks["attention"]), width // num_heads
        for name in ("query", "key", "value"):
            kernel, bias = attention[name]["kernel"], attention[name]["bias"]
            attention[name] = {
                "kernel": kernel.reshape(self.depth, width, num_heads, size),
                "bias": bias.reshape(self.depth, num_heads, size),
            }
        out = attention["out"]
        kernel = out["kernel"].reshape(self.depth, num_heads, size, width)
        attention["out"] = {"kernel": kernel, "bias": out["bias"]}
        return {**self._state, "blocks": {**blocks, "attention": attention}}


def read(
    arrays: Mapping[str, np.ndarray],
    *,
    source: str = "the weights",
    grid: tuple[int, int] | None = None,
    fresh_head: bool = False,
) -> Weights:
    """Recognise the layout of weights and put every array in its place.

    Args:
      arrays: name -> array of any floating dtype, the whole `state_dict` of a model.
      source: where they are from, for messages.
      grid: (rows, columns) of the position table; None for a square.
      fresh_head: leave the classifier out.

    Raises:
      CheckpointError: an unknown layout; a leaf that is missing, unexpected, or of a wrong shape; a position table
        that fits no grid.
    """
    layout = recognise(arrays, source)
    leaves = _Leaves(layout, arrays, source)
    width, channels, patch = leaves.patch_shape()
    depth = leaves.depth()
    hidden = leaves.array("up", ".weight", (None, width), 0).shape[0]
    embed = _embed(leaves, width, patch, grid)
    table = embed.pop("grid")
    attention, facts = _attention(leaves, width, depth)
    blocks = {
        "attention_norm": leaves.norm("attention_norm", width, depth),
        "attention": attention,
        "ffn_norm": leaves.norm("ffn_norm", width, depth),
        "mlp": {
            "up": leaves.linear("up", width, hidden, depth),
            "down": leaves.linear("down", hidden, width, depth),
        },
    }
    jumbo, block = "special_norm" in layout.parts, "block"
    if jumbo:
        blocks["jumbo_norm"] = leaves.norm("special_norm", len(embed["registers"]) * width, depth)
        shared, block = _jumbo(leaves, len(embed["registers"]) * width)
    scaled = leaves.has("attention_scale") or leaves.has("ffn_scale")
    if scaled:
        for name in ("attention_scale", "ffn_scale"):
            blocks[name] = {"scale": leaves.stacked(name, "", (width,), depth)}
    head: dict[str, Any] = {"norm": leaves.norm("norm", width)}
    classes = None
    if leaves.has("classifier") and not fresh_head:
        head["classifier"] = _classifier(leaves, width, 1 + len(embed["registers"]) if jumbo else 1)
        classes = head["classifier"]["kernel"].shape[1]
    settings = {
        "width": width,
        "mlp_dim": hidden,
        "patch": patch,
        "head": "special" if jumbo else "cls" if "cls" in embed else "mean",
        "registers": len(embed.get("registers", ())),
        "position": "learned",
        "position_grid": table,
        "num_kv_heads": None,
        "layer_scale": 1.0 if scaled else None,
        **facts,
    }
    conventional = {"activation": "gelu", "norm_eps": layout.norm_eps}
    state = {"embed": embed, "blocks": blocks, "head": head}
    if jumbo:
        state["shared"] = shared
    notes = tuple(leaves.notes)
    return Weights(layout, settings, conventional, depth, block, channels, classes, notes, source, state)


def convert_jumbo_checkpoint(
    state_dict: Mapping[str, Any], num_heads: int | None = None, *, grid: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The `state_dict` of a released Jumbo ViT (arXiv 2502.15021) as the state of a ViT here.

    Args:
      state_dict: name -> array or PyTorch tensor; its `cls_token`, which nothing reads, is left out.
      num_heads: H; None for that of the published size of this width.
      grid: (rows, columns) of the position table; None for a square.

    Returns:
      Nested dicts of float32 arrays, as `ViT.init` makes them for `stack="block(special=jumbo)*L"`, `registers=J`,
      `head="special"`, `activation="gelu"`, `norm_eps=1e-5`.

    Raises:
      CheckpointError: names of another model, leaves that are missing or of a wrong shape, or a width that H does not
        divide.
    """
    arrays = {
        name: np.asarray(leaf.detach().cpu() if hasattr(leaf, "detach") else leaf)
        for name, leaf in state_dict.items()
    }
    weights = read(arrays, source="the Jumbo checkpoint", grid=grid)
    if weights.layout.name != "Jumbo":
        raise CheckpointError(
            f"{weights.source} has the names of {weights.layout.name}, not of Jumbo (jumbo_token, jumbo_mlp.fc1, ...); "
            "use tokenlab.interop.vit_weights.read."
        )
    if num_heads is None:
        width = weights.settings["width"]
        published = {columns: heads for columns, _, _, heads in SIZES.values()} | weights.layout.heads
        if width not in published:
            raise CheckpointError(
                f"{weights.source} has width {width}, which no published size has; give num_heads as the model was "
                "trained with."
            )
        num_heads = published[width]
    return weights.state(num_heads)


class _Leaves:
    """The arrays of a file by part, checked as they are taken."""

    def __init__(self, layout: Layout, arrays: Mapping[str, np.ndarray], source: str) -> None:
        self.layout, self.source = layout, source
        self.notes: list[str] = []
        self._names = {short(leaf): leaf for leaf in arrays}
        self._arrays = arrays
        self._parts: dict[str, list[str]] = {}
        for leaf in self._names:
            self._parts.setdefault(layout.part_of(leaf) or leaf, []).append(leaf)
        for leaf, why in layout.unused.items():
            if leaf in self._names:
                self.notes.append(f"{self._names[leaf]} is left out: {why}")

    def has(self, part: str, suffix: str = "") -> bool:
        """Whether any block has a leaf of this part that ends so."""
        return any(leaf.endswith(suffix) for leaf in self._parts.get(part, ()))

    def depth(self) -> int:
        """Number of blocks, by the highest number in a name."""
        name = self.layout.parts["attention_norm"]
        before = name.partition("{k}")[0]
        numbers = [
            int(leaf.removeprefix(before).partition(".")[0])
            for leaf in self._names
            if leaf.startswith(before)
        ]
        if not numbers:
            raise self._missing(name.format(k=0) + ".weight")
        return 1 + max(numbers)

    def patch_shape(self) -> tuple[int, int, int]:
        """Width D, channels C and patch side p."""
        kernel = self.array("patch", ".weight", (None, None, None, None))
        width, channels, rows, columns = kernel.shape
        if rows != columns:
            raise CheckpointError(
                f"{self.said('patch', '.weight')} has patches of {rows}x{columns} pixels; "
                "expected square ones: import a model that has them."
            )
        return width, channels, rows

    def array(
        self, part: str, suffix: str, shape: tuple[int | None, ...], block: int | None = None
    ) -> np.ndarray:
        """One leaf as float32. Raises CheckpointError when it is missing or of another shape."""
        leaf = self.layout.parts[part].format(k=block) + suffix
        if leaf not in self._names:
            raise self._missing(leaf)
        found = self._arrays[self._names[leaf]]
        fits = len(found.shape) == len(shape) and all(
            want in (None, have) for have, want in zip(found.shape, shape, strict=True)
        )
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"{self.said(part, suffix, block)} has shape {list(found.shape)}, expected [{expected}]; "
                "import the weights of one unchanged model."
            )
        if not np.all(np.isfinite(found)):
            raise CheckpointError(
                f"{self.said(part, suffix, block)} holds values that are not finite; save the weights anew."
            )
        return np.asarray(found, np.float32)

    def stacked(self, part: str, suffix: str, shape: tuple[int, ...], depth: int | None) -> np.ndarray:
        """One leaf, or with a depth L that of all blocks, [L, *shape]."""
        if depth is None:
            return self.array(part, suffix, shape)
        return np.stack([self.array(part, suffix, shape, k) for k in range(depth)])

    def norm(self, part: str, width: int, depth: int | None = None) -> dict[str, np.ndarray]:
        """A layer norm."""
        return {
            "scale": self.stacked(part, ".weight", (width,), depth),
            "bias": self.stacked(part, ".bias", (width,), depth),
        }

    def linear(self, part: str, inputs: int, outputs: int, depth: int | None = None) -> dict[str, np.ndarray]:
        """A linear layer, kernel [..., in, out]; one without a bias gets zeros, which compute the same."""
        kernel = self.stacked(part, ".weight", (outputs, inputs), depth)
        if self.has(part, ".bias"):
            bias = self.stacked(part, ".bias", (outputs,), depth)
        else:
            bias = np.zeros(kernel.shape[:-1], np.float32)
            self.notes.append(f"{self.layout.parts[part].format(k='*')} has no bias: it starts at zeros")
        return {"kernel": np.ascontiguousarray(kernel.swapaxes(-1, -2)), "bias": bias}

    def _missing(self, leaf: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source}: {leaf} is missing (layout {self.layout.name}); "
            "save the whole state_dict of one model into the file."
        )

    def said(self, part: str, suffix: str = "", block: int | None = None) -> str:
        leaf = self.layout.parts[part].format(k=block) + suffix
        return f"{self.source}: {self._names.get(leaf, leaf)} (layout {self.layout.name})"


def _embed(leaves: _Leaves, width: int, patch: int, grid: tuple[int, int] | None) -> dict[str, Any]:
    """The parameters of `PatchEmbed`, and the "grid" of the position table."""
    channels = leaves.patch_shape()[1]
    kernel = leaves.array("patch", ".weight", (width, channels, patch, patch)).transpose(2, 3, 1, 0)
    bias = np.zeros(width, np.float32)
    if leaves.has("patch", ".bias"):
        bias = leaves.array("patch", ".bias", (width,))
    found: dict[str, Any] = {
        "patch": {"kernel": np.ascontiguousarray(kernel).reshape(-1, width), "bias": bias}
    }
    if leaves.has("cls"):
        found["cls"] = leaves.array("cls", "", (1, 1, width))[0]
    if "registers" in leaves.layout.parts and leaves.has("registers"):
        found["registers"] = leaves.array("registers", "", (1, None, width))[0]
    # Others give the special tokens positions too; here their embedding is all there is, so the two are added.
    table = leaves.array("position", "", (1, None, width))[0]
    special, found["grid"] = _special_rows(leaves, len(table), found, grid)
    at = 0
    for name in ("cls", "registers"):
        if at < special and name in found:
            rows = len(found[name])
            found[name] = found[name] + table[at : at + rows]
            at += rows
    found["position"] = table[special:]
    return found


def _special_rows(
    leaves: _Leaves, rows: int, found: Mapping[str, Any], grid: tuple[int, int] | None
) -> tuple[int, tuple[int, int]]:
    """How many rows of a position table are of special tokens, and the grid of the rest."""
    cls, registers = len(found.get("cls", ())), len(found.get("registers", ()))
    options = {cls + registers, 0} if leaves.layout.position_of_registers else {cls}
    fits = []
    for special in sorted(options):
        side = math.isqrt(max(rows - special, 0))
        shape = grid or (side, side)
        if shape[0] * shape[1] == rows - special and rows > special:
            fits.append((special, shape))
    if len(fits) != 1:
        tried = " or ".join(str(rows - special) for special in sorted(options))
        which = f"not those of config.model.position_grid {grid}" if grid else "no square grid"
        raise CheckpointError(
            f"{leaves.said('position')} has {rows} positions, {tried} of them of patches: "
            f"{which if not fits else 'more than one grid fits'}; "
            "give config.model.position_grid=(rows, columns) as the model was trained with."
        )
    return fits[0]


def _attention(leaves: _Leaves, width: int, depth: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attention with heads not split yet, kernels [L, D, D], and the settings it implies."""
    found: dict[str, Any] = {}
    if "qkv" in leaves.layout.parts:
        whole = leaves.linear("qkv", width, 3 * width, depth)
        for i, name in enumerate(("query", "key", "value")):
            part = slice(i * width, (i + 1) * width)
            found[name] = {"kernel": whole["kernel"][..., part], "bias": whole["bias"][..., part]}
    else:
        found |= {name: leaves.linear(name, width, width, depth) for name in ("query", "key", "value")}
    found["out"] = leaves.linear("out", width, width, depth)
    if not (leaves.has("query_norm") or leaves.has("key_norm")):
        return found, {"qk_norm": False}
    size = leaves.array("query_norm", ".weight", (None,), 0).shape[0]
    for name in ("query_norm", "key_norm"):
        found[name] = leaves.norm(name, size, depth)
    if width % size:
        raise CheckpointError(
            f"{leaves.said('query_norm', '.weight', 0)} norms {size} features of a head, "
            f"which do not divide the width {width}; import a model that norms queries and keys by head."
        )
    return found, {"qk_norm": True, "num_heads": width // size}


def _jumbo(leaves: _Leaves, width: int) -> tuple[dict[str, Any], str]:
    """What all blocks share of Jumbo, for pieces of J D = `width` together, and one of the blocks in a stack."""
    hidden = leaves.array("special_up", ".weight", (None, width)).shape[0]
    if hidden % width:
        raise CheckpointError(
            f"{leaves.said('special_up', '.weight')} has {hidden} hidden features, no multiple of the joined width "
            f"{width}; import the weights of one unchanged model."
        )
    up, down = leaves.linear("special_up", width, hidden), leaves.linear("special_down", hidden, width)
    mult = "" if hidden == 4 * width else f"(mult={hidden // width})"
    return {"jumbo": {"up": up, "down": down}}, f"block(special=jumbo{mult})"


def _classifier(leaves: _Leaves, width: int, vectors: int) -> dict[str, np.ndarray]:
    """The classifier, on so many vectors of `width` joined."""
    outputs, inputs = leaves.array("classifier", ".weight", (None, None)).shape
    if vectors == 1 and inputs == 2 * width:
        raise CheckpointError(
            f"{leaves.said('classifier', '.weight')} reads the class token beside the mean of the patches, "
            f"{inputs} features; the classifier here reads {width}: give --fresh-head to start it at zeros."
        )
    return leaves.linear("classifier", vectors * width, outputs)
