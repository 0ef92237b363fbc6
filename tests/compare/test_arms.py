"""Arms and their plan: what is solved once, what arms may differ in, what a hash is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections.config_dict import ConfigDict

from tests.compare.conftest import small
from tokenlab.compare import arms, budget, command
from tokenlab.compare.config import CompareConfig
from tokenlab.compare.report import reading
from tokenlab.core.config import override, to_dataclass
from tokenlab.core.errors import ConfigError, DataError


def resolve(config: ConfigDict, folder: Path, **how: Any) -> tuple[dict[str, int], float]:
    """Steps by arm, and the amount."""
    found, amount = arms.resolve(to_dataclass(CompareConfig, config), folder, **how)
    return {arm.name: arm.steps for arm in found}, amount


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arms of each measurement; each finds steps faster than the one before."""
    calls: list[list[str]] = []

    def step_seconds(experiments: dict[str, Any]) -> dict[str, dict[str, float]]:
        calls.append(list(experiments))
        return {name: {"": 0.01 / len(calls)} for name in experiments}

    monkeypatch.setattr(budget, "step_seconds", step_seconds)
    return calls


def seconds(amount: float | None = 3.0) -> ConfigDict:
    return small(**{"budget.kind": "seconds", "budget.amount": amount})


def test_a_measured_budget_is_measured_once(tmp_path: Path, timed: list[list[str]]) -> None:
    first = resolve(seconds(), tmp_path)
    assert first == ({"dense": 300, "keep": 300}, 3.0)
    fewer = seconds()
    fewer.arms = fewer.arms[:1]
    assert resolve(fewer, tmp_path) == ({"dense": 300}, 3.0)
    assert resolve(seconds(), tmp_path) == first  # one was left out for a while
    resolve(seconds(6.0), tmp_path)
    assert resolve(seconds(), tmp_path) == first  # the budget was another for a while
    assert timed == [["dense", "keep"]] * 2
    more = seconds()
    more.arms = (*more.arms, {"name": "new", "model.stack": "block"})
    assert resolve(more, tmp_path)[0] == {"dense": 300, "keep": 300, "new": 900}
    assert timed[2:] == [["new"]]


def test_the_amount_is_what_was_planned(tmp_path: Path, timed: list[list[str]]) -> None:
    config = seconds(None)
    assert resolve(config, tmp_path) == ({"dense": 60, "keep": 60}, pytest.approx(0.6))
    assert json.loads((tmp_path / "plan.json").read_text())["amount"] == pytest.approx(0.6)
    config.arms = (*config.arms, {"name": "new", "model.stack": "block"})
    assert resolve(config, tmp_path) == ({"dense": 60, "keep": 60, "new": 120}, pytest.approx(0.6))
    found = command.run(config, tmp_path, training=False)
    assert found["budget"] == {
        "kind": "seconds",
        "amount": pytest.approx(0.6),
        "tolerance": None,
        "largest_deviation": None,
    }


def with_equal_steps(**changes: Any) -> ConfigDict:
    """The dense arm a second time, as often trained as `keep`."""
    config = small(**changes)
    config.arms = (*config.arms, {**config.arms[0], "name": "dense, equal steps", "steps_of": "keep"})
    return config


def test_an_arm_may_have_the_steps_of_another(tmp_path: Path) -> None:
    config = with_equal_steps(**{"budget.kind": "layer_tokens"})
    ready, amount = arms.resolve(to_dataclass(CompareConfig, config), tmp_path)
    dense, keep, more = ready
    assert dense.steps == 60 < keep.steps == more.steps
    assert more.folder != dense.folder and more.costs is dense.costs and more.steps_of == "keep"
    said = json.loads((tmp_path / "plan.json").read_text())
    assert [entry["steps"] for entry in said["arms"].values()] == [60, keep.steps, keep.steps]
    assert resolve(config, tmp_path) == ({arm.name: arm.steps for arm in ready}, amount)
    assert json.loads((tmp_path / "plan.json").read_text()) == said
    config.arms = (
        config.arms[0],
        {**config.arms[1], "model.stack": "block + keep(1, by=cls) + block"},
        *config.arms[2:],
    )
    other, _ = resolve(config, tmp_path)  # its steps are those of the arm as it is now
    assert other["dense, equal steps"] == other["keep"] > keep.steps


def test_the_report_says_what_an_arm_with_the_steps_of_another_spends(tmp_path: Path) -> None:
    config = with_equal_steps(**{"budget.kind": "layer_tokens"})
    found = command.run(config, tmp_path, training=False)
    dense, keep, more = found["arms"]
    assert [arm["steps_of"] for arm in (dense, keep, more)] == [None, None, "keep"]
    assert more["layer_tokens"] == dense["layer_tokens"] * keep["steps"] / 60
    off = 100 * (more["layer_tokens"] / found["budget"]["amount"] - 1)
    assert off > 5
    (note, *_) = found["notes"]
    assert note.startswith(f"dense, equal steps has the {keep['steps']} steps of keep: ")
    assert (
        f"layer tokens, {off:.3g} % more than the " in note
        and "3 arms are to be trained" in reading.compared(found)
    )
    assert "(within 1 %) but for dense, equal steps, with the steps of keep, and" in reading.compared(found)
    assert note in (tmp_path / "report" / "index.html").read_text()


