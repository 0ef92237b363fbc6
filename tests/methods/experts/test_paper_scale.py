"""The configurations at paper scale have the published parameters and FLOPs (arXiv 2308.00951, table 1)."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import pytest

from tokenlab import models, tasks
from tokenlab.core.config import load, to_dataclass
from tokenlab.core.errors import ConfigError
from tokenlab.data.source import ENCODED
from tokenlab.data.transform import Transform
from tokenlab.train import costs, optimizer
from tokenlab.train.config import TrainConfig

CONFIGS = Path(__file__).parents[3] / "configs"
SPEC = {"image": ((224, 224, 3), "float32"), "label": ((), "int32")}


def build(text):
    config = to_dataclass(TrainConfig, load(f"{CONFIGS}/{text}"))
    return config, models.build(config.model, spec=SPEC, num_outputs=1000)


@pytest.mark.parametrize(
    ("size", "billions", "gigaflops"), [("S/14", 1.8, 13.2), ("B/16", 3.7, 32.0), ("L/16", 13.1, 111.1)]
)
def test_soft_moe_is_as_large_as_published(size, billions, gigaflops):
    config, model = build(f"soft_moe.py:{size}")
    state = model.abstract_state()
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    assert parameters == pytest.approx(billions * 1e9, rel=0.02)
    flops = costs.forward_cost(model, tasks.build(config.task), SPEC).model_flops
    assert flops == pytest.approx(gigaflops * 1e9, rel=0.01)


@pytest.mark.parametrize("text", ["soft_moe.py:S/16", "soft_moe.py:H/14", "tokens_choice.py:B/16:priority"])
def test_the_optimizer_finds_the_parameters_it_is_told_of(text):
    config, model = build(text)
    made = optimizer.build(config.optimizer, config.steps)
    jax.eval_shape(made.init, model.abstract_state())
    assert "3 of head/classifier/kernel" in made.description


@pytest.mark.parametrize("text", ["soft_moe.py", "tokens_choice.py"])
def test_its_images_are_of_the_size_that_the_model_takes(text):
    data = load(f"{CONFIGS}/{text}").data
    for said in (data.transform, data.eval_transform):
        assert Transform(said, {"image": ((None, None, 3), ENCODED)}).spec["image"] == SPEC["image"]


def test_an_active_parameter_is_one_that_a_token_meets():
    _, dense = build("soft_moe.py:S/16")
    _, hard = build("tokens_choice.py:S/32")
    for model, per_token, experts in ((dense, 128 / 196, 128), (hard, 2, 32)):
        state = model.abstract_state()
        total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
        kind = next(name for name in state["blocks"] if "experts" in state["blocks"][name])
        bank = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["blocks"][kind]["experts"]))
        assert costs.active_parameters(model) == pytest.approx(
            total - bank * (1 - per_token / experts), rel=1e-6
        )


@pytest.mark.parametrize("text", ["soft_moe.py:S/12", "tokens_choice.py:B/16:prio"])
def test_unknown_sizes_are_told(text):
    with pytest.raises(ConfigError, match="has no"):
        build(text)
