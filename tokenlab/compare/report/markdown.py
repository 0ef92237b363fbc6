"""table.md: the table of arms for a README, an issue or a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenlab.compare.report import metrics, numbers, reading


def markdown(results: Mapping[str, Any]) -> str:
    """The title, the two sentences, a table with a row an arm, what is missing, and notes.

    Raises:
      DataError: the results are of another format, or have no arm of the baseline's name.
    """
    reading.checked(results)
    metric = results["metric"]
    head = [
        "arm",
        "stack",
        f"{metric['split']} {metric['name']}",
        f"difference to {_cell(results['baseline'])}",
        *(cost.title for cost in reading.COSTS),
        "steps",
        "status",
    ]
    rows = [_row(results, arm) for arm in results["arms"]]
    table = [
        " | ".join(head),
        " | ".join(["---", "---", *["---:"] * (len(head) - 3), "---"]),
        *(" | ".join(row) for row in rows),
    ]
    parts = [
        f"# {_text(results['title'])}",
        f"{_text(reading.compared(results))} {_text(reading.finding(results))}",
        "\n".join(f"| {line} |" for line in table),
        "Intervals: 95 %, Student's t over seeds; differences are paired by seed.",
        *_by_metric(results),
    ]
    said = [*reading.missing(results), *results["notes"]]
    if said:
        parts.append("\n".join(f"- {_text(line)}" for line in said))
    return "\n\n".join(parts) + "\n"


def _row(results: Mapping[str, Any], arm: Mapping[str, Any]) -> list[str]:
    return [
        _cell(arm["name"]),
        _code(arm["stack"]),
        _with_interval(arm["quality"], "mean"),
        "baseline"
        if arm["name"] == results["baseline"]
        else _with_interval(arm["versus_baseline"], "difference"),
        *(numbers.amount(arm[cost.key], cost.unit) for cost in reading.COSTS),
        f"{arm['steps']:,}" if arm["steps"] is not None else numbers.NONE,
        arm["status"],
    ]


def _by_metric(results: Mapping[str, Any]) -> list[str]:
    """A table a metric, of all arms; none where results hold nothing of it."""
    found = []
    for name in metrics.names(results):
        lines = [
            f"arm | {name} | difference to {_cell(results['baseline'])} | {metrics.ETA}",
            "--- | ---: | ---: | ---:",
        ]
        for arm in results["arms"]:
            each = arm["by_metric"][name]
            base = arm["name"] == results["baseline"]
            difference = "baseline" if base else _with_interval(each["versus_baseline"], "difference")
            quality = _with_interval(each["quality"], "mean")
            lines.append(" | ".join((_cell(arm["name"]), quality, difference, metrics.eta(each, base))))
        found.append("\n".join(f"| {line} |" for line in lines))
    return [metrics.EXPLAINED, *found] if found else []


def _with_interval(found: Mapping[str, Any] | None, key: str) -> str:
    if found is None:
        return numbers.NONE
    sign = key == "difference"
    value = numbers.signed(found[key]) if sign else numbers.quality(found[key])
    span = numbers.interval(found["low"], found["high"], sign=sign)
    return f"{value} ({span})" if span else value


def _text(text: str) -> str:
    """Text that Markdown shows as it is."""
    for mark in "\\&<>*_`$[]~#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _code(text: str) -> str:
    """A stack as code, if there is one; a bar inside would end the cell."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`" if text else ""
