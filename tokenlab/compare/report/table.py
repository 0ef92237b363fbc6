"""The table of arms: a row an arm, sortable, with the difference to the baseline drawn beside its number."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from tokenlab.compare.report import numbers, reading

_SHAPES = {
    "circle": '<circle cx="8" cy="8" r="5"/>',
    "square": '<rect x="3.5" y="3.5" width="9" height="9"/>',
    "triangle-up": '<path d="M8 2.5 14 13H2z"/>',
    "diamond": '<path d="M8 1.5 14 8 8 14.5 2 8z"/>',
    "triangle-down": '<path d="M8 13.5 2 3h12z"/>',
    "cross": '<path d="M6 2h4v4h4v4h-4v4H6v-4H2V6h4z"/>',
    "x": '<path d="M5 2 8 5l3-3 3 3-3 3 3 3-3 3-3-3-3 3-3-3 3-3-3-3z"/>',
}

# The drawing of an interval, in its own units.
_WIDTH, _HEIGHT, _EDGE = 84, 38, 6


def section(results: Mapping[str, Any]) -> str:
    """The section with the table."""
    metric = results["metric"]
    heads = [
        ("Arm", "text", False),
        (f"{metric['split']} {metric['name']}", "number", False),
        (f"Difference to {results['baseline']}", "number", False),
        *((cost.title, "number", True) for cost in reading.COSTS),
        ("Steps", "number", True),
    ]
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button" data-kind="{kind}">'
        f"{escape(text[:1].upper() + text[1:])}</button></th>"
        for text, kind, _ in heads
    )
    rows = "\n".join(_row(results, arm, index) for index, arm in enumerate(results["arms"]))
    return (
        '<section aria-labelledby="arms-title">\n<h2 id="arms-title">The arms</h2>\n'
        "<p>Press a heading to sort. Intervals are 95 %; a difference in bold has an interval without zero.</p>\n"
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="arms-title">\n<table id="arms">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>\n</section>"
    )


def swatch(look: reading.Look) -> str:
    """The marker of an arm as a small drawing."""
    return (
        f'<svg class="swatch" viewBox="0 0 16 16" aria-hidden="true" style="{color(look)}">'
        f"{_SHAPES[look.symbol]}</svg>"
    )


def color(look: reading.Look) -> str:
    """The style that gives an element the colour of an arm; ink where it is the baseline's."""
    return f"--arm:{'var(--ink)' if look.color == reading.INK else look.color}"


def _row(results: Mapping[str, Any], arm: Mapping[str, Any], index: int) -> str:
    look = reading.looks(results)[arm["name"]]
    base = arm["name"] == results["baseline"]
    marks = "".join(
        f'<span class="mark">{text}</span>'
        for text, shown in (
            ("baseline", base),
            (
                f"{len(arm['runs'])} of {len(results['seeds'])} seeds",
                arm["status"] in ("partial", "diverged"),
            ),
            ("waits", arm["status"] == "waiting"),
            ("diverged", arm["status"] == "diverged"),
        )
        if shown
    )
    name = (
        f'<th scope="row" data-sort="{index}"><div class="arm">{swatch(look)}<div><code>{escape(arm["stack"])}</code>'
        f'<span class="name">{escape(arm["name"])}{marks}</span></div></div></th>'
    )
    cells = [
        _quality(arm["quality"]),
        _difference(results, arm, look),
        *(_number(arm[cost.key], numbers.amount(arm[cost.key], cost.unit)) for cost in reading.COSTS),
        _number(arm["steps"], numbers.NONE if arm["steps"] is None else f"{arm['steps']:,}"),
    ]
    return f'<tr id="row-{index}" class="{arm["status"]}">{name}{"".join(cells)}</tr>'


def _number(value: float | None, text: str) -> str:
    if value is None:
        return f'<td class="none">{text}<span class="hidden">not recorded</span></td>'
    return f'<td data-value="{value!r}" data-sort="{value!r}">{escape(text)}</td>'


def _quality(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return _number(None, numbers.NONE)
    return (
        f'<td data-sort="{found["mean"]!r}"><span class="main" data-value="{found["mean"]!r}">'
        f"{numbers.quality(found['mean'])}</span>{_span(found, sign=False)}</td>"
    )


def _span(found: Mapping[str, Any], *, sign: bool) -> str:
    if found["low"] is None or found["high"] is None:
        return '<span class="span">one seed</span>'
    write = numbers.signed if sign else numbers.quality
    low, high = (f'<span data-value="{found[key]!r}">{write(found[key])}</span>' for key in ("low", "high"))
    return f'<span class="span">{low} to {high}</span>'


def _difference(results: Mapping[str, Any], arm: Mapping[str, Any], look: reading.Look) -> str:
    found = arm["versus_baseline"]
    if arm["name"] == results["baseline"]:
        return f'<td class="none" data-sort="0"><div class="versus">{_forest(results, None, look)}</div></td>'
    if found is None:
        return _number(None, numbers.NONE)
    strong = " beyond" if reading.beyond(arm) else ""
    return (
        f'<td data-sort="{found["difference"]!r}"><div class="versus"><div>'
        f'<span class="main{strong}" data-value="{found["difference"]!r}">{numbers.signed(found["difference"])}</span>'
        f"{_span(found, sign=True)}</div>{_forest(results, found, look)}</div></td>"
    )


def _forest(results: Mapping[str, Any], found: Mapping[str, Any] | None, look: reading.Look) -> str:
    """The interval as a line, the difference as a dot on it; the dashed line is zero, the same in all rows.

    The baseline's row has the line of zero alone.
    """
    ends = [0.0]
    for arm in results["arms"]:
        if arm["versus_baseline"] is not None:
            ends += [arm["versus_baseline"][key] for key in ("difference", "low", "high")]
    ends = [end for end in ends if end is not None]
    low, wide = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(_EDGE + (_WIDTH - 2 * _EDGE) * (value - low) / wide, 1)

    middle, zero = _HEIGHT / 2, place(0.0)
    line = dot = ""
    if found is not None:
        dot = f'<circle cx="{place(found["difference"])}" cy="{middle}" r="4"/>'
    if found is not None and found["low"] is not None and found["high"] is not None:
        left, right = place(found["low"]), place(found["high"])
        line = f'<line class="reach" x1="{left}" x2="{right}" y1="{middle}" y2="{middle}"/>'
    return (
        f'<svg class="forest" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" aria-hidden="true" '
        f'style="{color(look)}"><line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="{_HEIGHT}"/>{line}{dot}</svg>'
    )
