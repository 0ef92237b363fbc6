"""The optimizer's state in the host's memory: the same numbers, checkpoints that go on with and without, and a TPU's
memory that is freed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.train.test_loop import build_small, config, params_of, records
from tokenlab import models
from tokenlab.core.errors import ShardingError
from tokenlab.train import experiment, loop, state
from tokenlab.train.state import HOST

ROOT = Path(__file__).parents[2]

FOR_A_SLICE = """
import json
from tokenlab.core.config import load, override, to_dataclass
from tokenlab.sharding.topology import topology
from tokenlab.train.compile_report import one_at_a_time
from tokenlab.train.config import TrainConfig
from tokenlab.train.offline import compile_step
names = {"ids": "int32", "target": "int32", "segment": "int32", "position": "int32"}
names |= {"weight": "float32", "bytes": "float32"}
said = {}
with one_at_a_time():
    devices = topology("v5e:2x2")
    for offload in (False, True):
        config = load("configs/mixture_of_depths.py:125M-dense")
        config = override(config, {"optimizer.offload": offload, "batch_size": 16})
        spec = {name: ((config.data.length,), dtype) for name, dtype in names.items()}
        made = compile_step(to_dataclass(TrainConfig, config), spec, 32_000, devices, {"fsdp": 4})
        memory = made.compiled.memory_analysis()
        said[str(offload)] = {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "host": memory.host_argument_size_in_bytes,
            "alias": memory.host_alias_size_in_bytes,
            "peak": made.peak_bytes,
            "fixed": made.fixed_bytes,
            "offloaded": made.host_bytes,
        }
print(json.dumps(said))
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "build", build_small)


def kinds(tree: Any) -> set[str | None]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def test_moments_lie_on_the_host_and_nothing_else_does(small: None) -> None:
    built = experiment.build(config(**{"optimizer.offload": True, "mesh.fsdp": 8}))
    begun = built.init()
    first = built.put(built.stream.batch(0))
    after, _ = built.compiled_step(0, begun, first).run(begun, first)
    for found in (built.abstract_state, after):
        moments = [leaf for leaf in jax.tree.leaves(found.optimizer) if leaf.shape]
        assert len(moments) == 4 and kinds(moments) == {HOST}
        assert {len(leaf.sharding.device_set) for leaf in moments} == {8}
        rest = found.replace(optimizer=[leaf for leaf in jax.tree.leaves(found.optimizer) if not leaf.shape])
        assert HOST not in kinds(rest)
    kernel, moment = after.params["head"]["kernel"], next(m for m in moments if m.ndim == 2)
    assert moment.sharding.spec == kernel.sharding.spec


def test_a_run_goes_on_with_it_and_without_it_as_if_nothing_were(small: None, tmp_path: Path) -> None:
    """Every record bit for bit that of a run without, through two resumes that switch it on and off."""
    settings = {"optimizer.schedule.name": "constant", "optimizer.schedule.warmup_steps": 0}
    settings |= {"log_every": 4, "eval_every": 4, "eval.final_split": None}
    loop.run(config(**settings, steps=12), tmp_path / "whole")
    for steps, offload in ((4, False), (8, True), (12, False)):
        changes = {"steps": steps, "optimizer.offload": offload}
        loop.run(config(**settings, **changes), tmp_path / "switched")
    assert len(records(tmp_path / "whole")) == 6
    assert records(tmp_path / "whole") == records(tmp_path / "switched")
    jax.tree.map(
        np.testing.assert_array_equal, *(params_of(tmp_path / name) for name in ("whole", "switched"))
    )


def test_devices_without_such_memory_are_told(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "HOST", "attic")
    with pytest.raises(
        ShardingError, match=r"^config\.optimizer\.offload: .*attic.*; expected devices that "
    ):
        experiment.build(config(**{"optimizer.offload": True}))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_tpu_has_the_room(capsys: pytest.CaptureFixture[str]) -> None:
    """A 125M decoder on a v5e of 2 x 2: Adam's moments are on the host, and the devices need less at once."""
    settings = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", FOR_A_SLICE], cwd=ROOT, capture_output=True, text=True, timeout=1200,
        env={**settings, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    without, with_it = said["False"], said["True"]
    with capsys.disabled():
        print(f"\nv5e:2x2, 125M: {without} without, {with_it} with offload")
    moments = with_it["offloaded"]
    assert without["host"] == 0 and without["offloaded"] == 0
    assert without["fixed"] - with_it["fixed"] == moments > 250e6  # eight bytes a parameter, in quarters
    # In whole tiles it is some more; and it is written where it is read.
    assert with_it["host"] == with_it["alias"] == without["arguments"] - with_it["arguments"]
    assert moments <= with_it["host"] < 1.1 * moments
    assert without["peak"] - with_it["peak"] > 0.8 * moments
