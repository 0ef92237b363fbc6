"""`tokenlab data list | show | ngram | prepare`: what data there is, what it looks like, and getting more."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tokenlab.core import names
from tokenlab.core.errors import ConfigError, DataError, NameLookupError, suggest
from tokenlab.core.files import check_writable
from tokenlab.data import pixels, prepared, source_of
from tokenlab.data.image_text import show as image_text_show
from tokenlab.data.source import ENCODED, Source, check_split
from tokenlab.data.text import show as text_show
from tokenlab.data.text.ngram import MOST_ORDER

SOURCES = "tokenlab.data.sources"
ACTIONS = ("list", "show", "ngram", "prepare")
FLAGS = {
    "config": ("show", "ngram"),
    "data-dir": ("list", "show", "prepare"),
    "png": ("show",),
    "split": ("show", "ngram"),
    "order": ("ngram",),
}
"""Flag -> the actions that take it."""

COLUMNS, ROWS = 10, 20
"""Examples a class, and classes, on the contact sheet."""

MOST_BYTES = 1 << 30
"""Of pictures read to count classes: of a larger split the first part is counted, and the output says so."""

MOST_LINES = 60
_CHUNK = 512


def run(
    words: Sequence[str],
    *,
    config: Mapping[str, Any] | None = None,
    data_dir: str | None = None,
    png: str | None = None,
    split: str | None = None,
    order: int | None = None,
) -> None:
    """Do what the words of the command say and print the answer.

    Args:
      words: "list"; "show" or "prepare" and a name; with `config`, "show" or "ngram" alone.
      config: a `config.data`.
      data_dir: folder of prepared TFDS sets, see `prepared.data_dir`.
      png: of `show`: where the contact sheet goes; None for NAME.png in the current folder.
      split: of `show`: which split is counted and drawn; None for "train", else the first. Of `ngram`: which is
        predicted; None for "validation".
      order: of `ngram`: the longest n-gram; None for the longest that there is.

    Raises:
      ConfigError: words or flags that do not go together.
      DataError: data that is not there or cannot be read.
    """
    action, *rest = words or ("",)
    if action not in ACTIONS:
        given = f"data: unknown action {action!r}" if action else "data: an action is missing"
        raise NameLookupError(f"{given}.{suggest(action, ACTIONS)}")
    flags = {"config": config, "data-dir": data_dir, "png": png, "split": split, "order": order}
    for flag, value in flags.items():
        if value is not None and action not in FLAGS[flag]:
            whose = " and ".join(f"`data {each}`" for each in FLAGS[flag])
            raise ConfigError(f"data {action} takes no --{flag}: it belongs to {whose}.")
    if action == "ngram" and config is None:
        raise ConfigError(
            "data ngram: --config=FILE is missing: expected a configuration whose data is text."
        )
    if config is not None and data_dir is not None:
        raise ConfigError("data show: --data-dir is for a NAME; with --config set --config.data.data_dir.")
    expected = 0 if action == "list" or config is not None else 1
    if len(rest) != expected:
        usage = f"data {action}" + (" --config=FILE" if config is not None else " NAME" * expected)
        raise ConfigError(f"data {action}: got {len(rest)} names: expected `{usage}`.")
    if action == "list":
        if data_dir and not epath.Path(data_dir).expanduser().is_dir():
            raise DataError(f"--data-dir={data_dir} is no folder: expected one with prepared TFDS sets.")
        print("\n".join(list_lines(prepared.data_dir(data_dir))))
    elif action == "prepare":
        prepare(rest[0], prepared.data_dir(data_dir))
    elif config is None:
        show(rest[0], data_dir=data_dir, png=png, split=split)
    elif action == "show":
        source = source_of(config)
        show_source(source, _source_lines(source), png=png, split=split)
    else:
        order = MOST_ORDER if order is None else order
        print("\n".join(text_show.ngram_lines(source_of(config), split or "validation", order)))


def list_lines(folder: str) -> list[str]:
    """A line for each prepared set in `folder`, then one for each source that needs no files."""
    rows = []
    for name, path in prepared.scan(folder):
        try:
            found = prepared.read(path)
        except DataError as error:
            rows.append((name, Path(path).name, "", str(error)))
            continue
        splits = ", ".join(f"{split} {count:,}" for split, count in found.counts().items())
        other = (
            "" if prepared.FORMAT in found.file_formats else f"  ({found.file_formats[0]}: not readable here)"
        )
        rows.append((name, found.version, _size(sum(found.num_bytes.values())), splits + other))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [f"prepared TFDS sets in {folder}"]
    for row in rows:
        lines.append(f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}")
    if not rows:
        lines.append(f"  (none; --data-dir=DIR or {prepared.DATA_DIR_VARIABLE} names another folder)")
    embedded = _embedded()
    lines += ["", "sources that need no files"]
    width = max(map(len, embedded), default=0)
    return lines + [f"  {name:<{width}}  {summary}" for name, summary in embedded.items()]


def _embedded() -> dict[str, str]:
    """Summaries of the sources that need no settings: what they hold comes with the package."""
    return {
        module.name: module.summary
        for module in names.list_modules(SOURCES, defines="build")
        if not _needed(names.find_attr(SOURCES, module.name, "Config"))
    }


def _needed(config: Any) -> list[str]:
    """The fields of a source's `Config` that have no default."""
    return [
        each.name for each in fields(config) if each.default is MISSING and each.default_factory is MISSING
    ]


