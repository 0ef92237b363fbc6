"""report.png: which records become which curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tests.evaluate.conftest import copy
from tokenlab.core.errors import ConfigError, DataError
from tokenlab.evaluate import figures, style


def drawn(monkeypatch: pytest.MonkeyPatch, workdir: Path) -> Figure:
    """The figure as it was when it was saved."""
    kept: list[Figure] = []
    monkeypatch.setattr(style, "save", lambda figure, path: kept.append(figure) or Path(path))
    figures.report(workdir, workdir / "report.png")
    return kept[0]


def test_curves_are_the_records(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir, _ = trained
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    figure = drawn(monkeypatch, workdir)
    assert len(figure.axes) == 6
    shown = iter(figure.axes)
    for metric in ("loss", "accuracy"):
        for key in ("step", "flops", "seconds"):
            lines = {line.get_label().split(" ")[0]: line.get_xydata().tolist() for line in next(shown).lines}
            assert lines == {
                split: [[r[key], r[metric]] for r in records if r["split"] == split]
                for split in ("train", "validation", "test")
            }
    assert [axes.get_xlabel() for axes in figure.axes[3:]] == list(figures.AGAINST.values())
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["loss", "accuracy"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["train", "validation", "test"]


def test_a_run_under_way_is_drawn(trained: Any, tmp_path: Path) -> None:
    workdir = copy(trained[0], tmp_path / "run")
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text(lines[0])
    path = figures.report(workdir, workdir / "report.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not list(workdir.glob(".report*"))


def test_no_records_are_told(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        figures.report(tmp_path, tmp_path / "report.png")
    workdir = copy(trained[0], tmp_path / "run")
    (workdir / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no record yet"):
        figures.report(workdir, workdir / "report.png")
    assert not (workdir / "report.png").exists()
