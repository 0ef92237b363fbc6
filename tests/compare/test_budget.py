"""Budgets: what a run spends as a function of its steps, and the steps that spend a budget."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from tokenlab.compare import budget
from tokenlab.core.config import override
from tokenlab.core.errors import ConfigError
from tokenlab.train import experiment, schedule
from tokenlab.train.config import default_config
from tokenlab.train.experiment import Experiment


@functools.cache
def scheduled_as(k: str | float) -> Experiment:
    """An arm whose stack keeps the share `k`."""
    return built(**{"stack_vars.k": k})


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
    seconds = budget.Spending(scheduled, "seconds", {"k=1.0": 0.5, "k=0.5": 0.25})
    assert seconds(8) == pytest.approx(2 * 0.5 + 6 * 0.25)


@pytest.mark.parametrize("kind", ["steps", "flops", "layer_tokens"])
@pytest.mark.parametrize("steps", [1, 2, 3, 77, 1000, 4096])
def test_the_solver_finds_the_steps_that_were_spent(scheduled: Experiment, kind: str, steps: int) -> None:
    spending = budget.Spending(scheduled, kind)
    assert spending(spending.steps(spending(steps))) == spending(steps)


def test_the_solver_takes_the_nearest(scheduled: Experiment) -> None:
    spending = budget.Spending(scheduled, "steps")
    assert [spending.steps(amount) for amount in (0.2, 1.4, 1.6, 10.4)] == [1, 1, 2, 10]


def test_spending_counts_steps_that_alternate() -> None:
    arm = scheduled_as("every 10: 1.0 else 0.5")
    spending = budget.Spending(arm, "layer_tokens")
    dense, sparse = 8 * 2 * 5, 8 * 2 * 3
    assert spending(25) == 3 * dense + 22 * sparse
    assert spending(10**9) == 10**8 * dense + 9 * 10**8 * sparse
    assert budget.pieces(arm) == {"k=1.0": 0, "k=0.5": 1}


def test_a_budget_too_small_names_the_arm_and_the_least(scheduled: Experiment) -> None:
    spending = budget.Spending(scheduled, "flops")
    with pytest.raises(
        ConfigError, match="arm 'keep' cannot spend the budget of .* FLOPs: 1 step spends .* at least"
    ):
        budget.solve("keep", spending, "flops", 1.6 * spending(1))
    assert budget.solve("keep", spending, "flops", spending(50)) == 50
    seconds = budget.Spending(scheduled, "seconds", {"k=1.0": 3.0, "k=0.5": 3.0})
    assert budget.solve("keep", seconds, "seconds", 100.0) == 33
    with pytest.raises(ConfigError, match="1 step spends 3, more than 5 % off; .* of at least 33 s"):
        budget.solve("keep", seconds, "seconds", 1.5)


@pytest.mark.parametrize(
    "k",
    [
        "0:0.25, 33.3%:1.0, 66.6%:0.25",
        "0:1.0, 30%:0.25, 60%:1.0",
        "0:0.5, 50%:1.0",
        "0:every 4: 1.0 else 0.5, 40%:0.25",
    ],
)
@pytest.mark.parametrize("kind", ["flops", "seconds"])
def test_the_least_amount_is_enough(k: str, kind: str) -> None:
    arm = scheduled_as(k)
    seconds = {"k=0.25": 0.1, "k=0.5": 0.2, "k=1.0": 0.4}
    spending = budget.Spending(arm, kind, seconds)
    with pytest.raises(ConfigError, match="at least") as caught:
        budget.solve("keep", spending, kind, 0.2 * spending(1))
    least = float(str(caught.value).rpartition("at least ")[2].split()[0])
    tolerance = budget.FORECAST if kind == "seconds" else budget.TOLERANCE
    every = np.array([spending(steps) for steps in range(1, 600)])
    assert every[-1] > 1.2 * least
    for amount in np.linspace(least, 1.2 * least, 40):
        off = abs(spending(budget.solve("keep", spending, kind, float(amount))) - amount)
        assert off <= tolerance * amount
        assert off == pytest.approx(np.abs(every - amount).min(), abs=1e-9 * amount)  # nothing is nearer


def test_an_amount_in_the_message_is_not_below_what_was_reckoned() -> None:
    for value in (1234.4, 99999.1, 0.0123412, 5e12, 5.0001e12):
        assert value <= float(budget._rounded_up(value)) <= 1.001 * value


def test_pieces_without_a_step_of_their_own_are_spent_in_a_longer_run() -> None:
    short, long = (built(steps=steps, **{"stack_vars.k": "0:1.0, 90%:0.5"}) for steps in (2, 1000))
    assert set(short.models) == {"k=1.0"}
    assert budget.Spending(short, "flops")(1000) == budget.Spending(long, "flops")(1000)


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


def test_shares_stay_as_they_are() -> None:
    given = {"k": "0:1.0, 33%:0.9, 34%:0.5", "m": 3, "n": "0:4, 15:2, 50%:1, 80:7"}
    found = schedule.in_shares(given, 60)
    assert found == {
        "k": "0:1.0, 33%:0.9, 34%:0.5",
        "m": 3,
        "n": "0:4, 25.000000000%:2, 50%:1",
    }
    assert schedule.stack_vars(found, 1000).changes(1000) == [0, 250, 330, 340, 500]


@pytest.mark.parametrize("key", ["timescale", "warmup_steps"])
def test_lengths_that_do_not_scale_are_refused(key: str) -> None:
    config = default_config()
    config.update(steps=200)
    config.optimizer.schedule.name = "rsqrt"
    config.optimizer.schedule[key] = 200
    with pytest.raises(ConfigError, match=f"{key} is 200 of 200 steps: a comparison"):
        budget.scalable(config)


def test_a_measured_budget_times_every_step_of_every_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(budget, "PROBE_ROUNDS", 2)
    experiments = {"one": built(), "other": built(**{"stack_vars.k": 1.0})}
    found = budget.step_seconds(experiments)
    assert {name: set(seconds) for name, seconds in found.items()} == {
        "one": {"k=1.0", "k=0.5"},
        "other": {"k=1.0"},
    }
    assert all(0 < seconds < 60 for arm in found.values() for seconds in arm.values())
