"""A setting so small that its programs compile in a moment."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest

from tokenlab import tasks
from tokenlab.bench import arm
from tokenlab.bench.arm import Setting, batch_sharding
from tokenlab.sharding.mesh import make_mesh
from tokenlab.train import optimizer
from tokenlab.train.config import OptimizerConfig

original_without_cache = arm._without_cache


@pytest.fixture(autouse=True, scope="session")
def cached():
    """Programs come from the compilation cache, which a benchmark does not use; so tests are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arm, "_without_cache", contextlib.nullcontext)
        yield


@pytest.fixture
def compiled_anew(monkeypatch) -> None:
    """As in a benchmark."""
    monkeypatch.setattr(arm, "_without_cache", original_without_cache)


ROWS, CLASSES = 4, 10


@pytest.fixture(scope="session")
def setting() -> Setting:
    """nano/2 on four 8 x 8 images, one device, unrolled."""
    generator = np.random.default_rng(0)
    batch = {
        "image": generator.standard_normal((ROWS, 8, 8, 1), dtype=np.float32),
        "label": generator.integers(CLASSES, size=ROWS, dtype=np.int32),
        "mask": np.ones(ROWS, np.float32),
    }
    mesh = make_mesh(devices=jax.devices()[:1])
    return Setting(
        model={"size": "nano/2", "execution": "unroll"},
        spec={"image": ((8, 8, 1), "float32"), "label": ((), "int32")},
        num_outputs=CLASSES,
        task=tasks.build({"name": "classify"}),
        optimizer=optimizer.build(OptimizerConfig(), 100),
        mesh=mesh,
        batch=jax.device_put(batch, batch_sharding(mesh)),
    )


RECORD = {
    "format": 1,
    "name": "keep after 4",
    "stack": "block*4 + keep(0.5) + block*8",
    "mode": "train",
    "execution": "scan",
    "flops_ratio": 0.65,
    "time_ratio": 0.7,
    "realised": 0.857,
    "realised_low": 0.8,
    "realised_high": 0.91,
    "step_seconds": 0.3254,
    "step_seconds_quartiles": [0.32, 1.25],
    "tokens_per_second": 4843.0,
    "mfu": 0.61,
    "mfu_datasheet": None,
    "roofline_seconds": 0.2,
    "roofline_bound": "memory",
    "peak_bytes": 250_000_000,
    "compile_seconds": 12.34,
    "platform": "cpu",
    "device": "a chip",
    "devices": 1,
    "cores": 2,
    "versions": {"jax": "0.0"},
    "size": "Ti/16",
    "dtype": "float32",
    "batch_size": 8,
    "rounds": 11,
}
DENSE = {
    **RECORD,
    "name": "dense",
    "stack": "block*12",
    "flops_ratio": 1.0,
    "time_ratio": 1.0,
    "realised": None,
}
RECORDS = [DENSE, RECORD]
