"""What a report says of results: fronts, differences, what is missing, and the sentences made of them.

Nothing is averaged or estimated here: fronts and differences come from comparing numbers that the results hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenlab.compare.report.numbers import budget_text, signed
from tokenlab.core.errors import DataError
from tokenlab.evaluate.style import COLORS, MARKERS

FORMAT = 1


class Cost(NamedTuple):
    """A cost of an arm: its key in the results, what to call it, and its unit ("" for a plain count)."""

    key: str
    title: str
    unit: str
    note: str


COSTS = (
    Cost("train_flops", "Training FLOPs", "FLOPs", "counted, the whole run"),
    Cost("forward_flops", "Forward FLOPs per example", "FLOPs", "counted, at evaluation"),
    Cost("step_seconds", "Step time", "s", "measured, median over seeds"),
    Cost("peak_bytes", "Peak memory", "B", "of the training step"),
    Cost("parameters", "Parameters", "", "all of them"),
    Cost("active_parameters", "Active parameters", "", "those that one token meets"),
)

SYMBOLS = dict(
    zip(MARKERS, ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"), strict=True)
)
"""Marker of matplotlib -> symbol of plotly."""

INK = COLORS[-1]
"""The baseline's colour. On a dark page the colour of the text stands in for it."""

_DASHES = {"solid": "-", "dash": "--", "dot": ":"}


class Look(NamedTuple):
    """How an arm is drawn everywhere: never told apart by colour alone."""

    color: str
    marker: str
    dash: str

    @property
    def symbol(self) -> str:
        """The marker as plotly calls it."""
        return SYMBOLS[self.marker]

    @property
    def line(self) -> str:
        """The dash as matplotlib calls it."""
        return _DASHES[self.dash]


def checked(results: Mapping[str, Any]) -> None:
    """Raises DataError unless a report can be made of the results."""
    if results.get("format") != FORMAT:
        raise DataError(
            f"results of format {results.get('format')!r}: expected {FORMAT}; run `tokenlab compare` again to make "
            "them anew with this version"
        )
    names = [arm["name"] for arm in results["arms"]]
    if results["baseline"] not in names:
        raise DataError(
            f"no arm is called {results['baseline']!r}, the baseline; the arms are {listed(names) or 'none'}"
        )


def looks(results: Mapping[str, Any]) -> dict[str, Look]:
    """Arm -> how it is drawn: the baseline in ink, the others in Okabe and Ito's colours, each with a marker."""
    found = {results["baseline"]: Look(INK, MARKERS[0], "solid")}
    others = [arm["name"] for arm in results["arms"] if arm["name"] != results["baseline"]]
    colors, markers = COLORS[:-1], MARKERS[1:]
    for index, name in enumerate(others):
        turn = index // len(colors)
        marker = markers[(index + turn) % len(markers)]
        found[name] = Look(colors[index % len(colors)], marker, list(_DASHES)[turn % len(_DASHES)])
    return found


def front(results: Mapping[str, Any], cost: str) -> list[str]:
    """Names of the arms that no other arm beats in mean quality at no more cost, cheapest first.

    Costs that the budget made equal count as equal when they agree within its tolerance.
    """
    budget, sign = results["budget"], 1 if results["metric"]["higher_is_better"] else -1
    slack = budget["tolerance"] * budget["amount"] if cost == equal_cost(results) else 0
    points = [
        (arm["name"], arm[cost], sign * arm["quality"]["mean"])
        for arm in results["arms"]
        if arm["quality"] is not None and arm[cost] is not None
    ]
    kept = [
        (price, name)
        for name, price, quality in points
        if not any(
            (other <= price + slack and better > quality) or (other + slack < price and better >= quality)
            for _, other, better in points
        )
    ]
    return [name for _, name in sorted(kept, key=lambda point: point[0])]


def equal_cost(results: Mapping[str, Any]) -> str | None:
    """The cost that the budget makes the same for all arms, if it is one of `COSTS`."""
    return "train_flops" if results["budget"]["kind"] == "flops" else None


def main_cost(results: Mapping[str, Any]) -> Cost:
    """The cost that the finding speaks of: the first that the budget leaves free."""
    return COSTS[1] if equal_cost(results) == COSTS[0].key and not unequal(results) else COSTS[0]


def unequal(results: Mapping[str, Any]) -> list[str]:
    """Names of the arms that have the steps of another, and not the budget."""
    return [arm["name"] for arm in results["arms"] if arm["steps_of"] is not None]


