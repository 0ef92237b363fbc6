"""`tokenlab encode`: every picture of a data set as codes, in a file that gives the pictures again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tokenlab.core.errors import ConfigError, DataError
from tokenlab.evaluate import codes
from tokenlab.evaluate.trained import load
from tokenlab.models.codes_file import Coded, check_fits
from tokenlab.tasks.reconstruct import psnr
from tokenlab.train import compilation
from tokenlab.train.manifest import Which
from tokenlab.train.records import write_atomic


def run(
    workdir: str | Path,
    out: str | Path,
    splits: Sequence[str] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    checkpoint: Which = "latest",
    overwrite: bool = False,
) -> Coded:
    """Encode splits with the weights of a run and write `out` (`tokenlab.models.codes_file`), whole or not at all.

    Args:
      workdir: of a training run of `vq_image`.
      out: the file; a folder for it must be there.
      splits: names; None for all of the data.
      overrides: dotted key -> text or value, as `tokenlab evaluate` takes.
      checkpoint: "latest", "best" or a step.
      overwrite: an existing file may be replaced.

    Returns:
      What the file holds. It also prints a line: pictures, codes used, PSNR of each split.

    Raises:
      ConfigError: the file exists, the run is of no tokenizer of pictures, or it has more codes than uint16 holds.
      DataError: no such split, or a picture that cannot be read.
      TokenLabError: as `tokenlab.evaluate.trained.load`; or `out` cannot be written.
    """
    out = Path(out)
    _check_free(out, overwrite)
    trained = load(workdir, overrides, checkpoint)
    if not codes.gives_codes(trained):
        name = trained.config.model.get("name", "vit")
        raise ConfigError(
            f"encode needs a run of a tokenizer of pictures; {workdir} trained {name!r}. Train one with "
            "configs/vq_digits.py."
        )
    model, source = trained.model, trained.source
    check_fits(model.codes_count)
    names = tuple(source.splits) if splits is None else tuple(splits)
    for name in names:
        source.split(name)  # raises, with the nearest name
    compilation.use_cache(trained.config.compilation_cache)
    coder = codes.Coder(trained)
    found = {name: coder(name) for name in names}
    for name, each in found.items():
        if each.left_out:
            raise DataError(
                f"{each.left_out} records of split {name!r} cannot be read, and a file of codes has a picture for "
                "each: mend the data, or leave them out of the split with config.data.splits."
            )
    value_range = trained.task.settings.value_range
    coded = Coded(
        source=source.name,
        fingerprint=source.fingerprint,
        num_codes=model.codes_count,
        grid=model.grid,
        image=model.image,
        value_range=value_range,
        model=model.described,
        codes={name: each.codes for name, each in found.items()},
        decoder=model.decoder_state(trained.params),
    )
    if jax.process_index() > 0:
        return coded
    _check_free(out, overwrite)  # again: it took a while
    write_atomic(out, coded.to_bytes())
    usage = codes.used((each.codes for each in found.values()), model.codes_count)
    told = ", ".join(
        f"{name} {len(each.codes)} pictures {psnr(each.mse, value_range):.2f} dB"
        for name, each in found.items()
    )
    print(
        f"wrote {out}: {usage['codes_used']} of {usage['codes']} codes used (perplexity "
        f"{usage['code_perplexity']:.1f}), {model.grid[0]}x{model.grid[1]} a picture; psnr: {told}"
    )
    return coded


def _check_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ConfigError(f"--out={out} exists already: give another file, or --overwrite to replace it.")
