"""Datasheets and the measured peak."""

from __future__ import annotations

import math

import pytest

from tokenlab.core.errors import CostError
from tokenlab.cost import lookup, measure_matmul_flops
from tokenlab.cost.hardware import HARDWARE


def test_every_entry_is_complete_and_found_by_each_of_its_names() -> None:
    for hardware in HARDWARE:
        assert 1e14 < hardware.bf16_flops < 1e16
        assert 1e10 < hardware.hbm_bytes < 1e12
        assert 5e11 < hardware.hbm_bandwidth < 1e13
        assert hardware.source
        for name in (hardware.name, *hardware.device_kinds):
            assert lookup(name) is hardware


def test_names_are_unique() -> None:
    kinds = [kind for hardware in HARDWARE for kind in {hardware.name, *hardware.device_kinds}]
    assert len(kinds) == len(set(kinds))


def test_known_figures() -> None:
    assert lookup("TPU v5 lite").bf16_flops == 197e12
    assert lookup("NVIDIA H200").hbm_bandwidth == 4.8e12


def test_unknown_device_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(CostError, match=r"no datasheet is known for device 'cpu'; measure"):
        lookup("cpu")
    with pytest.raises(CostError, match="Did you mean 'TPU v5e'"):
        lookup("TPU v5ee")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_peak_is_a_rate(dtype: str) -> None:
    rate = measure_matmul_flops(dtype, size=32, repeats=3)
    assert math.isfinite(rate) and rate > 0


def test_measuring_needs_sensible_arguments() -> None:
    with pytest.raises(CostError, match="size 0 and repeats 3"):
        measure_matmul_flops("float32", size=0, repeats=3)
    with pytest.raises(CostError, match="repeats 0"):
        measure_matmul_flops("float32", size=8, repeats=0)
    with pytest.raises(CostError, match="'int32', expected a floating"):
        measure_matmul_flops("int32", size=8, repeats=1)
