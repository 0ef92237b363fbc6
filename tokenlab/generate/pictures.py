"""`tokenlab generate --picture`, `--image` and `--example`, and both_ways.png: pictures of captions and the reverse."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tokenlab import data
from tokenlab.core.errors import ConfigError, DataError, TokenLabError
from tokenlab.data.image_text import ImageTextVocabulary, Pair, Pixels, pairs
from tokenlab.evaluate.pixels import pixels_for
from tokenlab.evaluate.trained import Trained, load
from tokenlab.generate.both_ways import BothWays, read_image
from tokenlab.generate.generator import check_seed, found_no_room
from tokenlab.models.decoder_lm import DecoderLM
from tokenlab.ops.sample import Sampling
from tokenlab.train import compilation
from tokenlab.train.manifest import Which

SAMPLES = 4
"""Pictures of a caption, where nothing is said."""

CAPTIONS, EACH, PICTURES = 6, 3, 10
"""In both_ways.png: captions, pictures sampled of each, and pictures that captions are sampled of."""

SAMPLING = Sampling(0.8)
"""Of both_ways.png, as the command's default."""


def draw(
    workdir: str | Path,
    captions: Sequence[str],
    out: str | os.PathLike[str],
    *,
    samples: int = SAMPLES,
    sampling: Sampling | None = None,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    checkpoint: Which = "latest",
) -> np.ndarray:
    """Draw pictures of captions, with the caption above each group, and print a line.

    Args:
      workdir: of a training run on pictures and text.
      captions: one or more.
      out: the PNG to write, whole or not at all.
      samples: pictures of each caption.
      sampling, seed, overrides, checkpoint: as of `tokenlab.generate.run`.

    Returns:
      Codes, int32 [captions, samples, h, w].

    Raises:
      ConfigError: the run is of no pictures and text.
      DataError: the codes of its pictures are those of a file that is not there any more.
      TokenLabError: as `BothWays.pictures` and `tokenlab.evaluate.load`.
    """
    from tokenlab.generate import panels  # matplotlib takes a second to import

    trained = load(workdir, overrides, checkpoint, examples=False)
    both, pixels = _both_ways(trained)
    check_seed(seed)
    codes = both.pictures(captions, samples, sampling=sampling, seed=seed)
    _tell(trained, both)
    shown = [
        panels.Panel((caption,), pixels.decode(each)) for caption, each in zip(captions, codes, strict=True)
    ]
    heading = f"step {trained.step}: {samples} sampled of each caption"
    print(
        f"wrote {panels.draw(out, [panels.Section(heading, shown)])}: {codes.shape[0] * codes.shape[1]} pictures"
    )
    return codes


def describe(
    workdir: str | Path,
    *,
    image: str | os.PathLike[str] | None = None,
    example: int | None = None,
    split: str = "validation",
    tokens: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    checkpoint: Which = "latest",
    file: TextIO | None = None,
) -> str:
    """Print what is said of a picture; the caption that it has, if it is one of the data, goes to standard error.

    Args:
      workdir: of a training run on pictures and text.
      image: a file with a picture; for codes that are grey levels.
      example: in its place, the number of a picture of the run's data, see `tokenlab.data.image_text.pairs`.
      split: of the example.
      tokens: most tokens of the text; None for as many as a row has room for.
      sampling, seed, overrides, checkpoint: as of `tokenlab.generate.run`.
      file: where to print; None: standard output.

    Returns:
      The text.

    Raises:
      ConfigError: the run is of no pictures and text, or not one of `image` and `example` is given.
      DataError: the picture cannot be read or encoded, or there is no such example.
      TokenLabError: as `BothWays.captions` and `tokenlab.evaluate.load`.
    """
    if (image is None) == (example is None):
        raise ConfigError("generate: give a picture, either with --image=FILE or with --example=N.")
    trained = load(workdir, overrides, checkpoint, examples=example is not None)
    both, pixels = _both_ways(trained)
    check_seed(seed)
    pair = None if example is None else _example(trained, split, example)
    codes = read_image(image, pixels) if pair is None else pair.codes
    (said,) = both.captions(codes[None], tokens, sampling=sampling, seed=seed)
    _tell(trained, both)
    print(said, file=file or sys.stdout)
    if pair is not None:
        print(f"its caption in the data: {pair.caption}", file=sys.stderr)
    return said


