"""`tokenlab data`: list the data sets there are, show one, count n-grams in one, or prepare one."""

from __future__ import annotations

import dataclasses

from tokenlab.commands.common import CONFIG
from tokenlab.core.errors import ConfigError
from tokenlab.core.flags import Arguments, Command, Flag, number


def run(arguments: Arguments) -> None:
    """List the data sets there are, show one, count n-grams in one, or prepare one."""
    given, described = arguments.values, None
    order = number("data: --order", given["order"])
    if given["config"] is not None:
        from tokenlab.core import config

        wanted = config.override(config.load(given["config"]), arguments.overrides)
        if "data" not in wanted:
            raise ConfigError(
                f"data: {given['config']} has no config.data; expected a configuration for training."
            )
        described = wanted.data
    elif arguments.overrides:
        raise ConfigError("data: --config.KEY=VALUE changes a configuration; give it with --config=FILE.")
    from tokenlab.data import show

    flags = {"data_dir": given["data-dir"], "png": given["png"], "split": given["split"], "order": order}
    show.run(arguments.words, config=described, **flags)


COMMAND = Command(
    run,
    "list the data sets there are, show one, count n-grams in text, or prepare a set of TFDS",
    (
        dataclasses.replace(CONFIG, help="show and ngram: the data of a configuration", required=False),
        Flag("data-dir", "folder of TFDS sets (default: $TFDS_DATA_DIR, else TFDS's own)", "DIR"),
        Flag("png", "show: the contact sheet (default: NAME.png in this folder)", "FILE"),
        Flag(
            "split",
            "show: split to count and draw (default: train, else the first); ngram: to predict (validation)",
            "NAME",
        ),
        Flag("order", "ngram: the longest n-gram, 1 to 5 (default: 5)", "N"),
    ),
    overrides=True,
    words="(list | show NAME | show --config=FILE | ngram --config=FILE | prepare NAME)",
    more="NAME is a TFDS set in that folder, the folder of one, or a source that needs no files.",
)
