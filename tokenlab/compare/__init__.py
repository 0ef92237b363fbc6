"""Comparisons at equal cost: arms, budgets, results and the report that is made of them."""

from tokenlab.compare.config import Budget, CompareConfig, default_config, product, zipped

__all__ = ["Budget", "CompareConfig", "default_config", "product", "zipped"]
