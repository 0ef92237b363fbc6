"""Ranking the mappings of a configuration: the legal ones, the best first, without a device or a compiler."""

from __future__ import annotations

import json
import math
import shlex

import jax
import jax.numpy as jnp
import pytest

from tokenlab import cli
from tokenlab.core.config import override, to_dataclass
from tokenlab.core.errors import ConfigError, CostError
from tokenlab.cost import lookup
from tokenlab.cost.mapping import Leaf, computed_with, step_bytes
from tokenlab.sharding.plan import ParallelPlan, every_plan
from tokenlab.sharding.slices import Slices
from tokenlab.train import search
from tokenlab.train.config import MeshConfig, TrainConfig, default_config
from tokenlab.train.scaling import leaves_of

CONFIG = """
from tokenlab.train import default_config

def get_config(stack="block + block(ffn=dropless(experts=8, k=2))"):
    config = default_config(model="decoder_lm", task="next_token", data="shakespeare")
    config.data.length = 64
    config.model.size, config.model.stack, config.batch_size = "nano", stack, 16
    return config
"""


def in_turn(seconds):
    computing = max(seconds["compute_seconds"], seconds["memory_seconds"])
    return computing + seconds["collective_seconds"] + seconds["network_seconds"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "mine.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def ranked(file, tmp_path_factory):
    told = file.parent / "ranked.json"
    assert cli.main(["compile", "--search", f"--config={file}", "--topology=v5e:2x4", f"--json={told}"]) == 0
    return json.loads(told.read_text())


def test_every_mapping_is_legal_and_the_best_come_first(ranked):
    assert ranked["devices"] == 8 and ranked["chip"] == "TPU v5e"
    found = ranked["mappings"]
    assert len({json.dumps(each["mesh"], sort_keys=True) for each in found}) == len(found) > 20
    assert {each["folded"] for each in found} == {True, False} and {each["ep"] for each in found} == {
        1,
        2,
        4,
        8,
    }
    assert all(each["tp"] in (1, 2) for each in found)  # two heads
    best = min(each["step_seconds_bound"] for each in found)
    keys = [
        (
            not each["fits"],
            round(math.log(each["step_seconds_bound"] / best) / math.log(1.01)),
            in_turn(each["seconds_by_resource"]),
        )
        for each in found
    ]
    assert keys == sorted(keys)
    for each in found:
        assert each["tp"] * each["cp"] * each["dp"] == 8 and each["dp"] % each["fsdp"] == 0
        assert each["collective_bytes"]["far"] == 0
        sent = sum(each["collective_bytes"].values()) / lookup("TPU v5e").link_bandwidth
        assert each["seconds_by_resource"]["collective_seconds"] == pytest.approx(sent)
        assert each["state_bytes"] < each["bytes_per_device"]


def test_state_is_shared_by_fsdp_and_experts(ranked):
    def state(**sizes):
        plain = {"tp": 1, "cp": 1, "fsdp": 1, "ep": 1, "etp": 1} | sizes
        return next(e["state_bytes"] for e in ranked["mappings"] if all(e[k] == v for k, v in plain.items()))

    assert state(ep=8) < state(ep=2) < state()
    assert state(fsdp=8) < state() / 7


def test_what_the_configuration_says_of_the_devices_counts(file, capsys):
    """Moments on the host take no memory of a chip, and the rule of the slice holds, but for its mesh."""
    told, command = (
        file.parent / "other.json",
        ["compile", "--search", f"--config={file}", "--topology=v5e:2x2"],
    )
    assert cli.main([*command, f"--json={told}"]) == 0
    usual = json.loads(told.read_text())["mappings"][0]["state_bytes"]
    ruled = file.parent / "ruled.py"
    rule = dict(
        kind="TPU v5e",
        devices=4,
        set={"optimizer.offload": True, "mesh.fsdp": 4},
        step_seconds=1.0,
        basis="estimated",
        source="a guess",
    )
    ruled.write_text(
        CONFIG.replace("    return config", f"    config.hardware = ({rule!r},)\n    return config")
    )
    capsys.readouterr()
    assert cli.main([*command[:2], f"--config={ruled}", command[3], f"--json={told}"]) == 0
    assert "4 x TPU v5e, the rule for TPU v5e x 4: optimizer.offload=True (1 s" in capsys.readouterr().out
    state = {
        json.dumps(each["mesh"]): each["state_bytes"] for each in json.loads(told.read_text())["mappings"]
    }
    assert 2 * min(state.values()) <= usual


def test_experts_that_are_not_split_are_experts():
    """Where attention alone uses `tensor`, every device has all of each expert, and all sum their gradients."""
    params = {"experts": {"up": jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)}}
    table = {"experts/up": ("expert", "expert_embed", "expert_mlp")}
    sizes = ParallelPlan(tp=2, dp=4, etp=1).sizes
    (leaf,) = leaves_of(params, table, sizes, {})
    assert leaf == Leaf(384, (), expert=True)
    assert step_bytes(sizes, [], [leaf], 8, 4).gradients == 4 * 2 * 384 * 7 / 8
    sizes = ParallelPlan(dp=8, fsdp=8, etp=2).sizes
    (leaf,) = leaves_of(params, table, sizes, {})
    assert set(leaf.axes) == {"fsdp", "fsdp_tensor"} and computed_with(leaf, sizes) == 192