def beyond(arm: Mapping[str, Any]) -> bool:
    """Whether the paired interval of the difference to the baseline leaves out zero."""
    paired = arm["versus_baseline"]
    return paired is not None and paired["low"] is not None and (paired["low"] > 0 or paired["high"] < 0)


def compared(results: Mapping[str, Any]) -> str:
    """One sentence: what was compared under which budget."""
    metric, arms = results["metric"], results["arms"]
    done = [arm for arm in arms if arm["quality"] is not None]
    verb = "were trained" if done else "are to be trained"
    what = f"{len(arms)} arms" if not done or len(done) == len(arms) else f"{len(done)} of {len(arms)} arms"
    if len(arms) == 1:
        what, verb = "1 arm", "was trained" if done else "is to be trained"
    seeds = listed(str(seed) for seed in results["seeds"])
    kind = "seed" if len(results["seeds"]) == 1 else "seeds"
    order = "higher" if metric["higher_is_better"] else "lower"
    but = [
        f"{arm['name']}, with the steps of {arm['steps_of']}" for arm in arms if arm["steps_of"] is not None
    ]
    exceptions = f" but for {'; '.join(but)}" if but else ""
    return (
        f"{what} {verb} with {kind} {seeds}, each run for {budget_text(results['budget'])}{exceptions}, and compared "
        f"by {metric['split']} {metric['name']}, where {order} is better."
    )


def finding(results: Mapping[str, Any]) -> str:
    """One sentence: which arms are on the front, and which differ from the baseline beyond the paired interval."""
    cost, base = main_cost(results), results["baseline"]
    best = front(results, cost.key)
    if not best:
        return "No arm has a result yet."
    is_are = "is" if len(best) == 1 else "are"
    start = (
        f"On the front of {results['metric']['name']} against {lower(cost.title)} {is_are} {listed(best)}; "
    )
    paired = [arm for arm in results["arms"] if arm["versus_baseline"] is not None and arm["name"] != base]
    if not paired:
        return start + f"no arm shares a seed with {base} yet."
    if all(arm["versus_baseline"]["low"] is None for arm in paired):
        return start + f"with one seed, chance cannot be told from a difference to {base}."
    apart = [arm for arm in paired if beyond(arm)]
    if not apart:
        return start + f"no arm differs from {base} beyond the paired 95 % interval."
    sign = 1 if results["metric"]["higher_is_better"] else -1
    sides = []
    for word, side in (("better", 1), ("worse", -1)):
        those = [arm["versus_baseline"]["difference"] for arm in apart]
        names = [
            f"{arm['name']} ({signed(difference)})"
            for arm, difference in zip(apart, those, strict=True)
            if side * sign * difference > 0
        ]
        if names:
            sides.append(f"{listed(names)} {'is' if len(names) == 1 else 'are'} {word}")
    return start + f"beyond the paired 95 % interval, {' and '.join(sides)} than {base}."


def missing(results: Mapping[str, Any]) -> list[str]:
    """What the results lack, a sentence each."""
    waiting = [arm["name"] for arm in results["arms"] if arm["status"] == "waiting"]
    found = [f"{listed(waiting)} wait{'s' if len(waiting) == 1 else ''} to be run."] if waiting else []
    for arm in results["arms"]:
        name, total = arm["name"], len(results["seeds"])
        if arm["status"] != "finished" and arm["status"] != "waiting":
            what = "diverged" if arm["status"] == "diverged" else "is not finished"
            found.append(f"{name} {what}: {len(arm['runs'])} of {total} seeds have a result.")
        if not arm["runs"]:
            continue
        lacks = [lower(cost.title) for cost in COSTS if arm[cost.key] is None]
        if lacks:
            found.append(f"{name} has no record of its {listed(lacks)}.")
    return found


def listed(names: Iterable[str]) -> str:
    """Names in a sentence: "a, b and c"."""
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def lower(title: str) -> str:
    """A title in the middle of a sentence."""
    return title[:1].lower() + title[1:]


def curves(arm: Mapping[str, Any], split: str, quality: str) -> list[Sequence[Mapping[str, Any]]]:
    """The records of a split that hold the quality: a list a run."""
    return [
        [point for point in run["curve"] if point["split"] == split and point.get(quality) is not None]
        for run in arm["runs"]
    ]


def curve_splits(results: Mapping[str, Any]) -> list[str]:
    """Splits of the learning curves, held-out ones first."""
    found = {point["split"] for arm in results["arms"] for run in arm["runs"] for point in run["curve"]}
    return sorted(found, key=lambda split: (split == "train", split != "validation", split))
