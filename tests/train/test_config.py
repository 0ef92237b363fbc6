"""The configuration: defaults that build, and ranges that are checked when it is made."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tokenlab.core.config import from_json, override, to_dataclass, to_json
from tokenlab.core.errors import ConfigError
from tokenlab.train import experiment
from tokenlab.train.config import (
    EvalConfig,
    InitFrom,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    default_config,
)


def test_the_default_configuration_builds_and_survives_json() -> None:
    config = default_config()
    assert to_dataclass(TrainConfig, config) == to_dataclass(TrainConfig, from_json(to_json(config)))
    assert experiment.build(config).model.stack_text == "block*6"


def test_fields_keep_their_kind_when_they_are_overridden() -> None:
    """A count of steps and a fraction of them differ."""
    changes = {"optimizer.schedule.warmup_steps": "1", "optimizer.ema": "0.5", "init_from.fresh": "('head',)"}
    config = override(default_config(), changes | {"init_from.path": "somewhere", "stack_vars.k": "3"})
    made = to_dataclass(TrainConfig, config)
    assert made.optimizer.schedule.warmup_steps == 1 and isinstance(made.optimizer.schedule.warmup_steps, int)
    assert made.optimizer.ema == 0.5 and made.init_from.fresh == ("head",)
    assert made.stack_vars == {"k": 3}


@pytest.mark.parametrize(
    ("make", "fields", "words"),
    [
        (TrainConfig, {"steps": 0}, ["config.steps is 0", ">= 1"]),
        (TrainConfig, {"steps": True}, ["config.steps is True"]),
        (TrainConfig, {"seed": 2**32}, ["config.seed"]),
        (TrainConfig, {"log_every": 0}, ["config.log_every"]),
        (TrainConfig, {"eval_every": -1}, ["config.eval_every"]),
        (TrainConfig, {"checkpoint_every": -1}, ["config.checkpoint_every"]),
        (TrainConfig, {"keep_checkpoints": 0}, ["config.keep_checkpoints"]),
        (
            TrainConfig,
            {"batch_size": 6, "optimizer": OptimizerConfig(accumulate=4)},
            ["accumulate", "batch_size=6"],
        ),
        (EvalConfig, {"batch_size": 0}, ["config.eval.batch_size"]),
        (MeshConfig, {"data": -1, "fsdp": -1}, ["config.mesh", "at most one"]),
        (MeshConfig, {"tensor": 0}, ["config.mesh.tensor"]),
        (InitFrom, {"fresh": ("head",)}, ["config.init_from.fresh"]),
        (OptimizerConfig, {"learning_rate": math.inf}, ["learning_rate", "inf"]),
        (OptimizerConfig, {"learning_rate": math.nan}, ["learning_rate", "nan"]),
    ],
)
def test_values_out_of_range(make: Any, fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**fields)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
