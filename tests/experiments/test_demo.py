"""The demo: its arms, its files, going on with what is there, and its pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from tokenlab import data, models, tasks
from tokenlab.evaluate import style
from tokenlab.train import experiment
from tokenlab.train.costs import train_cost

FILE = Path(__file__).resolve().parents[2] / "experiments" / "demo" / "run.py"
KEYS = {
    "name",
    "stack",
    "test_accuracy",
    "train_flops",
    "seconds",
    "steps",
    "flops_per_example",
    "parameters",
}


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arm(name: str, accuracy: float, flops: float, seconds: float) -> dict[str, Any]:
    found = {
        "name": name,
        "stack": "block",
        "test_accuracy": accuracy,
        "train_flops": flops,
        "seconds": seconds,
    }
    return {**found, "steps": 10, "flops_per_example": 1e6, "parameters": 5, "test_examples": 360}


ARMS = [
    arm("dense", 0.97, 8e11, 20.0),
    arm("keep", 0.96, 4e11, 11.0),
    arm("skip", 0.98, 5e11, 14.0),
    arm("merge", 0.96, 4e11, 11.2),
]


def test_the_arms_are_the_quickstart_with_other_stacks(demo: ModuleType) -> None:
    assert {"dense", "keep", "skip", "merge"} <= demo.ARMS.keys()
    source, task = data.build({"name": "digits"}), tasks.build({})
    flops = {}
    for name, stack in demo.ARMS.items():
        config = demo.arm_config(stack, steps=None)
        assert config.model.stack == stack
        model = models.build(config.model, spec=source.spec, num_outputs=10)
        assert model.program.depth == 4
        flops[name] = train_cost(model, task, source.spec).model_flops
    dense = flops.pop("dense")
    assert all(0.4 * dense < other < 0.8 * dense for other in flops.values())


def test_the_report_labels_every_point_and_no_label_covers_another(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figures: list[Any] = []
    save = style.save
    monkeypatch.setattr(style, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    path = demo.report(ARMS, tmp_path / "report.png")
    assert matplotlib.image.imread(path).shape[1] > 1000
    (figure,) = figures
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "counted training FLOPs",
        "measured seconds of training",
    ]
    for axes, key in zip(figure.axes, ("train_flops", "seconds"), strict=True):
        assert {text.get_text(): text.xy for text in axes.texts} == {
            found["name"]: (found[key], found["test_accuracy"]) for found in ARMS
        }
        boxes = [text.get_window_extent() for text in axes.texts]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])
            assert axes.get_window_extent().x1 + 20 > box.x1


def test_the_table_compares_with_the_dense_arm(demo: ModuleType) -> None:
    columns = {
        str(column.header).replace("\n", " "): list(column.cells) for column in demo.table(ARMS).columns
    }
    assert columns["arm"] == ["dense", "keep", "skip", "merge"]
    assert columns["test accuracy"] == ["0.9700", "0.9600", "0.9800", "0.9600"]
    assert columns["training FLOPs"] == ["800 G (1.00)", "400 G (0.50)", "500 G (0.62)", "400 G (0.50)"]
    assert columns["training seconds"] == ["20.0 (1.00)", "11.0 (0.55)", "14.0 (0.70)", "11.2 (0.56)"]


def test_a_workdir_of_another_run_is_left_alone(demo: ModuleType, tmp_path: Path, capsys: Any) -> None:
    from tokenlab.core.config import to_json

    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "config.json").write_text(to_json(demo.arm_config(demo.ARMS["keep"], steps=3)))
    assert demo.main([f"--workdir={tmp_path}", "--steps=2"]) == 2
    error = capsys.readouterr().err
    assert "steps: 3 -> 2" in error and "another --workdir" in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
    assert demo.main([f"--workdir={tmp_path / 'x'}", "--steps=0"]) == 2
    assert "config.steps is 0" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_whole_demo_and_going_on_with_it(demo: ModuleType, tmp_path: Path) -> None:
    flags = [f"--workdir={tmp_path}", "--steps=2"]
    assert demo.main(flags) == 0
    arms = json.loads((tmp_path / "results.json").read_text())
    assert [found["name"] for found in arms] == list(demo.ARMS)
    for found in arms:
        assert KEYS <= found.keys() and found["steps"] == 2
        assert found["stack"] == demo.ARMS[found["name"]]
        assert 0 <= found["test_accuracy"] <= 1 and found["seconds"] > 0
        step = experiment.build(demo.arm_config(found["stack"], steps=2)).step_cost(0).model_flops
        assert found["train_flops"] == 2 * step
    by_name = {found["name"]: found for found in arms}
    assert by_name["keep"]["flops_per_example"] < by_name["dense"]["flops_per_example"]
    assert by_name["skip"]["flops_per_example"] == by_name["dense"]["flops_per_example"]
    for name in ("report.png", "tokens.png"):
        assert np.ptp(matplotlib.image.imread(tmp_path / name)) > 0
    before = {name: (tmp_path / name / "metrics.jsonl").read_text() for name in demo.ARMS}
    assert demo.main(flags) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == arms
    assert {name: (tmp_path / name / "metrics.jsonl").read_text() for name in demo.ARMS} == before
