"""`tokenlab train`: train what a configuration describes, or go on with it."""

from __future__ import annotations

from tokenlab.commands.common import CONFIG, HOSTS, joined
from tokenlab.core.flags import Arguments, Command, Flag


def run(arguments: Arguments) -> None:
    """Train what a configuration describes, or go on with it."""
    from tokenlab.core import config

    wanted = config.override(config.load(arguments.values["config"]), arguments.overrides)
    with joined("train", arguments):
        from tokenlab.train import run

        sampler = None
        if wanted.get("sample_every"):
            from tokenlab.generate import Samples as sampler

        run(wanted, arguments.values["workdir"], profile="profile" in arguments.switches, sampler=sampler)


COMMAND = Command(
    run,
    "train what a configuration describes, or go on with it",
    (
        CONFIG,
        Flag("workdir", "folder of the run, or gs://BUCKET/FOLDER; made when missing", "DIR", required=True),
        Flag("profile", "trace three steps into DIR/profile, with a summary of what took longest"),
        *HOSTS,
    ),
    overrides=True,
)
