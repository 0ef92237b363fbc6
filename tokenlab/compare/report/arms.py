"""Each arm by itself: its runs, its configuration, the command that reproduces it; pictures of tokens and samples."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from tokenlab.compare.report import numbers, reading, table
from tokenlab.cost import pretty

_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def section(results: Mapping[str, Any]) -> str:
    """The section with a folded part for each arm."""
    parts = "\n".join(_arm(results, arm) for arm in results["arms"])
    return (
        '<section aria-labelledby="each-title">\n<h2 id="each-title">Each arm in full</h2>\n'
        "<p>Runs, the command that reproduces the arm, what it changes, and its whole configuration.</p>\n"
        f"{parts}\n</section>"
    )


def pictures(results: Mapping[str, Any], folder: Path | None) -> str:
    """The section with the pictures, which are read from the folder; empty where no arm has one."""
    looks = reading.looks(results)
    blocks = []
    for arm in results["arms"]:
        if not arm["pictures"]:
            continue
        shown = "".join(_picture(path, arm["name"], folder) for path in arm["pictures"])
        blocks.append(f"<h3>{table.swatch(looks[arm['name']])} {escape(arm['name'])}</h3>\n{shown}")
    if not blocks:
        return ""
    return (
        '<section class="pictures" aria-labelledby="pictures-title">\n<h2 id="pictures-title">Pictures</h2>\n'
        f"{''.join(blocks)}\n</section>"
    )


def _picture(path: str, name: str, folder: Path | None) -> str:
    file, kind = Path(path), _TYPES.get(Path(path).suffix.lower())
    why = ""
    if folder is None:
        why = "is left out: no folder was given to read it from"
    elif kind is None:
        why = f"is left out: pictures end in {reading.listed(_TYPES)}"
    else:
        try:
            content = base64.b64encode((folder / file).read_bytes()).decode()
        except OSError as error:
            why = f"is left out: {error.strerror}"
    if why:
        return f'<p class="empty"><code>{escape(path)}</code> {escape(why)}.</p>'
    says = escape(_caption(file))
    alt = f"{escape(name)}: {says}"
    return (
        f'<figure class="picture"><img src="data:{kind};base64,{content}" alt="{alt}" loading="lazy">'
        f"<figcaption>{says}</figcaption></figure>"
    )


def _caption(file: Path) -> str:
    """What a picture is of, by its name; of seed_0/samples/200.png "seed 0, samples after 200 steps"."""
    if file.parent.name == "samples" and file.stem.isdecimal():
        return f"{file.parts[-3].replace('_', ' ')}, samples after {int(file.stem):,} steps"
    return file.stem.replace("_", " ")


def _arm(results: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    look = reading.looks(results)[arm["name"]]
    counts = {
        "Training FLOPs": ("train_flops", "FLOPs"),
        "With recomputing": ("train_flops_with_recompute", "FLOPs"),
        "Tokens over layers": ("layer_tokens", ""),
        "Training time": ("seconds", "s"),
    }
    facts = "".join(
        f"<div><dt>{title}</dt><dd>{_value(arm[key], numbers.amount(arm[key], unit))}</dd></div>"
        for title, (key, unit) in counts.items()
    )
    return (
        f"<details><summary>{table.swatch(look)}<span><b>{escape(arm['name'])}</b> "
        f'<code>{escape(arm["stack"])}</code></span></summary>\n<div class="inside">\n'
        f'<dl class="facts">{facts}<div><dt>Hash of the config</dt><dd><code>{escape(arm["hash"])}</code></dd></div>'
        f"</dl>\n{_runs(results, arm)}\n"
        f"<h4>Reproduce it</h4>{_code(arm['command'], wrap=True)}\n"
        f"<h4>What it changes</h4>{_json(arm['overrides']) if arm['overrides'] else '<p>Nothing.</p>'}\n"
        f"<h4>Configuration</h4>{_json(arm['config'])}\n</div></details>"
    )


def _value(value: float | None, text: str) -> str:
    return text if value is None else f'<span data-value="{value!r}">{escape(text)}</span>'


def _runs(results: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    if not arm["runs"]:
        return '<p class="empty">No run yet.</p>'
    first = results["metric"]["name"]
    names = sorted(
        {name for run in arm["runs"] for name in run["metrics"]}, key=lambda name: (name != first, name)
    )
    heads = ["Seed", *names, "Steps", "Training FLOPs", "Time", "Step time", "Folder"]
    head = "".join(f'<th scope="col">{escape(text[:1].upper() + text[1:])}</th>' for text in heads)
    rows = "".join(_run(run, names) for run in arm["runs"])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Runs of {escape(arm["name"])}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _run(run: Mapping[str, Any], names: list[str]) -> str:
    metrics = [(run["metrics"].get(name), numbers.quality(run["metrics"].get(name))) for name in names]
    cells = [
        *metrics,
        (run["steps"], f"{run['steps']:,}"),
        (run["train_flops"], pretty(run["train_flops"], "FLOPs")),
        (run["seconds"], numbers.seconds(run["seconds"])),
        (run["step_seconds"], numbers.seconds(run["step_seconds"])),
    ]
    inside = "".join(f"<td>{_value(value, text)}</td>" for value, text in cells)
    return (
        f'<tr><th scope="row">{escape(str(run["seed"]))}</th>{inside}'
        f"<td><code>{escape(run['workdir'])}</code></td></tr>"
    )


def _json(value: Any) -> str:
    return _code(json.dumps(value, indent=2, ensure_ascii=False))


def _code(text: str, *, wrap: bool = False) -> str:
    return (
        f'<div class="code{" wrap" if wrap else ""}"><button type="button" class="quiet copy">Copy</button>'
        f'<pre tabindex="0"><code>{escape(text)}</code></pre></div>'
    )
