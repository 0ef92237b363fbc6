"""Counted cost: FLOPs and bytes of any JAX function, the cost table of a model, and what the hardware can do."""

from tokenlab.cost.flops import Cost, count
from tokenlab.cost.hardware import Hardware, lookup, measure_matmul_flops
from tokenlab.cost.operations import OperationCost, register_cost
from tokenlab.cost.table import CostRow, CostTable, Ratio, RowInfo, pretty

__all__ = [
    "Cost",
    "CostRow",
    "CostTable",
    "Hardware",
    "OperationCost",
    "Ratio",
    "RowInfo",
    "count",
    "lookup",
    "measure_matmul_flops",
    "pretty",
    "register_cost",
]
