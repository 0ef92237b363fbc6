"""Models compiled for slices: the record says what it must, the page says what the record says, and a run goes on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from tokenlab.bench import page, pods
from tokenlab.core import config as configs
from tokenlab.core.errors import DataError, ShardingError, TokenLabError
from tokenlab.sharding.topology import pinned_libtpu

ROOT = Path(__file__).resolve().parents[2]
RECORD = pods.read(ROOT / pods.RECORD)
with_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (.ci/run does it)"
)


def test_the_page_shows_the_record(capsys) -> None:
    assert pods.main(["--check"], ROOT) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", RECORD["pods"])
def test_what_the_record_holds(name: str) -> None:
    """It fits, was compiled in time by the libtpu of its jax, and tokens go to experts and not experts to tokens."""
    pod, said = pods.PODS[name], RECORD["pods"][name]
    assert said["command"] == " ".join(pod.command)
    pods.check(pod, said)
    assert said["step"] == "train" and said["bytes_per_device"] < said["hbm_bytes"]
    # Seconds of processors: what it takes on a machine that does nothing else.
    assert said["compile_cpu_seconds"] < 360 and said["step_seconds_bound"] > 0
    if said["versions"]["jax"] == jax.__version__:
        assert said["versions"]["libtpu"].startswith(pinned_libtpu().rstrip("*"))
    assert said["batch_that_fits"] >= said["batch_size"]


@pytest.mark.parametrize("name", RECORD["pods"])
def test_rules_of_configurations_have_the_time_of_the_record(name: str) -> None:
    pod, said = pods.PODS[name], RECORD["pods"][name]
    for rule in configs.load(ROOT / pod.config).get("hardware", ()):
        assert rule["devices"] == said["devices"]
        assert rule["step_seconds"] == pytest.approx(said["step_seconds_bound"], rel=5e-3)


REPORT = {
    "fits": True,
    "bytes_per_device": 10,
    "devices": 16,
    "mesh": {"fsdp": 2, "data": 2, "expert": 4},
    "collectives": [{"kind": "all-reduce", "count": 3, "bytes": 3450}],
    "across_expert": [
        {"kind": "all-reduce", "count": 2, "bytes": 3000, "largest": 3000},
        {"kind": "all-to-all", "count": 4, "bytes": 10, "largest": 10},
        {"kind": "all-gather", "count": 1, "bytes": 8, "largest": 8},
    ],
}


def test_where_attention_shares_the_axes_of_experts_its_tokens_are_gathered_and_experts_are_not() -> None:
    sizes = {"expert": 100, "kernels": 8, "others": 50, "tokens": 100}
    pod = pods.Pod("a model", "configs/none.py", "v5e:4x4", "expert=4", **sizes)
    there = [each for each in REPORT["across_expert"] if each["kind"] != "all-gather"]
    gather = {"kind": "all-gather", "count": 1, "bytes": 599, "largest": 400}
    pods.check(pod, REPORT | {"across_expert": [*there, gather]})
    for wrong, message in (
        ({"largest": 401}, "counts and tokens"),
        ({"bytes": 600}, "kernels would be 1,200"),
    ):
        with pytest.raises(ShardingError, match=message):
            pods.check(pod, REPORT | {"across_expert": [*there, gather | wrong]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fits": False}, "does not fit"),
        ({"collectives": None, "across_expert": None}, "not known: expected the libtpu"),
        ({"collectives": None, "collectives_unknown": "a loop without end"}, "not known: a loop without end"),
        ({"across_expert": None}, "no axis of expert=4 has experts on it"),
        ({"across_expert": [REPORT["across_expert"][-1]]}, "no tokens are exchanged"),
        (
            {
                "across_expert": [
                    REPORT["across_expert"][1],
                    {"kind": "all-gather", "bytes": 200, "largest": 200},
                ]
            },
            "all-gather of 200",
        ),
        # Of 8 kernels of 100 over 4 x 2 devices each holds 100; with 50 others 2 x 300 bytes go around 4 of them.
        (
            {"collectives": [{"kind": "all-reduce", "bytes": 3451}]},
            "451 bytes .*100 weights .*50 others .*450 at",
        ),
    ],
)
def test_what_may_not_be_written(changes, message: str) -> None:
    pod = pods.Pod("a model", "configs/none.py", "v5e:4x4", "expert=4", expert=100, kernels=8, others=50)
    pods.check(pod, REPORT)
    with pytest.raises(ShardingError, match=message):
        pods.check(pod, REPORT | changes)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A page without a table, and a compiler that says of everything what the record says of ViT."""
    (tmp_path / "docs").mkdir()
    (tmp_path / pods.PAGE).write_text(f"# Scale\n\n{pods.BEGIN}\n{pods.END}\n\nbelow\n")
    asked: list[str] = []

    def compiled(pod: pods.Pod) -> dict:
        asked.append(pod.title)
        if pod.topology == "v5p:8x8x8":
            raise TokenLabError("stopped")
        sent = {name: REPORT[name] for name in ("collectives", "across_expert")} if pod.expert else {}
        return RECORD["pods"]["vit"] | {"command": " ".join(pod.command), **sent}

    monkeypatch.setattr(pods, "compiled", compiled)
    monkeypatch.setattr(pods, "asked", asked, raising=False)
    return tmp_path


def test_what_was_stopped_goes_on(checkout, capsys) -> None:
    assert pods.main([], checkout) == 2
    assert "stopped" in capsys.readouterr().err
    assert list(pods.read(checkout / pods.RECORD)["pods"]) == ["soft_moe", "vit", "jumbo", "mod"]
    pods.asked.clear()
    assert pods.main(["--only=grin"], checkout) == 0
    assert pods.asked == [pods.PODS["grin"].title]
    page = (checkout / pods.PAGE).read_text()
    assert page.count("\n| ") == 5 * 2 + 2 and "GRIN" in page and page.endswith("below\n")
    assert pods.main(["--check"], checkout) == 0
    (checkout / pods.PAGE).write_text(page.replace("GRIN", "GRAN"))
    assert pods.main(["--check"], checkout) == 1
    assert pods.main(["--only=vit", "--again"], checkout) == 0 and pods.asked[1:] == [pods.PODS["vit"].title]


def test_what_is_no_record(tmp_path) -> None:
    file = tmp_path / "record.json"
    for text, message in (
        ("{", "cannot read"),
        ("[]", "no record"),
        (json.dumps({"format": 2, "pods": {}}), "no record"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            pods.read(file)
    file.write_text("no marks")
    with pytest.raises(DataError, match="once each"):
        page.updated(file, "", pods.BEGIN, pods.END)
    with pytest.raises(DataError, match="root of a checkout"):
        page.updated(tmp_path / "none.md", "", pods.BEGIN, pods.END)


@pytest.mark.slow
@with_compiler
@pytest.mark.parametrize("name", pods.PODS)
def test_a_model_for_its_tpu_slice(name: str) -> None:
    """It fits, and tokens travel, today as when the record was made."""
    said = pods.compiled(pods.PODS[name])
    pods.check(pods.PODS[name], said)
    if name in RECORD["pods"]:
        assert said["bytes_per_device"] < 1.1 * RECORD["pods"][name]["bytes_per_device"]
