"""What a comparison may be, and the arms that product and zipped make."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compare.conftest import small
from tokenlab.compare.config import CompareConfig, default_config, product, zipped
from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import ConfigError


def test_product_names_arms_by_their_words() -> None:
    arms = product(
        {"model.stack": {"dense": "block*4", "keep": "keep(0.5) + block*4"}, "optimizer.ema": (0.9, 0.99)}
    )
    assert [arm["name"] for arm in arms] == ["dense 0.9", "dense 0.99", "keep 0.9", "keep 0.99"]
    assert arms[2] == {"name": "keep 0.9", "model.stack": "keep(0.5) + block*4", "optimizer.ema": 0.9}
    named = product({"model.stack": {"dense": "block"}, "batch_size": (8, 16)}, name="{} at batch {}")
    assert [arm["name"] for arm in named] == ["dense at batch 8", "dense at batch 16"]


def test_zipped_takes_values_side_by_side() -> None:
    arms = zipped({"batch_size": (8, 16), "optimizer.learning_rate": (1e-3, 2e-3)}, name="batch {}")
    assert arms == (
        {"name": "batch 8", "batch_size": 8, "optimizer.learning_rate": 1e-3},
        {"name": "batch 16", "batch_size": 16, "optimizer.learning_rate": 2e-3},
    )
    with pytest.raises(ConfigError, match="batch_size 2, seed 1"):
        zipped({"batch_size": (8, 16), "seed": (0,)})


@pytest.mark.parametrize("make", [product, zipped])
@pytest.mark.parametrize("changes", [{}, {"batch_size": ()}])
def test_arms_of_nothing_are_refused(make: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a key or more with a value or more"):
        make(changes)


def follower(of: Any) -> tuple[dict[str, Any], ...]:
    """Three arms, of which the third has the steps of the arm `of`."""
    return ({"name": "dense"}, {"name": "keep"}, {"name": "more", "steps_of": of})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"arms": ()}, "config.arms is empty"),
        ({"arms": ({"model.stack": "block"},)}, r"config\.arms\[0\] is .*expected \{\"name\""),
        ({"arms": ("dense",)}, r"config\.arms\[0\] is 'dense'"),
        ({"arms": ({"name": "a/b"},)}, r"config\.arms\[0\]\.name is 'a/b'"),
        ({"arms": ({"name": "../x"},)}, "names a folder"),
        ({"arms": ({"name": "dense"}, {"name": "Dense"})}, "has the name 'dense' twice"),
        ({"arms": ({"name": "dense", "steps": 5},)}, "sets 'steps', which config.budget decides"),
        ({"arms": ({"name": "dense", "seed": 5},)}, "sets 'seed', which config.seeds decides"),
        ({"baseline": "dens"}, "config.baseline 'dens' is the name of no arm. Did you mean 'dense'"),
        ({"seeds": ()}, "config.seeds is empty"),
        ({"seeds": (1, 1)}, "config.seeds has 1 twice"),
        ({"seeds": (-1,)}, "config.seeds has -1"),
        ({"seeds": (0.5,)}, "config.seeds has 0.5|config.seeds"),
        ({"budget.kind": "flop"}, "config.budget.kind is 'flop'. Did you mean 'flops'"),
        ({"budget.amount": -3.0}, "config.budget.amount is -3.0"),
        ({"budget.amount": float("nan")}, "config.budget.amount is nan"),
        ({"pictures": -1}, "config.pictures is -1"),
        ({"arms": follower("kep")}, r"arms\[2\].steps_of 'kep' is the name of no arm. Did you mean 'keep'"),
        ({"arms": follower("more")}, "steps_of 'more' is the arm itself"),
        (
            {"arms": (*follower("keep"), {"name": "d", "steps_of": "more"})},
            "'more' has the steps of 'keep' itself",
        ),
        ({"arms": follower("keep"), "budget.kind": "steps"}, "gives all arms as many: leave steps_of out"),
        (
            {"arms": follower("keep"), "baseline": "more"},
            "of the baseline 'more', whose steps decide the budget",
        ),
        ({"arms": follower(3)}, "steps_of 3 is the name of no arm"),
    ],
)
def test_wrong_comparisons(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        to_dataclass(CompareConfig, small(**changes))
    assert "\n" not in str(caught.value)


def test_the_defaults_have_neither_arms_nor_a_base() -> None:
    config = default_config()
    with pytest.raises(ConfigError, match="config.arms is empty"):
        to_dataclass(CompareConfig, config)
    config.arms = ({"name": "dense", "model.stack": "block"},)
    with pytest.raises(ConfigError, match=r"config.base is empty: .*load\('configs/quickstart.py'\)"):
        to_dataclass(CompareConfig, config)
