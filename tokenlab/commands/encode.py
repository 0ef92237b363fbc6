"""`tokenlab encode`: turn pictures into codes with a trained tokenizer."""

from __future__ import annotations

from tokenlab.commands.common import trained_workdir, which_checkpoint
from tokenlab.core.files import check_writable
from tokenlab.core.flags import Arguments, Command, Flag


def run(arguments: Arguments) -> None:
    """Turn pictures into codes with a trained tokenizer."""
    given = arguments.values
    workdir = trained_workdir(given["workdir"])
    check_writable(given["out"], "--out")
    checkpoint = which_checkpoint(given["checkpoint"])
    from tokenlab.evaluate.encode import run

    run(
        workdir,
        given["out"],
        None if given["split"] is None else given["split"].split(","),
        overrides=dict(arguments.overrides),
        checkpoint=checkpoint,
        overwrite="overwrite" in arguments.switches,
    )


COMMAND = Command(
    run,
    "turn every picture into codes with a trained tokenizer, in a file that gives the pictures again",
    (
        Flag("workdir", "folder of a training run, or gs://BUCKET/FOLDER", "DIR", required=True),
        Flag("out", "the file to write", "FILE.npz", required=True),
        Flag("split", "splits of the data (default: all)", "NAME,NAME"),
        Flag("checkpoint", "the newest, the best, or that of a step", "latest|best|STEP", default="latest"),
        Flag("overwrite", "replace FILE.npz where it exists"),
    ),
    overrides=True,
    more="docs/image-tokenizer.md says what the file holds.",
)