def test_with_such_an_arm_training_flops_are_not_taken_for_equal(tmp_path: Path) -> None:
    found = command.run(with_equal_steps(), tmp_path, training=False)
    assert reading.main_cost(found).key == "train_flops" and reading.unequal(found) == ["dense, equal steps"]
    found["arms"] = found["arms"][:2]
    assert reading.main_cost(found).key == "forward_flops"


def test_an_arm_with_the_steps_of_another_is_not_timed(tmp_path: Path, timed: list[list[str]]) -> None:
    config = with_equal_steps(**{"budget.kind": "seconds", "budget.amount": 3.0})
    assert resolve(config, tmp_path) == ({"dense": 300, "keep": 300, "dense, equal steps": 300}, 3.0)
    assert timed == [["dense", "keep"]]
    (note, *_) = command.run(config, tmp_path, training=False)["notes"]
    assert note == "dense, equal steps has the 300 steps of keep: how much is known when it is trained."


def test_a_report_measures_nothing(tmp_path: Path, timed: list[list[str]]) -> None:
    with pytest.raises(DataError, match="how many steps arm 'dense' trains.*copy plan.json beside the arms"):
        command.run(seconds(), tmp_path / "run", training=False)
    assert not timed and not (tmp_path / "run").exists()
    resolve(seconds(), tmp_path)
    assert resolve(seconds(), tmp_path, measure=False)[0] == {"dense": 300, "keep": 300}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What plan.json holds."""
    folder = tmp_path_factory.mktemp("plan")
    resolve(small(), folder)
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize("missing", ["arms", "amount", "others"])
def test_a_plan_that_is_not_whole(plan: dict[str, Any], tmp_path: Path, missing: str) -> None:
    rest = {key: value for key, value in plan.items() if key != missing}
    assert rest != plan
    (tmp_path / "plan.json").write_text(json.dumps(rest))
    with pytest.raises(DataError, match=f"plan.json is no whole plan .*'{missing}'.*move it away"):
        resolve(small(), tmp_path)


def test_arms_agree_within_one_percent(tmp_path: Path) -> None:
    config = small()
    config.base.steps = 100
    for kind in ("flops", "layer_tokens"):
        ready, amount = arms.resolve(
            to_dataclass(CompareConfig, override(config, {"budget.kind": kind})), tmp_path
        )
        spent = [budget.Spending(arm.experiment, kind)(arm.steps) for arm in ready]
        assert max(spent) - min(spent) <= 0.01 * amount


@pytest.mark.parametrize(
    "changes",
    [
        {"task.label_smoothing": 0.1},
        {"eval.split": "test"},
        {"eval.final_split": None},
        {"data.splits": {"train": "train[:50%]", "validation": "validation", "test": "test"}},
        {"data.eval_transform": "central_crop(8)"},
    ],
)
def test_quality_is_measured_alike(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = small()
    config.arms = (*config.arms, {"name": "odd", "model.stack": "block*3", **changes})
    (key,) = changes
    with pytest.raises(ConfigError, match=f"arm 'odd' differs from 'dense' in {key}.*config.base") as caught:
        resolve(config, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_further_metrics_are_known_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'acuracy', which evaluations of arm 'dense'.*'accuracy'"
    ) as caught:
        command.run(small(also={"acuracy": "max"}), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    resolve(small(also={"accuracy": "max"}), tmp_path)


def test_training_and_the_stack_of_evaluation_may_differ(tmp_path: Path) -> None:
    config = small()
    config.base.steps = 600
    free = {"eval.stack": "block*3", "eval.batch_size": 8, "data.transform": "rotate(30)", "data.prefetch": 2}
    config.arms = (*config.arms, {"name": "free", "model.stack": "block*3", **free})
    assert set(resolve(config, tmp_path)[0]) == {"dense", "keep", "free"}


def test_a_hash_is_of_what_results_depend_on(tmp_path: Path) -> None:
    def hashes(**changes: Any) -> list[str]:
        config = small(**{"budget.kind": "steps", **changes})
        return [arm.hash for arm in arms.resolve(to_dataclass(CompareConfig, config), tmp_path)[0]]

    same = {"base.log_every": 7, "base.data.prefetch": 3, "base.keep_checkpoints": 2, "base.seed": 5}
    assert hashes(**same) == hashes()
    for key, value in {"base.steps": 80, "base.batch_size": 8, "base.data.transform": "rotate(30)"}.items():
        assert not set(hashes(**{key: value})) & set(hashes())
    config = small()
    config.arms = (*config.arms, {"name": "twin", "model.stack": "block*2", "data.prefetch": 3})
    with pytest.raises(ConfigError, match="arms 'dense' and 'twin' have the same configuration, apart from"):
        resolve(config, tmp_path)
