"""`tokenlab generate`: generate text, pictures or captions from trained weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokenlab.commands.common import trained_workdir, which_checkpoint
from tokenlab.core.errors import ConfigError
from tokenlab.core.files import check_writable
from tokenlab.core.flags import Arguments, Command, Flag, decimal, number


def run(arguments: Arguments) -> None:
    """Generate text, pictures or captions from trained weights."""
    given = arguments.values
    workdir = trained_workdir(given["workdir"])
    from_picture = [name for name in ("image", "example") if given[name] is not None]
    if len(from_picture) == 2:
        raise ConfigError("generate: give a picture, either with --image=FILE or with --example=N.")
    what = f"--{from_picture[0]}" if from_picture else "--picture" if arguments.switches else "text"
    _check_kind(what, given, arguments.switches)
    prompts = () if from_picture else _prompts(given)
    whole = {
        name: number(f"generate: --{name}", given[name])
        for name in ("tokens", "top-k", "prompt-tokens", "seed", "samples", "example")
    }
    share = {name: decimal(f"generate: --{name}", given[name]) for name in ("temperature", "top-p")}
    checkpoint = which_checkpoint(given["checkpoint"])
    if given["out"] is not None:
        check_writable(given["out"], "--out")
    from tokenlab import generate as generation
    from tokenlab.ops.sample import Sampling

    how: dict[str, Any] = {
        "sampling": Sampling(share["temperature"], whole["top-k"], share["top-p"]),
        "seed": whole["seed"],
        "overrides": dict(arguments.overrides),
        "checkpoint": checkpoint,
    }
    optional = {name: whole[name] for name in ("tokens", "samples") if whole[name] is not None}
    if from_picture:
        chosen = {"image": given["image"], "example": whole["example"]}
        split = {} if given["split"] is None else {"split": given["split"]}
        generation.describe(workdir, **chosen, **split, **optional, **how)
    elif arguments.switches:
        generation.draw(workdir, prompts, given["out"], **optional, **how)
    else:
        generation.run(workdir, prompts, prompt_tokens=whole["prompt-tokens"], **optional, **how)


_OF_KIND = {
    "text": ("prompt", "prompts", "tokens", "prompt-tokens"),
    "--picture": ("prompt", "prompts", "out", "samples"),
    "--image": ("image", "tokens"),
    "--example": ("example", "split", "tokens"),
}
"""Flags of `generate` that not everything takes, by what is generated."""


def _check_kind(what: str, given: Mapping[str, str | None], switches: Collection[str]) -> None:
    """Raise a ConfigError for a flag that has no meaning for what is to be generated."""
    owners = {name: [kind for kind, names in _OF_KIND.items() if name in names] for name in given}
    for name, value in given.items():
        if value is not None and owners[name] and what not in owners[name]:
            whose = " or ".join(owners[name])
            raise ConfigError(
                f"generate: --{name} goes with {whose}, and not with {what}: leave one of them out."
            )
    if what in ("--image", "--example") and "picture" in switches:
        raise ConfigError(f"generate: --picture draws a picture and {what} reads one: leave one of them out.")
    if what == "--picture" and given["out"] is None:
        raise ConfigError("generate: --out=FILE.png is missing: expected the file for the pictures.")


def _prompts(given: Mapping[str, str | None]) -> list[str]:
    if (given["prompt"] is None) == (given["prompts"] is None):
        raise ConfigError("generate: give a prompt with --prompt=TEXT, or several with --prompts=FILE.")
    if given["prompt"] is not None:
        return [given["prompt"]]
    try:
        return Path(given["prompts"]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"generate: --prompts={given['prompts']} cannot be read: {error}.") from None


COMMAND = Command(
    run,
    "generate text behind a prompt with a trained language model, pictures of captions, captions of pictures",
    (
        Flag("workdir", "folder of a training run, or gs://BUCKET/FOLDER", "DIR", required=True),
        Flag("prompt", "what the text begins with; at least a character", "TEXT"),
        Flag("prompts", "several at once: a file with one a line", "FILE"),
        Flag("picture", "draw pictures; the prompts are their captions (of a run on pictures and text)"),
        Flag("out", "of --picture: the sheet to write, with the caption above each", "FILE.png"),
        Flag("samples", "of --picture: pictures of each caption (default: 4)", "N"),
        Flag(
            "image",
            "a picture to say what it shows, in grey levels (of a run on pictures and text)",
            "FILE",
        ),
        Flag("example", "in its place, a picture of the run's data by its number, from 0", "N"),
        Flag("split", "of --example: split of the data (default: validation)", "NAME"),
        Flag(
            "tokens",
            "most tokens to generate (default: 256; captions: as many as a row has room for)",
            "N",
        ),
        Flag("temperature", "divides the logits; 0 takes the likeliest token", "T", default="0.8"),
        Flag("top-k", "draw from the K likeliest tokens", "K"),
        Flag("top-p", "draw from the likeliest tokens of together this probability", "P"),
        Flag("seed", "of the draws", "N", default="0"),
        Flag("prompt-tokens", "longest prompt to compile for (default: the training length)", "N"),
        Flag("checkpoint", "the newest, the best, or that of a step", "latest|best|STEP", default="latest"),
    ),
    overrides=True,
    more="--config.eval.stack=STACK generates with another stack on the same weights.",
)