def show(name: str, *, data_dir: str | None = None, png: str | None = None, split: str | None = None) -> None:
    """Print what a set holds and draw its contact sheet, or print its first texts.

    Args:
      name: a TFDS set or its folder as in `prepared.find`, or a source that needs no files.
      data_dir, png, split: see `run`.

    Raises:
      DataError: the set is not there, holds neither pictures nor text, or a record cannot be read.
      ConfigError: the picture cannot be written there.
    """
    embedded = _embedded()
    if name in embedded:
        source = source_of({"name": name})
        show_source(source, _source_lines(source, "  (comes with the package)"), png=png, split=split)
        return
    from tokenlab.data.sources import tfds, tfds_text

    found = _find(name, data_dir, embedded)
    if tfds_text.texts(found) and not any(feature.kind == "image" for feature in found.features.values()):
        config = {"name": "tfds_text", "dataset": name, **({"data_dir": data_dir} if data_dir else {})}
        source = source_of(config)
    else:
        source = tfds.TfdsSource(found)
    show_source(source, _described(found), png=png, split=split)


def show_source(
    source: Source, lines: Sequence[str], *, png: str | None = None, split: str | None = None
) -> None:
    """Print `lines`, what a source holds, and its first texts; of pictures draw a contact sheet instead.

    Args:
      source: of pictures, of text, or of rows of both.
      lines: what to say first.
      png, split: see `run`.

    Raises:
      DataError: there is no such split, the source holds neither pictures nor text, or a record cannot be read.
      ConfigError: the picture cannot be written there.
    """
    if split is None:
        split = "train" if "train" in source.splits else next(iter(source.splits))
    check_split(source, split)
    for shown in (text_show, image_text_show):
        if shown.is_text(source):
            if png is not None:
                raise ConfigError(f"data show: --png is for pictures, and source {source.name!r} holds text.")
            print("\n".join([*lines, *shown.show_lines(source, split)]))
            return
    target = Path(png or f"{source.name.replace('/', '-')}.png")
    check_writable(target, "--png")
    sample = _sample(source, split)
    print("\n".join([*lines, *_class_lines(source, split, sample)]))
    _draw(source, split, sample, target)
    print(f"  wrote {target}")


def _source_lines(source: Source, note: str = "") -> list[str]:
    if text_show.is_text(source) or image_text_show.is_text(source):  # more is said of each split
        return [f"{source.name}{note}"]
    counts = ", ".join(f"{each} {count:,}" for each, count in source.splits.items())
    lines = [f"{source.name}{note}", f"  splits    {counts}"]
    for key, (shape, dtype) in source.spec.items():
        lines.append(f"  {key:<8}  {dtype} {list(shape)}")
    return lines


def _find(name: str, data_dir: str | None, embedded: Collection[str]) -> prepared.Prepared:
    """The prepared set `name`; the errors know of the sources, which may have been meant."""
    _check_name(name)
    if name in [module.name for module in names.list_modules(SOURCES)]:
        raise ConfigError(
            f"data show: {name!r} is a source with settings of its own, which `show` does not take; expected a TFDS "
            f"set, the folder of one, {', '.join(embedded)}, or --config=FILE."
        )
    try:
        return prepared.find(name, data_dir)
    except DataError as error:
        near = suggest(name, embedded)
        raise DataError(f"{error}{near}" if "mean" in near else str(error)) from error


def _check_name(name: str) -> None:
    if name.startswith(":"):
        raise DataError(f"{name!r} has no name before its version; expected NAME{name}.")


def _described(found: prepared.Prepared) -> list[str]:
    counts = found.counts()
    splits = ", ".join(f"{each} {counts[each]:,} ({_size(found.num_bytes[each])})" for each in counts)
    width = max(map(len, found.features), default=0)
    return [
        f"{found.name} {found.version}",
        f"  folder    {found.folder}",
        f"  format    {', '.join(found.file_formats)}",
        f"  splits    {splits}",
        "  features",
        *(f"    {key:<{width}}  {feature}" for key, feature in found.features.items()),
    ]


@dataclass(frozen=True)
class _Sample:
    """What was read of a split: how many records, of each class, and the first examples of each class.

    `examples` has (record index, image) by label, and by 0, 1, ... for a source without labels, ten a row.
    """

    read: int
    counts: dict[int, int]
    examples: dict[int, list[tuple[int, Any]]]


