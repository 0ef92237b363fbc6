"""Fronts, differences and the sentences made of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compare.report import example
from tokenlab.compare.report import reading
from tokenlab.core.errors import DataError


def arm(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in results["arms"] if each["name"] == name)


def test_front() -> None:
    results = example.results()
    assert reading.front(results, "forward_flops") == [example.ODD, "keep", "soft-moe"]
    # The arm without a record of its memory cannot be on that front.
    assert reading.front(results, "peak_bytes") == ["random", "depth", "keep", "soft-moe"]


def test_front_of_a_cost_that_the_budget_makes_equal() -> None:
    results = example.results()
    costs = {each["train_flops"] for each in results["arms"]}
    assert len(costs) > 1 and max(costs) < 1.01 * min(costs)
    assert reading.front(results, "train_flops") == ["soft-moe"]
    cheap = arm(results, "keep")
    cheap["train_flops"] = int(0.5 * cheap["train_flops"])
    assert reading.front(results, "train_flops") == ["keep", "soft-moe"]


def test_front_where_lower_is_better() -> None:
    results = example.results()
    results["metric"]["higher_is_better"] = False
    assert reading.front(results, "forward_flops") == [example.ODD, "depth", "random"]


def test_equal_arms_are_both_on_the_front() -> None:
    results = example.results()
    keep, odd = arm(results, "keep"), arm(results, example.ODD)
    keep["quality"], keep["forward_flops"] = odd["quality"], odd["forward_flops"]
    assert set(reading.front(results, "forward_flops")) == {"keep", example.ODD, "soft-moe"}


def test_compared() -> None:
    assert reading.compared(example.results()) == (
        "6 of 7 arms were trained with seeds 0, 1 and 2, each run for the same 240 TFLOPs of counted training (within "
        "1 %), and compared by test accuracy, where higher is better."
    )


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ({"kind": "steps", "amount": 700.0, "tolerance": 0}, "the same 700 steps, and"),
        (
            {"kind": "seconds", "amount": 60.0, "tolerance": None, "largest_deviation": 0.0712},
            "the same 60 s of training (a measured forecast, met within 7.1 %), and",
        ),
        (
            {"kind": "seconds", "amount": 60.0, "tolerance": None, "largest_deviation": None},
            "the same 60 s of training (a measured forecast), and",
        ),
        (
            {"kind": "layer_tokens", "amount": 2.5e9, "tolerance": 0.01},
            "the same 2.5 G tokens summed over layers",
        ),
    ],
)
def test_budgets_in_words(budget: dict[str, Any], text: str) -> None:
    assert text in reading.compared({**example.results(), "budget": budget})


def test_one_arm() -> None:
    results = example.results()
    results["arms"] = results["arms"][:1]
    assert reading.compared(results).startswith("1 arm was trained with")
    results["arms"][0]["quality"] = None
    assert reading.compared(results).startswith("1 arm is to be trained with")


class TestFinding:
    def test_who_is_better_and_who_is_worse(self) -> None:
        text = reading.finding(example.results())
        assert text.startswith(
            f"On the front of accuracy against forward FLOPs per example are {example.ODD}, keep"
        )
        end = text.partition("; ")[2]
        assert "keep (+0.0094)" in end.partition("better")[0]
        assert end.endswith("are better and random (−0.0215) is worse than dense.")
        assert "depth" not in end  # its interval holds zero

    def test_nobody_differs(self) -> None:
        results = example.results()
        for each in results["arms"]:
            if each["versus_baseline"] is not None:
                each["versus_baseline"] |= {"low": -0.1, "high": 0.1}
        assert reading.finding(results).endswith(
            "; no arm differs from dense beyond the paired 95\u00a0% interval."
        )

    def test_lower_is_better(self) -> None:
        results = example.results()
        results["metric"]["higher_is_better"] = False
        assert "random (−0.0215) is better and" in reading.finding(results)

    def test_one_seed(self) -> None:
        assert reading.finding(example.one_seed()).endswith(
            "; with one seed, chance cannot be told from a difference to dense."
        )

    def test_nothing_yet(self) -> None:
        results = example.waiting()
        assert reading.finding(results) == "No arm has a result yet."
        assert reading.compared(results).startswith("7 arms are to be trained")

    def test_another_budget_another_cost(self) -> None:
        results = example.results()
        results["budget"] = {"kind": "steps", "amount": 700.0, "tolerance": 0}
        assert "accuracy against training FLOPs" in reading.finding(results)


def test_missing() -> None:
    assert reading.missing(example.results()) == [
        "registers waits to be run.",
        f"{example.ODD} has no record of its peak memory.",
        "depth is not finished: 2 of 3 seeds have a result.",
    ]


def test_an_arm_that_diverged_is_missing() -> None:
    results = example.results()
    for name in ("registers", "depth"):
        arm(results, name)["status"] = "diverged"
    assert reading.missing(results)[1:] == [
        "depth diverged: 2 of 3 seeds have a result.",
        "registers diverged: 0 of 3 seeds have a result.",
    ]


def test_no_two_arms_look_alike() -> None:
    results = example.results()
    results["arms"] += [{**results["arms"][1], "name": f"more-{n}"} for n in range(30)]
    looks = reading.looks(results)
    assert len(looks) == len({(look.color, look.symbol) for look in looks.values()}) == 37
    assert [name for name, look in looks.items() if look.color == reading.INK] == ["dense"]


def test_what_no_report_can_be_made_of() -> None:
    with pytest.raises(DataError, match=r"format 2: expected 1; run `tokenlab compare` again"):
        reading.checked({**example.results(), "format": 2})
    with pytest.raises(DataError, match="no arm is called 'vanilla', the baseline; the arms are dense, keep"):
        reading.checked({**example.results(), "baseline": "vanilla"})
    with pytest.raises(DataError, match="the arms are none"):
        reading.checked({**example.results(), "arms": []})
