"""The roofline of a configuration on a chip: the least time of a batch, and which layers its memory bounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tokenlab.cost import Cost, CostRow, CostTable, Peaks, Roofline, lookup, measure_peaks, pretty, roofline

HERE = "here"


@dataclass(frozen=True)
class Rooflines:
    """Rooflines of forward pass and train step of one batch on one device.

    Attributes:
      table: counted for the batch.
      batch_size: examples in it.
      peaks: of the device.
      dtype: of the matrix products.
    """

    table: CostTable
    batch_size: int
    peaks: Peaks
    dtype: str

    def of(self, row: CostRow) -> dict[str, Roofline]:
        """Of one row: "forward" and "training"."""
        forward = Cost(flops=row.forward_flops, bytes=row.forward_bytes)
        training = Cost(flops=row.train_flops, bytes=row.train_bytes)
        return {"forward": roofline(forward, self.peaks), "training": roofline(training, self.peaks)}

    def memory_bound(self, what: str) -> list[str]:
        """The layers whose memory traffic takes longer than their products, by group: "block (8 of 12)"."""
        slow = Counter(row.group for row in self.table.rows if self.of(row)[what].bound == "memory")
        every = Counter(row.group for row in self.table.rows)
        return [f"{group} ({count} of {every[group]})" for group, count in slow.items()]

    @property
    def text(self) -> str:
        """For people."""
        peak = (
            f"{pretty(self.peaks.flops)}FLOP/s in {self.dtype}, {pretty(self.peaks.bandwidth)}B/s of memory"
        )
        lines = [f"roofline on {self.peaks.name} ({peak}), batch {self.batch_size} on one device:"]
        for what, bound in self.of(self.table.total).items():
            times = f"compute {_ms(bound.compute_seconds)}, memory {_ms(bound.memory_seconds)}"
            lines.append(f"  {what}: about {_ms(bound.seconds)}, bound by {bound.bound} ({times})")
            slow = self.memory_bound(what)
            lines.append(f"    layers bound by memory: {', '.join(slow) or 'none'}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Seconds and bounds, of the whole and by layer."""
        return {
            "device": self.peaks.name,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "peak_flops_per_second": self.peaks.flops,
            "peak_bytes_per_second": self.peaks.bandwidth,
            "total": _to_json(self.of(self.table.total)),
            "rows": {row.name: _to_json(self.of(row)) for row in self.table.rows},
        }


def peaks_of(chip: str, dtype: str) -> Peaks:
    """The peaks of a chip by its name in `tokenlab.cost.hardware`, or "here": measured on this device.

    Raises:
      CostError: no datasheet is known (with the nearest name).
    """
    return measure_peaks(dtype) if chip == HERE else lookup(chip).peaks(dtype)


def _to_json(bounds: dict[str, Roofline]) -> dict[str, Any]:
    return {
        what: {
            "compute_seconds": bound.compute_seconds,
            "memory_seconds": bound.memory_seconds,
            "seconds": bound.seconds,
            "bound": bound.bound,
        }
        for what, bound in bounds.items()
    }


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
