"""Checkpoints in a bucket: equal to those on a file system, whole or none, and what goes wrong is told."""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.fake_gcs import CUT, FakeGcs, Request, standing_in
from tests.train.test_checkpoint import META, abstract, content, make_state
from tokenlab.core import bucket as buckets
from tokenlab.core.bucket import EMULATOR, Bucket
from tokenlab.core.errors import CheckpointError, StorageError
from tokenlab.core.lease import TakenOver
from tokenlab.train import manifest
from tokenlab.train.checkpoint import Checkpoints, load_params

pytest.importorskip("google.cloud.storage", reason="needs google-cloud-storage (the extra gcs)")

ADDRESS = "gs://bucket/run/checkpoints"
PREFIX = "run/checkpoints/"
SMALL = {"w": jnp.arange(6.0)}
LIKE = {"w": jax.ShapeDtypeStruct((6,), jnp.float32)}


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    with standing_in(monkeypatch) as server:
        yield server


def saved(steps: dict[int, Any], **options: Any) -> None:
    with Checkpoints(ADDRESS, **{"keep": 9, **options}) as checkpoints:
        for step, metrics in steps.items():
            checkpoints.save(step, {"w": SMALL["w"] + step}, {"a": step}, metrics)


def refuse(status: int | str, part: str, method: str = "POST") -> Any:
    return lambda request: status if part in request.name and request.method == method else None


def test_it_is_what_a_file_system_holds_bit_for_bit(gcs: FakeGcs, tmp_path: Path) -> None:
    state = make_state(2.0)
    for where in (ADDRESS, tmp_path / "checkpoints"):
        with Checkpoints(where, keep=2) as checkpoints:
            checkpoints.save(30, make_state(1.0), META)
            checkpoints.save(40, state, META)
        with Checkpoints(where, keep=2) as checkpoints:
            restored, meta, step, notes = checkpoints.restore_latest(abstract(state))
            assert (content(restored), meta, step, notes) == (content(state), META, 40, [])
    names = {name.removeprefix(f"{PREFIX}40/") for name in gcs.names(f"{PREFIX}40/")}
    assert {"meta.json", "manifest.md5", "_METADATA", "manifest.ocdbt", "commit_success.txt"} < names
    params, meta = load_params("gs://bucket/run")
    assert content(params) == content(load_params(tmp_path)[0]) and meta == META | {"step": 40}
    assert content(load_params(ADDRESS, 30)[0]) == content(make_state(1.0).params)


