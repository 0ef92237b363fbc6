"""Checkpoints: exact round trips, damage of every kind to every file, retention, resharding, failures to write."""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import tensorstore
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint._src.serialization import serialization

from tokenlab.core.errors import CheckpointError
from tokenlab.train import manifest
from tokenlab.train.checkpoint import Checkpoints, load_params

META = {"tokens": 123456789012345678, "flops": 1.5e18, "data": {"seed": 3, "step": 7}, "note": None}


@struct.dataclass
class State:
    step: jax.Array
    key: jax.Array
    typed_keys: jax.Array
    params: Any
    optimizer: Any
    ema: Any


def make_state(value: float = 1.0, width: int = 8, dtype: Any = jnp.float32) -> State:
    draw = np.random.default_rng(0).normal(size=(16, width)) * value
    params = {
        "embed": {"kernel": jnp.asarray(draw, dtype), "bias": jnp.asarray(draw[0] / 3, jnp.bfloat16)},
        "items": {
            "none": jnp.zeros((0, width)),
            "odd": jnp.asarray([np.nan, np.inf, -0.0, 1e-42], jnp.float32),
        },
    }
    return State(
        step=jnp.asarray(int(value), jnp.int32),
        key=jax.random.key_data(jax.random.key(5)),
        typed_keys=jax.random.split(jax.random.key(6, impl="rbg"), 2),
        params=params,
        optimizer=optax.adamw(1e-3).init(params),
        ema=None,
    )


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )


