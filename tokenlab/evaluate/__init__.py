"""Evaluation: trained weights under any stack of as many blocks, what a stack costs, and pictures of both."""

from tokenlab.evaluate.command import run
from tokenlab.evaluate.cost import CostReport, cost_report
from tokenlab.evaluate.results import Measured, measure, measure_each
from tokenlab.evaluate.trained import Trained, load, load_each

__all__ = [
    "CostReport",
    "Measured",
    "Trained",
    "cost_report",
    "load",
    "load_each",
    "measure",
    "measure_each",
    "run",
]
