"""Rules for devices: which holds, what wins, what is refused, and that a run says and keeps what it did."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_loop import build_small, config, records
from tokenlab import models
from tokenlab.core import config as configs
from tokenlab.core.errors import ConfigError
from tokenlab.train import default_config, experiment, hardware, loop
from tokenlab.train.compile_report import compile_report
from tokenlab.train.config import TrainConfig
from tokenlab.train.records import read_config, read_run

ROOT = Path(__file__).parents[2]
SAID = {"step_seconds": 0.5, "basis": "estimated", "source": "tokenlab compile --topology=v5e:4x4"}
SLICE = {"kind": "TPU v5e", "devices": 16, "set": {"mesh.data": 1, "mesh.fsdp": 16, "model.remat": "full"}}
ANY_TPU = {"kind": "TPU *", "set": {"mesh.data": 1, "mesh.fsdp": -1}}
CPUS = {"kind": "cpu", "devices": 8, "set": {"mesh.data": 2, "mesh.fsdp": 4, "optimizer.accumulate": 2}}


def with_rules(*rules: dict[str, Any], **changes: Any) -> Any:
    found = default_config()
    found.hardware = tuple({**SAID, **rule} for rule in rules)
    return configs.override(found, changes)


def applied(config: Any, kind: str, devices: int) -> tuple[TrainConfig, hardware.Applied | None]:
    return hardware.applied(configs.to_dataclass(TrainConfig, config), kind, devices)


@pytest.mark.parametrize(
    ("kind", "devices", "fsdp", "remat"),
    [
        ("TPU v5 lite", 16, 16, "full"),  # what jax calls a v5e
        ("TPU v5e", 16, 16, "full"),
        ("TPU v5 lite", 8, -1, "none"),
        ("TPU v5p", 16, -1, "none"),
        ("cpu", 8, 4, "none"),
        ("cpu", 4, 1, "none"),
    ],
)
def test_the_first_rule_that_fits_holds(kind: str, devices: int, fsdp: int, remat: str) -> None:
    given = with_rules(SLICE, ANY_TPU, CPUS)
    found, rule = applied(given, kind, devices)
    assert (found.mesh.fsdp, found.model["remat"]) == (fsdp, remat)
    assert (rule.rule is None) == (fsdp == 1)
    assert found.optimizer.accumulate == (2 if fsdp == 4 else 1)
    again, _ = hardware.applied(found, kind, devices)
    assert again == found


def test_without_rules_nothing_is_asked() -> None:
    plain = configs.to_dataclass(TrainConfig, default_config())
    assert hardware.on(plain) == (plain, None)


def test_what_is_changed_afterwards_wins() -> None:
    """A key of its own alone; one of the mesh the whole mesh, whose sizes belong together."""
    found, rule = applied(with_rules(SLICE, **{"model.remat": "dots"}), "TPU v5e", 16)
    assert (found.mesh.fsdp, found.model["remat"]) == (16, "dots")
    assert set(rule.changed) == {"mesh.data", "mesh.fsdp"}
    found, _ = applied(with_rules(SLICE, **{"mesh.tensor": "4"}), "TPU v5e", 16)
    assert (found.mesh.data, found.mesh.fsdp, found.mesh.tensor, found.model["remat"]) == (-1, 1, 4, "full")
    given = with_rules(SLICE)
    configs.override(given, {"mesh.tensor": "4"})
    assert given.hardware[0]["set"] == SLICE["set"]
    assert configs.override(given, {"hardware": "()"}).hardware == ()
    base = configs.override(configs.from_dataclass(TrainConfig), {})
    base.hardware = given.hardware
    nested = type(base)({"base": base})
    assert "model.remat" not in configs.override(nested, {"base.model.remat": "dots"}).base.hardware[0]["set"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"kind": "TPU v5f"}], "no device is of the kind 'TPU v5f'. Did you mean 'TPU v5"),
        ([{"kind": "gpu"}], "no device is of the kind 'gpu'"),
        ([{**SLICE, "set": {"mesh.fspd": 2}}], "sets 'mesh.fspd', and config has no such key. Did you mean 'fsdp'?"),
        ([{**SLICE, "set": {"learning_rate": 2}}], "sets 'learning_rate', which is not of the devices: expected one "),
        ([{**SLICE, "set": {"optimizer.learning_rate": 2.0}}], "sets 'optimizer.learning_rate', which is not of the d"),
        ([{**SLICE, "set": {"mesh.fsdp": "many"}}], "config.mesh.fsdp is 'many' (str): expected int"),
        ([{**SLICE, "set": {"mesh.fsdp": 0}}], "config.mesh.fsdp is 0: expected a number of devices >= 1"),
        ([{**SLICE, "set": {"model.remat": "some"}}], "config.model.remat is 'some'"),
        ([{**SLICE, "set": {"optimizer.accumulate": 7}}], "config.optimizer.accumulate is 7: expected a divisor o"),
        ([ANY_TPU, SLICE], "(the rule for TPU v5e x 16) never holds: the rule for TPU * comes before it"),
        ([SLICE, SLICE], "never holds: the rule for TPU v5e x 16 comes before it"),
        ([{**SLICE, "devices": 0}], "hardware: devices is 0: expected a number of devices >= 1"),
        ([{**SLICE, "step_seconds": 0.0}], "hardware: step_seconds is 0.0: expected seconds > 0"),
        ([{**SLICE, "source": ""}], "hardware: source is '': expected where step_seconds is from"),
        ([{**SLICE, "basis": "guessed"}], "hardware[0].basis is 'guessed'"),
        ([{**SLICE, "mesh": {}}], "config.hardware[0] has no key 'mesh'"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_on_all_devices(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        applied(with_rules(*rules), "cpu", 1)


def test_rules_are_saved_and_read_again() -> None:
    given = with_rules(SLICE, CPUS)
    again = configs.from_json(configs.to_json(given))
    assert configs.diff(again, given) == []
    assert applied(again, "cpu", 8) == applied(given, "cpu", 8)


def test_a_run_says_and_keeps_what_it_did_and_goes_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight CPUs have a rule; where another device is, with another rule, the same workdir goes on."""
    monkeypatch.setattr(models, "build", build_small)
    rule = {**CPUS, **SAID, "xla": {"xla_cpu_enable_fast_min_max": True}}
    given = config(steps=4, **{"optimizer.schedule.name": "constant"})
    given.hardware = (rule,)
    loop.run(given, tmp_path)
    said = capsys.readouterr().out
    assert "hardware: 8 x cpu, the rule for cpu x 8: mesh.data=2, mesh.fsdp=4, optimizer.accumulate=2" in said
    assert "0.5 s a step estimated by `tokenlab compile --topology=v5e:4x4`" in " ".join(said.split())
    run = read_run(tmp_path)
    assert (run["mesh"]["data"], run["mesh"]["fsdp"]) == (2, 4)
    assert run["hardware"]["changed"]["optimizer.accumulate"] == [1, 2]
    assert run["hardware"]["rule"]["source"] == SAID["source"]
    kept = read_config(tmp_path)
    assert (kept.mesh.data, kept.mesh.fsdp, kept.optimizer.accumulate) == (-1, 1, 1)
    monkeypatch.setattr(hardware, "_called", lambda kind: ("TPU v5e",))  # so are the CPUs called from here on
    given.hardware = (*given.hardware, {**SAID, **SLICE, "devices": 8, "set": {"mesh.data": -1}})
    given.steps = 6
    loop.run(given, tmp_path)
    assert "the configuration changed since the last session: hardware" in capsys.readouterr().out
    assert [each["step"] for each in records(tmp_path) if each["split"] == "train"][-1] == 6
    assert json.loads((tmp_path / "run.json").read_text())["mesh"]["data"] == 8