def test_several_slices(file, tmp_path, capsys):
    """Only data or fsdp reaches from slice to slice, and what crosses takes the network's time."""
    told, chip = tmp_path / "told.json", lookup("TPU v5e")
    assert (
        cli.main(["compile", "--search", f"--config={file}", "--topology=v5e:2x2*2", f"--json={told}"]) == 0
    )
    said = json.loads(told.read_text())
    assert said["devices"] == 8 and said["slices"] == 2
    for each in said["mappings"]:
        far = each["collective_bytes"]["far"]
        assert any(each["mesh"].get(axis, 1) % 2 == 0 for axis in ("data", "fsdp")) and far > 0
        assert each["seconds_by_resource"]["network_seconds"] == pytest.approx(far / chip.far_bandwidth)
    best = next(each for each in said["mappings"] if each["folded"])
    shown = " ".join(f"--config.mesh.{name}={size}" for name, size in best["settings"].items())
    assert shown in capsys.readouterr().out.replace("\n", " ")


def test_what_is_printed_makes_the_plan_whatever_the_configuration_says_of_the_mesh():
    config = default_config()
    config.mesh.recipe = "folded:2,4"
    before = to_dataclass(TrainConfig, config).mesh
    for plan in every_plan(8, fsdp=True, beyond=True):
        words = shlex.split(search.typed(plan, before))
        changes = dict(word.removeprefix("--config.").split("=", 1) for word in words)
        config = default_config()
        config.mesh.recipe = "folded:2,4"
        made = to_dataclass(TrainConfig, override(config, changes)).mesh
        assert dict(made.build().shape) == {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1} | plan.sizes, plan
    assert search.typed(ParallelPlan(dp=8), MeshConfig()) == "--config.mesh.data=8"


def test_mistakes(file, capsys):
    assert cli.main(["compile", "--search", f"--config={file}", "--topology=here"]) == 2
    assert "expected kind and shape, such as v5e:4x4" in capsys.readouterr().err
    with pytest.raises(CostError, match="no bandwidth of its links"):
        search.rank(default_config(), 4, lookup("H100 PCIe"))
    with pytest.raises(CostError, match="TPU v6e: no bandwidth of the network of slices is stated"):
        search.rank(default_config(), 8, lookup("TPU v6e"), slices=2)
    with pytest.raises(CostError, match="no datasheet is known"):
        search.chip_of(Slices("v5f", (4, 4)))
    assert search.chip_of(Slices.parse("H100 SXM:8*16")).name == "H100 SXM"
    config = default_config()
    config.model.stack, config.batch_size = "block*2", 64
    with pytest.raises(
        ConfigError, match=r"no mapping of 7 devices divides the model and config\.batch_size=64"
    ):
        search.rank(config, 7, lookup("TPU v5e"))
