"""Whole comparisons, small: equal spending, going on after a stop, changed arms, shares, wrong files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.compare.conftest import small
from tokenlab import cli, train
from tokenlab.compare import command, results
from tokenlab.core.config import override
from tokenlab.core.errors import ConfigError, DataError

TIMES = ("seconds", "step_seconds")


def without_times(value: Any) -> Any:
    """All but what is measured with a clock."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "run"
    command.run(small(), folder, command="tokenlab compare --config=x.py")
    return folder


@pytest.fixture(scope="module")
def found(finished: Path) -> dict[str, Any]:
    return json.loads((finished / "results.json").read_text())


def test_arms_spend_the_same_counted_flops(found: dict[str, Any]) -> None:
    dense, keep = found["arms"]
    assert found["budget"] == {"kind": "flops", "amount": dense["train_flops"], "tolerance": 0.01}
    assert dense["steps"] == 60 < keep["steps"]
    assert keep["train_flops"] == pytest.approx(dense["train_flops"], rel=0.01)
    for arm in (dense, keep):  # what the runs counted themselves
        assert [run["train_flops"] for run in arm["runs"]] == [arm["train_flops"]] * 2
        assert arm["status"] == "finished"
        assert arm["forward_flops"] * 16 * 60 < dense["train_flops"]
        assert arm["peak_bytes"] > 4 * arm["parameters"]
    assert [layer["tokens"] for layer in keep["tokens_by_layer"]] == [5, 3]


def test_quality_is_that_of_the_runs(found: dict[str, Any]) -> None:
    dense, keep = found["arms"]
    values = [[run["metrics"]["accuracy"] for run in arm["runs"]] for arm in (dense, keep)]
    assert keep["quality"]["mean"] == pytest.approx(np.mean(values[1]))
    difference = np.subtract(values[1], values[0])
    expected = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    versus = keep["versus_baseline"]
    assert (versus["low"], versus["high"]) == pytest.approx(tuple(expected))
    assert versus["difference"] == pytest.approx(difference.mean()) and versus["pairs"] == 2
    assert dense["versus_baseline"] is None


def test_seeds_differ_and_share_one_compiled_step(finished: Path, found: dict[str, Any]) -> None:
    for arm in found["arms"]:
        first, second = (
            json.loads((finished / run["workdir"] / "run.json").read_text()) for run in arm["runs"]
        )
        assert first["compile_seconds"] == second["compile_seconds"]  # one measurement
        losses = [[point["loss"] for point in run["curve"]] for run in arm["runs"]]
        assert losses[0] != losses[1]


def test_a_rerun_changes_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "arms").rglob("*")}
    said = (finished / "results.json").read_text()
    monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("a finished run was trained again"))
    command.run(small(), finished, command="tokenlab compare --config=x.py")
    assert (finished / "results.json").read_text() == said
    assert {path: path.stat().st_mtime_ns for path in (finished / "arms").rglob("*")} == before


def test_a_stopped_comparison_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, count = train.run, []

    def stopping(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        if len(count) == 3:
            raise SystemExit(143)
        return real(*args, **kwargs)

    monkeypatch.setattr(train, "run", stopping)
    with pytest.raises(SystemExit):
        command.run(small(), tmp_path, command="tokenlab compare --config=x.py")
    assert not (tmp_path / "results.json").exists()
    partial = command.run(small(), tmp_path, training=False)
    assert [arm["status"] for arm in partial["arms"]] == ["finished", "waiting"]
    assert partial["notes"] == ["keep: 2 of 2 runs are not finished."]
    assert partial["arms"][1]["quality"] is None
    capsys.readouterr()
    again = command.run(small(), tmp_path, command="tokenlab compare --config=x.py")
    assert capsys.readouterr().out.count(": is done") == 2
    whole = json.loads((finished / "results.json").read_text())
    assert without_times(json.loads(json.dumps(again))) == without_times(whole)


def test_a_changed_arm_is_told_apart(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    changed = small()
    changed.arms = (changed.arms[0], {"name": "keep", "model.stack": "block + keep(0.25, by=cls) + block"})
    found = command.run(changed, folder, training=False)
    assert [arm["status"] for arm in found["arms"]] == ["finished", "waiting"]
    assert len(list((folder / "arms").iterdir())) == 2  # the old one is still there


def test_shares_of_the_runs_make_the_whole(finished: Path, tmp_path: Path) -> None:
    first = command.run(small(), tmp_path, share=(1, 2))
    assert [[run["seed"] for run in arm["runs"]] for arm in first["arms"]] == [[0], [0]]
    both = command.run(small(), tmp_path, share=(2, 2), command="tokenlab compare --config=x.py")
    whole = json.loads((finished / "results.json").read_text())
    assert without_times(json.loads(json.dumps(both))) == without_times(whole)


def test_one_arm_alone(tmp_path: Path) -> None:
    found = command.run(small(seeds=(3,)), tmp_path, arms=("keep",))
    assert [arm["status"] for arm in found["arms"]] == ["waiting", "finished"]
    assert found["arms"][1]["quality"]["low"] is None
    with pytest.raises(ConfigError, match="--arm='kept' is the name of no arm; expected one of dense, keep"):
        command.run(small(), tmp_path, arms=("kept",))


@pytest.mark.parametrize("name", ["results.json", "plan.json"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"format": 1, "arms"', "cannot read"), ('{"format": 99}', "is of format 99"), ("[]", "format None")],
)
def test_files_of_others_are_left_alone(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=expected):
        command.run(small(), tmp_path, training=False)
    assert (tmp_path / name).read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_mistakes_in_an_arm_name_it_before_anything_is_written(tmp_path: Path) -> None:
    config = small()
    config.arms = (*config.arms, {"name": "odd", "model.stak": "block"})
    with pytest.raises(ConfigError, match="arm 'odd': .*stak"):
        command.run(config, tmp_path)
    config.arms = (*small().arms, {"name": "twin", "model.stack": "block*2"})
    with pytest.raises(ConfigError, match="arms 'dense' and 'twin' have the same configuration"):
        command.run(config, tmp_path)
    with pytest.raises(ConfigError, match="arm 'dense' cannot spend the budget of 1 k FLOPs"):
        command.run(small(**{"budget.amount": 1000.0}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.py"
    path.write_text(
        "from tests.compare.conftest import small\n\n\ndef get_config():\n    return small(seeds=(0,))\n"
    )
    words = ["compare", f"--config={path}", f"--workdir={tmp_path / 'run'}"]
    assert cli.main([*words, "--report", "--config.title=Small & quick"]) == 0
    assert "results.json" in capsys.readouterr().out
    said = json.loads((tmp_path / "run" / "results.json").read_text())
    assert said["title"] == "Small & quick"
    assert said["arms"][0]["command"].startswith(f"tokenlab compare --config={path} --workdir=")
    assert said["arms"][0]["command"].endswith("'--config.title=Small & quick' --arm=dense")
    assert cli.main([*words, "--arms=3/2"]) == 2
    assert "--arms=3/2 is no share" in capsys.readouterr().err


def test_an_interval_needs_two_values() -> None:
    assert results.interval([]) is None
    assert results.interval([0.5]) == {"mean": 0.5, "low": None, "high": None}
    values = [0.9, 0.93, 0.95]
    found = results.interval(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert override(small(), {"seeds": "(0, 1, 2)"}).seeds == (0, 1, 2)
