"""Timing beside counting: how much of a counted saving a machine really saves."""

from tokenlab.bench.command import run

__all__ = ["run"]
