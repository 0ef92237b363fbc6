"""Rules for devices and launches: sizes are checked as they will be there, and the dry run says which rule holds."""

from __future__ import annotations

import pytest

from tests.launch.conftest import TPU
from tokenlab.core.errors import ConfigError

RULES = """
from tokenlab.train import default_config

SAID = dict(step_seconds=0.5, basis="estimated", source="tokenlab compile")


def get_config():
    config = default_config()
    config.hardware = (
        dict(kind="TPU v5e", devices=16, set={"mesh.data": 1, "mesh.fsdp": FSDP}, **SAID),
        dict(kind="cpu", set={"mesh.data": 1, "mesh.fsdp": -1}, **SAID),
    )
    return config
"""


@pytest.fixture
def ruled(config):
    """A configuration with rules, by the devices that the first one wants."""

    def write(fsdp: int):
        file = config.with_name(f"ruled_{fsdp}.py")
        file.write_text(RULES.replace("FSDP", str(fsdp)))
        return file

    return write


def test_the_dry_run_says_which_rule_holds(go, ruled, capsys):
    file = ruled(16)
    go("tpu-vm", "gs://bucket/run", more=TPU, dry_run=True, file=file)
    assert (
        "# hardware: 16 x TPU v5e, the rule for TPU v5e x 16: mesh.data=1, mesh.fsdp=16"
        in capsys.readouterr().out
    )
    go("tpu-vm", "gs://bucket/run", more=TPU, dry_run=True, file=file, changes={"mesh.fsdp": "2"})
    assert "nothing is changed" in capsys.readouterr().out
    more = {"processes": "2", "platform": "cpu", "devices": "4"}
    go("local", "runs/x", more=more, dry_run=True, file=file)
    assert "# hardware: 8 x cpu, the rule for cpu: mesh.data=1, mesh.fsdp=-1" in capsys.readouterr().out
    go("slurm", "runs/x", more={"gpus_per_task": "1"}, dry_run=True, file=file)
    assert "# hardware: which rule holds is known on the devices" in capsys.readouterr().out


def test_a_mesh_that_does_not_fit_there(go, ruled):
    with pytest.raises(ConfigError, match=r"config\.mesh fsdp=32 needs 32 devices, and 1 x v5e:4x4 has 16"):
        go("tpu-vm", "gs://bucket/run", more=TPU, dry_run=True, file=ruled(32))
