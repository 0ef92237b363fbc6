"""Records: what was counted beside what was timed."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from tests.bench.conftest import ROWS
from tokenlab.bench import measure as measures
from tokenlab.bench.measure import Case, measure
from tokenlab.core.errors import ConfigError
from tokenlab.cost import Peaks

DENSE, KEEP = Case.of("dense", "block*2"), Case.of("keep", "block + keep(0.5) + block")
SECONDS = {"dense": [1.0, 1.0, 3.0], "keep": [0.8, 0.8, 2.4]}
PEAKS = [Peaks("test chip", 1e6, 4e6), Peaks("test chip", 2e6, 3e6)]


def times_of(seconds: dict, slower: str = ""):
    """Stands in for the timing: these times, and twice as many in the way that is slower."""

    def interleaved(runs, rounds):
        return {
            (name, how): [(2 if how == slower else 1) * each for each in seconds[name]] for name, how in runs
        }

    return interleaved


@pytest.fixture(scope="module")
def records(setting):
    """Of both modes, with times and peaks that are known."""
    peaks = iter(PEAKS * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures.timing, "interleaved", times_of(SECONDS))
        return measure(
            setting,
            DENSE,
            [KEEP],
            modes=("train", "inference"),
            rounds=3,
            measured_peaks=lambda dtype: next(peaks),
        )


def test_one_record_an_arm_and_mode(records) -> None:
    assert [(r["mode"], r["name"]) for r in records] == [
        ("train", "dense"),
        ("train", "keep"),
        ("inference", "dense"),
        ("inference", "keep"),
    ]
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_ratios(records) -> None:
    for dense, keep in (records[:2], records[2:]):
        assert dense["flops_ratio"] == dense["time_ratio"] == 1 and dense["realised"] is None
        assert keep["flops_ratio"] == keep["flops"] / dense["flops"] < 0.9
        assert keep["time_ratio"] == pytest.approx(0.8)
        assert keep["realised"] == pytest.approx(0.2 / (1 - keep["flops_ratio"]))
        assert keep["realised_low"] == pytest.approx(keep["realised_high"])  # each round says the same
        assert keep["baseline"] == dense["name"] == "dense"


def test_rates(records) -> None:
    for record in records:
        assert record["step_seconds"] == SECONDS[record["name"]][0]  # the median, not the mean
        low, high = record["step_seconds_quartiles"]
        assert low == record["step_seconds"] < high
        assert record["tokens_per_second"] == pytest.approx(ROWS * 17 / record["step_seconds"])
        assert record["flops_per_second"] == pytest.approx(record["flops"] / record["step_seconds"])
        assert record["mfu"] == pytest.approx(record["flops_per_second"] / 2e6)  # the better of the two peaks
        assert record["mfu_datasheet"] is None
        assert record["peak_bytes_per_second"] == 4e6
        assert record["roofline_seconds"] >= record["flops"] / 2e6
        assert record["roofline_bound"] in ("compute", "memory")
        assert record["batch_size"] == ROWS and record["rounds"] == 3
        assert record["peak_bytes"] > 0 and record["devices"] == 1


def test_what_it_ran_on(records) -> None:
    import jax

    for record in records:
        assert record["versions"]["jax"] == jax.__version__
        assert record["platform"] == "cpu"
        assert record["device"] and record["huge_pages"] in (True, False) and record["cores"] >= 1


def test_the_share_of_a_datasheet(monkeypatch) -> None:
    class Device:
        device_kind = "TPU v5 lite"

    monkeypatch.setattr(measures.jax, "devices", lambda: [Device()])
    assert measures._of_datasheet(19.7e12, "bfloat16") == pytest.approx(0.1)
    assert measures._device() == "TPU v5 lite"


@pytest.mark.parametrize("slower", ["scan", "unroll"])
def test_the_faster_way_counts_for_the_dense_one_too(setting, slower, monkeypatch) -> None:
    both = dataclasses.replace(setting, model={"size": "nano/2"})
    monkeypatch.setattr(measures.timing, "interleaved", times_of(SECONDS, slower))
    cases = Case.of("dense", "block*4"), [Case.of("keep", "block*2 + keep(0.5) + block*2")]
    found = measure(both, *cases, modes=("inference",), rounds=3, measured_peaks=lambda dtype: PEAKS[0])
    assert {record["execution"] for record in found} == {"scan", "unroll"} - {slower}
    assert [record["step_seconds"] for record in found] == [1.0, 0.8]


def test_really_timed(setting, tmp_path) -> None:
    """Without stand-ins: times are positive and consistent; notes tell what goes on; each arm is profiled."""
    notes: list[str] = []
    found = measure(
        setting,
        DENSE,
        [KEEP],
        modes=("inference",),
        rounds=3,
        note=notes.append,
        profiles=tmp_path,
        measured_peaks=lambda dtype: PEAKS[0],
    )
    for record in found:
        assert 0 < record["step_seconds"] < math.inf and 0 < record["time_ratio"] < math.inf
    assert found[1]["realised_low"] <= found[1]["realised"] <= found[1]["realised_high"]
    assert "timing 2 stacks, 2 programs, in 3 rounds" in "\n".join(notes)
    for name in ("inference_dense", "inference_keep"):
        assert "ms a step" in (tmp_path / name / "summary.txt").read_text()
        assert list((tmp_path / name).glob("plugins/profile/*/perfetto_trace.json.gz"))


def test_names_must_differ_and_processes_be_one(setting, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="two stacks are named 'dense'"):
        measure(setting, DENSE, [Case.of("dense", "block")], modes=("train",), rounds=1)
    monkeypatch.setattr(measures.jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="expected one process, got 2"):
        measure(setting, DENSE, [KEEP], modes=("train",), rounds=1)
