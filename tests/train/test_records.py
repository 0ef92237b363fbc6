"""The workdir: whose it is, one process at a time, atomic files, and records that are never lost or doubled."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections.config_dict import ConfigDict
from tensorboardX.proto import event_pb2

from tokenlab.core.errors import ConfigError, DataError, TokenLabError
from tokenlab.train import metrics_file, records
from tokenlab.train.config import default_config
from tokenlab.train.records import Workdir, read_config, read_metrics, read_run

CONFIG = {
    "seed": 0,
    "steps": 100,
    "log_every": 10,
    "model": {"stack": "block*2", "width": 32},
    "optimizer": {"learning_rate": 1e-3, "steps": 5},
}


def changed(**values: Any) -> ConfigDict:
    config = ConfigDict(CONFIG)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config


def tree_of_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def record(step: int, split: str = "train", **values: Any) -> dict[str, Any]:
    return {"step": step, "split": split, "loss": 1 / (step + 1), **values}


def write(path: Path, steps: range, restored: int = 0) -> None:
    """One session: goes on from `restored` and writes a record at each of `steps`."""
    with Workdir(path, CONFIG) as workdir:
        workdir.rewind(restored)
        for step in steps:
            workdir.record(record(step))


# ----------------------------------------------------------------------------------------------- whose it is


def test_a_new_folder_is_made_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    with Workdir(path, ConfigDict(CONFIG)) as workdir:
        assert (workdir.path, workdir.checkpoints, workdir.notes) == (path, path / "checkpoints", [])
    assert read_config(path).to_dict() == CONFIG
    with Workdir(path, CONFIG) as workdir:
        assert workdir.notes == []


def test_what_may_change_is_changed_and_told(tmp_path: Path) -> None:
    with Workdir(tmp_path, CONFIG):
        pass
    with Workdir(tmp_path, changed(steps=200, log_every=5)) as workdir:
        (note,) = workdir.notes
    assert note.endswith("log_every: 10 -> 5; steps: 100 -> 200")
    assert read_config(tmp_path).steps == 200


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"seed": 1}, ["seed: 0 -> 1"]),
        ({"steps": 5, "model__width": 64, "model__stack": "block*3"}, ["model.width: 32 -> 64", "'block*3'"]),
        ({"optimizer__steps": 6}, ["optimizer.steps: 5 -> 6"]),  # a key of that name elsewhere is not the one
    ],
)
def test_another_configuration_is_refused_and_nothing_touched(
    tmp_path: Path, values: dict[str, Any], named: list[str]
) -> None:
    write(tmp_path, range(3))
    before = tree_of_files(tmp_path)
    with pytest.raises(ConfigError, match="belongs to a run of another configuration") as error:
        Workdir(tmp_path, changed(**values)).__enter__()
    assert all(text in str(error.value) for text in named)
    assert "\n" not in str(error.value) and "give another workdir" in str(error.value)
    assert tree_of_files(tmp_path) == before
    with Workdir(tmp_path, CONFIG):  # and it is not left locked
        pass


def test_keys_that_came_later_have_their_defaults_in_a_run_from_before(tmp_path: Path) -> None:
    config = default_config()
    with Workdir(tmp_path, config):
        pass
    before = json.loads((tmp_path / "config.json").read_text())
    del before["model"]["registers"], before["data"]["prefetch"], before["optimizer"]["accumulate"]
    del before["optimizer"]["schedule"]["clock"], before["init_from"], before["sample_every"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    with Workdir(tmp_path, config) as workdir:
        assert workdir.notes == []
    config.model.registers = 1
    with pytest.raises(ConfigError, match=r"another configuration: model.registers: 0 -> 1;"):
        Workdir(tmp_path, config).__enter__()


def test_folders_that_are_no_workdir(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workdir is gs://bucket/run: expected a folder, or the mirror"):
        Workdir("gs://bucket/run", CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use .*file as workdir: "):
        Workdir(tmp_path / "file", CONFIG).__enter__()
    with pytest.raises(
        ConfigError, match="cannot use .*below as workdir: Not a directory; expected a folder"
    ):
        Workdir(tmp_path / "file" / "below", CONFIG).__enter__()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds metrics.jsonl but no config.json"):
        Workdir(tmp_path / "foreign", CONFIG).__enter__()
    assert list(tree_of_files(tmp_path)) == ["file", "foreign/metrics.jsonl"]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"damaged/config.json: "):
        Workdir(tmp_path / "damaged", CONFIG).__enter__()
    with pytest.raises(ConfigError, match="expected the workdir of a run"):
        read_config(tmp_path / "nowhere")


def test_a_workdir_that_has_become_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Workdir(tmp_path, CONFIG):
        pass

    def refuse(*args: Any, **options: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)  # as root no permission stands in the way
    with pytest.raises(
        ConfigError, match=r"as workdir: Read-only file system; expected a folder that can be"
    ):
        Workdir(tmp_path, CONFIG).__enter__()


def test_processes_that_are_not_the_first_write_nothing(tmp_path: Path) -> None:
    with Workdir(tmp_path / "a", CONFIG, primary=False) as workdir:
        assert workdir.begin_run({"parameters": 1}, 0) == []
        workdir.update_run({"more": 1})
        assert workdir.rewind(0) == []
        workdir.record(record(1))
    assert not (tmp_path / "a").exists()


def test_other_processes_see_the_same_folder_and_configuration(tmp_path: Path) -> None:
    other = Workdir(tmp_path / "a", CONFIG, primary=False)
    with pytest.raises(ConfigError, match=r"process 0 on .* does not see .*config.json.*all hosts share"):
        other.check_shared(patience=0.0)
    with Workdir(tmp_path / "a", CONFIG, primary=True) as first:
        first.check_shared()
        other.check_shared()
        stranger = Workdir(tmp_path / "a", changed(steps=5), primary=False)
        with pytest.raises(
            ConfigError, match="another configuration than process 0: steps: 100 -> 5; give all"
        ):
            stranger.check_shared()


def test_a_run_may_go_on_on_another_mesh(tmp_path: Path) -> None:
    with Workdir(tmp_path, changed(mesh={"data": -1, "fsdp": 2})):
        pass
    with Workdir(tmp_path, changed(mesh={"data": -1, "fsdp": 1})) as workdir:
        (note,) = workdir.notes
    assert note.endswith("mesh.fsdp: 2 -> 1")


# -------------------------------------------------------------------------------------------------- the lock

CHILD = """
import os, signal, sys
from tokenlab.train.records import Workdir
workdir = Workdir(sys.argv[1], {"seed": 0}).__enter__()
workdir.rewind(0)
workdir.record({"step": 1, "split": "train", "loss": 0.5})
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_and_free_again_after_kill_9(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as child:
        pid = int(child.stdout.readline())
        before = tree_of_files(tmp_path)
        with pytest.raises(
            ConfigError, match=rf"is in use by process {pid} on .*; wait for it, end it"
        ) as error:
            Workdir(tmp_path, {"seed": 0}).__enter__()
        assert "\n" not in str(error.value)
        assert tree_of_files(tmp_path) == before
        child.send_signal(signal.SIGKILL)
    assert read_metrics(tmp_path) == [{"step": 1, "split": "train", "loss": 0.5}]
    with Workdir(tmp_path, {"seed": 0}):
        with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()}"):
            Workdir(tmp_path, {"seed": 0}).__enter__()
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    with Workdir(tmp_path, {"seed": 0}):
        pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(records.fcntl, "flock", flock)
    with Workdir(tmp_path, CONFIG) as workdir:
        (note,) = workdir.notes
    assert "has no locks" in note


