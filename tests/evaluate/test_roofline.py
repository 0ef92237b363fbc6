"""The roofline of a configuration, in all and by layer."""

from __future__ import annotations

import json

import pytest

from tests.evaluate.conftest import config
from tokenlab.core.errors import CostError
from tokenlab.cost import Peaks
from tokenlab.evaluate import cost_report, roofline


def test_the_roofline_of_a_chip() -> None:
    report = cost_report(
        config(**{"model.stack": "block + keep(0.5) + block", "batch_size": 32}), chip="TPU v5e"
    )
    found = report.to_json()["roofline"]
    assert (found["device"], found["batch_size"], found["peak_bytes_per_second"]) == ("TPU v5e", 32, 819e9)
    assert list(found["rows"]) == [row.name for row in report.table.rows]
    total = found["total"]["training"]
    # Products are per example; weights are read once a batch, so bytes are less than 32 times those of one.
    assert total["compute_seconds"] == pytest.approx(32 * report.table.total.train_flops / 197e12)
    assert total["memory_seconds"] < 32 * report.table.total.train_bytes / 819e9
    assert total["seconds"] == max(total["compute_seconds"], total["memory_seconds"])
    assert sum(row["training"]["compute_seconds"] for row in found["rows"].values()) == pytest.approx(
        total["compute_seconds"]
    )
    text = report.rooflines.text
    assert "training: about" in text and "bound by memory" in text and "block (2 of 2)" in text
    assert text in report.to_markdown()
    json.dumps(found)


def test_a_machine_with_slow_products_is_bound_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure_peaks", lambda dtype: Peaks(f"slow in {dtype}", 1e3, 1e12))
    found = cost_report(config(**{"model.stack": "block*2"}), chip="here").rooflines
    assert found.memory_bound("forward") == ["other (1 of 1)"]  # what has no products
    assert "slow in float32" in found.text and "bound by compute" in found.text


def test_without_a_chip_there_is_no_roofline_and_an_unknown_one_is_told() -> None:
    report = cost_report(config())
    assert (
        report.rooflines is None
        and "roofline" not in report.to_json()
        and "roofline" not in report.to_markdown()
    )
    with pytest.raises(CostError, match="Did you mean 'TPU v5e'"):
        cost_report(config(), chip="TPU v5ee")
