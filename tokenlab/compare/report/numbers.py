"""Numbers written out for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenlab.cost import pretty

NONE = "–"
"""Stands where there is no number."""

MINUS = "−"


def amount(value: float | None, unit: str) -> str:
    """A cost: three digits with a decimal prefix; seconds below a minute as milliseconds where they are short."""
    if value is None:
        return NONE
    if unit == "s":
        return seconds(value)
    return pretty(value, unit)


def seconds(value: float | None) -> str:
    """A time: 31.2 ms, 4.1 s, 75 s."""
    if value is None:
        return NONE
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:,.3g} s" if value < 1000 else f"{value:,.0f} s"


def quality(value: float | None) -> str:
    """A metric: 0.9712; larger ones with four digits."""
    if value is None:
        return NONE
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def signed(value: float | None) -> str:
    """A difference of metrics: +0.0123, −0.0040."""
    if value is None:
        return NONE
    text = quality(abs(value))
    return (MINUS if value < 0 else "+" if value > 0 else "±") + text


def interval(low: float | None, high: float | None, *, sign: bool = False) -> str:
    """An interval: "0.9650 to 0.9770"; empty where there is none."""
    if low is None or high is None:
        return ""
    write = signed if sign else quality
    return f"{write(low)} to {write(high)}"


def budget_text(budget: Mapping[str, Any]) -> str:
    """A budget in words: "the same 1.2 TFLOPs of counted training (within 1 %)".

    Seconds are met as well as they were forecast, so the largest deviation is said instead.
    """
    value, tolerance = budget["amount"], budget["tolerance"]
    words = {
        "steps": f"the same {value:,.0f} steps",
        "flops": f"the same {pretty(value, 'FLOPs')} of counted training",
        "seconds": f"the same {seconds(value)} of training",
        "layer_tokens": f"the same {pretty(value)} tokens summed over layers",
    }
    within = f" (within {100 * tolerance:.2g} %)" if tolerance else ""
    if budget["kind"] == "seconds":
        off = budget["largest_deviation"]
        within = (
            " (a measured forecast"
            + ("" if off is None else f", met within {100 * off:.{0 if off >= 0.1 else 1}f} %")
            + ")"
        )
    return words[budget["kind"]] + within


def budget_short(budget: Mapping[str, Any]) -> str:
    """A budget in a few words: "1.2 TFLOPs of training"."""
    value = budget["amount"]
    return {
        "steps": f"{value:,.0f} steps",
        "flops": f"{pretty(value, 'FLOPs')} of training",
        "seconds": f"{seconds(value)} of training",
        "layer_tokens": f"{pretty(value)} layer tokens",
    }[budget["kind"]]
