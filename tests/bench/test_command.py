"""`tokenlab benchmark`, from the words to the table and the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.conftest import RECORDS
from tokenlab import cli
from tokenlab.bench import command
from tokenlab.bench import suite as suites
from tokenlab.bench.measure import setting_of
from tokenlab.bench.suite import Size
from tokenlab.bench.table import to_markdown

CONFIG = """
from tokenlab.train import default_config

def get_config():
    c = default_config()
    c.steps, c.batch_size = 8, 8
    c.model.size = "nano/2"
    c.model.execution = "unroll"
    c.model.stack = "block + keep(k, train_only=True) + block"
    c.stack_vars = {"k": "0:1.0, 5:0.5"}
    return c
"""


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """Stands in for the measurement; collects what it is asked for."""
    calls = []

    def measure(setting, dense, cases, **how):
        calls.append({"setting": setting, "dense": dense, "cases": cases, **how})
        return RECORDS if how["modes"] == ("train",) else []

    monkeypatch.setattr(command, "measure", measure)
    return calls


def run(capsys, *words) -> tuple[int, str, str]:
    status = cli.main(["benchmark", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_configuration_beside_its_dense_twin(config, asked, capsys, tmp_path) -> None:
    target = tmp_path / "b.json"
    words = [f"--config={config}", "--batch=16", "--rounds=4", "--mode=train", f"--json={target}"]
    assert run(capsys, *words, f"--profile={tmp_path / 'p'}")[0] == 0
    (call,) = asked
    assert (call["dense"].name, call["dense"].train) == ("dense", "block*2")
    (case,) = call["cases"]
    # As in the last step of training; at evaluation the item is not there.
    assert (case.name, case.train) == ("mine", "block + keep(0.5, train_only=True) + block")
    assert (
        "keep" in case.inference
        and call["setting"].build(case.inference, "inference", "scan").program.after == 17
    )
    assert call["setting"].batch_size == 16 and call["setting"].batch["image"].shape == (16, 8, 8, 1)
    assert (call["modes"], call["rounds"], call["profiles"]) == (("train",), 4, tmp_path / "p")
    assert json.loads(target.read_text()) == RECORDS


def test_the_dense_twin_of_a_masked_autoencoder_sees_every_patch(asked, capsys, tmp_path) -> None:
    path = tmp_path / "masked.py"
    path.write_text(
        "from tokenlab.train import default_config\n\n"
        "def get_config():\n"
        "    c = default_config(model='mae', task='mae')\n"
        "    c.model.size, c.batch_size = 'nano/2', 8\n"
        "    return c\n"
    )
    assert run(capsys, f"--config={path}", "--mode=train")[0] == 0
    (call,) = asked
    (case,) = call["cases"]
    settings = [setting_of(call["setting"], each) for each in (call["dense"], case)]
    dense, masked = (each.build("block*2", "train", "unroll") for each in settings)
    assert (dense.kept, masked.kept) == (16, 4) and settings[1] is call["setting"]


def test_a_suite(asked, capsys, monkeypatch) -> None:
    size = Size({"size": "nano/112"}, batch=2, rounds=7, inference_batch=3)
    monkeypatch.setattr(suites, "SIZES", {"cpu": size})
    status, _, err = run(capsys, "--suite=core")
    assert (status, err) == (0, "")
    found = [(call["modes"], call["setting"].batch_size, call["rounds"]) for call in asked]
    assert found == [(("train",), 2, 7), (("inference",), 3, 7)]
    assert asked[0]["dense"] == suites.DENSE and asked[1]["cases"] == suites.cases("core")[0]
    monkeypatch.setattr(suites, "cases", lambda suite: ([], ["quiet"]))
    words = ["--suite=core", "--rounds=3", "--mode=inference", "--batch=5"]
    assert "left out: quiet, which declares no BENCHMARK" in run(capsys, *words)[2]
    (call,) = asked[2:]
    assert (call["modes"], call["setting"].batch_size, call["rounds"]) == (("inference",), 5, 3)


def test_a_table_or_markdown(config, asked, capsys) -> None:
    assert "scanned" in run(capsys, f"--config={config}")[1]
    assert run(capsys, f"--config={config}", "--markdown")[1] == to_markdown(RECORDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "neither is given: expected --config=FILE or --suite=NAME"),
        (["--config=CONFIG", "--suite=core"], "both are given"),
        (["--suite=cor"], "Did you mean 'core'"),
        (["--suite=core", "--size=cqu"], "there is no size 'cqu'. Did you mean 'cpu'"),
        (["--config=CONFIG", "--size=cpu"], "--size is of a suite"),
        (["--config=CONFIG", "--mode=trian"], "expected one of train, inference, both. Did you mean 'train'"),
        (["--config=CONFIG", "--rounds=2"], "--rounds=2: expected a number of at least 3"),
        (["--config=CONFIG", "--rounds=x"], "--rounds=x: expected a whole number"),
        (["--config=CONFIG", "--batch=0"], "--batch=0: expected a number of at least 1"),
        (["--config=CONFIG", "--batch=9"], "expected a multiple of 8"),
        (["--config=CONFIG", "--json=/nowhere/b.json"], "cannot be written"),
        (["--config=CONFIG", "--config.model.stack=blok*2+keep(k)"], "Did you mean 'block'"),
        (["--suite=core", "--config.steps=3"], "give it with --config=FILE"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(words, message, config, asked, capsys) -> None:
    status, _, err = run(capsys, *[word.replace("CONFIG", str(config)) for word in words])
    assert status == 2 and message in err
    assert asked == []


def test_an_option_that_the_compiler_does_not_know_is_told_with_its_rule(config, capsys) -> None:
    rule = {"kind": "cpu", "set": {}, "xla": {"xla_no_such_option": 1}}
    rule |= {"step_seconds": 1.0, "basis": "estimated", "source": "nothing"}
    config.write_text(CONFIG.replace("    return c", f"    c.hardware = ({rule},)\n    return c"))
    status, out, err = run(capsys, f"--config={config}", "--mode=train")
    assert status == 2 and not out
    assert "config.hardware: xla of the rule for cpu: " in err and "xla_no_such_option" in err
