"""A table of each metric: values of the arms, their differences to the baseline, and eta (`tokenlab.compare.reach`)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from tokenlab.compare.report import numbers, reading, table

ETA = "eta"
EXPLAINED = (
    "eta: the training FLOPs of the baseline's whole run, divided by those after which an arm first is as good as the "
    "baseline at its end, on the split that is evaluated during training; above 1, the arm gets there for less."
)


def names(results: Mapping[str, Any]) -> list[str]:
    """The metrics that have a table, the primary one first."""
    return list(next((arm["by_metric"] for arm in results["arms"] if arm.get("by_metric")), {}))


def eta(found: Mapping[str, Any], base: bool) -> str:
    """ "1.42 (1.31 to 1.53)"; how many seeds got there, where not all did."""
    if base or not found["pairs"]:
        return numbers.NONE
    if found["eta"] is None:
        return f"reached by {found['reached']} of {found['pairs']} seeds"
    span = numbers.interval(found["eta"]["low"], found["eta"]["high"])
    return numbers.quality(found["eta"]["mean"]) + (f" ({span})" if span else "")


def section(results: Mapping[str, Any]) -> str:
    """The section with the tables; empty where results hold nothing of them."""
    shown = "\n".join(_table(results, name) for name in names(results))
    if not shown:
        return ""
    return (
        '<section aria-labelledby="metrics-title">\n<h2 id="metrics-title">By metric</h2>\n'
        f"<p>{escape(EXPLAINED)}</p>\n{shown}\n</section>"
    )


def _table(results: Mapping[str, Any], name: str) -> str:
    looks = reading.looks(results)
    heads = (name, f"Difference to {results['baseline']}", ETA)
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("Arm", *heads))
    rows = []
    for arm in results["arms"]:
        found, base = arm["by_metric"][name], arm["name"] == results["baseline"]
        cells = (
            _interval(found["quality"], "mean", sign=False),
            _interval(found["versus_baseline"], "difference", sign=True),
            escape(eta(found, base)),
        )
        rows.append(
            f'<tr><th scope="row">{table.swatch(looks[arm["name"]])} {escape(arm["name"])}</th>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)} of each arm">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _interval(found: Mapping[str, Any] | None, key: str, *, sign: bool) -> str:
    if found is None:
        return numbers.NONE
    write = numbers.signed if sign else numbers.quality
    span = numbers.interval(found["low"], found["high"], sign=sign)
    value = f'<span data-value="{found[key]!r}">{write(found[key])}</span>'
    return f'{value}<span class="span">{escape(span)}</span>' if span else value
