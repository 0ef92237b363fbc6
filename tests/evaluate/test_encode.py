"""A tokenizer of digits: what evaluation tells of it, the file it writes, and what is refused."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.evaluate.conftest import copy
from tokenlab import cli, train
from tokenlab.core.config import override
from tokenlab.core.errors import CheckpointError, ConfigError, DataError, NameLookupError, ShapeError
from tokenlab.evaluate import cost_report, encode, load
from tokenlab.evaluate.cost import CostReport
from tokenlab.models import codes_file
from tokenlab.models.vq_image import Decoder
from tokenlab.tasks.reconstruct import psnr

SPLITS = {"train": 1257, "validation": 180, "test": 360}


def config(**changes: Any) -> Any:
    found = train.default_config(model="vq_image", task="reconstruct", data="digits")
    found.update(steps=4, batch_size=32, log_every=4, eval_every=0, checkpoint_every=0)
    found.model.update(size="tiny", factor=4, width=8, blocks=0, codes=64)
    found.eval.batch_size = 256  # so that the last batch of every split is padded
    found.optimizer.learning_rate = 4e-3
    return override(found, changes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(workdir, what the run said of itself); not to be changed."""
    found = tmp_path_factory.mktemp("tokenizer") / "run"
    return found, train.run(config(), found)


