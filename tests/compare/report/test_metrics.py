"""The tables by metric, on the page and in Markdown."""

from __future__ import annotations

from typing import Any

from tests.compare.report import example
from tokenlab.compare import report, results


def with_metrics() -> dict[str, Any]:
    found = example.results()
    for arm in found["arms"]:
        arm["by_metric"] = {
            name: results._by_metric(arm, found["arms"][0], "validation", name, higher=name == "accuracy")
            for name in ("accuracy", "loss")
        }
    return found


def test_eta_is_what_the_curves_say() -> None:
    found = with_metrics()["arms"]
    dense, keep = found[0]["by_metric"]["accuracy"], found[1]["by_metric"]["accuracy"]
    assert dense["eta"] is None and dense["versus_baseline"] is None
    assert keep["reached"] == keep["pairs"] == 3 and keep["eta"]["mean"] > 1.2
    slow = next(arm for arm in found if arm["name"] == "random")["by_metric"]["accuracy"]
    assert slow["eta"] is None and slow["reached"] == 0  # 0.94 never is 0.96
    waits = next(arm for arm in found if arm["name"] == "registers")["by_metric"]["accuracy"]
    assert waits["quality"] is None and waits["pairs"] == 0


def test_both_reports_show_a_table_a_metric() -> None:
    found = with_metrics()
    eta = found["arms"][1]["by_metric"]["accuracy"]["eta"]["mean"]
    text = report.markdown(found)
    assert "| arm | accuracy | difference to dense | eta |" in text and "| arm | loss |" in text
    (row,) = [
        line for line in text.splitlines() if line.startswith("| keep | 0.9") and f" {eta:.4f} (" in line
    ]
    assert row.count("|") == 5
    page = report.html(found)
    assert page.count(f"{eta:.4f}") >= 1 and "reached by 0 of 3 seeds" in page


def test_results_of_before_have_no_such_table() -> None:
    assert "eta" not in report.markdown(example.results())
    assert "By metric" not in report.html(example.results())