def drawn(trained: Trained, split: str, workdir: Path) -> list[str]:
    """Draw both_ways.png in the workdir, if the run is of pictures and text.

    Args:
      trained: any run.
      split: of its data, from which captions and pictures come.
      workdir: of the run.

    Returns:
      A line: written, or why not; none for other runs.
    """
    if not _of_pictures(trained):
        return []
    name = "both_ways.png"
    try:
        both, pixels = _both_ways(trained)
        path = sheet(workdir / name, both, pixels, trained.source, split, f"{split}, step {trained.step}")
    except TokenLabError as error:  # what was measured is worth its place without a picture
        return [f"{name}: not drawn: {error}"]
    return [f"wrote {path}"]


def sheet(
    path: str | os.PathLike[str],
    both: BothWays,
    pixels: Pixels,
    source: data.Source,
    split: str,
    title: str,
) -> Path:
    """Draw captions of a split with the real picture and sampled ones, and pictures with the real caption and another.

    Captions are the first different ones, pictures those that follow them.

    Args:
      path: the PNG to write, whole or not at all.
      both: what samples.
      pixels: of the codes.
      source, split: the data.
      title: in front of each heading.

    Raises:
      TokenLabError: as `BothWays`. DataError: there is no such split.
    """
    from tokenlab.generate import panels  # as in `draw`

    chosen: dict[str, Pair] = {}
    others: list[Pair] = []
    for pair in pairs(source, split):
        if pair.caption not in chosen and len(chosen) < CAPTIONS:
            chosen[pair.caption] = pair
        elif len(others) < PICTURES:
            others.append(pair)
        if len(chosen) == CAPTIONS and len(others) == PICTURES:
            break
    firsts = list(chosen.values())
    sampled = both.pictures(list(chosen), EACH, sampling=SAMPLING)
    others = others or firsts
    said = both.captions(np.stack([pair.codes for pair in others]), sampling=SAMPLING)
    to_pictures = [
        panels.Panel((pair.caption,), pixels.decode(np.concatenate([pair.codes[None], codes])))
        for pair, codes in zip(firsts, sampled, strict=True)
    ]
    to_captions = [
        panels.Panel((f"real: {pair.caption}", f"sampled: {text}"), pixels.decode(pair.codes[None]))
        for pair, text in zip(others, said, strict=True)
    ]
    return panels.draw(
        path,
        [
            panels.Section(
                f"{title}: captions, each with its picture first and then {EACH} sampled of it", to_pictures
            ),
            panels.Section(f"{title}: pictures, each with its caption and one sampled of it", to_captions),
        ],
    )


def _tell(trained: Trained, both: BothWays) -> None:
    for note in (*trained.notes, *((found_no_room(both.lost),) if both.lost else ())):
        print(note, file=sys.stderr)


def _of_pictures(trained: Trained) -> bool:
    known = getattr(trained.source, "tokenizer", None)
    return isinstance(known, ImageTextVocabulary) and isinstance(trained.model, DecoderLM)


def _both_ways(trained: Trained) -> tuple[BothWays, Pixels]:
    """What samples, and what makes pixels of codes."""
    if not _of_pictures(trained):
        name = trained.config.model.get("name", "vit")
        raise ConfigError(
            f"generate: --picture, --image and --example need a run on pictures and text; this one trained {name!r} on "
            f"data {trained.source.name!r}. Train one with configs/image_text_digits.py."
        )
    compilation.use_cache(trained.config.compilation_cache)
    known = trained.source.tokenizer
    codec = getattr(data.resolve(trained.config.data), "codec", known.codec)
    return BothWays(trained.model, trained.params, known), pixels_for(known, codec)


def _example(trained: Trained, split: str, number: int) -> Pair:
    found = None if number < 0 else next(islice(pairs(trained.source, split), number, None), None)
    if found is None:
        count = sum(1 for _ in pairs(trained.source, split))
        raise DataError(
            f"--example={number}: split {split!r} of {trained.source.name!r} has {count} pictures; expected 0 to "
            f"{count - 1}."
        )
    return found
