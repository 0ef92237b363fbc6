"""Whole comparisons, small: equal spending, going on after a stop, changed arms, shares, wrong files."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections.config_dict import ConfigDict
from scipy import stats

from tests.compare.conftest import small
from tokenlab import cli, train
from tokenlab.compare import command, report, results
from tokenlab.core.errors import ConfigError, DataError, NonFiniteError
from tokenlab.train.experiment import Experiment

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


@pytest.fixture(autouse=True)
def few_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the report are drawn for `finished`, which is made before this: they take as long as training does."""
    monkeypatch.setattr(report, "draw", lambda results, folder: [])


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


def test_the_report_is_whole(finished: Path) -> None:
    written = {path.name for path in (finished / "report").iterdir()}
    assert {"index.html", "table.md", "pareto_train_flops.png", "curves.png"} <= written


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


def from_finished(finished: Path, folder: Path) -> Callable[..., None]:
    """In place of `train.run`: the run as `finished` has it, since the same run trained again is the same
    (tests/train/test_loop.py). The folder's name holds the hash of its configuration."""

    def run(config: ConfigDict, where: Path, *, experiment: Experiment, sampler: Any) -> None:
        assert config.seed == experiment.config.seed and where.name == f"seed_{config.seed}"
        assert sampler is not None and config.steps == experiment.config.steps
        shutil.copytree(finished / where.relative_to(folder), where, dirs_exist_ok=True)

    return run


def test_a_stopped_comparison_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, count = from_finished(finished, tmp_path), []

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


def test_shares_of_the_runs_make_the_whole(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "run", from_finished(finished, tmp_path))
    first = command.run(small(), tmp_path, share=(1, 2))
    assert [[run["seed"] for run in arm["runs"]] for arm in first["arms"]] == [[0, 1], []]
    both = command.run(small(), tmp_path, share=(2, 2), command="tokenlab compare --config=x.py")
    whole = json.loads((finished / "results.json").read_text())
    assert without_times(json.loads(json.dumps(both))) == without_times(whole)


@pytest.mark.parametrize(("arms", "seeds"), [(7, 3), (2, 3), (1, 5)])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 40])
def test_shares_are_of_whole_arms_where_there_are_enough(arms: int, seeds: int, n: int) -> None:
    shares = [command.share_of(range(arms), range(seeds), i, n) for i in range(1, n + 1)]
    every = [(arm, seed) for arm in range(arms) for seed in range(seeds)]
    assert sorted(run for share in shares for run in share) == every
    whole = all(len(share) == seeds * len({arm for arm, _ in share}) for share in shares)
    assert whole or n > arms
    assert all(share == sorted(share) for share in shares)


def test_an_arm_that_diverges_does_not_end_the_others(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    for arm in (folder / "arms").iterdir():
        shutil.rmtree(arm / "seed_1")
    real = from_finished(finished, folder)

    def diverging(config: Any, where: Path, **kwargs: Any) -> Any:
        if "dense" in str(where):
            where.mkdir(parents=True)
            raise NonFiniteError("step 3: loss is not finite.")
        return real(config, where, **kwargs)

    monkeypatch.setattr(train, "run", diverging)
    with pytest.raises(NonFiniteError, match="dense, seed 1 diverged.*tries again"):
        command.run(small(), folder)
    said = json.loads((folder / "results.json").read_text())
    assert [arm["status"] for arm in said["arms"]] == ["diverged", "finished"]
    assert said["notes"] == ["dense, seed 1 diverged: step 3: loss is not finite."]
    for page in ("index.html", "table.md"):
        assert "dense diverged: 1 of 2 seeds have a result." in (folder / "report" / page).read_text()
    assert command.run(small(), folder, training=False)["arms"][0]["status"] == "diverged"
    monkeypatch.setattr(train, "run", lambda *_, **__: None)  # is tried again, and stopped
    assert command.run(small(), folder)["arms"][0]["status"] == "partial"


def edited(finished: Path, folder: Path, change: Any) -> dict[str, Any]:
    """Results of a copy of the comparison, after run.json of the last run was changed."""
    shutil.copytree(finished, folder)
    path = (
        folder
        / json.loads((folder / "results.json").read_text())["arms"][1]["runs"][1]["workdir"]
        / "run.json"
    )
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    return command.run(small(), folder, training=False)


def test_device_and_versions_are_those_of_the_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = results.environment()
    monkeypatch.setattr(results, "environment", lambda: pytest.fail("of the process that reports"))
    found = edited(
        finished, tmp_path / "copy", lambda run: run["environment"].update(device="chip", jax="9.9")
    )
    assert found["device"] == f"{here['device']}, chip" and found["versions"] == here
    assert found["arms"][1]["runs"][1]["environment"] == {**here, "device": "chip", "jax": "9.9"}
    differ = f"jax ({here['jax']}, 9.9), device ({here['device']}, chip)"
    assert found["notes"] == [f"The runs differ in {differ}: their times and memory are not comparable."]


def test_peak_memory_is_the_most_of_all_sessions_and_runs(finished: Path, tmp_path: Path) -> None:
    def stopped(run: dict[str, Any]) -> None:
        run["history"] = [{"peak_bytes": {"": 7_000_000}}, {"started": "then"}]

    keep = edited(finished, tmp_path / "copy", stopped)["arms"][1]
    assert keep["runs"][0]["peak_bytes"] < keep["runs"][1]["peak_bytes"] == keep["peak_bytes"] == 7_000_000


def test_seconds_a_step_of_few_records() -> None:
    records = [
        {"split": "train", "step": step, "seconds": seconds} for step, seconds in ((2, 9.0), (4, 10.0))
    ]
    assert results._step_seconds(records, records[-1]) == 2.5
    records.append({"split": "train", "step": 6, "seconds": 11.5})
    assert results._step_seconds(records, records[-1]) == pytest.approx(0.625)


def test_pictures_are_as_many_as_asked_for(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    drawn = [command.run(small(pictures=n), folder, training=False)["arms"][1]["pictures"] for n in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert all((folder / path).stat().st_size for (path,) in drawn)


def test_the_last_samples_of_an_arm_are_in_the_report(finished: Path, tmp_path: Path) -> None:
    """Of its first run, as `config.sample_every` leaves them; other files in that folder are none."""
    folder = shutil.copytree(finished, tmp_path / "run")
    runs = command.run(small(), folder, training=False)["arms"][1]["runs"]
    samples = folder / runs[0]["workdir"] / "samples"
    samples.mkdir()
    for name in ("5", "60", "1000", "notes"):
        (samples / f"{name}.png").write_bytes(f"picture {name}".encode())
    dense, keep = command.run(small(), folder, training=False)["arms"]
    assert dense["pictures"] == [] and keep["pictures"] == [f"{runs[0]['workdir']}/samples/1000.png"]
    page = (folder / "report" / "index.html").read_text()
    assert base64.b64encode(b"picture 1000").decode() in page
    assert "seed 0, samples after 1,000 steps" in page and "picture 60" not in page


def test_one_arm_alone(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run", from_finished(finished, tmp_path))
    found = command.run(small(seeds=(1,)), tmp_path, arms=("keep",))
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