def test_copied_from_a_bucket_it_is_whole_and_copied_to_one_too(gcs: FakeGcs, tmp_path: Path) -> None:
    saved({1: None})
    for name in gcs.names(f"{PREFIX}1/"):
        file = tmp_path / name.removeprefix("run/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gcs.objects[name].data)
    assert manifest.damage(tmp_path / "checkpoints" / "1") is None
    assert load_params(tmp_path, part="w")[0].tolist() == [1, 2, 3, 4, 5, 6]
    with Checkpoints(tmp_path / "checkpoints", keep=9) as checkpoints:
        checkpoints.save(2, SMALL, {}, wait=True)
    for file in (tmp_path / "checkpoints" / "2").rglob("*"):
        if file.is_file():
            gcs.put(f"{PREFIX}{file.relative_to(tmp_path / 'checkpoints')}", file.read_bytes())
    assert load_params("gs://bucket/run", 2, part="w")[0].tolist() == [0, 1, 2, 3, 4, 5]
    gcs.put(f"{PREFIX}2/manifest.ocdbt", b"other")
    with pytest.raises(CheckpointError, match=r"checkpoint 2 in gs:.* \(manifest.ocdbt is not as it was"):
        load_params("gs://bucket/run", 2, part="w")


def test_without_its_manifest_it_is_none_and_the_next_writer_removes_it(gcs: FakeGcs) -> None:
    saved({1: None, 2: None})
    del gcs.objects[f"{PREFIX}2/manifest.md5"]
    before = gcs.names()
    assert load_params("gs://bucket/run", part="w")[1]["step"] == 1
    with pytest.raises(CheckpointError, match="no checkpoint 2 in gs://bucket/run/checkpoints"):
        load_params("gs://bucket/run", 2, part="w")
    assert gcs.names() == before
    with Checkpoints(ADDRESS, keep=9) as checkpoints:
        assert (checkpoints.steps(), gcs.names(f"{PREFIX}2/")) == ([1], [])
        assert checkpoints.restore_latest(LIKE)[2] == 1


@pytest.mark.parametrize("md5", [True, False])
def test_a_damaged_one_is_moved_aside(gcs: FakeGcs, md5: bool) -> None:
    saved({1: None, 2: None})
    data = gcs.names(f"{PREFIX}2/d/")[0]
    gcs.put(data, gcs.objects[data].data[:-1] + b"?", md5=md5)
    damaged = {name.removeprefix(f"{PREFIX}2/"): gcs.objects[name].data for name in gcs.names(f"{PREFIX}2/")}
    with Checkpoints(ADDRESS, keep=9) as checkpoints:
        restored, _, step, notes = checkpoints.restore_latest(LIKE)
        assert (step, restored["w"].tolist()) == (1, [1, 2, 3, 4, 5, 6])
        assert len(notes) == 1 and "is not as it was written): moved to 2.damaged-1" in notes[0]
        assert checkpoints.steps() == [1]
        checkpoints.save(2, SMALL, {}, wait=True)
    kept = f"{PREFIX}2.damaged-1/"
    assert {name.removeprefix(kept): gcs.objects[name].data for name in gcs.names(kept)} == damaged


def test_keeps_the_newest_and_the_best(gcs: FakeGcs) -> None:
    gcs.page = 7  # a listing of several pages
    accuracies = {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.1}
    saved({step: {"accuracy": value} for step, value in accuracies.items()}, keep=1, best="max")
    assert {name.removeprefix(PREFIX).split("/")[0] for name in gcs.names(PREFIX)} == {"2", "4"}
    assert load_params(ADDRESS, "best", part="w")[1]["step"] == 2
    with Checkpoints(ADDRESS, keep=1, best="max") as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 4], 2)


@pytest.mark.parametrize("part", ["meta.json", "manifest.md5", "/d/", "_METADATA"])
def test_a_save_that_is_refused_is_told_and_spares_the_others(gcs: FakeGcs, part: str) -> None:
    saved({1: None})
    whole = {name: gcs.objects[name].data for name in gcs.names(f"{PREFIX}1/")}
    with Checkpoints(ADDRESS, keep=1) as checkpoints:
        gcs.faults = [refuse(403, part)]
        with pytest.raises(
            CheckpointError, match=r"cannot save step 2 in gs://bucket/run/checkpoints: .*403|denied"
        ):
            checkpoints.save(2, SMALL, {}, wait=True)
        assert {name: gcs.objects[name].data for name in gcs.names(PREFIX)} == whole
        gcs.faults = []
        checkpoints.save(2, SMALL, {}, wait=True)
        assert checkpoints.steps() == [2]


def test_one_that_was_taken_over_removes_nothing_of_the_others(gcs: FakeGcs) -> None:
    """The other one may be saving the same step."""

    def taken_over() -> None:
        gcs.put(f"{PREFIX}2/d/theirs", b"1")
        raise TakenOver("gs://bucket/run was taken over")

    with Checkpoints(ADDRESS, keep=1, before=taken_over) as checkpoints:
        with pytest.raises(CheckpointError, match="was taken over"):
            checkpoints.save(2, SMALL, {}, wait=True)
        assert checkpoints.steps() == [] and f"{PREFIX}2/d/theirs" in gcs.names()


# A connection that was cut stays open on this side until it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_passes_is_tried_again(gcs: FakeGcs) -> None:
    seen: list[str] = []

    def once(request: Request) -> int | str | None:
        key = f"{request.method} {request.name}"
        if key in seen:
            return None
        seen.append(key)
        return CUT if len(seen) % 2 else 503

    saved({1: None})
    gcs.faults = [once]
    assert load_params(ADDRESS, part="w")[0].tolist() == [1, 2, 3, 4, 5, 6]
    assert len(seen) > 5


