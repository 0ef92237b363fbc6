"""`tokenlab compare`: train the arms of a comparison under one budget, or go on with it, and write the report."""

from __future__ import annotations

from tokenlab.commands.common import CONFIG
from tokenlab.core.flags import Arguments, Command, Flag


def run(arguments: Arguments) -> None:
    """Train the arms of a comparison under one budget, or go on with it, and write the report."""
    from tokenlab.core import config

    given = arguments.values
    wanted = config.override(config.load(given["config"]), arguments.overrides)
    from tokenlab.compare import command

    said = {name: value for name, value in given.items() if name in ("config", "workdir") and value}
    command.run(
        wanted,
        given["workdir"],
        share=command.read_share(given["arms"]),
        arms=() if given["arm"] is None else (given["arm"],),
        training="report" not in arguments.switches,
        command=command.spelled(said, arguments.overrides),
    )


COMMAND = Command(
    run,
    "train several arms under one budget from several seeds, and write a report",
    (
        CONFIG,
        Flag("workdir", "folder of the comparison; made when missing", "DIR", required=True),
        Flag("arms", "train only the I-th of N shares of the runs, as one of N machines", "I/N"),
        Flag("arm", "train only this arm", "NAME"),
        Flag("report", "train nothing: collect the finished runs and write the report"),
    ),
    overrides=True,
    more="A rerun goes on where the last one ended; runs that are finished stay as they are.",
)
