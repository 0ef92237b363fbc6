"""Both directions from a run: the command, the sheets it draws, samples during training, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import pytest

from tokenlab import cli, data, models, train
from tokenlab.core.config import override
from tokenlab.core.errors import ConfigError, DataError, TokenLabError
from tokenlab.data.image_text import Grey, ImageTextVocabulary, pairs
from tokenlab.data.image_text.codec import checksum
from tokenlab.data.text import ByteTokenizer
from tokenlab.evaluate import load
from tokenlab.evaluate.pixels import pixels_for
from tokenlab.generate import Samples, describe, draw, drawn, pictures
from tokenlab.generate.both_ways import read_image
from tokenlab.generate.panels import drawable
from tokenlab.models import codes_file
from tokenlab.ops.sample import Sampling
from tokenlab.train.records import read_metrics

STACK = "block"


def config(**changes: Any) -> Any:
    """Two steps on digits of 2 x 2 grey levels."""
    found = train.default_config(model="decoder_lm", task="mixed_next_token", data="image_text")
    found.update(steps=2, batch_size=8, log_every=2, eval_every=0, checkpoint_every=0)
    found.eval.update(batch_size=64, split="test", final_split=None)
    found.model.update(size="nano", stack=STACK)
    found.data.update(size=2, codec="grey(5)", length=40)
    return override(found, changes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that also drew samples at every step; not to be changed."""
    found = tmp_path_factory.mktemp("both_ways") / "run"
    train.run(config(sample_every=1), found, sampler=Samples)
    return found


def image(path: Path) -> np.ndarray:
    found = cv2.imread(str(path))
    assert found is not None
    return found


def test_samples_are_drawn_during_training(workdir: Path) -> None:
    """A picture a step asked for, each of the weights of that step."""
    first, second = (image(workdir / "samples" / f"{step}.png") for step in (1, 2))
    assert first.size and (first.shape != second.shape or (first != second).any())
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == ["1.png", "2.png"]


@pytest.mark.slow
def test_drawing_samples_changes_no_record(workdir: Path, tmp_path: Path) -> None:
    plain = train.run(config(), tmp_path / "plain")
    assert [record["loss"] for record in read_metrics(workdir)] == [
        plain["train"]["loss"],
        plain["test"]["loss"],
    ]


