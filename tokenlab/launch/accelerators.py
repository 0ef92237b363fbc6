"""Slices of TPUs: what `v5e:4x4` is called by Google Cloud and Kubernetes, its chips, and its virtual machines.

Facts are from Google Cloud's documentation of each TPU version ("Cloud TPU configurations") and of GKE ("Plan TPUs").
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tokenlab.core.errors import ConfigError, suggest


@dataclass(frozen=True)
class Kind:
    """A TPU version.

    Attributes:
      accelerator: what stands before the size in an accelerator type, such as "v5litepod".
      per_chip: what the size of an accelerator type counts of each chip: TensorCores before v5e, chips since.
      gke: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      runtime: software of a TPU VM.
      dimensions: of the torus.
      most: chips in the largest slice.
      single: chips of the largest slice that is one virtual machine; those of larger slices have four each.
    """

    accelerator: str
    per_chip: int
    gke: str
    runtime: str
    dimensions: int
    most: int
    single: int


KINDS = {
    "v4": Kind("v4", 2, "tpu-v4-podslice", "tpu-ubuntu2204-base", 3, 4096, 4),
    "v5e": Kind("v5litepod", 1, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite", 2, 256, 8),
    "v5p": Kind("v5p", 2, "tpu-v5p-slice", "v2-alpha-tpuv5", 3, 8960, 4),
    "v6e": Kind("v6e", 1, "tpu-v6e-slice", "v2-alpha-tpuv6e", 2, 256, 8),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
"""Slices of a TPU version whose torus has two dimensions."""


@dataclass(frozen=True)
class Slice:
    """Chips that are linked to each other.

    Attributes:
      kind: the TPU version.
      topology: chips along each axis, such as "4x4".
      chips: in the slice.
      hosts: virtual machines of the slice, each of them one process.
    """

    kind: Kind
    topology: str
    chips: int
    hosts: int

    @property
    def accelerator_type(self) -> str:
        """What Google Cloud calls the slice, such as "v5litepod-16"."""
        return f"{self.kind.accelerator}-{self.chips * self.kind.per_chip}"

    @property
    def device_kind(self) -> str:
        """What rules for devices call its chips, "TPU v5e"."""
        return f"TPU {next(name for name, kind in KINDS.items() if kind is self.kind)}"


def tpu_slice(setting: str, text: str) -> Slice:
    """The slice called `text`, the kind of chip and the shape: "v5e:4x4", "v5p:4x4x8".

    Raises:
      ConfigError: no such kind, or no such slice of it; the message begins with `setting`.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", text)
    if found is None:
        raise ConfigError(f"{setting}={text}: expected the kind of TPU and the shape, such as v5e:4x4.")
    name, shape = found[1], found[2]
    if name not in KINDS:
        raise ConfigError(f"{setting}={text}: there is no TPU {name!r}.{suggest(name, KINDS)}")
    kind, sizes = KINDS[name], [int(size) for size in shape.split("x")]
    if len(sizes) != kind.dimensions:
        example = "4x4" if kind.dimensions == 2 else "4x4x4"
        raise ConfigError(
            f"{setting}={text}: slices of {name} have {kind.dimensions} dimensions: "
            f"expected one such as {name}:{example}."
        )
    chips = math.prod(sizes)
    if kind.dimensions == 2 and shape not in FLAT:
        raise ConfigError(f"{setting}={text}: no slice of {name} has that shape. Known: {', '.join(FLAT)}.")
    if kind.dimensions == 3 and not (_is_block(sizes) and chips <= kind.most):
        raise ConfigError(
            f"{setting}={text}: no slice of {name} has that shape: expected 2x2x1, 2x2x2, 2x2x4, 2x4x4, or multiples "
            f"of 4 with at most {kind.most} chips in all, such as 4x4x8."
        )
    return Slice(kind, shape, chips, 1 if chips <= kind.single else chips // 4)


def _is_block(sizes: list[int]) -> bool:
    return sizes in ([2, 2, 1], [2, 2, 2], [2, 2, 4], [2, 4, 4]) or all(
        size % 4 == 0 < size for size in sizes
    )