# -------------------------------------------------------------------------------------------------- run.json


def test_run_json_tells_environment_and_facts_and_keeps_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = records.environment()
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenlab"} < set(real)
    assert (real["devices"], real["processes"], real["platform"]) == (8, 1, "cpu")
    with Workdir(tmp_path, CONFIG) as workdir:
        assert workdir.begin_run({"parameters": 10, "cost": {"flops": 2**70}}, 0) == []
        workdir.update_run({"compile_seconds": 1.5})
    run = read_run(tmp_path)
    assert (run["parameters"], run["cost"], run["compile_seconds"]) == (10, {"flops": 2**70}, 1.5)
    assert (run["from_step"], run["environment"], run["history"]) == (0, real, [])

    with Workdir(tmp_path, CONFIG) as workdir:  # the same again: nothing to tell
        assert workdir.begin_run({"parameters": 10, "cost": {"flops": 2**70}}, 30) == []
    run = read_run(tmp_path)
    assert run["from_step"] == 30
    assert [set(session) for session in run["history"]] == [{"started", "from_step", "compile_seconds"}]

    monkeypatch.setattr(records, "environment", lambda: real | {"jax": "9.9", "devices": 4})
    with Workdir(tmp_path, CONFIG) as workdir:
        (note,) = workdir.begin_run({"parameters": 11, "cost": {"flops": 2**70}}, 40)
    assert (
        f"environment.devices: 8 -> 4; environment.jax: '{real['jax']}' -> '9.9'; parameters: 10 -> 11"
        in note
    )
    run = read_run(tmp_path)
    assert len(run["history"]) == 2
    assert (run["history"][1]["environment"], run["history"][1]["parameters"]) == (real, 10)
    assert "cost" not in run["history"][1]