@pytest.fixture(scope="module")
def file(workdir: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All digits as codes; not to be changed."""
    found = tmp_path_factory.mktemp("codes") / "codes.npz"
    assert cli.main(["encode", f"--workdir={workdir[0]}", f"--out={found}"]) == 0
    return found


def test_evaluation_tells_of_codes_and_draws_the_pictures(workdir: Any, tmp_path: Path, capsys: Any) -> None:
    folder = copy(workdir[0], tmp_path / "run")
    assert cli.main(["evaluate", f"--workdir={folder}", f"--json={tmp_path / 'r.json'}"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["mse"] == pytest.approx(workdir[1]["test"]["mse"], rel=1e-5)
    assert found["codes"] == 64 and 2 <= found["codes_used"] <= 64
    assert 1 < found["code_perplexity"] <= found["codes_used"]
    assert "stack" not in found and "tokens_out" not in found and found["tokens_per_example"] == 4
    assert "code perplexity" in out and "reconstructions.png" in out and "tokens.png" not in out
    for name in ("report", "reconstructions"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_picture_of_every_split_is_in_the_file_in_order(workdir: Any, file: Path, capsys: Any) -> None:
    coded, trained = codes_file.read(file), load(workdir[0])
    assert {split: len(codes) for split, codes in coded.codes.items()} == SPLITS
    model, source = trained.model, trained.source
    for split, size in SPLITS.items():
        images = source.read(split, np.arange(size))["image"]
        wanted = jax.jit(model.encode)(trained.params, images)
        # In batches of another size the last bits differ, and a patch may lie as near to one code as to another.
        assert coded.codes[split].shape == wanted.shape and np.mean(coded.codes[split] != wanted) < 1e-3
    assert (coded.source, coded.fingerprint) == ("digits", source.fingerprint)
    assert (coded.num_codes, coded.grid, coded.image) == (64, (2, 2), (8, 8, 1))
    assert coded.value_range == (-1.0, 1.0) and coded.model == model.described


def test_the_file_alone_gives_the_pictures_of_the_model(workdir: Any, file: Path) -> None:
    coded, trained = codes_file.read(file), load(workdir[0])
    decoder = Decoder.load(file)
    found = np.asarray(decoder(coded.codes["validation"]))
    wanted = jax.jit(trained.model.decode)(trained.params, coded.codes["validation"])
    np.testing.assert_array_equal(found, wanted)
    images = trained.source.read("validation", np.arange(180))["image"]
    assert float(((found - images) ** 2).mean()) == pytest.approx(workdir[1]["validation"]["mse"], rel=1e-5)
    assert decoder.value_range == (-1.0, 1.0)
    for wrong, says in (
        (np.full((1, 2, 2), 64), "codes are 64 to 64; expected 0 to 63"),
        (np.full((1, 2, 2), -1), "codes are -1 to -1"),
        (np.zeros((1, 2, 3), int), r"decodes int \[B, 2, 2\]"),
        (np.zeros((1, 2, 2)), r"got float"),
    ):
        with pytest.raises(ShapeError, match=says):
            decoder(wrong)


def test_one_line_says_what_was_written(workdir: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "some.npz"
    words = ["encode", f"--workdir={workdir[0]}", f"--out={out}", "--split=test,validation"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    wanted = psnr(workdir[1]["test"]["mse"], (-1.0, 1.0))
    assert said.count("\n") == 1 and f"test 360 pictures {wanted:.2f} dB, validation 180 pictures" in said
    assert " of 64 codes used (perplexity " in said
    assert list(codes_file.read(out).codes) == ["test", "validation"]
    before = out.read_bytes()
    with pytest.MonkeyPatch.context() as patch:  # said before any work is done
        patch.setattr(encode, "load", lambda *_: pytest.fail("work began"))
        assert cli.main([*words[:-1], "--split=validation"]) == 2
    assert "exists already: give another file, or --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert cli.main([*words[:-1], "--split=validation", "--overwrite"]) == 0
    assert list(codes_file.read(out).codes) == ["validation"]
    assert [path.name for path in tmp_path.iterdir()] == ["some.npz"]


def test_a_write_that_fails_leaves_nothing(workdir: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def half(self: Any) -> bytes:
        raise RuntimeError("the power went")

    monkeypatch.setattr(codes_file.Coded, "to_bytes", half)
    with pytest.raises(RuntimeError, match="the power went"):
        encode.run(workdir[0], tmp_path / "c.npz", ["validation"])
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_model_is_refused(workdir: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(encode.codes, "gives_codes", lambda trained: False)
    with pytest.raises(ConfigError, match=r"needs a run of a tokenizer of pictures; .* trained 'vq_image'"):
        encode.run(workdir[0], tmp_path / "c.npz")


def test_what_cannot_be_encoded_is_refused(workdir: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "c.npz"
    with pytest.raises((DataError, NameLookupError), match="validation"):
        encode.run(workdir[0], out, ["validaton"])
    many = copy(workdir[0], tmp_path / "many", **{"model.codes": 2**16 + 1})
    with pytest.raises(
        CheckpointError, match="quantizer/codebook"
    ):  # the weights have as many codes as they have
        encode.run(many, out)
    with pytest.raises(ConfigError, match="tells 65536 of them apart, the model has 65537"):
        codes_file.check_fits(2**16 + 1)
    codes_file.check_fits(2**16)
    bright = copy(workdir[0], tmp_path / "bright", **{"task.value_range": [0.0, 1.0]})
    with pytest.raises(DataError, match=r"values from -1 to 1; expected 0 to 1, as config.task.value_range"):
        encode.run(bright, out)
    for words, says in (
        ([f"--workdir={workdir[0]}", f"--out={tmp_path / 'none' / 'c.npz'}"], "--out="),
        ([f"--workdir={tmp_path / 'none'}", f"--out={out}"], "is not a folder"),
        ([f"--workdir={workdir[0]}"], "--out=FILE.npz is missing"),
    ):
        assert cli.main(["encode", *words]) == 2
        assert says in capsys.readouterr().err
    assert not out.exists()


def changed(file: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with other arrays in it."""
    with np.load(file) as found:
        arrays = dict(found)
    change(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def meta(**others: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays["meta"] = np.array(json.dumps({**json.loads(str(arrays["meta"])), **others}))

    return change


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = value
        if value is None:
            del arrays[name]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("meta", None), "has no meta data of codes"),
        (put("meta", np.array("{half")), "has no meta data of codes"),
        (meta(format=2), "is of format 2; this version reads 1"),
        (meta(grid=[2, 3]), r"codes/\w+ is uint16\[\d+, 2, 2\]; expected uint16 \[n, 2, 3\]"),
        (meta(grid="2x2"), "its meta has grid='2x2'; expected a list"),
        (meta(image=[8, 8]), r"image=\[8, 8\]; expected 3 numbers"),
        (meta(codes=4), "holds code .* expected 0 to 3"),
        (meta(codes=65), "a grid .* of 65 codes, but its model gives .* of 64"),
        (meta(value_range=[1, -1]), "a value range that no picture has"),
        (meta(model={"name": "vit"}), "are of model 'vit'; expected codes of 'vq_image'"),
        (put("codes/test", np.zeros((3, 2, 2), np.int64)), r"codes/test is int64\[3, 2, 2\]"),
        (put("decoder/quantizer/codebook", None), "decoder/quantizer/codebook is of shape None"),
        (put("decoder/decoder/extra", np.zeros(3, np.float32)), "decoder/decoder/extra is of shape"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    file: Path, tmp_path: Path, change: Any, says: str
) -> None:
    other = tmp_path / "other.npz"
    other.write_bytes(changed(file, change))
    with pytest.raises(DataError, match=says):
        Decoder.load(other)


def test_a_damaged_or_foreign_file_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    middle = len(whole) // 2
    array = io.BytesIO()
    np.save(array, np.arange(3))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as found:
        found.writestr("readme.txt", "hello")
    for content in (
        b"",
        b"hello",
        whole[:middle],
        whole[:middle] + bytes(64) + whole[middle + 64 :],
        array.getvalue(),
        archive.getvalue(),
    ):
        other = tmp_path / "other.npz"
        other.write_bytes(content)
        with pytest.raises(DataError, match="expected a file that tokenlab encode wrote"):
            codes_file.read(other)
    with pytest.raises(DataError, match="expected a file that tokenlab encode wrote"):
        codes_file.read(tmp_path / "none.npz")


def test_the_same_run_gives_the_same_file(workdir: Any, file: Path, tmp_path: Path) -> None:
    again = encode.run(workdir[0], tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == file.read_bytes()
    assert again.fingerprint == codes_file.read(file).fingerprint


def test_its_cost_table_stands_alone() -> None:
    report = cost_report(config())
    assert isinstance(report, CostReport) and report.dense is None
    assert report.title == "vq_image: cost of one example of digits" and "decoder" in report.to_markdown()
    assert "of_dense" not in report.to_json()


def test_what_needs_a_stack_says_so(tmp_path: Path) -> None:
    from tokenlab.bench import command

    with pytest.raises(ConfigError, match="benchmark times a stack beside the dense one"):
        command.run(config(), name="vq")
    upcycled = config(**{"init_from.path": str(tmp_path), "init_from.upcycle": True})
    with pytest.raises(CheckpointError):
        train.run(upcycled, tmp_path / "run")
