"""index.html: the whole report in one file that opens offline and asks the network for nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from tokenlab.compare.report import arms, metrics, numbers, reading, table
from tokenlab.core.errors import DataError

ASSETS = Path(__file__).parent / "assets"

CHARTS = ("looks.js", "pareto.js", "curves.js", "layers.js", "draw.js")
"""The program that draws, in parts that build upon each other."""

# Nothing may be fetched: a browser refuses even what a library might try.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_CURVE_AXES = {"step": "Steps", "train_flops": "FLOPs", "seconds": "Seconds"}


def html(results: Mapping[str, Any], folder: Path | None = None) -> str:
    """The page.

    Args:
      results: of format 1, as results.json of a comparison holds them. The page carries all of them: its charts are
        drawn from there.
      folder: of the comparison; pictures are read from it and put into the page. Without it, or where a picture
        is not there, the page says which are left out.

    Returns:
      A whole HTML document.

    Raises:
      DataError: the results are of another format, have no arm of the baseline's name, or hold what JSON cannot.
    """
    reading.checked(results)
    title = escape(results["title"])
    sections = [
        _summary(results),
        _missing(results),
        table.section(results),
        metrics.section(results),
        _charts(results),
        _experts(results),
        arms.pictures(results, folder),
        arms.section(results),
        _about(results),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{_asset("page.css")}</style>
</head>
<body>
<header class="top">
<p class="eyebrow">TokenLab comparison</p>
<h1>{title}</h1>
<button type="button" id="theme" class="quiet">Theme: system</button>
</header>
<main>
{chr(10).join(section for section in sections if section)}
</main>
<script type="application/json" id="results">{_embedded(results)}</script>
<script type="application/json" id="view">{_embedded(_view(results))}</script>
<script>
{_asset("page.js")}</script>
<script>
{_plotly()}
</script>
<script>
{"".join(map(_asset, CHARTS))}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _plotly() -> str:
    # Imported here: it takes most of a second, and only the page needs it.
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _embedded(value: Any) -> str:
    """JSON that can stand inside a script element: no text in it ends the element."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise DataError(f"the page cannot hold the results: {error}; expected finite JSON values") from error
    # "<" would be read by the browser; the other two end a line in older JavaScript.
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _view(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the charts need besides the results: how arms look, and which are on which front."""
    return {
        "looks": {
            name: {
                "color": None if look.color == reading.INK else look.color,
                "symbol": look.symbol,
                "dash": look.dash,
            }
            for name, look in reading.looks(results).items()
        },
        "costs": [cost._asdict() for cost in reading.COSTS],
        "fronts": {cost.key: reading.front(results, cost.key) for cost in reading.COSTS},
        "equal": reading.equal_cost(results),
        "splits": reading.curve_splits(results),
        "against": _against(results),
    }


def _summary(results: Mapping[str, Any]) -> str:
    budget, metric = results["budget"], results["metric"]
    amount = numbers.budget_short(budget)
    order = "higher" if metric["higher_is_better"] else "lower"
    facts = {
        "Budget": f'<span data-value="{budget["amount"]}">{escape(amount)}</span>',
        "Quality": f"{escape(metric['split'])} {escape(metric['name'])}, {order} is better",
        "Baseline": escape(results["baseline"]),
        "Seeds": escape(", ".join(map(str, results["seeds"]))),
        "Device": escape(results["device"]),
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in facts.items())
    return (
        f'<section class="summary" aria-label="Summary">\n<p class="finding">{escape(reading.finding(results))}</p>\n'
        f'<p class="compared">{escape(reading.compared(results))}</p>\n<dl class="facts">{rows}</dl>\n</section>'
    )


def _missing(results: Mapping[str, Any]) -> str:
    said = [*reading.missing(results), *results["notes"]]
    if not said:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>" for line in said)
    return (
        '<section class="notes" aria-labelledby="notes-title"><h2 id="notes-title">Read with this in mind</h2>\n'
        f"<ul>{lines}</ul></section>"
    )


def _charts(results: Mapping[str, Any]) -> str:
    """The sections that share the legend, which stays in sight as far as they go."""
    sections = [_legend(results), _pareto(results), _curves(results), _tokens(results)]
    return "<div>\n" + "\n".join(section for section in sections if section) + "\n</div>"


def _legend(results: Mapping[str, Any]) -> str:
    """The one legend of all charts; a press on an arm brings it out everywhere."""
    looks = reading.looks(results)
    chips = "".join(
        f'<button type="button" class="chip" data-arm="{index}" aria-pressed="false" title="{escape(arm["stack"])}">'
        f"{table.swatch(looks[arm['name']])}<span>{escape(arm['name'])}</span></button>"
        for index, arm in enumerate(results["arms"])
        if arm["runs"] or arm["tokens_by_layer"]
    )
    return f'<nav class="legend" aria-label="Arms: press one to bring it out in every chart"><div>{chips}</div></nav>'


def _pareto(results: Mapping[str, Any]) -> str:
    metric = results["metric"]
    figures = "".join(_pareto_figure(results, cost) for cost in reading.COSTS)
    return (
        f'<section aria-labelledby="pareto-title">\n<h2 id="pareto-title">{_title(metric["name"])} against cost</h2>\n'
        "<p>A point is an arm: the mean over its seeds, the bar its 95 % interval. The grey line is the front: no arm "
        "beats those on it at no more cost. Hollow points are arms that are not finished.</p>\n"
        f'<div class="grid">{figures}</div>\n</section>'
    )


def _pareto_figure(results: Mapping[str, Any], cost: reading.Cost) -> str:
    with_both = [arm for arm in results["arms"] if arm["quality"] is not None and arm[cost.key] is not None]
    best = reading.front(results, cost.key)
    heading = f"<h3>{cost.title}<small>{cost.note}</small></h3>"
    if not with_both:
        return f'<figure>{heading}<p class="empty">No arm has both a result and this cost yet.</p></figure>'
    caption = f"On the front: {escape(reading.listed(best))}."
    if reading.equal_cost(results) == cost.key:
        but = reading.unequal(results)
        all_but = f"all but {escape(reading.listed(but))}" if but else "all"
        caption += f" The budget makes this cost the same for {all_but}."
    lacks = [arm["name"] for arm in results["arms"] if arm["quality"] is not None and arm[cost.key] is None]
    if lacks:
        caption += f" No record: {escape(reading.listed(lacks))}."
    label = escape(
        f"{results['metric']['name']} against {reading.lower(cost.title)}. On the front: {', '.join(best)}."
    )
    return (
        f'<figure>{heading}<div class="chart" role="img" aria-label="{label}" data-chart="pareto" '
        f'data-cost="{cost.key}"></div><figcaption>{caption}</figcaption></figure>'
    )


def _curves(results: Mapping[str, Any]) -> str:
    splits = reading.curve_splits(results)
    if not splits:
        return ""
    metric = results["metric"]["name"]
    names = {metric: _title(metric), "loss": "Loss"}
    controls = (
        _choice("Against", "x", _CURVE_AXES, _against(results))
        + (_choice("Show", "y", names) if len(names) > 1 else "")
        + (_choice("Split", "split", {split: _title(split) for split in splits}) if len(splits) > 1 else "")
        + _choice("Range", "range", {"all": "Whole run", "late": "Last half"})
    )
    return (
        '<section aria-labelledby="curves-title">\n<h2 id="curves-title">Learning curves</h2>\n'
        "<p>The strong line runs through the middle seed at each record; the thin ones are the seeds.</p>\n"
        f'<div class="controls" id="curve-controls">{controls}</div>\n'
        '<figure class="wide"><div class="chart tall" role="img" data-chart="curves" '
        f'aria-label="Learning curves of each arm: {escape(metric)} or loss against steps, FLOPs or seconds"></div>'
        '<p class="empty" id="curves-empty" hidden>No record of this.</p></figure>\n</section>'
    )


def _against(results: Mapping[str, Any]) -> str:
    """What the learning curves are drawn against at first: what the budget makes equal, where it is one of them."""
    return {"flops": "train_flops", "seconds": "seconds"}.get(results["budget"]["kind"], "step")


def _choice(legend: str, name: str, options: Mapping[str, str], pressed: str | None = None) -> str:
    pressed = next(iter(options)) if pressed is None else pressed
    buttons = "".join(
        f'<button type="button" data-set="{name}" data-to="{escape(key)}" '
        f'aria-pressed="{"true" if key == pressed else "false"}">{escape(text)}</button>'
        for key, text in options.items()
    )
    return f'<fieldset><legend>{legend}</legend><div class="segments">{buttons}</div></fieldset>'


def _tokens(results: Mapping[str, Any]) -> str:
    if not any(arm["tokens_by_layer"] for arm in results["arms"]):
        return ""
    return (
        '<section aria-labelledby="tokens-title">\n<h2 id="tokens-title">Where the tokens went</h2>\n'
        "<p>Tokens that each layer works on. Arms with the same counts share a line: the wider one lies behind.</p>\n"
        '<figure class="wide"><div class="chart" role="img" data-chart="tokens" '
        'aria-label="Tokens by layer of each arm"></div></figure>\n</section>'
    )


def _experts(results: Mapping[str, Any]) -> str:
    figures = "".join(
        f'<figure><h3>{escape(arm["name"])}</h3><div class="chart" role="img" data-chart="experts" data-arm="{index}" '
        f'aria-label="Load of each expert by layer, {escape(arm["name"])}"></div></figure>'
        for index, arm in enumerate(results["arms"])
        if arm["expert_load"]
    )
    if not figures:
        return ""
    return (
        '<section aria-labelledby="experts-title">\n<h2 id="experts-title">Expert load</h2>\n'
        "<p>What each expert of a layer was given. An even row is a balanced layer.</p>\n"
        f'<div class="grid">{figures}</div>\n</section>'
    )


def _about(results: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(version))}</dd></div>"
        for name, version in results["versions"].items()
    )
    return (
        '<section class="about" aria-labelledby="about-title">\n<h2 id="about-title">Made with</h2>\n'
        f'<dl class="facts">{rows}</dl>\n'
        "<p>Intervals are 95 %, Student’s t over seeds; differences to the baseline are paired by seed, and "
        "each interval stands for itself: none is widened for the number of arms. FLOPs are "
        "counted from the program, two per multiply-add; times and memory are measured on the device named above. "
        "Every number here stands in <code>results.json</code>; <code>table.md</code> and the PNGs beside this file "
        "hold the same table and charts.</p>\n</section>"
    )


def _title(text: str) -> str:
    return escape(text[:1].upper() + text[1:])
