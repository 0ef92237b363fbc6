"""`tokenlab evaluate`: several stacks, classes, probes and pictures in one call."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.evaluate.conftest import copy
from tokenlab import cli, evaluate
from tokenlab.core.errors import ConfigError, NameLookupError, StackError, TokenLabError
from tokenlab.evaluate import class_pictures, metrics, results, tables
from tokenlab.evaluate.predictions import Predictions

STACKS = "block*2 ;block + keep(9, by=norm) + block; block + merge(k) + block"


@pytest.fixture(scope="module")
def answer(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A copy of the run, and what one call with everything wrote there."""
    workdir = copy(trained[0], tmp_path_factory.mktemp("command") / "run")
    words = [f"--config.eval.stack={STACKS}", "--config.stack_vars.k=4", f"--json={workdir / 'r.json'}"]
    words += ["--pictures", "--per-class", "--probe=knn,linear", "--config.eval.batch_size=200"]
    assert cli.main(["evaluate", f"--workdir={workdir}", *words]) == 0
    return workdir, json.loads((workdir / "r.json").read_text())


def test_several_stacks_in_one_call(answer: Any, trained: Any) -> None:
    found = answer[1]
    assert found.keys() == {"split", "stacks"} and found["split"] == "test"
    assert [each["stack"] for each in found["stacks"]] == [
        "block*2",
        "block + keep(9, by=norm) + block",
        "block + merge(4) + block",
    ]
    assert [each["tokens_out"] for each in found["stacks"]] == [17, 10, 13]
    assert found["stacks"][0]["accuracy"] == trained[1]["test"]["accuracy"]
    alone = evaluate.run(trained[0], {"eval.stack": "block + keep(9, by=norm) + block"}, pictures=False)
    beside = found["stacks"][1]
    assert alone.keys() == beside.keys() - {"probe"}
    for key in ("accuracy", "loss", "top5_accuracy", "ece"):
        assert alone[key] == pytest.approx(beside[key], rel=1e-4)
    for key in ("split", "stack", "flops_per_example", "tokens_out", "examples", "parameters"):
        assert alone[key] == beside[key]
    assert alone["calibration"]["nll"] == pytest.approx(alone["loss"], rel=1e-5)
    assert alone["ece"] == alone["calibration"]["ece"] and len(alone["calibration"]["bins"]) == 15
    assert sum(row["support"] for row in alone["per_class"]) == alone["examples"] == 360
    hits = sum(row["support"] * (row["recall"] or 0) for row in alone["per_class"])
    assert hits / 360 == pytest.approx(alone["accuracy"])


def test_probes_and_pictures_are_there(answer: Any) -> None:
    workdir, found = answer
    for each in found["stacks"]:
        assert each["probe"]["knn"]["k"] == 20 and 0.2 < each["probe"]["knn"]["accuracy"] < 1
        assert each["probe"]["linear"]["train_examples"] > 1000
    for name in ("report", "tokens", "predictions", "calibration", "confusion"):
        assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(workdir.glob(".*.png*"))


def test_tables(answer: Any) -> None:
    stacks = answer[1]["stacks"]
    table = tables.several(stacks, "accuracy")
    names = [str(column.header) for column in table.columns]
    assert names[:6] == ["stack", "tokens out", "accuracy", "difference", "top-5", "ECE"]
    assert names[-3:] == ["FLOPs/example", "ratio", "images/s (measured)"]
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["difference"][0] == "+0.0000" and cells["ratio"][0] == "1.000"
    assert cells["difference"][1] == f"{stacks[1]['accuracy'] - stacks[0]['accuracy']:+.4f}"
    rows = list(zip(*(column.cells for column in tables.classes(stacks[0]).columns), strict=True))
    assert len(rows) == 10 and rows[3][0] == "3"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"overrides": {"eval.stack": "block*2; block + kep(4) + block; block*2"}},
            StackError,
            ["'kep'", "block + kep(4) + block\n", "^^^"],
        ),
        ({"overrides": {"eval.stack": "block*2; block*"}}, StackError, ["block*", "^"]),
        ({"overrides": {"eval.stack": "block*2;; block"}}, StackError, ["no stack on one side", "^"]),
        ({"overrides": {"eval.stack": "block*2;"}}, StackError, ["no stack on one side", "^"]),
        (
            {"overrides": {"eval.stack": STACKS, "stack_vars.k": "2", "stack_vars.j": "2"}},
            StackError,
            ["stack_vars.j is not used"],
        ),
        ({"probes": "kn"}, ConfigError, ["'kn'", "'knn'"]),
        ({"probes": "knn", "split": "train"}, ConfigError, ["--probe=knn learns from split 'train'"]),
    ],
)
def test_mistakes_are_told_before_any_work(
    trained: Any,
    arguments: dict[str, Any],
    error: type[Exception],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(results.predictions, "predict", lambda *_: pytest.fail("work began"))
    with pytest.raises((error, NameLookupError)) as caught:
        evaluate.run(trained[0], **{"overrides": {}, **arguments})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "stack", ["block*3", "block + skip(keep=0.5, by=learned)(block)", "block + keep(99) + block"]
)
def test_of_several_stacks_the_wrong_one_is_named(trained: Any, stack: str) -> None:
    with pytest.raises(TokenLabError) as caught:
        evaluate.load_each(trained[0], {"eval.stack": f"block*2; {stack}"})
    assert str(caught.value).startswith(f"of 2 stacks, {stack!r}: ")
    with pytest.raises(type(caught.value)) as alone:
        evaluate.load_each(trained[0], {"eval.stack": stack})
    assert str(caught.value).endswith(str(alone.value))


