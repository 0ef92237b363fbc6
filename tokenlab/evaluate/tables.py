"""Results of evaluation for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tokenlab.cost import pretty

COUNTS = ("flops_per_example", "parameters")
APART = ("per_class", "calibration", "most_confused", "probe")
"""Keys of a result that are tables themselves."""

NONE = "-"


def one(result: Mapping[str, Any]) -> Table:
    """The result of one stack, a row a key."""
    found = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    found.add_column(style="bold")
    found.add_column(overflow="fold")
    for name, value in result.items():
        if name in APART:
            continue
        if name == _speed_key(result):
            found.add_row(_speed_label(name), _speed(value))
        elif isinstance(value, float):
            found.add_row(name.replace("_", " "), _share(value))
        else:
            found.add_row(name.replace("_", " "), pretty(value) if name in COUNTS else str(value))
    for name, probe in result.get("probe", {}).items():
        settings = ", ".join(f"{key} {probe[key]:g}" for key in ("k", "temperature", "C") if key in probe)
        unsure = "" if probe.get("converged", True) else ", did not converge"
        found.add_row(f"{name} probe accuracy", f"{_share(probe['accuracy'])}  ({settings}{unsure})")
    return found


def several(results: Sequence[Mapping[str, Any]], primary: str) -> Table:
    """A row a stack, each compared with the first.

    Args:
      results: from `measure_each`, of one split.
      primary: the metric to compare by.
    """
    first = results[0]
    found = Table(box=SIMPLE_HEAD, pad_edge=False)
    found.add_column("stack", overflow="fold")
    shares = [key for key in ("top5_accuracy", "ece") if key in first]
    heads = {"top5_accuracy": "top-5", "ece": "ECE"}
    columns = ["tokens out", primary, "difference", *(heads[key] for key in shares)]
    columns += [f"{name} {primary}" for name in first.get("probe", {})]
    for name in (*columns, "FLOPs/example", "ratio", _speed_label(_speed_key(first))):
        found.add_column(name, justify="right")
    for result in results:
        ratio = result["flops_per_example"] / first["flops_per_example"]
        found.add_row(
            result["stack"],
            str(result["tokens_out"]),
            _share(result[primary]),
            f"{result[primary] - first[primary]:+.4f}",
            *(_share(result[key]) for key in shares),
            *(_share(probe["accuracy"]) for probe in result.get("probe", {}).values()),
            pretty(result["flops_per_example"]),
            f"{ratio:.3f}",
            _speed(result[_speed_key(result)]),
        )
    return found


def classes(result: Mapping[str, Any]) -> Table:
    """A row a class: examples, predictions, precision, recall and F1."""
    found = Table(box=SIMPLE_HEAD, pad_edge=False, title=result["stack"], title_justify="left")
    named = any(row["name"] is not None for row in result["per_class"])
    found.add_column("class")
    for name in ("support", "predicted", "precision", "recall", "f1"):
        found.add_column(name, justify="right")
    for row in result["per_class"]:
        label = f"{row['class']} {row['name']}" if named else str(row["class"])
        found.add_row(
            label,
            str(row["support"]),
            str(row["predicted"]),
            *(_share(row[key]) for key in ("precision", "recall", "f1")),
        )
    return found


def confused(result: Mapping[str, Any], names: Sequence[str] | None) -> list[str]:
    """The pairs of classes that are mistaken most often, a line each."""

    def name(number: int) -> str:
        return names[number] if names is not None else str(number)

    return [
        f"class {name(pair['label'])} said to be {name(pair['predicted'])}: {pair['count']}"
        for pair in result["most_confused"]
    ]


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _speed_key(result: Mapping[str, Any]) -> str:
    """The key that tells of speed, such as "images_per_second"."""
    return next(key for key in result if key.endswith("_per_second"))


def _speed_label(key: str) -> str:
    return f"{key.removesuffix('_per_second')}/s (measured)"


def _speed(value: float) -> str:
    return f"{value:,.0f}"
