"""Steps compiled for devices that need not be there: memory a device, and what they move."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

from tokenlab.core.config import override, to_dataclass
from tokenlab.core.errors import ShardingError
from tokenlab.sharding import topology
from tokenlab.sharding.check import collectives
from tokenlab.train import compile_report
from tokenlab.train.config import TrainConfig, default_config
from tokenlab.train.offline import compile_step, mesh_of

ROOT = Path(__file__).parents[2]
SPEC = {"image": ((8, 8, 1), "float32"), "label": ((), "int32")}

with_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (.ci/run does it)"
)


def test_on_devices_that_are_there():
    config = default_config()
    config.update(batch_size=16)
    config.model.update(size="nano/2", stack="block + block(ffn=tokens_choice(experts=4))")
    devices = jax.devices()[:8]
    made = compile_step(to_dataclass(TrainConfig, config), SPEC, 5, devices, {"data": 2, "expert": 4})
    assert "all-to-all" in {each.kind for each in collectives(made.compiled)}
    alone = compile_step(to_dataclass(TrainConfig, config), SPEC, 5, devices[:1], {"data": 1})
    assert made.state_bytes < alone.state_bytes and made.peak_bytes > made.state_bytes


def test_it_is_compiled_for_the_mesh_of_a_run_in_its_order_of_devices():
    """Where experts have a mapping of their own, devices are dealt out as the plan says; sizes alone do not say it."""
    config = override(default_config(), {"mesh.tensor": "2", "mesh.experts.expert": "2"})
    config = to_dataclass(TrainConfig, config)
    made = mesh_of(config, jax.devices(), None)
    assert made == config.mesh.build() and made.devices[0, 0, :, 0].tolist() == jax.devices()[:2]
    assert made != mesh_of(config, jax.devices(), config.mesh.sizes(8))


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ShardingError, match=r"pip install 'libtpu==[\d.]+\*'"):
        topology.topology("v5e:4x4")


@with_compiler
def test_a_small_program_for_a_tpu_slice(tmp_path):
    """Experts on a v5e of 2 x 2: tokens are sent as a TPU sends them, and nothing of an expert is gathered."""
    file = tmp_path / "said.json"
    words = ["compile", "--config=configs/quickstart.py", "--topology=v5e:2x2", "--mesh=expert=4"]
    words += ["--config.batch_size=16", "--config.model.size=nano/4", f"--json={file}"]
    words.append("--config.model.stack=block + block(ffn=dropless(experts=8, expert=mlp(hidden=256)))")
    # In a process of its own, since libtpu is loaded once; flags for the CPU's compiler stay here.
    settings = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "tokenlab", *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**settings, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(file.read_text())
    across = {each["kind"]: each for each in said["across_expert"]}
    assert said["chip"] == "TPU v5 lite" and said["fits"] and said["collectives_unknown"] is None
    assert across["ragged-all-to-all"]["count"] >= 4, across  # there and back, forward and backward
    assert across.get("all-gather", {"largest": 0})["largest"] < 16 * 256 * 4, across


def test_the_extra_asks_for_the_compiler_of_its_jax():
    """jax[tpu] names one version of libtpu; another makes programs that jaxlib may be unable to read."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (jax_itself,) = [each for each in project["dependencies"] if re.match(r"jax\b(?!-)", each)]
    assert project["optional-dependencies"]["tpu"] == [jax_itself.replace("jax", "jax[tpu]", 1)]
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\*", topology.pinned_libtpu())
    assert topology.other_libtpu() is None, "libtpu is installed, and is not the one of this jax"


@pytest.mark.parametrize(
    ("version", "said"), [("0.0.42.1", None), ("0.0.421", "0.0.421"), ("0.0.52", "0.0.52")]
)
def test_a_compiler_of_another_jax_is_named(monkeypatch, version, said):
    monkeypatch.setattr(topology, "pinned_libtpu", lambda: "0.0.42.*")
    monkeypatch.setattr(topology.importlib.metadata, "version", lambda name: version)
    found = topology.other_libtpu()
    assert found is None if said is None else f"libtpu is {said}" in found and "0.0.42.*" in found


def test_a_program_that_cannot_be_read_says_why(monkeypatch):
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: 3 operands\nmore")

    monkeypatch.setattr(compile_report, "other_libtpu", lambda: None)
    assert (
        compile_report._executed(Unreadable())
        == "jaxlib cannot read the program: INVALID_ARGUMENT: 3 operands"
    )
    monkeypatch.setattr(compile_report, "other_libtpu", lambda: "libtpu is 1")
    assert compile_report._executed(Unreadable()) == "libtpu is 1"


@pytest.mark.parametrize(
    ("name", "reason", "message"),
    [
        ("v5e:2x2*0", "", "for two slices"),
        ("v5e:2x2", "INTERNAL: it holds /tmp/libtpu_lockfile", "remove that file"),
        ("v5e:3x3", "INVALID: no such thing", "INVALID: no such thing; expected kind and shape"),
    ],
)
def test_what_libtpu_says_is_explained(monkeypatch, name, reason, message):
    def raises(**how):
        raise RuntimeError(reason)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(topologies, "get_topology_desc", raises)
    for key in topology._ENVIRONMENT:
        monkeypatch.setenv(key, os.environ.get(key, topology._ENVIRONMENT[key]))
    with pytest.raises(ShardingError, match=message):
        topology.topology(name)
