"""Evaluation: trained weights under any stack of as many blocks, what a stack costs, and pictures of both."""

from tokenlab.evaluate.cost import CostReport, cost_report
from tokenlab.evaluate.trained import Trained, load, measure, run

__all__ = ["CostReport", "Trained", "cost_report", "load", "measure", "run"]
