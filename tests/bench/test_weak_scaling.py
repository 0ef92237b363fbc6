"""Weak scaling on paper: the page shows the record, and the record what the formulas say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tokenlab.bench import page, pods, weak_scaling
from tokenlab.core import config as configs
from tokenlab.core.errors import DataError, TokenLabError
from tokenlab.cost import Roofline, lookup
from tokenlab.train.config import TrainConfig
from tokenlab.train.scaling import Scaling

ROOT = Path(__file__).resolve().parents[2]
RECORD = weak_scaling.read(ROOT / weak_scaling.RECORD)


def test_the_page_shows_the_record(capsys) -> None:
    assert weak_scaling.main(["--check"], ROOT) == 0, capsys.readouterr().err
    assert (ROOT / weak_scaling.PICTURE).is_file()


def test_the_record_has_every_mesh_of_every_model() -> None:
    for family in weak_scaling.FAMILIES:
        own = [row for row in RECORD["rows"] if row["title"] == family.title]
        assert [row["mesh"] for row in own] == [
            family.mesh(chips, most) for most in family.most for chips in weak_scaling.CHIPS
        ]
        assert [row["slices"] for row in own[:5]] == [family.slices(chips) for chips in weak_scaling.CHIPS]
    assert {row["slices"] for row in RECORD["rows"]} == {1, 4, 16}


@pytest.mark.parametrize("family", weak_scaling.FAMILIES, ids=lambda family: family.chip + family.axis)
def test_the_record_is_what_the_formulas_say(family) -> None:
    config = configs.to_dataclass(TrainConfig, configs.load(ROOT / family.config))
    found, chip = Scaling(config, family.outputs), lookup(family.chip)
    for row in (row for row in RECORD["rows"] if row["title"] == family.title):
        sent = found.sent(row["mesh"], family.each * row["chips"], row["slices"])
        assert (sent.parameters, sent.far) == (row["gathered_bytes"], row["far_bytes"])
        assert sent.experts + sent.tensor + sent.sequence == row["exchanged_bytes"]
        assert sent.gradients == row["summed_bytes"]
        assert row["near_seconds"] == pytest.approx(sent.near / chip.link_bandwidth)
        assert row["far_seconds"] == pytest.approx(sent.far / chip.far_bandwidth)
        least = Roofline(*(row[f"{name}_seconds"] for name in ("compute", "memory", "near", "far")))
        assert (least.seconds, least.in_turn, least.bound) == (
            row["overlapped_seconds"],
            row["in_turn_seconds"],
            row["bound"],
        )


def test_the_formulas_are_near_what_is_compiled() -> None:
    """They are what the algorithm asks for; the compiler may send up to 2.5 times as much."""
    known = pods.read(ROOT / pods.RECORD)["pods"]
    assert {each["title"] for each in RECORD["held"]} >= {
        pods.PODS[name].title for name in weak_scaling.HELD if name in known
    }
    for each in RECORD["held"]:
        assert 0.4 < each["formula_bytes"] / each["compiled_bytes"] < 1.1, each["title"]


def test_what_is_no_record(tmp_path) -> None:
    file = tmp_path / "record.json"
    for text, message in (("{", "cannot read"), ("[]", "no record")):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            weak_scaling.read(file)


def test_what_was_compiled_stays_when_the_next_one_fails(tmp_path, monkeypatch) -> None:
    """And what the pods' record says anew is taken in place of what it said before."""
    wanted = [pod for family in weak_scaling.FAMILIES for pod in family.pods()]
    names = [" ".join(pod.command) for pod in wanted]

    def compiled(pod: pods.Pod) -> dict:
        if pod != wanted[0]:
            raise TokenLabError("stopped")
        return {"collectives": ["new"]}

    monkeypatch.setattr(weak_scaling, "rows", lambda family: [])
    monkeypatch.setattr(weak_scaling, "compiled", compiled)
    monkeypatch.setattr(
        weak_scaling,
        "held",
        lambda pod, said: {"command": " ".join(pod.command), "compiled": said["collectives"]},
    )
    known = {name: " ".join(pods.PODS[name].command) for name in weak_scaling.HELD}
    reports = {name: {"command": command, "collectives": ["again"]} for name, command in known.items()}
    (tmp_path / pods.RECORD).parent.mkdir(parents=True)
    (tmp_path / pods.RECORD).write_text(json.dumps({"format": page.FORMAT, "pods": reports}))
    before = [
        {"command": known["vit"], "compiled": ["old"]},
        {"command": names[-1], "compiled": ["last"]},
    ]
    with pytest.raises(TokenLabError, match="stopped"):
        weak_scaling._made({"format": page.FORMAT, "rows": [], "held": before}, tmp_path, compiling=True)
    kept = {
        each["command"]: each["compiled"]
        for each in weak_scaling.read(tmp_path / weak_scaling.RECORD)["held"]
    }
    assert kept == dict.fromkeys(known.values(), ["again"]) | {names[0]: ["new"], names[-1]: ["last"]}