def content(state: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Every bit of a state, to compare by ==."""

    def of(path: Any, leaf: Any) -> tuple[str, str, tuple[int, ...], bytes]:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        return jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape, data.tobytes()

    return [of(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]


def tree_of_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints 30 (of make_state(1)) and 40 (of make_state(2)); tests copy it."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    with Checkpoints(directory, keep=2) as checkpoints:
        checkpoints.save(30, make_state(1.0), META)
        checkpoints.save(40, make_state(2.0), META)
    return directory


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    shutil.copytree(two, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


# ---------------------------------------------------------------------------------------------- round trips


def test_restores_every_bit_and_the_structure(two: Path) -> None:
    state = make_state(2.0)
    with Checkpoints(two, keep=2) as checkpoints:
        restored, meta, step, notes = checkpoints.restore_latest(abstract(state))
    assert content(restored) == content(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert (meta, step, notes) == (META, 40, [])
    assert jax.random.bits(restored.typed_keys[1]) == jax.random.bits(state.typed_keys[1])


def test_no_checkpoint_is_none_not_an_error(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new", keep=1) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state())) is None
        assert checkpoints.steps() == []
        assert checkpoints.best_step() is None


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 1.5 + 1, tree), donate_argnums=0)
    state = step({"w": jnp.arange(1 << 16, dtype=jnp.float32), "b": jnp.ones((3,))})
    expected = content(state)
    like = abstract(state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(3):
            state = step(state)
        restored, _, _, _ = checkpoints.restore_latest(like)
    assert content(restored) == expected


def test_transfer_guard_does_not_stop_a_save_or_a_restore(tmp_path: Path) -> None:
    state = make_state()
    with Checkpoints(tmp_path, keep=1) as checkpoints, jax.transfer_guard("disallow"):
        checkpoints.save(1, state, {}, wait=True)
        restored, _, _, _ = checkpoints.restore_latest(abstract(state))
    assert content(restored) == content(state)


@pytest.mark.parametrize("sizes", [(8, 1), (1, 8), (8, 4)])
def test_reshards_on_restore(tmp_path: Path, sizes: tuple[int, int]) -> None:
    def shardings(state: State, size: int) -> State:
        mesh = Mesh(np.array(jax.devices()[:size]), ("fsdp",))

        def of(leaf: jax.Array) -> NamedSharding:
            divides = leaf.ndim > 0 and leaf.shape[0] > 0 and leaf.shape[0] % 8 == 0
            return NamedSharding(mesh, PartitionSpec("fsdp") if divides else PartitionSpec())

        return jax.tree.map(of, state)

    state = make_state()
    saved = jax.device_put(state, shardings(state, sizes[0]))
    wanted = shardings(state, sizes[1])
    like = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, wanted
    )
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, saved, {})
        restored, _, _, _ = checkpoints.restore_latest(like)
    assert content(restored) == content(state)
    kernel = restored.params["embed"]["kernel"]
    assert kernel.sharding == wanted.params["embed"]["kernel"]
    assert len(kernel.sharding.device_set) == sizes[1]


# --------------------------------------------------------------------------------------------------- damage


def test_every_kind_of_damage_to_every_file_is_found_or_harmless(copy: Path) -> None:
    folder, older, newer = copy / "40", content(make_state(1.0)), content(make_state(2.0))
    files = tree_of_files(folder)
    assert {manifest.MANIFEST, manifest.META, "_METADATA", "manifest.ocdbt"} < set(files)
    harmless = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    for name, original in files.items():
        middle = len(original) // 2
        flipped = original[:middle] + bytes([original[middle] ^ 4]) + original[middle + 1 :]
        for damaged in (None, original[:middle], b"", flipped):
            path = folder / name
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with Checkpoints(copy, keep=2) as checkpoints:
                state, meta, step, notes = checkpoints.restore_latest(abstract(make_state()))
            assert meta == META
            if name in harmless:
                assert (step, content(state), notes) == (40, newer, [])
            else:
                assert (step, content(state)) == (30, older), name
                (note,) = notes
                assert "checkpoint 40 is damaged" in note and "going on from 30" in note and "\n" not in note
                assert name in note or name == manifest.MANIFEST  # which may name another file
                (copy / "40.damaged-1").rename(folder)
            path.write_bytes(original)
    with Checkpoints(copy, keep=2) as checkpoints:  # the test has put everything back
        assert checkpoints.restore_latest(abstract(make_state()))[2] == 40


def test_a_damaged_step_is_kept_aside_and_can_be_saved_again(copy: Path) -> None:
    for number in (1, 2):
        (copy / "40" / manifest.META).write_text("{")
        damaged = tree_of_files(copy / "40")
        with Checkpoints(copy, keep=2) as checkpoints:
            assert checkpoints.restore_latest(abstract(make_state()))[2] == 30
            assert checkpoints.steps() == [30]
            checkpoints.save(40, make_state(2.0), META, wait=True)
            assert checkpoints.steps() == [30, 40]
        assert tree_of_files(copy / f"40.damaged-{number}") == damaged
        assert manifest.damage(copy / "40") is None


def test_several_damaged_ones_are_passed_over(copy: Path) -> None:
    with Checkpoints(copy, keep=4) as checkpoints:
        checkpoints.save(50, make_state(3.0), META)
        checkpoints.save(60, make_state(4.0), META)
    shutil.rmtree(copy / "60" / "d")
    (copy / "50" / manifest.MANIFEST).unlink()
    with Checkpoints(copy, keep=4) as checkpoints:
        state, _, step, notes = checkpoints.restore_latest(abstract(make_state()))
    assert (step, content(state)) == (40, content(make_state(2.0)))
    assert [note.split(" is damaged")[0] for note in notes] == ["checkpoint 60", "checkpoint 50"]


def test_none_readable_is_an_error_that_changes_nothing(copy: Path) -> None:
    for step in ("30", "40"):
        (copy / step / manifest.META).write_text("")
    before = tree_of_files(copy)
    with (
        Checkpoints(copy, keep=2) as checkpoints,
        pytest.raises(
            CheckpointError, match=r"none of the 2 checkpoints in .* can be read \(40: .*; 30: .*"
        ) as error,
    ):
        checkpoints.restore_latest(abstract(make_state()))
    assert "\n" not in str(error.value)
    assert tree_of_files(copy) == before


def test_other_format_is_not_called_damage(copy: Path) -> None:
    record = json.loads((copy / "40" / manifest.META).read_text()) | {"format": 2}
    (copy / "40" / manifest.MANIFEST).unlink()
    manifest.seal(copy / "40", json.dumps(record))
    with (
        Checkpoints(copy, keep=2) as checkpoints,
        pytest.raises(CheckpointError, match="has format 2, expected 1"),
    ):
        checkpoints.restore_latest(abstract(make_state()))


# -------------------------------------------------------------------------------------------- other models


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace(ema={"w": s.step}), r"'ema/w' is not in it, expected int32\[\]"),
        (lambda s: s.replace(step=None), r"'step' is int32\[\], expected no such leaf"),
        (lambda s: make_state(width=4), r"'params/embed/bias' is bfloat16\[8\], expected bfloat16\[4\]"),
        (
            lambda s: make_state(dtype=jnp.bfloat16),
            r"'params/embed/kernel' is float32\[16, 8\], expected bfloat16",
        ),
        (
            lambda s: s.replace(typed_keys=jax.random.split(jax.random.key(0), 2)),
            r"key<rbg>\[2\], expected key<fry>",
        ),
        (lambda s: s.replace(key=jax.random.key(0)), r"'key' is uint32\[2\], expected key<fry>\[\]"),
    ],
)
def test_another_model_is_an_error_and_no_reason_to_fall_back(copy: Path, change: Any, message: str) -> None:
    (copy / "40" / manifest.META).write_text(
        ""
    )  # damaged, and stays where it is: nothing is moved on an error
    before = tree_of_files(copy)
    with Checkpoints(copy, keep=2) as checkpoints, pytest.raises(CheckpointError, match=message) as error:
        checkpoints.restore_latest(abstract(change(make_state())))
    assert "checkpoint 30 " in str(error.value) and "give the configuration" in str(error.value)
    assert "\n" not in str(error.value)
    assert tree_of_files(copy) == before


def test_a_sharding_that_does_not_fit_is_an_error_and_no_damage(copy: Path) -> None:
    """Another sharding is no fault; one that does not divide an array is said before anything is moved."""
    before = tree_of_files(copy)
    like = abstract(make_state())
    over = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), PartitionSpec("fsdp"))
    like.params["items"]["odd"] = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=over)  # 4 over 8 devices
    with Checkpoints(copy, keep=2) as checkpoints:
        message = r"checkpoint 40 in .* cannot be restored with this sharding: 'params/items/odd', \[4\]: "
        with pytest.raises(CheckpointError, match=message) as error:
            checkpoints.restore_latest(like)
        assert "\n" not in str(error.value) and tree_of_files(copy) == before
        assert checkpoints.restore_latest(abstract(make_state()))[2] == 40


# ----------------------------------------------------------------------------------------------- retention


def test_keeps_the_newest_and_the_best_also_after_a_restart(tmp_path: Path) -> None:
    state = {"w": jnp.ones((2,))}
    accuracies = {1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 5: 0.7, 6: None}
    for step, accuracy in accuracies.items():
        with Checkpoints(tmp_path, keep=2, best="max") as checkpoints:
            checkpoints.save(
                step, state, {}, None if accuracy is None else {"accuracy": accuracy, "loss": 1.0}
            )
            checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best_step() == 2
    assert load_params(tmp_path, "best", part="w")[1] == {"step": 2}
    with Checkpoints(tmp_path, keep=1, best="max") as checkpoints:
        checkpoints.save(7, state, {}, {"accuracy": 1.0}, wait=True)
        assert checkpoints.steps() == [7]


def test_the_smallest_may_be_the_best(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1, best="min", metric="loss") as checkpoints:
        for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
            checkpoints.save(step, {"w": jnp.ones(())}, {}, {"loss": loss})
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 3], 2)
        assert checkpoints.restore("best", {"w": jax.ShapeDtypeStruct((), jnp.float32)})[2] == 2


def test_without_best_only_the_newest_stay(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 10):
            checkpoints.save(step, {"w": jnp.ones(())}, {}, {"accuracy": 1.0 / step})
        checkpoints.wait()
        assert checkpoints.steps() == [3, 10]
        assert checkpoints.best_step() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "3"]


# -------------------------------------------------------------------------------------- one, and only a part


def test_restore_takes_the_one_that_is_named_and_no_other(copy: Path) -> None:
    like = abstract(make_state())
    with Checkpoints(copy, keep=2) as checkpoints:
        state, meta, step = checkpoints.restore(30, like)
        assert (step, meta, content(state)) == (30, META, content(make_state(1.0)))
        assert checkpoints.restore("latest", like)[2] == 40
        with pytest.raises(CheckpointError, match=r"no checkpoint 35 in .*'latest', 'best' or one of 30, 40"):
            checkpoints.restore(35, like)
        with pytest.raises(CheckpointError, match="has a metric to choose the best by"):
            checkpoints.restore("best", like)
        (copy / "40" / "_METADATA").write_text("")
        with pytest.raises(CheckpointError, match=r"checkpoint 40 .* is damaged .*there are: 30"):
            checkpoints.restore("latest", like)
        assert checkpoints.steps() == [30, 40]


def test_load_params_needs_neither_optimizer_nor_model(two: Path) -> None:
    for path in (two, two.parent):
        before = tree_of_files(path)
        params, meta = load_params(path)
        assert content(params) == content(make_state(2.0).params)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
        assert meta == META | {"step": 40}
        assert tree_of_files(path) == before
    assert content(load_params(two, 30)[0]) == content(make_state(1.0).params)
    with pytest.raises(CheckpointError, match=r"has no 'parms'\. Did you mean 'params'\?"):
        load_params(two, part="parms")


@pytest.mark.parametrize("known", [True, False])
def test_small_arrays_are_written_by_one_device_and_large_ones_by_all(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each writes of an array that all have is cut out by a program of its own, which has to be worth it.

    An Orbax that is built otherwise shares out everything.
    """
    if not known:
        monkeypatch.setattr(orbax.checkpoint.type_handlers, "get_type_handler", lambda kind: object())
    whole = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
    state = {"small": jnp.ones((16, 8)), "large": jnp.ones((8, 1 << 18))}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, jax.device_put(state, whole), META, wait=True)
    written = json.loads((tmp_path / "1" / "array_metadatas" / "process_0").read_text())["array_metadatas"]
    shapes = {each["array_metadata"]["param_name"]: each["array_metadata"]["write_shape"] for each in written}
    assert shapes == {"small": [16, 8] if known else [2, 8], "large": [1, 1 << 18]}
    np.testing.assert_array_equal(load_params(tmp_path, part="large")[0], state["large"])


