"""The roofline: the least time that a counted program can take on a machine, and what sets it.

    compute     = FLOPs / FLOP/s of matrix products
    memory      = bytes / bytes/s of memory
    collectives = bytes moved between devices / bytes/s of their links
    network     = bytes moved between slices / bytes/s of the network that joins them
    time       >= the largest of these

FLOPs and bytes are those of `tokenlab.cost.count`: a loop's body as often as it runs, elementwise work taken as fused
into its neighbours. Source: Williams, Waterman and Patterson 2009 (Roofline, CACM 52(4)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenlab.core.errors import CostError
from tokenlab.cost.flops import Cost
from tokenlab.cost.hardware import Peaks


@dataclass(frozen=True)
class Roofline:
    """Seconds that each resource needs at its peak rate."""

    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    network_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """The least time: the longest of all, as they overlap at best."""
        return max(self.compute_seconds, self.memory_seconds, self.collective_seconds, self.network_seconds)

    @property
    def in_turn(self) -> float:
        """The time where nothing that is sent overlaps with what computes."""
        return max(self.compute_seconds, self.memory_seconds) + self.collective_seconds + self.network_seconds

    @property
    def bound(self) -> Literal["compute", "memory", "collectives", "network"]:
        """What takes longest; on a tie the first of compute, memory, collectives and network."""
        if self.compute_seconds == self.seconds:
            return "compute"
        if self.memory_seconds == self.seconds:
            return "memory"
        return "collectives" if self.collective_seconds == self.seconds else "network"


def roofline(
    cost: Cost,
    peaks: Peaks,
    *,
    devices: int = 1,
    collective_bytes: int = 0,
    link_bandwidth: float | None = None,
) -> Roofline:
    """The roofline of a program that runs once.

    Args:
      cost: over all devices, recomputation included.
      peaks: of one device, in the dtype of the matrix products.
      devices: that share the work evenly, at least 1.
      collective_bytes: each device sends in collectives; `tokenlab.sharding.check.collectives` lists those of a
        compiled program (once each, also in a loop).
      link_bandwidth: bytes/s that a device can send; needed where `collective_bytes` is not 0.

    Raises:
      CostError: no device, or bytes to send without a link.
    """
    if devices < 1:
        raise CostError(f"roofline: got {devices} devices, expected at least 1.")
    if collective_bytes and not link_bandwidth:
        raise CostError(
            f"roofline: {collective_bytes} bytes of collectives and no link_bandwidth; give the bytes/s of a link."
        )
    return Roofline(
        compute_seconds=cost.flops / devices / peaks.flops,
        memory_seconds=cost.bytes / devices / peaks.bandwidth,
        collective_seconds=collective_bytes / link_bandwidth if link_bandwidth else 0.0,
    )