def test_pictures_of_a_caption(workdir: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "sheet.png"
    words = ["generate", f"--workdir={workdir}", "--prompt=the digit seven", "--picture", "--samples=2"]
    assert cli.main([*words, f"--out={out}", "--seed=3"]) == 0
    assert capsys.readouterr().out == f"wrote {out}: 2 pictures\n"
    codes = draw(workdir, ["the digit seven"], out, samples=2, sampling=Sampling(0.8), seed=3)
    assert codes.shape == (1, 2, 2, 2)
    # Each code is a square of one grey level on the sheet.
    shown = image(out)
    levels = np.unique(np.rint((codes / 4) * 255).astype(int))
    assert all((shown == level).all(-1).sum() >= 48 * 48 for level in levels)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_a_sheet_that_cannot_be_drawn_leaves_the_old_one(
    workdir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "sheet.png"
    out.write_bytes(b"old")

    def half(self: Any, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(OSError, match="disk is full"):
        draw(workdir, ["one"], out, samples=2)
    assert out.read_bytes() == b"old"


def test_a_caption_of_an_example_and_of_its_file(workdir: Path, tmp_path: Path, capsys: Any) -> None:
    """The picture of an example, written as a PNG and read again, is the same codes and so gives the same text."""
    words = ["generate", f"--workdir={workdir}", "--temperature=0", "--tokens=6"]
    assert cli.main([*words, "--example=2", "--split=test"]) == 0
    said, noted = capsys.readouterr()
    *_, pair = (pair for pair, _ in zip(pairs(data.build(config().data), "test"), range(3), strict=False))
    assert noted == f"its caption in the data: {pair.caption}\n"
    grey = Grey(5, (2, 2))
    file = tmp_path / "picture.png"
    cv2.imwrite(str(file), np.rint((grey.decode(pair.codes) + 1) * 127.5).astype(np.uint8))
    np.testing.assert_array_equal(read_image(file, grey), pair.codes)
    assert cli.main([*words, f"--image={file}"]) == 0
    assert capsys.readouterr() == (said, "")
    out = io.StringIO()
    assert describe(workdir, image=file, tokens=6, sampling=Sampling(0.0), file=out) == out.getvalue()[:-1]


def test_text_behind_a_prompt_is_text_alone(workdir: Path, capsys: Any) -> None:
    assert cli.main(["generate", f"--workdir={workdir}", "--prompt=the digit", "--tokens=5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the digit") and "tokens in" in err


def test_evaluation_draws_both_ways(workdir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """In the workdir; what stands against it is told in its place."""
    trained = load(workdir)
    monkeypatch.setattr(pictures, "sheet", lambda path, both, pixels, source, split, title: Path(path))
    assert drawn(trained, "test", tmp_path) == [f"wrote {tmp_path / 'both_ways.png'}"]

    def moved(*_: Any) -> None:
        raise DataError("the file is gone")

    monkeypatch.setattr(pictures, "pixels_for", moved)
    assert drawn(trained, "test", tmp_path) == ["both_ways.png: not drawn: the file is gone"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt=a", "--picture"], "--out=FILE.png is missing"),
        (["--prompt=a", "--out=x.png"], "--out goes with --picture, and not with text"),
        (["--prompt=a", "--samples=2"], "--samples goes with --picture, and not with text"),
        (["--prompt=a", "--split=test"], "--split goes with --example, and not with text"),
        (
            ["--prompt=a", "--picture", "--out=x.png", "--tokens=3"],
            "--tokens goes with text or --image or --example",
        ),
        (["--prompt=a", "--image=x.png"], "--prompt goes with text or --picture, and not with --image"),
        (["--image=x.png", "--split=test"], "--split goes with --example, and not with --image"),
        (["--image=x.png", "--example=1"], "either with --image=FILE or with --example=N"),
        (["--image=x.png", "--picture"], "--picture draws a picture and --image reads one"),
        (["--picture", "--out=x.png"], "give a prompt with --prompt=TEXT"),
        (["--prompt=a", "--picture", "--out=/nowhere/x.png"], "--out=/nowhere/x.png cannot be written"),
        (["--example=-1"], "--example=-1: expected a whole number"),
        (
            ["--example=400", "--split=test"],
            "split 'test' of 'digits and shakespeare' has 360 pictures; expected 0 to",
        ),
        (["--example=1", "--split=tset"], "tset"),
        (["--image=/nowhere/x.png"], "--image=/nowhere/x.png cannot be read: No such file"),
        (["--image=pyproject.toml"], "are no picture that can be decoded"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    workdir: Path, capsys: Any, words: list[str], says: str
) -> None:
    assert cli.main(["generate", f"--workdir={workdir}", *words]) == cli.EXIT_ERROR
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1


def test_a_caption_that_leaves_no_room_for_its_picture_is_refused(workdir: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TokenLabError, match="has 36 tokens; expected 1 to 35, since with its picture of 2 x 2 codes"
    ):
        draw(workdir, ["x" * 36], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "sampler", "says"),
    [
        ({"sample_every": 3}, None, r"config\.sample_every is 3, and nothing that draws samples was given"),
        ({"sample_every": -1}, Samples, r"config\.sample_every is -1: expected a number of steps"),
        ({"sample_every": 3, "text": True}, Samples, "data 'shakespeare' has no pictures and text to sample"),
    ],
)
def test_samples_that_cannot_be_drawn_are_told_before_training(
    tmp_path: Path, changes: dict[str, Any], sampler: Any, says: str
) -> None:
    wanted = config()
    if changes.pop("text", False):
        wanted = train.default_config(model="decoder_lm", task="next_token", data="shakespeare")
        wanted.model.update(size="nano", stack="block")
    with pytest.raises(ConfigError, match=says):
        train.run(override(wanted, changes), tmp_path / "run", sampler=sampler)
    assert not (tmp_path / "run").exists()


def test_what_a_font_lacks_is_shown_escaped() -> None:
    assert drawable("six \N{GREEK SMALL LETTER PI}") == "six \N{GREEK SMALL LETTER PI}"
    assert drawable("a\n\x00\N{HANGUL SYLLABLE GO}") == r"a\n\x00\uace0"


# ---------------------------------------------------------------------------------------------------- a file of codes


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A file of codes of pictures in [0, 1], its untrained model and the weights."""
    settings = {"name": "vq_image", "size": "tiny", "factor": 2, "width": 4, "blocks": 0, "codes": 6}
    model = models.build(settings, spec={"image": ((4, 6, 1), "float32")}, num_outputs=24)
    state = jax.jit(model.init)(jax.random.key(0))
    file = tmp_path_factory.mktemp("codes") / "codes.npz"
    coded = codes_file.Coded(
        "some", "f", 6, model.grid, model.image, (0.0, 1.0), model.described, {}, model.decoder_state(state)
    )
    file.write_bytes(coded.to_bytes())
    return file, model, state


def vocabulary(file: Path, count: int = 6) -> ImageTextVocabulary:
    return ImageTextVocabulary(ByteTokenizer(), count, (2, 3), str(file))


def test_a_file_of_codes_gives_its_pictures(codes: tuple[Path, Any, Any]) -> None:
    """At [-1, 1] whatever the range of the tokenizer was, and any number of them."""
    file, model, state = codes
    pixels = pixels_for(vocabulary(file), str(file))
    assert (pixels.codes, pixels.grid, pixels.image) == (6, (2, 3), (4, 6, 1))
    drawn = np.random.default_rng(0).integers(0, 6, (2, 3, 2, 3))
    raw = np.asarray(jax.jit(model.decode)(state, drawn.reshape(6, 2, 3))).reshape(2, 3, 4, 6, 1)
    found = pixels.decode(drawn)
    np.testing.assert_array_equal(found, np.clip(raw * 2 - 1, -1, 1).astype(np.float32))
    for wrong in (drawn + 1, drawn[..., :2], drawn.astype(float)):
        with pytest.raises(DataError, match=r"expected integers \[\.\.\., 2, 3\] from 0 to 5"):
            pixels.decode(wrong)


def test_a_file_of_codes_has_no_encoder(codes: tuple[Path, Any, Any]) -> None:
    file = codes[0]
    with pytest.raises(DataError, match="holds its decoder but no encoder; take a picture .* --example=N"):
        read_image("some.png", pixels_for(vocabulary(file), str(file)))


def test_a_file_that_is_gone_or_another_is_told(codes: tuple[Path, Any, Any], tmp_path: Path) -> None:
    file = codes[0]
    with pytest.raises(DataError, match=r"no such file .*; put it back, or .* --config\.data\.codec=FILE"):
        pixels_for(vocabulary(file), str(tmp_path / "moved.npz"))
    with pytest.raises(DataError, match="is of 2 x 3 codes out of 6; the run knows 2 x 3 out of 7"):
        pixels_for(vocabulary(file, 7), str(file))
    known = vocabulary(file)
    known.checksum = checksum({})
    assert pixels_for(known, str(file)).codes == 6
    known.checksum = checksum({"train": np.zeros((1, 2, 3), np.uint16)})
    with pytest.raises(DataError, match="holds other codes than the run was trained on: it was written anew"):
        pixels_for(known, str(file))