def _sample(source: Source, split: str) -> _Sample:
    if "image" not in source.spec:
        raise DataError(
            f"source {source.name!r} has neither pictures nor text; its keys: {', '.join(source.spec)}."
        )
    records = source.split(split)
    labelled = "label" in source.spec and source.num_classes is not None
    counts: dict[int, int] = {}
    examples: dict[int, list[tuple[int, Any]]] = {}
    total = size = 0
    while total < len(records) and size < MOST_BYTES:
        batch = records.batch(np.arange(total, min(total + _CHUNK, len(records))))
        for row, image in enumerate(batch["image"]):
            label = int(batch["label"][row]) if labelled else (total + row) // COLUMNS
            counts[label] = counts.get(label, 0) + 1
            size += len(image) if isinstance(image, bytes) else image.nbytes
            if len(examples.setdefault(label, [])) < COLUMNS:
                examples[label].append((total + row, image))
        total += len(batch["image"])
        if not labelled and total >= ROWS * COLUMNS:
            break
    return _Sample(total, dict(sorted(counts.items())), dict(sorted(examples.items())))


def _class_lines(source: Source, split: str, sample: _Sample) -> list[str]:
    if source.num_classes is None:
        return ["  no classes"]
    part = "" if sample.read == source.splits[split] else f", counted in the first {sample.read:,} records"
    lines = [f"  classes of {split!r}{part}"]
    width = max(len(_class_name(source, label)) for label in range(source.num_classes))
    for label in range(min(source.num_classes, MOST_LINES)):
        lines.append(
            f"    {label:>4}  {_class_name(source, label):<{width}}  {sample.counts.get(label, 0):>9,}"
        )
    if source.num_classes > MOST_LINES:
        lines.append(f"    ... and {source.num_classes - MOST_LINES:,} more")
    for label in sample.counts:
        if not 0 <= label < source.num_classes:
            lines.append(f"    {label:>4}  is no class: {sample.counts[label]:,} records have this label")
    return lines


def _class_name(source: Source, label: int) -> str:
    known = source.class_names
    return known[label] if known and 0 <= label < len(known) else str(label)


def _draw(source: Source, split: str, sample: _Sample, target: Path) -> None:
    """Write the contact sheet: a row a class, a column an example; the file is the old one or the new one, whole."""
    import cv2
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(sample.examples)[:ROWS]
    rows = [[_picture(source, split, *each) for each in sample.examples[label]] for label in labels]
    cell = min(max(max(image.shape[:2]) for row in rows for image in row), 96)
    cell, gap = max(cell, 48), 4
    canvas = np.full((len(rows) * (cell + gap), COLUMNS * (cell + gap), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            scale = cell / max(image.shape[:2])
            height, width = (max(1, math.floor(side * scale)) for side in image.shape[:2])
            how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
            top, left = (i * (cell + gap) + (cell - height) // 2, j * (cell + gap) + (cell - width) // 2)
            canvas[top : top + height, left : left + width] = cv2.resize(
                image, (width, height), interpolation=how
            )
    scale = 1.0 / 100  # inches a pixel
    size = (canvas.shape[1] * scale + 2.5, canvas.shape[0] * scale + 0.6)
    figure = Figure(figsize=size, dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(canvas)
    axes.set_xticks([])
    centres = [i * (cell + gap) + cell / 2 for i in range(len(rows))]
    axes.set_yticks(centres, [_row_title(source, sample, label) for label in labels])
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    more = f", {len(labels)} of {len(sample.examples)} classes" if len(labels) < len(sample.examples) else ""
    axes.set_title(f"{source.name}, {split}: first examples of each class{more}", fontsize=10, loc="left")
    temporary = target.with_name(f".{target.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(target)


def _row_title(source: Source, sample: _Sample, label: int) -> str:
    if source.num_classes is None:
        return str(sample.examples[label][0][0])
    # A dollar sign would begin a formula.
    return f"{_class_name(source, label)}  {sample.counts[label]:,}".replace("$", r"\$")


def _picture(source: Source, split: str, index: int, image: Any) -> np.ndarray:
    """An image as uint8 [H, W, 3]; floats are stretched from their least to their greatest value."""
    shape, dtype = source.spec["image"]
    if dtype == ENCODED:
        try:
            image = pixels.decode(image, shape)
        except DataError as error:
            raise DataError(f"source {source.name!r}, split {split!r}: record {index}: {error}.") from error
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = ((image.astype(np.float32) - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    if image.ndim == 2:
        image = image[..., None]
    return np.ascontiguousarray(np.broadcast_to(image[..., :3], (*image.shape[:2], 3)))


def prepare(name: str, folder: str) -> None:
    """Let TFDS download and prepare a set that it knows, as array_record files.

    Raises:
      DataError: TensorFlow is not installed, TFDS knows no such set, or preparing it fails.
    """
    _check_name(name)
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        raise DataError(
            f"preparing {name!r} needs TensorFlow, which reading does not: install tokenlab-jax[prepare]."
        ) from None
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=folder)
        builder.download_and_prepare(file_format=prepared.FORMAT)
    except Exception as error:  # of many kinds, from network to disk: whatever it is, it is told in one line
        first = next(iter(str(error).strip().splitlines()), "")
        raise DataError(f"TFDS cannot prepare {name!r}: {type(error).__name__}: {first}") from error
    found = prepared.read(builder.data_dir)
    if (
        prepared.FORMAT not in found.file_formats
    ):  # TFDS leaves alone what was prepared before in another format
        raise DataError(prepared.convert_hint(found))
    print(f"prepared {found.name} {found.version} in {found.folder}")


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
