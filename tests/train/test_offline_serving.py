"""What a trained model does, compiled from shapes alone: an evaluation, a prompt, one more token."""

from __future__ import annotations

import jax
import pytest

from tokenlab.core.errors import ConfigError
from tokenlab.train.compile_report import compile_report
from tokenlab.train.config import default_config

MESH = {"data": 2, "tensor": 2, "expert": 2}
LENGTH, NEW, WIDTH, HEADS = 32, 16, 16, 2


def decoder():
    config = default_config(model="decoder_lm", task="next_token", data="shakespeare")
    config.batch_size = 8
    config.data.length = LENGTH
    config.model.update(size="nano", stack="block*2", vocab_multiple=2, mlp_dim=32)
    return config


@pytest.fixture(scope="module")
def steps():
    return {
        name: compile_report(decoder(), "lm", "here", mesh=MESH, step=name, new=NEW)
        for name in ("evaluate", "prefill", "decode")
    }


def test_a_token_costs_a_lot_less_than_a_prompt(steps) -> None:
    assert all(report.step == name for name, report in steps.items())
    assert steps["decode"].flops_per_device < steps["prefill"].flops_per_device / LENGTH * 2
    assert steps["prefill"].flops_per_device <= steps["evaluate"].flops_per_device
    assert len({report.state_bytes for report in steps.values()}) == 1  # the weights, and no optimizer


def test_a_decoder_remembers_prompt_and_answer(steps) -> None:
    """Keys and values of two layers, a device's examples and heads of them, and float32 weights."""
    remembered = 2 * 2 * (8 // 4) * (HEADS // 2) * (LENGTH + NEW) * (WIDTH // HEADS) * 4
    assert steps["decode"].bytes_per_device > steps["decode"].state_bytes + remembered
    longer = compile_report(decoder(), "lm", "here", mesh=MESH, step="decode", new=NEW + 1024)
    more = longer.bytes_per_device - steps["decode"].bytes_per_device
    assert more >= remembered * 1024 // (LENGTH + NEW)


def test_what_does_not_generate_says_so() -> None:
    with pytest.raises(ConfigError, match="vit does not generate.*take evaluate"):
        compile_report(default_config(), "", "here", step="decode")
    with pytest.raises(ConfigError, match="'serve' is unknown; expected train, evaluate, prefill, decode"):
        compile_report(default_config(), "", "here", step="serve")


def test_a_classifier_is_evaluated() -> None:
    config = default_config()
    config.update(batch_size=8)
    config.model.update(size="nano/4", stack="block + keep(0.5, by=random, train_only=True) + block")
    served = compile_report(config, "", "here", mesh={"data": len(jax.devices())}, step="evaluate")
    trained = compile_report(config, "", "here", mesh={"data": len(jax.devices())})
    assert served.state_bytes < trained.state_bytes / 2 and served.flops_per_device < trained.flops_per_device