def test_an_option_that_the_compiler_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "build", build_small)
    given = config()
    given.hardware = ({**CPUS, **SAID, "xla": {"xla_no_such_option": True}},)
    built = experiment.build(given)
    state = built.init()
    with pytest.raises(
        ConfigError, match=r"^config\.hardware: xla of the rule for cpu x 8: .*xla_no_such_option"
    ):
        built.compiled_step(0, state, built.put(built.stream.batch(0)))


def test_a_topology_has_the_rule_of_its_kind_and_size() -> None:
    given = configs.to_dataclass(TrainConfig, with_rules(SLICE, ANY_TPU))
    assert hardware.at(given, "v5e:4x4")[0].mesh.fsdp == 16
    assert hardware.at(given, "v5e:4x8")[0].mesh.fsdp == -1
    assert (
        hardware.at(given, "v5e:2x4*2")[0].mesh.fsdp == 16
        and hardware.at(given, "v5e:4x4*2")[1].devices == 32
    )
    assert hardware.at(given, "v5p:2x2x4")[1].rule.kind == "TPU *"


@pytest.mark.parametrize(
    ("run", "topology", "mesh"),
    [
        ("soft_moe.py:B/16", "v5e:16x16", {"data": 2, "expert": 128}),
        ("mixture_of_depths.py:3B", "v5p:4x4x4", {"data": 4, "fsdp": 16}),
        ("moma.py:1.4B-4t4i", "v5p:8x8x8", {"fsdp": 128, "expert": 4}),
    ],
)
def test_the_rules_of_published_runs(run: str, topology: str, mesh: dict[str, int]) -> None:
    """That for which their step was compiled."""
    given = configs.to_dataclass(TrainConfig, configs.load(f"{ROOT}/configs/{run}"))
    found, rule = hardware.at(given, topology)
    assert found.mesh.sizes(rule.devices) == mesh and f"--topology={topology}" in rule.rule.source
    assert hardware.at(hardware.without_mesh(given), topology)[0].mesh == given.mesh


@pytest.mark.slow
def test_compiling_says_the_rule() -> None:
    given = with_rules({**CPUS, "set": {"mesh.data": 2, "mesh.fsdp": 4}}, batch_size=16)
    given.model.update(size="nano/4", stack="block")
    found = compile_report(given, "mine", "here")
    assert found.mesh == {"data": 2, "fsdp": 4} and found.rule.startswith(
        "hardware: 8 x cpu, the rule for cpu"
    )
    assert found.to_json()["rule"] == found.rule
