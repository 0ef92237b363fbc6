"""`tokenlab compile`: memory, traffic and least time of a step, without data and on devices that need not be there."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from pathlib import Path

import jax
import pytest

from tokenlab import cli
from tokenlab.core.config import load
from tokenlab.cost import hardware
from tokenlab.train import compile_report as module
from tokenlab.train.compile_report import compile_report, one_at_a_time, used_bytes
from tokenlab.train.config import default_config
from tokenlab.train.costs import train_cost
from tokenlab.train.experiment import build

ROOT = Path(__file__).parents[2]
CHIP = dataclasses.replace(
    hardware.HARDWARE[0], name="cpu", device_kinds=("cpu",), hbm_bytes=1e9, link_bandwidth=1e9
)


def config(**changes):
    found = default_config()
    found.update(batch_size=16, **changes)
    found.model.update(size="nano/4", stack="block + block(ffn=tokens_choice(experts=4))")
    return found


@pytest.fixture(scope="module")
def report():
    return compile_report(config(), "configs/mine.py", "here", mesh={"data": 2, "expert": -1})


def test_what_is_reported(report) -> None:
    assert report.mesh == {"data": 2, "expert": 4} and report.devices == 8
    assert report.fits is None and "whether it fits cannot be told" in report.verdict
    assert 0 < report.state_bytes < report.bytes_per_device
    kinds = {each.kind: each for each in report.collectives}
    assert kinds["all-to-all"].count >= 4 and all(each.bytes > 0 for each in report.collectives)
    over_experts = {each.kind: each for each in report.across_expert}
    assert over_experts["all-to-all"] == kinds["all-to-all"]
    assert sum(each.bytes for each in report.across_expert) < sum(each.bytes for each in report.collectives)
    built = build(config())
    cost = train_cost(built.model, built.task, built.source.spec, 1)
    assert report.flops_per_device == 16 * cost.flops // 8


def test_the_state_is_what_the_devices_hold(report) -> None:
    alone = compile_report(config(), "", "here", mesh={"data": 8})
    built = build(config())
    whole = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(built.abstract_state)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
    )
    assert alone.state_bytes == whole > report.state_bytes
    assert alone.across_expert is None


def test_the_file_has_what_the_documentation_promises(report) -> None:
    said = json.loads(json.dumps(report.to_json()))
    assert {
        "config", "topology", "devices", "fits", "bytes_per_device", "hbm_bytes", "flops_per_device", "collectives",
        "step_seconds_bound", "bound", "compile_seconds",
    } <= set(said)  # fmt: skip
    assert all(set(each) == {"kind", "count", "bytes"} for each in said["collectives"])


@pytest.mark.parametrize(("memory", "fits"), [(1e9, True), (1e5, False)])
def test_on_a_chip_that_is_known(monkeypatch, memory: float, fits: bool) -> None:
    monkeypatch.setattr(module, "lookup", lambda kind: dataclasses.replace(CHIP, hbm_bytes=memory))
    found = compile_report(config(), "", "here", mesh={"data": 8})
    assert found.fits is fits and found.hbm_bytes == memory
    least = found.roofline
    assert least.seconds == max(least.compute_seconds, least.memory_seconds, least.collective_seconds)
    assert found.roofline.collective_seconds == sum(each.bytes for each in found.collectives) / 1e9 > 0
    if fits:
        assert found.batch_that_fits > 16 and found.batch_that_fits % 8 == 0 and found.verdict == "it fits"
    else:
        assert found.batch_that_fits < 16 and "does NOT fit" in found.verdict


def test_the_command(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(module, "lookup", lambda kind: dataclasses.replace(CHIP, hbm_bytes=1e5))
    file = tmp_path / "said.json"
    words = ["compile", f"--config={ROOT}/configs/quickstart.py", "--topology=here", "--mesh=data=8"]
    words += ["--config.model.size=nano/4", "--config.batch_size=8", f"--json={file}"]
    assert cli.main(words) == 3
    assert "does NOT fit" in capsys.readouterr().out
    assert json.loads(file.read_text())["fits"] is False
    assert cli.main([*words[:3], "--mesh=data8"]) == 2
    assert "expected devices per axis" in capsys.readouterr().err


def test_data_need_not_be_here(monkeypatch, tmp_path) -> None:
    """Text with a tokenizer that is to be trained, and a set of TFDS that is not prepared."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    from tokenlab.data.outline import outline

    text = outline(load(f"{ROOT}/configs/encoder_lm.py:base").data)
    assert text.vocab_size == 30_522 and text.spec["ids"][0] == (512,)
    pictures = outline(load(f"{ROOT}/configs/skipvit.py:S/16").data)
    assert pictures.spec["image"] == ((224, 224, 3), "float32") and pictures.num_classes == 1000
    unknown = load(f"{ROOT}/configs/skipvit.py:S/16").data
    unknown.dataset = "nobody_made_this"
    with pytest.raises(Exception, match="nobody_made_this"):
        outline(unknown)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Ran out of memory in memory space hbm. Used 20.31G of 15.75G hbm. Exceeded", int(20.31 * 2**30)),
        ("RESOURCE_EXHAUSTED: Used 512.5M of 100M hbm", int(512.5 * 2**20)),
        ("INTERNAL: something else", None),
    ],
)
def test_what_a_compiler_says_of_too_much(message: str, expected: int | None) -> None:
    assert used_bytes(message) == expected


def _hold(folder: str, seconds: float) -> None:
    os.environ["XDG_CACHE_HOME"] = folder
    with one_at_a_time():
        (Path(folder) / "held").touch()
        time.sleep(seconds)


def test_one_process_compiles_at_a_time(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = multiprocessing.get_context("spawn").Process(target=_hold, args=(str(tmp_path), 1.0))
    other.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.02)
    start = time.monotonic()
    with one_at_a_time():
        assert time.monotonic() - start > 0.1
    other.join()
    assert f"waiting for process {other.pid}" in capsys.readouterr().out
    with one_at_a_time():  # a lock that nobody holds is taken at once, whatever stands in it
        pass
