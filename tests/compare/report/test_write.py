"""What a report writes, and that it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tests.compare.report import example
from tokenlab.compare import report
from tokenlab.compare.report import pictures, reading
from tokenlab.core.errors import DataError, TokenLabError
from tokenlab.evaluate import style


def test_files(tmp_path: Path) -> None:
    written = report.write(example.results(), tmp_path)
    assert [path.relative_to(tmp_path / "report").as_posix() for path in written] == [
        "index.html",
        "table.md",
        *(f"pareto_{cost.key}.png" for cost in reading.COSTS),
        "curves.png",
    ]
    assert sorted(written) == sorted((tmp_path / "report").iterdir())
    assert written[0].read_text(encoding="utf-8") == report.html(example.results(), tmp_path)
    assert written[1].read_text(encoding="utf-8") == report.markdown(example.results())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[2:])


def test_before_the_first_run_there_is_a_page_without_pictures(tmp_path: Path) -> None:
    assert [path.name for path in report.write(example.waiting(), tmp_path)] == ["index.html", "table.md"]


def test_wrong_results_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="format"):
        report.write({**example.results(), "format": 0}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(TokenLabError, match="cannot make .*report: File exists"):
        report.write(example.results(), tmp_path)


def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: dict[str, Any]) -> dict[str, Figure]:
    """The figures as they were when they were saved."""
    kept: dict[str, Figure] = {}

    def save(figure: Figure, path: Path) -> Path:
        kept[path.stem] = figure
        return path

    monkeypatch.setattr(style, "save", save)
    pictures.draw(results, tmp_path)
    return kept


def test_points_and_front_are_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = example.results()
    figures = drawn(monkeypatch, tmp_path, results)
    for cost in reading.COSTS:
        (axes,) = figures[f"pareto_{cost.key}"].axes
        front, *points = [line.get_xydata().tolist() for line in axes.lines]
        shown = [arm for arm in results["arms"] if arm["quality"] is not None and arm[cost.key] is not None]
        assert points == [[[arm[cost.key], arm["quality"]["mean"]]] for arm in shown]
        by_name = {arm["name"]: arm for arm in shown}
        best = [by_name[name] for name in reading.front(results, cost.key)]
        assert front[:-1] == [[arm[cost.key], arm["quality"]["mean"]] for arm in best]
        assert all(axes.get_xlim()[0] < point[0][0] < axes.get_xlim()[1] for point in points)


def test_curves_are_the_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = example.results()
    figure = drawn(monkeypatch, tmp_path, results)["curves"]
    for axes, key in zip(figure.axes, pictures.AGAINST, strict=True):
        assert [line.get_xydata().tolist() for line in axes.lines] == [
            [[point[key], point["accuracy"]] for point in run["curve"] if point["split"] == "validation"]
            for arm in results["arms"]
            for run in arm["runs"]
        ]
    (legend,) = figure.legends
    names = [text.get_text().replace(r"\$", "$") for text in legend.get_texts()]
    assert names == [arm["name"] for arm in results["arms"] if arm["runs"]]