def test_run_json_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with Workdir(tmp_path, CONFIG) as workdir:
        for text, message in (("{", "cannot read"), ("[1]", "holds a JSON list; expected an object")):
            (tmp_path / "run.json").write_text(text)
            with pytest.raises(DataError, match=message):
                workdir.begin_run({}, 0)
            assert (tmp_path / "run.json").read_text() == text
        with pytest.raises(RuntimeError, match="before Workdir.begin_run"):
            Workdir(tmp_path, CONFIG).update_run({})


def test_atomic_writes_keep_the_old_file_when_they_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(TokenLabError, match="expected finite JSON values"):
        records.write_json(path, {"a": math.nan})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics_file.os, "fsync", full)
    with pytest.raises(TokenLabError, match=r"cannot write .*a.json: No space left on device; expected"):
        records.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


# --------------------------------------------------------------------------------------------------- records


def test_records_are_strict_json_and_come_back_exactly(tmp_path: Path) -> None:
    given = [
        record(0, seconds=0.1 + 0.2, flops=2**70, note=None, done=True),
        record(
            1, "test", accuracy=np.float32(0.1), count=np.int64(3), nan=math.nan, up=math.inf, down=-math.inf
        ),
    ]
    with Workdir(tmp_path, CONFIG) as workdir:
        workdir.rewind(0)
        for item in given:
            workdir.record(item)
            assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == item["step"] + 1  # at once
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    strict = [json.loads(line, parse_constant=refuse) for line in lines]
    assert strict[1]["nan"] is None and strict[1]["nonfinite"] == {"nan": "nan", "up": "inf", "down": "-inf"}
    first, second = read_metrics(tmp_path)
    assert first == given[0]
    assert second["accuracy"] == float(np.float32(0.1)) and math.isnan(second["nan"])
    assert (second["up"], second["down"], second["count"]) == (math.inf, -math.inf, 3)
    assert "nonfinite" not in second


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"split": "train"}, "needs an integer 'step'"),
        ({"step": 1.0, "split": "train"}, "needs an integer 'step'"),
        ({"step": True, "split": "train"}, "needs an integer 'step'"),
        ({"step": 1}, "a text 'split'"),
        ({"step": 1, "split": "train", "x": object()}, "holds names and JSON values"),
        ({"step": 1, "split": "train", "x": {"y": math.nan}}, "holds names and JSON values"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with Workdir(tmp_path, CONFIG) as workdir:
        workdir.rewind(0)
        with pytest.raises(TokenLabError, match=message):
            workdir.record(bad)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    "bad", [b"{", b"[1]", b"3", b"", b'{"split": "train"}', b'{"step": "1"}', b"\xff\xfe"]
)
def test_a_corrupt_line_is_named_and_left_alone(tmp_path: Path, bad: bytes) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], bad, *lines[1:], b""]))
    before = tree_of_files(tmp_path)
    with pytest.raises(
        DataError, match=r"metrics.jsonl line 2 is not a record \(.*\): .*; remove the line"
    ) as error:
        read_metrics(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="line 2 is not a record"):
        metrics_file.rewind(tmp_path, 1)
    assert tree_of_files(tmp_path) == before


def test_no_file_of_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*metrics.jsonl: .*expected a file of records"):
        read_metrics(tmp_path)


def test_record_needs_a_rewind_first_and_room_on_the_disk(tmp_path: Path) -> None:
    with Workdir(tmp_path, CONFIG) as workdir:
        with pytest.raises(RuntimeError, match="before Workdir.rewind"):
            workdir.record(record(1))
        workdir.rewind(0)
        workdir._metrics._file.close()
        workdir._metrics._file = open("/dev/full", "ab", buffering=0)
        with pytest.raises(TokenLabError, match=r"cannot write .*metrics.jsonl: No space left on device"):
            workdir.record(record(1))


# ---------------------------------------------------------------------------------------------------- rewind


