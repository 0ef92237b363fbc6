"""Counted cost: FLOPs and bytes of any JAX function, the cost table of a model, and what the hardware can do."""

from tokenlab.cost.flops import Cost, count
from tokenlab.cost.hardware import (
    Hardware,
    Peaks,
    lookup,
    measure_matmul_flops,
    measure_memory_bandwidth,
    measure_peaks,
)
from tokenlab.cost.operations import OperationCost, register_cost
from tokenlab.cost.roofline import Roofline, roofline
from tokenlab.cost.table import CostRow, CostTable, Ratio, RowInfo, pretty

__all__ = [
    "Cost",
    "CostRow",
    "CostTable",
    "Hardware",
    "OperationCost",
    "Peaks",
    "Ratio",
    "Roofline",
    "RowInfo",
    "count",
    "lookup",
    "measure_matmul_flops",
    "measure_memory_bandwidth",
    "measure_peaks",
    "pretty",
    "register_cost",
    "roofline",
]
