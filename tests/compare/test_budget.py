"""Budgets: what a run spends as a function of its steps, and the steps that spend a budget."""

from __future__ import annotations

from typing import Any

import pytest

from tokenlab.compare import budget
from tokenlab.core.config import override
from tokenlab.core.errors import ConfigError
from tokenlab.train import experiment
from tokenlab.train.config import default_config
from tokenlab.train.experiment import Experiment


def built(**changes: Any) -> Experiment:
    config = default_config()
    config.update(steps=100, batch_size=8)
    config.model.update(size="nano/4", stack="keep(k, by=random) + block*2")
    config.stack_vars.k = "0:1.0, 25%:0.5"
    return experiment.build(override(config, changes))


@pytest.fixture(scope="module")
def scheduled() -> Experiment:
    return built()


def test_spending_follows_the_schedule_of_the_stack(scheduled: Experiment) -> None:
    flops = [scheduled.step_cost(at).model_flops for at in (0, 25)]
    assert flops[0] > flops[1]
    spending = budget.Spending(scheduled, "flops")
    assert spending(100) == 25 * flops[0] + 75 * flops[1]
    assert spending(1000) == 10 * spending(100)
    tokens = budget.Spending(scheduled, "layer_tokens")
    assert tokens(100) == 8 * 2 * (25 * 5 + 75 * 3)  # 4 patches and CLS; half of the patches and CLS
    assert budget.Spending(scheduled, "steps")(7) == 7
    assert budget.Spending(scheduled, "seconds", 0.5)(8) == pytest.approx(4.0)


@pytest.mark.parametrize("kind", ["steps", "flops", "layer_tokens"])
@pytest.mark.parametrize("steps", [1, 2, 3, 77, 1000, 4096])
def test_the_solver_finds_the_steps_that_were_spent(scheduled: Experiment, kind: str, steps: int) -> None:
    spending = budget.Spending(scheduled, kind)
    assert spending(spending.steps(spending(steps))) == spending(steps)


def test_the_solver_takes_the_nearest(scheduled: Experiment) -> None:
    spending = budget.Spending(scheduled, "steps")
    assert [spending.steps(amount) for amount in (0.2, 1.4, 1.6, 10.4)] == [1, 1, 2, 10]


def test_a_budget_too_small_names_the_arm_and_the_least(scheduled: Experiment) -> None:
    spending = budget.Spending(scheduled, "flops")
    with pytest.raises(
        ConfigError, match="arm 'keep' cannot spend the budget of .* FLOPs: 1 step spends .* at least"
    ):
        budget.solve("keep", spending, "flops", 1.6 * spending(1))
    assert budget.solve("keep", spending, "flops", spending(50)) == 50
    seconds = budget.Spending(scheduled, "seconds", 3.0)
    assert budget.solve("keep", seconds, "seconds", 100.0) == 33
    with pytest.raises(ConfigError, match="arm 'keep' cannot spend"):
        budget.solve("keep", seconds, "seconds", 1.0)


def test_lengths_in_steps_scale_with_the_run() -> None:
    config = default_config()
    config.update(steps=200)
    config.optimizer.schedule.warmup_steps = 20
    config.stack_vars.k = "0:1.0, 50:0.5"
    config.model.stack = "keep(k, by=random) + block*2"
    found = budget.scalable(config)
    assert found.optimizer.schedule.warmup_steps == pytest.approx(0.1)
    longer = experiment.build(override(found, {"steps": 1000, "model.size": "nano/4"}))
    assert longer.stack_vars.changes(1000) == [0, 250]
    assert "the first 100 of them warm-up" in longer.optimizer.description


def test_a_measured_budget_times_every_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(budget, "PROBE_ROUNDS", 2)
    experiments = {"one": built(), "other": built(**{"stack_vars.k": 1.0})}
    found = budget.step_seconds(experiments)
    assert set(found) == {"one", "other"} and all(0 < seconds < 60 for seconds in found.values())
