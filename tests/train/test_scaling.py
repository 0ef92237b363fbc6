"""What is sent on meshes of any size, by formula, against sums written out by hand."""

from __future__ import annotations

import dataclasses
import math

import jax
import pytest

from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import CostError, ShardingError
from tokenlab.cost import lookup
from tokenlab.train.config import TrainConfig, default_config
from tokenlab.train.scaling import Scaling

WIDTH, HIDDEN, LENGTH, EXPERTS, K = 16, 32, 32, 8, 2


def scaling(remat: str = "none") -> Scaling:
    """A decoder of two blocks, the second with experts."""
    config = default_config(model="decoder_lm", task="next_token", data="shakespeare")
    config.data.length = LENGTH
    layer = f"dropless(experts={EXPERTS}, k={K}, expert=swiglu(hidden={HIDDEN}))"
    config.model.update(
        size="nano", stack=f"block + block(ffn={layer})", vocab_multiple=16, dtype="bfloat16", remat=remat
    )
    return Scaling(to_dataclass(TrainConfig, config))


@pytest.fixture(scope="module")
def plain() -> Scaling:
    return scaling()


def elements(found: Scaling, *, experts: bool, wide: bool) -> int:
    """Of parameters, of experts or not, with an axis along the width or without one (norms)."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(found.model.abstract_state()):
        own = "experts" in jax.tree_util.keystr(path)
        flat = "norm" in jax.tree_util.keystr(path) or leaf.ndim < 2
        if own == experts and flat != wide:
            total += math.prod(leaf.shape)
    return total


def test_weights_and_gradients_along_fsdp_and_data(plain) -> None:
    sent = plain.sent({"data": 2, "fsdp": 4}, 16)
    wide = elements(plain, experts=False, wide=True) + elements(plain, experts=True, wide=True)
    flat = elements(plain, experts=False, wide=False)
    assert sent.parameters == pytest.approx(2 * wide * 2 * 3 / 4)
    summed = 2 * wide / 4 * 2 * 1 / 2 + 2 * flat * 2 * 7 / 8
    assert sent.gradients == pytest.approx(wide * 2 * 3 / 4 + summed)
    assert sent.experts == sent.tensor == sent.sequence == sent.far == 0
    assert sent.near == sent.parameters + sent.gradients


def test_tokens_travel_to_experts_and_weights_of_experts_do_not(plain) -> None:
    sent = plain.sent({"expert": 4}, 16)
    dense = elements(plain, experts=False, wide=True) + elements(plain, experts=False, wide=False)
    assert sent.parameters == 0 and sent.gradients == pytest.approx(2 * dense * 2 * 3 / 4)
    assert sent.experts == pytest.approx(4 * (16 / 4) * LENGTH * K * WIDTH * 2 * 3 / 4)
    assert scaling("full").sent({"expert": 4}, 16).experts == pytest.approx(1.5 * sent.experts)


def test_several_slices_sum_in_two_stages(plain) -> None:
    one, two = plain.sent({"data": 8}, 16), plain.sent({"data": 8}, 16, slices=2)
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plain.model.abstract_state()))
    assert one.far == 0 and two.far == pytest.approx(2 * whole / 4 * 2 * 1 / 2)
    assert two.gradients == pytest.approx(2 * whole * 2 * 3 / 4) and two.gradients < one.gradients
    with pytest.raises(ShardingError, match="expected data or fsdp to be a multiple of 2"):
        plain.sent({"expert": 8}, 16, slices=2)


def test_parameters_in_parts_on_several_slices(plain) -> None:
    """Every part crosses once, and is passed on within the slice."""
    sent = plain.sent({"fsdp": 8}, 16, slices=2)
    wide = elements(plain, experts=False, wide=True) + elements(plain, experts=True, wide=True)
    flat = elements(plain, experts=False, wide=False)
    assert sent.parameters == pytest.approx(2 * wide * 2 * 3 / 4)
    assert sent.far == pytest.approx(3 * wide / 4 * 2 * 1 / 2 + 2 * flat / 4 * 2 * 1 / 2)


def test_the_least_time_follows_the_slowest(plain) -> None:
    chip = lookup("TPU v5e")
    least = plain.least({"data": 8}, 64, chip, slices=2)
    sent = plain.sent({"data": 8}, 64, slices=2)
    assert least.collective_seconds == sent.near / chip.link_bandwidth
    assert least.network_seconds == sent.far / chip.far_bandwidth
    assert least.compute_seconds == plain.cost[0].flops * 8 / chip.bf16_flops
    assert least.seconds == least.memory_seconds and least.bound == "memory"
    assert least.in_turn == least.seconds + least.collective_seconds + least.network_seconds
    twice = plain.least({"data": 16}, 128, chip, slices=2)
    assert twice.compute_seconds == least.compute_seconds and twice.memory_seconds == least.memory_seconds
    assert twice.collective_seconds > least.collective_seconds
    with pytest.raises(CostError, match="H100 PCIe: its links: no bandwidth is stated"):
        plain.least({"data": 8}, 64, lookup("H100 PCIe"))


def test_tensor_splits_what_a_device_computes(plain) -> None:
    sent = plain.sent({"tensor": 2}, 8)
    each = 2 * 8 * LENGTH * WIDTH * 2 / 2  # a sum over two devices
    assert sent.tensor == pytest.approx(2 * (2 + 1) * each) and sent.experts == pytest.approx(2 * each)
    assert sent.parameters == sent.gradients == 0
    again = scaling("full").sent({"tensor": 2}, 8).tensor  # sums behind attention, of both blocks
    assert again == pytest.approx(sent.tensor + 2 * each)


def test_microbatches_each_gather_parameters_and_sum_gradients(plain) -> None:
    config = dataclasses.replace(
        plain.config, optimizer=dataclasses.replace(plain.config.optimizer, accumulate=2)
    )
    once, twice = plain.sent({"fsdp": 4, "expert": 2}, 16), Scaling(config).sent({"fsdp": 4, "expert": 2}, 16)
    assert twice.parameters == 2 * once.parameters and twice.gradients == 2 * once.gradients
    assert twice.experts == once.experts