def test_rewind_moves_what_comes_after_the_step(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    with Workdir(tmp_path, CONFIG) as workdir:
        assert workdir.rewind(3) == ["moved 2 records past step 3 to metrics.aside-1.jsonl"]
        workdir.record(record(4, again=1))
    assert [(r["step"], r.get("again")) for r in read_metrics(tmp_path)] == [
        (1, None),
        (2, None),
        (3, None),
        (4, 1),
    ]
    assert read_metrics(tmp_path / "metrics.aside-1.jsonl") == [record(4), record(5)]


def test_rewind_that_moves_nothing_makes_no_file(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    with Workdir(tmp_path, CONFIG) as workdir:
        assert workdir.rewind(3) == []
    assert not list(tmp_path.glob("metrics.aside*"))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_repeated_rewinds_number_their_files(tmp_path: Path) -> None:
    for _ in range(3):
        write(tmp_path, range(1, 4), restored=0)
    assert sorted(path.name for path in tmp_path.glob("metrics.*")) == [
        "metrics.aside-1.jsonl",
        "metrics.aside-2.jsonl",
        "metrics.jsonl",
    ]
    every = [r["step"] for path in tmp_path.glob("metrics.*") for r in read_metrics(path)]
    assert Counter(every) == {1: 3, 2: 3, 3: 3}


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_torn_last_line_is_moved_too(tmp_path: Path, cut: int) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    torn = path.read_bytes().splitlines()[-1][:-cut]
    path.write_bytes(path.read_bytes() + torn)
    with pytest.raises(DataError, match="line 4 is not a record"):
        read_metrics(tmp_path)
    with Workdir(tmp_path, CONFIG) as workdir:
        assert workdir.rewind(3) == ["moved 1 records past step 3 to metrics.aside-1.jsonl"]
        workdir.record(record(4))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.aside-1.jsonl").read_bytes() == torn + b"\n"


class Killed(BaseException):
    """Stands for the end of the process: nothing of the code under test handles it."""


def lines_of(folder: Path, pattern: str) -> Counter[bytes]:
    return Counter(line for path in folder.glob(pattern) for line in path.read_bytes().splitlines())


KILLABLE = [(Path, "open"), (Path, "replace"), (Path, "rename"), (Path, "unlink"), (metrics_file.os, "fsync")]


def rewind_killed_at(point: int | None, folder: Path, step: int) -> bool:
    """Rewinds, killed at the call number `point` among those that touch the disk; whether it was."""
    calls = 0

    def killing(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls - 1 == point:
                raise Killed
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in KILLABLE:
            function = (
                getattr(owner, name) if name != "fsync" else lambda descriptor: None
            )  # slow, and idle here
            patch.setattr(owner, name, killing(function))
        try:
            metrics_file.rewind(folder, step)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "sp'])
def test_rewinds_killed_at_any_point_lose_and_double_nothing(tmp_path: Path, torn: bytes) -> None:
    content = b"".join(metrics_file.encode(record(step)) for step in range(1, 6)) + torn
    written = Counter(content.splitlines())
    kills = 0
    for first in range(100):
        for second in range(100):  # the rewind that cleans up after the first may be killed as well
            folder = tmp_path / f"{first}-{second}"
            folder.mkdir()
            (folder / "metrics.jsonl").write_bytes(content)
            killed = rewind_killed_at(first, folder, 3)
            kills += killed
            assert lines_of(folder, "metrics.jsonl") + lines_of(folder, "metrics.aside*") >= written
            killed_again = rewind_killed_at(second, folder, 3)
            assert lines_of(folder, "metrics.jsonl") + lines_of(folder, "metrics.aside*") >= written
            rewind_killed_at(None, folder, 3)
            assert [r["step"] for r in read_metrics(folder)] == [1, 2, 3]
            assert lines_of(folder, "metrics.jsonl") + lines_of(folder, "metrics.aside*") == written
            left = {path.name for path in folder.iterdir() if not path.name.endswith(".tmp")}
            assert left == {"metrics.jsonl", "metrics.aside-1.jsonl"}
            if not killed_again:
                break
        if not killed:
            break
    assert kills > 50


def test_a_rewind_killed_before_the_file_was_replaced_is_forgotten(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    (tmp_path / metrics_file.PENDING).write_bytes(metrics_file.encode(record(5)))
    with Workdir(tmp_path, CONFIG) as workdir:
        assert workdir.rewind(5) == []
    assert not list(tmp_path.glob("metrics.aside*"))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


# ----------------------------------------------------------------------------------------------- TensorBoard


def events(folder: Path) -> list[event_pb2.Event]:
    """Events of a folder in the order of its files, as TensorBoard reads them."""
    found = []
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            found.append(event_pb2.Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def test_tensorboard_shows_each_step_once_after_a_rewind(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    write(tmp_path, range(4, 8), restored=3)
    write(tmp_path, range(3, 5), restored=2)
    shown: list[tuple[str, int, float]] = []
    starts = []
    for event in events(tmp_path / "tensorboard"):
        if event.HasField("session_log"):
            assert event.session_log.status == event_pb2.SessionLog.START
            starts.append(event.step)
            shown = [point for point in shown if point[1] < event.step]
        shown += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    assert starts == [4, 3]
    assert [(tag, step) for tag, step, _ in shown] == [("train/loss", step) for step in (1, 2, 3, 4)]
    np.testing.assert_allclose(
        [value for _, _, value in shown], [1 / (step + 1) for step in (1, 2, 3, 4)], rtol=1e-6
    )
