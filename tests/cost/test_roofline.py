"""The roofline of counted costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tokenlab.core.errors import CostError
from tokenlab.cost import Cost, Peaks, count, lookup, measure_memory_bandwidth, measure_peaks, roofline

CHIP = Peaks("chip", flops=100.0, bandwidth=10.0)


def test_compute_and_memory() -> None:
    found = roofline(Cost(flops=400, bytes=20), CHIP)
    assert (found.compute_seconds, found.memory_seconds, found.collective_seconds) == (4.0, 2.0, 0.0)
    assert (found.seconds, found.bound) == (4.0, "compute")
    found = roofline(Cost(flops=400, bytes=80), CHIP)
    assert (found.seconds, found.bound) == (8.0, "memory")


def test_devices_share_the_work_and_collectives_come_on_top() -> None:
    found = roofline(Cost(flops=400, bytes=20), CHIP, devices=4, collective_bytes=30, link_bandwidth=5.0)
    assert (found.compute_seconds, found.memory_seconds, found.collective_seconds) == (1.0, 0.5, 6.0)
    assert (found.seconds, found.bound) == (6.0, "collectives")


def test_recomputation_takes_time_too() -> None:
    assert roofline(Cost(flops=400, recomputed=100), CHIP).compute_seconds == 4.0


def test_a_loop_counts_as_often_as_it_runs() -> None:
    weight = jax.ShapeDtypeStruct((8, 8), jnp.float32)

    def loop(w):
        return jax.lax.scan(lambda x, _: (x @ w, None), w, None, length=10)[0]

    once, ten = count(lambda w: w @ w, weight), count(loop, weight)
    assert roofline(ten, CHIP).compute_seconds == pytest.approx(10 * roofline(once, CHIP).compute_seconds)


def test_bytes_without_a_link_and_no_devices() -> None:
    with pytest.raises(CostError, match="30 bytes of collectives and no link_bandwidth"):
        roofline(Cost(), CHIP, collective_bytes=30)
    with pytest.raises(CostError, match="0 devices"):
        roofline(Cost(), CHIP, devices=0)


def test_peaks_by_dtype() -> None:
    a100 = lookup("A100 SXM 80GB")
    assert a100.peaks("bfloat16") == Peaks("A100 SXM 80GB", 312e12, 2039e9)
    assert a100.peaks("float32").flops == 156e12
    assert lookup("TPU v5e").peaks("float32").flops == lookup("TPU v5e").bf16_flops
    with pytest.raises(CostError, match="got dtype 'int8', expected one of bfloat16, float32"):
        a100.peaks("int8")


def test_measured_bandwidth_is_a_rate() -> None:
    assert measure_memory_bandwidth(4096, repeats=3) > 0
    for size, repeats in ((3, 1), (4096, 0)):
        with pytest.raises(CostError, match="expected at least 4 and 1"):
            measure_memory_bandwidth(size, repeats)


def test_measured_peaks_take_sizes_that_fit_the_device(monkeypatch) -> None:
    import tokenlab.cost.hardware as hardware

    asked = []
    monkeypatch.setattr(
        hardware, "measure_matmul_flops", lambda dtype, size: asked.append((dtype, size)) or 7.0
    )
    monkeypatch.setattr(hardware, "measure_memory_bandwidth", lambda size: asked.append(size) or 3.0)
    found = measure_peaks("bfloat16")
    assert (found.flops, found.bandwidth) == (7.0, 3.0) and "measured" in found.name
    assert asked == [("bfloat16", 1024), 2**28]
