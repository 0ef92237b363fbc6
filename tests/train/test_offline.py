"""Steps compiled for devices that need not be there: memory a device, and what they move."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import ShardingError
from tokenlab.sharding import topology
from tokenlab.sharding.check import collectives
from tokenlab.train.config import TrainConfig, default_config
from tokenlab.train.offline import compile_step

ROOT = Path(__file__).parents[2]
SPEC = {"image": ((8, 8, 1), "float32"), "label": ((), "int32")}

FOR_A_SLICE = """
import json
from tokenlab.core.config import load, to_dataclass
from tokenlab.sharding.check import collectives
from tokenlab.sharding.topology import topology
from tokenlab.train.config import TrainConfig
from tokenlab.train.offline import compile_step
config = load("configs/soft_moe.py:S/16")
config.batch_size = 1024
spec = {"image": ((224, 224, 3), "float32"), "label": ((), "int32")}
mesh = {"data": 2, "expert": 8}
made = compile_step(to_dataclass(TrainConfig, config), spec, 1000, topology("v5e:4x4"), mesh)
across = [each.kind for each in collectives(made.compiled) if each.crosses(made.mesh, ("expert",))]
said = {"state": made.state_bytes, "temporary": made.temporary_bytes, "seconds": made.seconds}
print(json.dumps({**said, "across": across}))
"""

LM_FOR_A_SLICE = """
import json
from tokenlab.core.config import load, to_dataclass
from tokenlab.sharding.topology import topology
from tokenlab.train.config import TrainConfig
from tokenlab.train.offline import compile_step
config = load("configs/mixture_of_depths.py:3B")
keys = {"ids": "int32", "target": "int32", "segment": "int32", "position": "int32"}
keys |= {"weight": "float32", "bytes": "float32"}
spec = {name: ((config.data.length,), dtype) for name, dtype in keys.items()}
mesh = {"fsdp": 16, "tensor": 4}
made = compile_step(to_dataclass(TrainConfig, config), spec, 32_000, topology("v5p:4x4x4"), mesh)
print(json.dumps({"state": made.state_bytes, "temporary": made.temporary_bytes, "seconds": made.seconds}))
"""
MOMA_FOR_A_SLICE = """
import json
from tokenlab.core.config import load, to_dataclass
from tokenlab.sharding.topology import topology
from tokenlab.train.config import TrainConfig
from tokenlab.train.offline import compile_step
config = load("configs/moma.py:1.4B-4t4i")
config.batch_size = 512
keys = {"ids": "int32", "target": "int32", "segment": "int32", "position": "int32", "modality": "int32"}
keys |= {"target_modality": "int32", "weight": "float32", "bytes": "float32"}
spec = {name: ((config.data.length,), dtype) for name, dtype in keys.items()}
mesh = {"fsdp": 128, "expert": 4}
made = compile_step(to_dataclass(TrainConfig, config), spec, 65_536, topology("v5p:8x8x8"), mesh)
print(json.dumps({"state": made.state_bytes, "temporary": made.temporary_bytes, "seconds": made.seconds}))
"""
with_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (.ci/run does it)"
)


def compiled_apart(program: str) -> dict[str, object]:
    """What a program says in its last line; in a process of its own, since libtpu is loaded once."""
    # Flags for the CPU's compiler stay here: libtpu stops at those that it does not know.
    settings = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=1200,
        env={**settings, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_on_devices_that_are_there():
    config = default_config()
    config.update(batch_size=16)
    config.model.update(size="nano/2", stack="block + block(ffn=tokens_choice(experts=4))")
    devices = jax.devices()[:8]
    made = compile_step(to_dataclass(TrainConfig, config), SPEC, 5, devices, {"data": 2, "expert": 4})
    assert "all-to-all" in {each.kind for each in collectives(made.compiled)}
    alone = compile_step(to_dataclass(TrainConfig, config), SPEC, 5, devices[:1], {"data": 1})
    assert made.state_bytes < alone.state_bytes and made.peak_bytes > made.state_bytes


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ShardingError, match="pip install libtpu"):
        topology.topology("v5e:4x4")


@pytest.mark.slow
@with_compiler
def test_soft_moe_for_a_tpu_slice(capsys):
    """S/16 with 128 experts on a v5e of 4 x 4: fits, exchanges tokens, and gathers nothing over the expert axis."""
    said = compiled_apart(FOR_A_SLICE)
    state, more = (said[key] / 2**30 for key in ("state", "temporary"))
    with capsys.disabled():
        print(
            f"\nv5e:4x4, batch 1024: {state:.2f} + {more:.2f} GiB a chip, compiled in {said['seconds']:.0f} s"
        )
    assert said["state"] + said["temporary"] < 15.75 * 2**30
    assert said["across"].count("all-to-all") >= 4 and "all-gather" not in said["across"]


@pytest.mark.slow
@with_compiler
def test_mixture_of_depths_for_a_tpu_slice(capsys):
    """A 3B decoder at 2,048 tokens on a v5p of 4 x 4 x 4, batch 128: fits."""
    said = compiled_apart(LM_FOR_A_SLICE)
    state, more = (said[key] / 2**30 for key in ("state", "temporary"))
    with capsys.disabled():
        print(
            f"\nv5p:4x4x4, 3B, batch 128: {state:.2f} + {more:.2f} GiB a chip, compiled in {said['seconds']:.0f} s"
        )
    assert said["state"] + said["temporary"] < 95 * 2**30


@pytest.mark.slow
@with_compiler
def test_moma_for_a_tpu_slice(capsys):
    """1.4B with 4 text and 4 image experts at 4,096 tokens on a v5p of 8 x 8 x 8, two million tokens a step: fits."""
    said = compiled_apart(MOMA_FOR_A_SLICE)
    state, more = (said[key] / 2**30 for key in ("state", "temporary"))
    with capsys.disabled():
        print(
            f"\nv5p:8x8x8, 1.4B 4t4i, batch 512: {state:.2f} + {more:.2f} GiB a chip, "
            f"compiled in {said['seconds']:.0f} s"
        )
    assert said["state"] + said["temporary"] < 95 * 2**30