def test_no_network_is_no_damage(gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    saved({1: None, 2: None})
    names = gcs.names()
    with Checkpoints(ADDRESS, keep=9) as checkpoints:
        for status in (503, 403, 401):
            gcs.faults = [refuse(status, "manifest.md5", "GET")]
            with pytest.raises(StorageError, match="gs://bucket/run/checkpoints"):
                checkpoints.restore_latest(LIKE)
        gcs.faults = []
        assert checkpoints.restore_latest(LIKE)[2] == 2
    assert gcs.names() == names


def test_a_bucket_that_is_not_there_denies_or_is_out_of_reach(
    gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        StorageError, match=r"gs://other/run/checkpoints: there is no bucket 'other'; make it"
    ):
        load_params("gs://other/run")
    gcs.faults = [lambda request: 403]
    with pytest.raises(
        StorageError, match=r"checkpoints: access is denied \(denied by the test\); give the account"
    ):
        load_params("gs://bucket/run")
    gcs.faults = [lambda request: 401]
    with pytest.raises(StorageError, match=r"no valid credentials \(.*gcloud auth application-default login"):
        load_params("gs://bucket/run")
    gcs.faults = [lambda request: 503]
    with pytest.raises(StorageError, match=r"gs://bucket/run/checkpoints cannot be reached: .*503"):
        load_params("gs://bucket/run")
    monkeypatch.setenv(EMULATOR, "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"gs://bucket/run/checkpoints cannot be reached: .*Connection"):
        load_params("gs://bucket/run")
    with pytest.raises(CheckpointError, match="no checkpoint in gs://bucket/none/checkpoints"):
        monkeypatch.setenv(EMULATOR, gcs.url)
        gcs.faults = []
        load_params("gs://bucket/none")


def test_a_bucket_that_is_not_there_is_told_when_checkpoints_are_opened(gcs: FakeGcs) -> None:
    with pytest.raises(StorageError, match="there is no bucket 'other'"):
        Checkpoints("gs://other/run/checkpoints", keep=1)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; sys.modules['google.cloud.storage'] = None\n"
        "from tokenlab.core.bucket import Bucket\nBucket('gs://a/b')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: gs:// addresses need the package google-cloud-storage" in found.stderr
    assert "tokenlab-jax[gcs]" in found.stderr


@pytest.mark.parametrize(
    "address", ["gs://", "gs://bucket", "gs://bucket/", "s3://bucket/a", "gs://bucket//a"]
)
def test_what_is_no_folder_of_a_bucket(address: str) -> None:
    with pytest.raises(buckets.ConfigError, match="expected gs://BUCKET/FOLDER"):
        Bucket(address)


def test_an_object_is_replaced_where_it_is_as_expected(gcs: FakeGcs) -> None:
    folder = Bucket("gs://bucket/a b/ü")
    first = folder.write("x #?%", b"1", generation=0)
    assert (folder.read("x #?%"), folder.generation("x #?%")) == (b"1", first)
    with pytest.raises(buckets.Changed):
        folder.write("x #?%", b"2", generation=0)
    second = folder.write("x #?%", b"2", generation=first)
    with pytest.raises(buckets.Changed):
        folder.delete("x #?%", generation=first)
    assert folder.objects()["x #?%"] == buckets.Object(1, second, hashlib.md5(b"2").hexdigest())
    folder.delete("x #?%", "nothing")
    assert (folder.read("x #?%"), folder.generation("x #?%"), folder.is_empty()) == (None, None, True)


def test_what_is_refused_leaves_no_connection_open(gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        buckets, "_clients", {}
    )  # a new one is collected with this test, and its connections told of
    folder, answers = Bucket(ADDRESS), iter((404, 403, 401, 503))
    gcs.faults = [lambda request: next(answers, None) if request.name.endswith("nothing") else None]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert folder.read("nothing") is None
        for _ in range(2):
            with pytest.raises(StorageError):
                folder.read("nothing")
        assert folder.read("nothing") is None  # after the 503
        gc.collect()
    assert [str(each.message) for each in told] == []
