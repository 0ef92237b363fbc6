"""`tokenlab evaluate`: measure, print, write and draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

from tokenlab.evaluate import codes, probe, results, tables
from tokenlab.evaluate.results import Measured
from tokenlab.evaluate.trained import Trained, load_each
from tokenlab.train import compilation
from tokenlab.train.manifest import Which
from tokenlab.train.mirror import here
from tokenlab.train.records import read_metrics, write_json

Painter = Callable[[Trained, str, Path], list[str]]
"""Draws a trained model's view of a split into the workdir; returns a line for each picture: written, or why not."""

PIPE_WIDTH = 160
"""Columns of a table that does not go to a terminal."""


def run(
    workdir: str | Path,
    overrides: Mapping[str, Any] | None = None,
    split: str = "test",
    json: str | Path | None = None,
    pictures: bool | Literal["all"] = True,
    checkpoint: Which = "latest",
    per_class: bool = False,
    probes: str | None = None,
    painters: Sequence[Painter] = (),
) -> dict[str, Any]:
    """Evaluate, print a table, write what is asked for.

    Args:
      workdir: of a training run, or its address, to which pictures are then written.
      overrides: dotted key -> text or value; see `settings.MAY_CHANGE`. `model.stack` and `eval.stack` both mean the
        stack to evaluate with, or several with ";" between them; by default it is the one that the run evaluates with.
      split: of the data.
      json: file for the result; replaced as a whole or not at all.
      pictures: True draws report.png and, for a stack that reduces tokens, tokens.png, for a tokenizer of pictures or
        a masked autoencoder reconstructions.png in the workdir; "all" draws predictions.png, calibration.png and
        confusion.png too.
      checkpoint: "latest", "best" or a step.
      per_class: also print a table of the classes.
      probes: "knn", "linear" or "knn,linear": what to learn from the features of the train split.
      painters: what else draws, unless `pictures` is False; they get the first stack.

    Returns:
      What `measure` returns, and the JSON file holds; for several stacks {"split", "stacks": [result, ...]}.

    Raises:
      TokenLabError: see `load_each` and `measure`; nothing was written then.
    """
    with here(workdir, push=jax.process_index() == 0 and bool(pictures)) as folder:
        return _run(folder, overrides, split, json, pictures, checkpoint, per_class, probes, painters)


def _run(
    workdir: Path,
    overrides: Mapping[str, Any] | None,
    split: str,
    json: str | Path | None,
    pictures: bool | Literal["all"],
    checkpoint: Which,
    per_class: bool,
    probes: str | None,
    painters: Sequence[Painter],
) -> dict[str, Any]:
    names = () if probes is None else probe.parse(probes)
    trained = load_each(workdir, overrides, checkpoint)
    first = trained[0]
    if split not in first.source.splits:
        first.source.split(split)  # raises, with the nearest name
    results.check_probes(first, split, names)
    for flag, asked in (("--per-class", per_class), ("--pictures", pictures == "all")):
        if asked:
            results.check_classifies(first, flag)
    compilation.use_cache(first.config.compilation_cache)
    measured = results.measure_each(trained, split, names)
    found = [each.result for each in measured]
    answer = found[0] if len(found) == 1 else {"split": split, "stacks": found}
    if jax.process_index() > 0:
        return answer
    _show(trained, found, per_class)
    if json is not None:
        write_json(json, answer)
    if pictures:
        lines = draw(trained, measured, workdir, split, everything=pictures == "all")
        for painter in painters:
            lines += painter(first, split, workdir)
        for line in lines:
            _console().print(line, markup=False, highlight=False, soft_wrap=True)
    return answer


def draw(
    trained: Sequence[Trained], measured: Sequence[Measured], workdir: Path, split: str, *, everything: bool
) -> list[str]:
    """Draw report.png, for stacks that reduce tokens tokens.png, for pictures as codes or with hidden patches
    reconstructions.png.

    Args:
      trained: stacks on the same weights.
      measured: of each, over `split`.
      workdir: of the run, where the pictures go.
      split: of the data.
      everything: also predictions.png (of the first stack), calibration.png and confusion.png.

    Returns:
      A line for each picture: written, or why not.
    """
    from tokenlab.evaluate import (
        class_pictures,
        figures,
        reconstructions,
        tokens_picture,
    )  # matplotlib takes a second to import

    source = trained[0].source
    names = results.class_names(source)
    written, notes = [], []
    if read_metrics(workdir):
        written.append(figures.report(workdir, workdir / "report.png"))
    else:  # imported weights that nobody has trained yet
        notes.append("report.png: no training is recorded here, so there are no curves to draw")
    sections = []
    if codes.gives_codes(trained[0]):
        found = measured[0].result
        title = f"{split}: psnr {found['psnr']:.2f} dB, {found['codes_used']} of {found['codes']} codes used"
        written.append(reconstructions.draw(workdir / "reconstructions.png", trained[0], split, title))
    elif reconstructions.masks(trained[0]):
        found = measured[0].result
        title = f"{split}: loss {found['loss']:.4f}"
        written.append(reconstructions.draw(workdir / "reconstructions.png", trained[0], split, title))
    elif "image" in source.spec:
        batch = tokens_picture.examples(source, split)
        sections = [
            tokens_picture.section(each.model, each.params, batch, title=each.model.stack_text)
            for each in trained
        ]
    if any(section.columns for section in sections):
        written.append(tokens_picture.save(workdir / "tokens.png", batch, sections, names))
    elif everything:
        notes.append("tokens.png: no stack here reduces tokens, so there is nothing to draw")
    if everything:
        titled = [(each.result["stack"], each) for each in measured]
        first = measured[0]
        chosen = class_pictures.choose(first.predictions)
        if "image" in source.spec:
            images = source.read(split, chosen.index)["image"]
            written.append(
                class_pictures.predictions(workdir / "predictions.png", chosen, images, names, titled[0][0])
            )
        else:
            notes.append("predictions.png: the examples are no pictures, so there is nothing to draw")
        curves = [(title, each.calibration) for title, each in titled]
        written.append(class_pictures.calibration(workdir / "calibration.png", curves))
        if len(first.confusion) <= class_pictures.MOST_CLASSES:
            matrices = [(title, each.confusion) for title, each in titled]
            written.append(class_pictures.confusion(workdir / "confusion.png", matrices, names))
        else:
            most = class_pictures.MOST_CLASSES
            notes.append(
                f"confusion.png: drawn of at most {most} classes, and here are {len(first.confusion)}"
            )
    return [*(f"wrote {path}" for path in written), *notes]


def _show(trained: Sequence[Trained], found: Sequence[Mapping[str, Any]], per_class: bool) -> None:
    console = _console()
    for note in dict.fromkeys(note for each in trained for note in each.notes):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if len(found) == 1:
        console.print(tables.one(found[0]))
    else:
        console.print(tables.several(found, trained[0].task.primary))
    if per_class:
        for result in found:
            console.print(tables.classes(result))
            for line in tables.confused(result, results.class_names(trained[0].source)):
                console.print(line, markup=False, highlight=False, soft_wrap=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)
