"""Runs whose workdir is in a bucket: what is written when, who may write, and what a run that goes on finds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gcs import FakeGcs, standing_in
from tokenlab.core import lease
from tokenlab.core.bucket import Bucket
from tokenlab.core.errors import ConfigError, StorageError
from tokenlab.core.lease import Lease
from tokenlab.train import mirror as mirrors
from tokenlab.train.mirror import Mirror, here
from tokenlab.train.records import Workdir, read_metrics

pytest.importorskip("google.cloud.storage", reason="needs google-cloud-storage (the extra gcs)")

ADDRESS = "gs://bucket/run"
CONFIG = {"seed": 0, "steps": 100}


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    with standing_in(monkeypatch, patience=1.0) as server:
        monkeypatch.setattr(lease, "BEAT", 0.05)
        monkeypatch.setattr(lease, "STALE", 0.5)
        yield server


def record(step: int) -> dict[str, Any]:
    return {"step": step, "split": "train", "loss": 1.0 / step}


def steps(gcs: FakeGcs, name: str = "run/metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in gcs.objects[name].data.splitlines()]


def foreign(gcs: FakeGcs, **more: Any) -> None:
    """A lock of another machine."""
    gcs.put("run/.lock", json.dumps({"process": 7, "host": "other", "machine": "x", **more}).encode())


# ------------------------------------------------------------------------------------------------ the lock


def test_one_at_a_time(gcs: FakeGcs) -> None:
    first, second = (Lease(Bucket(ADDRESS), tell=lambda line: None) for _ in range(2))
    assert first.take() is None
    with pytest.raises(ConfigError, match=rf"gs://bucket/run is in use by process {os.getpid()} on "):
        second.take()
    first.check()
    first.release()
    assert "run/.lock" not in gcs.objects
    assert second.take() is None
    second.release()


def test_one_that_shows_no_life_is_replaced_after_a_while(gcs: FakeGcs) -> None:
    foreign(gcs)
    told: list[str] = []
    found = Lease(Bucket(ADDRESS), tell=told.append)
    begun = time.monotonic()
    note = found.take()
    assert time.monotonic() - begun >= 0.5
    assert told == [f"{ADDRESS} is in use by process 7 on other: looking up to 0.5 s whether it lives"]
    assert note is not None and note.startswith(
        "process 7 on other is gone without giving gs://bucket/run free"
    )
    found.release()


def test_one_of_this_machine_that_is_gone_is_replaced_at_once(
    gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE", 600.0)
    gone = subprocess.Popen(["true"])
    gone.wait()
    foreign(gcs, process=gone.pid, host=socket.gethostname(), machine=lease._machine())
    found = Lease(Bucket(ADDRESS))
    assert "is gone" in (found.take() or "")
    found.release()


def test_of_two_that_want_it_one_gets_it(gcs: FakeGcs) -> None:
    foreign(gcs)
    wanting = [Lease(Bucket(ADDRESS), tell=lambda line: None) for _ in range(4)]
    got: list[Lease] = []

    def take(each: Lease) -> None:
        try:
            each.take()
            got.append(each)
        except ConfigError:
            pass

    threads = [threading.Thread(target=take, args=(each,)) for each in wanting]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].release()


def test_who_was_replaced_finds_out_and_touches_nothing(gcs: FakeGcs) -> None:
    with Mirror(ADDRESS) as place, Workdir(place, CONFIG) as workdir:
        workdir.begin_run({}, 0)
        workdir.rewind(0)
        workdir.record(record(1))
        workdir.secure()
        foreign(gcs, token="other")
        with pytest.raises(StorageError, match="gs://bucket/run was taken over by process 7 on other"):
            workdir.secure()
        with pytest.raises(StorageError, match="was taken over"):
            workdir.record(record(2))
        before = dict(gcs.objects)
        with pytest.raises(StorageError, match="was taken over") as error:
            workdir.close()
        kept = Path(str(error.value).rpartition(" is in ")[2].rstrip("."))
        assert len(read_metrics(kept)) == 1  # the record that was refused is not there
    assert gcs.objects == before and kept.is_dir()


def test_one_that_slept_writes_nothing_over_what_the_next_one_wrote(gcs: FakeGcs) -> None:
    with Mirror(ADDRESS) as place, Workdir(place, CONFIG) as workdir:
        workdir.begin_run({}, 0)
        workdir.rewind(0)
        workdir.record(record(1))
        place._lease._stop.set()  # asleep: it does not look at its lock
        place._lease._thread.join()
        workdir.record(record(2))
        foreign(gcs, token="other")
        theirs = gcs.put("run/metrics.jsonl", b'{"step": 9}\n')
        with pytest.raises(StorageError, match="was taken over"):
            workdir.secure()
        assert gcs.objects["run/metrics.jsonl"] is theirs
        with pytest.raises(StorageError, match="was taken over"):
            workdir.close()
    assert gcs.objects["run/metrics.jsonl"].data == b'{"step": 9}\n'


def test_one_that_is_given_free_meanwhile_is_taken_without_a_note(gcs: FakeGcs) -> None:
    foreign(gcs)
    found = Lease(Bucket(ADDRESS), tell=lambda line: gcs.objects.pop("run/.lock"))
    assert found.take() is None
    found.release()


def test_an_answer_that_is_lost_is_no_loss_of_the_lock(gcs: FakeGcs) -> None:
    found = Lease(Bucket(ADDRESS))
    foreign(gcs, token=found._token)  # the answer to the first write did not come
    assert found.take() is None
    found._generation = 1  # as if the answer to the last write had not come
    found.check()
    found.release()
    assert "run/.lock" not in gcs.objects


# ----------------------------------------------------------------------------------------------- the files


def test_a_workdir_in_a_bucket_is_one_as_any_other(gcs: FakeGcs) -> None:
    with Mirror(ADDRESS) as place, Workdir(place, CONFIG) as workdir:
        assert json.loads(gcs.objects["run/config.json"].data) == CONFIG  # for the others to see, at once
        assert str(workdir.checkpoints) == "gs://bucket/run/checkpoints"
        other = Workdir(place, {"seed": 1, "steps": 100}, primary=False)
        with pytest.raises(ConfigError, match="another configuration than process 0: seed"):
            other.check_shared()
        workdir.begin_run({"stack": "block"}, 0)
        assert workdir.rewind(0) == []
        for step in (1, 2, 3):
            workdir.record(record(step))
        workdir.secure()
        assert steps(gcs) == [1, 2, 3]
        workdir.record(record(4))
        (workdir.path / "samples").mkdir()
        (workdir.path / "samples" / "4.png").write_bytes(b"picture")
    assert not workdir.path.exists()
    assert steps(gcs) == [1, 2, 3, 4] and gcs.objects["run/samples/4.png"].data == b"picture"
    assert "run/.lock" not in gcs.objects and any("run/tensorboard/events." in name for name in gcs.objects)

    with pytest.raises(ConfigError, match="gs://bucket/run belongs to a run of another configuration: seed"):
        Workdir(Mirror(ADDRESS), {"seed": 2, "steps": 100}).__enter__()
    with Mirror(ADDRESS) as place, Workdir(place, CONFIG) as workdir:  # as on another machine
        workdir.begin_run({}, 2)
        assert workdir.rewind(2) == ["moved 2 records past step 2 to metrics.aside-1.jsonl"]
        assert workdir._purge_step == 3
        workdir.record(record(3))
    assert steps(gcs) == [1, 2, 3] and steps(gcs, "run/metrics.aside-1.jsonl") == [3, 4]
    assert json.loads(gcs.objects["run/run.json"].data)["history"][0]["stack"] == "block"
    assert not [name for name in gcs.objects if "pending" in name or "checkpoints" in name]


def test_what_a_killed_process_leaves_is_read_and_rewound(gcs: FakeGcs) -> None:
    place = Mirror(ADDRESS)
    workdir = Workdir(place, CONFIG).__enter__()
    workdir.begin_run({}, 0)
    workdir.rewind(0)
    for step in range(1, 9):
        workdir.record(record(step))
        if step == 5:
            workdir.secure()  # with a checkpoint
    place._lease._stop.set()  # kill -9: no record after the last writing is in the bucket, and the lock is
    place._stop.set()
    workdir._metrics.close(), workdir._events.close()
    assert "run/.lock" in gcs.objects
    with Mirror(ADDRESS) as anew, Workdir(anew, CONFIG) as again:
        assert any("is gone without giving" in note for note in again.notes)
        assert again.rewind(5) == []
        assert [each["step"] for each in read_metrics(again.path)] == [1, 2, 3, 4, 5]


def test_only_what_changed_is_written_and_what_is_gone_is_removed(gcs: FakeGcs) -> None:
    with Mirror(ADDRESS) as place:
        (place.path / "a.json").write_text("1")
        (place.path / "b.json").write_text("1")
        place.push()
        before = {name: item.generation for name, item in gcs.objects.items()}
        (place.path / "a.json").write_text("22")
        place.push()
        after = {name: item.generation for name, item in gcs.objects.items()}
        assert after.keys() == before.keys() == {"run/a.json", "run/b.json"}
        assert [name for name in after if after[name] != before[name]] == ["run/a.json"]
        (place.path / "b.json").rename(place.path / "c.json")
        place.push()
        assert gcs.names() == ["run/a.json", "run/c.json"]


def test_a_line_that_is_being_written_waits_for_its_end(gcs: FakeGcs) -> None:
    with Mirror(ADDRESS) as place:
        (place.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')
        place.push()
    assert gcs.objects["run/metrics.jsonl"].data == b'{"step": 1}\n'


def test_it_is_written_every_while(gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "EVERY", 0.05)
    with Mirror(ADDRESS) as place, Workdir(place, CONFIG) as workdir:
        workdir.begin_run({}, 0)
        workdir.rewind(0)
        gcs.faults = [lambda request: 403 if "metrics" in request.name else None]
        workdir.record(record(1))
        time.sleep(0.3)
        assert "run/metrics.jsonl" not in gcs.objects
        gcs.faults = []
        deadline = time.monotonic() + 20
        while "run/metrics.jsonl" not in gcs.objects and time.monotonic() < deadline:
            time.sleep(0.02)
        assert steps(gcs) == [1]


def test_what_cannot_be_written_at_the_end_is_kept_and_named(gcs: FakeGcs) -> None:
    with pytest.raises(StorageError, match="access is denied") as error:
        with Mirror(ADDRESS) as place, Workdir(place, CONFIG) as workdir:
            workdir.rewind(0)
            workdir.record(record(1))
            gcs.faults = [lambda request: 403 if "metrics" in request.name else None]
    kept = Path(str(error.value).rpartition(" is in ")[2].rstrip("."))
    assert len(read_metrics(kept)) == 1
    with pytest.raises(KeyError) as other:
        gcs.faults = []
        with Mirror(ADDRESS) as place, Workdir(place, CONFIG) as workdir:
            workdir.rewind(0)
            workdir.record(record(2))
            gcs.faults = [lambda request: 403 if "metrics" in request.name else None]
            raise KeyError("the loop's own")
    assert ["access is denied" in note for note in other.value.__notes__] == [True]


def test_checkpoints_without_a_configuration_belong_to_nobody_known(gcs: FakeGcs) -> None:
    gcs.put("run/checkpoints/5/meta.json", b"{}")
    with (
        Mirror(ADDRESS) as place,
        pytest.raises(ConfigError, match="gs://bucket/run holds checkpoints but no config"),
    ):
        Workdir(place, CONFIG).__enter__()
    assert gcs.names() == ["run/checkpoints/5/meta.json"]


def test_here_reads_and_adds_pictures(gcs: FakeGcs, tmp_path: Path) -> None:
    with here(tmp_path) as folder:
        assert folder == tmp_path
    with pytest.raises(ConfigError, match="gs://bucket/run holds no config.json"), here(ADDRESS):
        pass
    gcs.put("run/config.json", b"{}")
    gcs.put("run/tensorboard/events.1", b"large")
    with here(f"{ADDRESS}/checkpoints/", push=True) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [".bucket", "config.json"]
        (folder / "report.png").write_bytes(b"picture")
    assert not folder.exists()
    assert gcs.names() == ["run/config.json", "run/report.png", "run/tensorboard/events.1"]