def test_load_params_of_nothing_or_of_damage_is_an_error(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*expected a workdir"):
        load_params(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (copy / "40" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint 40 .*manifest.ocdbt is missing.*there are: 30"):
        load_params(copy)
    assert load_params(copy, 30)[1]["step"] == 30


# ---------------------------------------------------------------------------------------- failures to write


def test_a_full_disk_is_told_before_anything_is_written(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree_of_files(copy)
    free = shutil.disk_usage(copy)._replace(free=0)
    with Checkpoints(copy, keep=1) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(
            CheckpointError, match=r"step 50 .*takes 0.0 MB of space and 0 MB are free; make room"
        ):
            checkpoints.save(50, make_state(), META)
        assert tree_of_files(copy) == before


def test_no_space_is_one_line_and_spares_the_older_ones(copy: Path) -> None:
    before = tree_of_files(copy)
    large = make_state(3.0).replace(ema={"w": jnp.asarray(np.random.default_rng(1).normal(size=1 << 16))})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(copy, keep=1) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # a write past this fails as on a full disk
        try:
            checkpoints.save(50, large, META)
            # Which error comes first, of the write or of reading what was not written, is not always the same.
            with pytest.raises(CheckpointError, match=r"cannot save step 50 .*free space") as error:
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value) and "whole checkpoints: 30, 40" in str(error.value)
        assert before.items() <= tree_of_files(copy).items()
        checkpoints.wait()  # told once
        checkpoints.save(60, large, META, wait=True)  # not 50, whose files TensorStore may still be at
        assert checkpoints.steps() == [60]
        assert manifest.damage(copy / "60") is None


def test_a_folder_that_cannot_be_written_to_is_one_line(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree_of_files(copy)
    with Checkpoints(copy, keep=1) as checkpoints:
        moved = copy.rename(copy.with_name("moved"))
        copy.write_text("a file where the folder was")
        with pytest.raises(CheckpointError, match="cannot save step 50 in") as error:
            checkpoints.save(50, make_state(), META, wait=True)
        assert "\n" not in str(error.value)
        copy.unlink()
        moved.rename(copy)
        assert tree_of_files(copy) == before
        checkpoints.save(50, make_state(), META, wait=True)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(CheckpointError, match="cannot open the checkpoint folder"):
        Checkpoints(copy / "50" / manifest.META / "below a file", keep=1)


def test_a_failed_save_does_not_hide_the_error_that_ended_the_block(tmp_path: Path, monkeypatch: Any) -> None:
    def full(folder: Path, record: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "seal", full)
    with pytest.raises(KeyError) as error, Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(())}, {})
        raise KeyError("the loop's own")
    assert ["No space left on device" in note for note in error.value.__notes__] == [True]
    with (
        pytest.raises(CheckpointError, match="No space left on device"),
        Checkpoints(tmp_path, keep=1) as checkpoints,
    ):
        checkpoints.save(1, {"w": jnp.ones(())}, {})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("keep", [0, -1, True, 1.5])
def test_keep_out_of_range(tmp_path: Path, keep: Any) -> None:
    with pytest.raises(CheckpointError, match="expected an integer of at least 1"):
        Checkpoints(tmp_path / "c", keep=keep)
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_saved_is_refused_before_anything_is_written(two: Path) -> None:
    state = {"w": jnp.ones(())}
    before = tree_of_files(two)
    with Checkpoints(two, keep=2, best="max") as checkpoints:
        for arguments, message in (
            ((40, state, {}), "step 40 is saved already"),
            ((50, state, {"x": float("nan")}), "meta data of step 50 is not JSON"),
            ((50, state, {"x": np.ones(2)}), "meta data of step 50 is not JSON"),
            ((50, {"w": 3}, {}), "'w' in the state is a int; expected a jax array"),
            ((50, {"a/b": jnp.ones(())}, {}), "makes no path of its own"),
            ((50, {"a": {"": jnp.ones(())}}, {}), "makes no path of its own"),
            ((50, {"0": jnp.ones(()), 0: jnp.ones(())}, {}), None),
            ((50, jnp.ones(()), {}), "makes no path of its own"),
            ((50, state, {}, {"acuracy": 1.0}), r"'accuracy', .*Did you mean 'acuracy'\?"),
        ):
            if message is not None:
                with pytest.raises(CheckpointError, match=message):
                    checkpoints.save(*arguments)
    with pytest.raises(CheckpointError, match="best='maximum'"):
        Checkpoints(two, keep=1, best="maximum")
    assert tree_of_files(two) == before


def test_writes_that_end_after_the_failed_save_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax closes the loop at the first error; TensorStore tells it of the other writes, with a traceback for each."""
    told: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda each: told.append(str(each.exc_value)))

    def fail_with_one_under_way() -> None:
        (failing, first), (late, second) = tensorstore.Promise.new(), tensorstore.Promise.new()
        loop = asyncio.new_event_loop()
        loop.call_soon(failing.set_exception, ValueError("denied"))

        async def writes() -> None:
            await asyncio.gather(first, second)

        with pytest.raises(ValueError, match="denied"):
            loop.run_until_complete(writes())
        loop.close()
        late.set_result(1)

    fail_with_one_under_way()
    assert told == ["Event loop is closed"]
    for _ in range(2):
        Checkpoints(tmp_path, keep=1).close()
        fail_with_one_under_way()
    assert told == ["Event loop is closed"]

    class Faulty:
        def __del__(self) -> None:
            raise RuntimeError("Event loop is closed")

    Faulty()
    assert told == ["Event loop is closed"] * 2  # of anybody else it is told


def orbax_write() -> Coroutine[Any, Any, None]:
    """Fails at once: what it is given has not left the device."""
    return serialization.async_serialize_from_host(SimpleNamespace(is_on_host=False), {})


async def own_write() -> None:
    raise ValueError(f"denied: {serialization.__file__}")


async def own_write_by_orbax() -> None:
    await orbax_write()


@pytest.mark.parametrize("are_errors", [True, False])
@pytest.mark.parametrize("write", [orbax_write, own_write, own_write_by_orbax])
def test_what_a_failed_save_leaves_behind_is_silent(
    write: Callable[[], Coroutine[Any, Any, None]],
    are_errors: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of tasks that nobody waited for and of writes that had not begun Python tells when it collects them."""
    told: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda each: told.append(str(each.exc_value)))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        Checkpoints(tmp_path, keep=1).close()
        if are_errors:
            warnings.simplefilter("error")
        loop = asyncio.new_event_loop()
        ended = loop.create_task(write())
        together = asyncio.gather(loop.create_task(write()), loop.create_future())
        loop.run_until_complete(asyncio.wait([ended]))
        loop.run_until_complete(asyncio.sleep(0))
        assert together.done()
        not_begun = loop.create_task(write())
        loop.close()
        del ended, together, not_begun, loop
        gc.collect()
    told += [str(each.message) for each in shown]
    told += [record.getMessage().splitlines()[0] for record in caplog.records]
    reports = {
        f"coroutine '{write.__name__}' was never awaited",
        "Task exception was never retrieved",
        "_GatheringFuture exception was never retrieved",
        "Task was destroyed but it is pending!",
    }
    assert set(told) == (set() if write is orbax_write else reports)
