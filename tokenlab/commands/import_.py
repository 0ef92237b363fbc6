"""`tokenlab import`: make a workdir of the weights in a file."""

from __future__ import annotations

from pathlib import Path

from tokenlab.commands.common import CONFIG
from tokenlab.core.errors import ConfigError
from tokenlab.core.flags import Arguments, Command, Flag


def run(arguments: Arguments) -> None:
    """Make a workdir of the weights in a file."""
    if len(arguments.words) != 1:
        raise ConfigError(f"import: expected one FILE.safetensors, got {len(arguments.words)} files.")
    if not Path(arguments.words[0]).is_file():
        raise ConfigError(f"import: {arguments.words[0]} is not a file: expected FILE.safetensors.")
    from tokenlab.core import config

    wanted = config.override(config.load(arguments.values["config"]), arguments.overrides)
    from tokenlab.interop import import_weights

    notes = import_weights(
        arguments.words[0],
        arguments.values["workdir"],
        wanted,
        given=arguments.overrides,
        fresh_head="fresh-head" in arguments.switches,
    )
    print("\n".join(notes))


COMMAND = Command(
    run,
    "make a workdir of weights from timm, Hugging Face or DINOv2",
    (
        CONFIG,
        Flag("workdir", "folder to make", "DIR", required=True),
        Flag("fresh-head", "start the classifier at zeros instead of taking the file's"),
    ),
    overrides=True,
    words="FILE.safetensors",
    more="The configuration supplies data and task; the settings of the model come from the weights.",
)
