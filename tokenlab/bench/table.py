"""Benchmark records as tables, for terminals and in Markdown."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from tokenlab.cost import pretty

FORMAT = 1
"""Of the records."""

Record = Mapping[str, Any]

_WIDE = Console(width=1000, file=io.StringIO())  # only measures


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _spread(record: Record) -> str:
    low, high = record["step_seconds_quartiles"]
    return f"{_milliseconds(record['step_seconds'])} ({_milliseconds(low)} to {_milliseconds(high)})"


def _realised(record: Record) -> str:
    if record["realised"] is None:
        return ""
    return f"{record['realised']:.2f} ({record['realised_low']:.2f} to {record['realised_high']:.2f})"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


COLUMNS: Mapping[str, Callable[[Record], str]] = {
    "stack": lambda r: r["stack"],
    "runs": lambda r: {"scan": "scanned", "unroll": "unrolled"}[r["execution"]],
    "FLOPs / dense": lambda r: f"{r['flops_ratio']:.3f}",
    "time / dense": lambda r: f"{r['time_ratio']:.3f}",
    "realised (95 %)": _realised,
    "ms a step (quartiles)": _spread,
    "tokens/s": lambda r: pretty(r["tokens_per_second"]),
    "of measured peak": lambda r: _share(r["mfu"]),
    "of datasheet": lambda r: _share(r["mfu_datasheet"]),
    "roofline ms": lambda r: f"{_milliseconds(r['roofline_seconds'])}, {r['roofline_bound']}",
    "memory": lambda r: "" if r["peak_bytes"] is None else pretty(r["peak_bytes"], "B"),
    "compile s": lambda r: f"{r['compile_seconds']:.1f}",
}
"""Heading -> cell of a record, the most telling first."""

LEFT = ("stack", "runs")


def title(records: Sequence[Record]) -> str:
    """One line on what the records of one mode have in common."""
    first = records[0]
    what = "Train step" if first["mode"] == "train" else "Inference"
    of, one = ("cores", "core") if first["platform"] == "cpu" else ("devices", "device")
    count = f"{first[of]} {one if first[of] == 1 else of}"
    return (
        f"{what}, {first['size']}, {first['dtype']}, batch {first['batch_size']}, {first['rounds']} rounds, "
        f"{first['device']}, {count}, jax {first['versions']['jax']}"
    )


def by_mode(records: Sequence[Record]) -> list[list[Record]]:
    """The records of each mode, in the order of first appearance."""
    modes = dict.fromkeys(record["mode"] for record in records)
    return [[record for record in records if record["mode"] == mode] for mode in modes]


def to_rich(records: Sequence[Record], width: int) -> list[Table]:
    """A table a mode; as many of the columns, from the first on, as `width` characters take.

    Columns that are empty throughout are left out.
    """
    tables = []
    for group in by_mode(records):
        for last in range(len(COLUMNS), 0, -1):
            table = _rich(group, tuple(COLUMNS)[:last])
            if Measurement.get(_WIDE, _WIDE.options, table).maximum <= width:
                break
        tables.append(table)
    return tables


def _rich(records: Sequence[Record], columns: Sequence[str]) -> Table:
    table = Table(title=title(records), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    header, lines = _cells(records, columns)
    for name in header:
        stacked = name.replace(" (", "\n(")
        table.add_column(stacked, justify="left" if name in LEFT else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def to_markdown(records: Sequence[Record], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """The same in Markdown, with the columns asked for."""
    parts = []
    for group in by_mode(records):
        header, lines = _cells(group, columns)
        lines = [[f"`{line[0]}`", *line[1:]] for line in lines] if header[0] == "stack" else lines
        rule = ["---" if name in LEFT else "---:" for name in header]
        rows = "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))
        parts.append(f"{title(group)}:\n\n{rows}\n")
    return "\n".join(parts)


def _cells(
    records: Sequence[Record], columns: Sequence[str] = tuple(COLUMNS)
) -> tuple[list[str], list[list[str]]]:
    lines = [[COLUMNS[name](record) for name in columns] for record in records]
    used = [index for index in range(len(columns)) if any(line[index] for line in lines)]
    return [columns[index] for index in used], [[line[index] for index in used] for line in lines]