def test_confused_classes_read_as_a_sentence() -> None:
    result = {"most_confused": [{"label": 9, "predicted": 1, "count": 12}]}
    assert tables.confused(result, None) == ["class 9 said to be 1: 12"]


def test_several_stacks_where_one_is_wanted(trained: Any) -> None:
    with pytest.raises(ConfigError, match="holds 2 stacks: expected one"):
        evaluate.load(trained[0], {"eval.stack": "block*2; block*2"})


def test_a_task_that_does_not_classify_has_its_metrics_and_no_classes(trained: Any) -> None:
    classify = evaluate.load(trained[0])
    task = SimpleNamespace(loss=classify.task.loss, primary="loss", better="min", examples="documents")
    other = replace(classify, task=task)
    found = evaluate.measure(other, "validation")
    assert found["documents_per_second"] > 0 and "images_per_second" not in found
    assert found["loss"] == pytest.approx(evaluate.measure(classify, "validation")["loss"])
    assert not {"ece", "per_class", "calibration", "most_confused"} & found.keys()
    assert "difference" in [str(column.header) for column in tables.several([found, found], "loss").columns]
    with pytest.raises(ConfigError, match="--per-class needs a task that classifies"):
        results.check_classifies(other, "--per-class")
    source = SimpleNamespace(name="texts", spec={"text": ((8,), "int32")}, num_classes=None, splits={})
    with pytest.raises(ConfigError, match="--probe=knn needs data with labels; 'texts' has text"):
        results.check_probes(replace(classify, source=source), "test", ["knn"])


def test_a_call_for_classes_is_refused_before_any_work(trained: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(results, "classifies", lambda trained: False)
    monkeypatch.setattr(results.predictions, "predict", lambda *_: pytest.fail("work began"))
    for asked in ({"per_class": True}, {"pictures": "all"}):
        with pytest.raises(ConfigError, match=r"needs a task that classifies and data with labels"):
            evaluate.run(trained[0], **asked)


def test_which_examples_are_shown() -> None:
    labels = np.array([1, 0, 1, 2, 2, 0])
    logits = np.zeros((6, 3), np.float32)
    logits[np.arange(6), [1, 1, 1, 0, 1, 0]] = [1, 3, 9, 5, 1, 2]
    said = Predictions({}, logits, logits, labels, np.arange(6) + 10, 1.0)
    found = class_pictures.choose(said, across=2, down=1)
    assert (found.index.tolist(), found.right, found.mistakes) == ([15, 10, 13, 11], 2, 3)
    assert found.predicted.tolist() == [0, 1, 0, 1] and found.labels.tolist() == [0, 1, 2, 0]
    np.testing.assert_allclose(found.confidence[2], np.exp(5) / (np.exp(5) + 2), rtol=1e-6)


@pytest.mark.parametrize("right", [True, False])
def test_pictures_of_photographs_with_names_and_of_none_right_or_wrong(tmp_path: Path, right: bool) -> None:
    labels = np.array([0, 1, 2])
    logits = 4 * np.eye(3, dtype=np.float32)[labels if right else labels - 1]
    found = class_pictures.choose(Predictions({}, logits, logits, labels, labels, 1.0))
    images = np.random.default_rng(0).uniform(-1, 1, (3, 96, 96, 3)).astype(np.float32)
    names = ("T-shirt/top", "$a name$ that is long", "c")
    class_pictures.predictions(tmp_path / "p.png", found, images, names, "block*2")
    matrix = metrics.confusion_matrix(logits.argmax(axis=1), labels, 3)
    class_pictures.confusion(tmp_path / "c.png", [("block", matrix)] * 2, names)
    class_pictures.calibration(tmp_path / "r.png", [("block", metrics.calibration(logits, labels))])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "p.png", "r.png"]
