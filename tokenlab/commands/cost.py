"""`tokenlab cost`: print what a configuration costs; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

from tokenlab.commands.common import CONFIG, JSON, PIPE_WIDTH, writable
from tokenlab.core.flags import Arguments, Command, Flag


def run(arguments: Arguments) -> None:
    """Print what a configuration costs; nothing is trained."""
    from tokenlab.core import config

    target = writable(arguments.values["json"])
    wanted = config.override(config.load(arguments.values["config"]), arguments.overrides)
    from tokenlab.evaluate import cost_report

    table = cost_report(wanted, chip=arguments.values["chip"])
    if target is not None:
        Path(target).write_text(json.dumps(table.to_json(), indent=2) + "\n", encoding="utf-8")
    if "markdown" in arguments.switches:
        print(table.to_markdown(), end="")
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console = Console(width=PIPE_WIDTH)
        console.print(table.to_rich(width=console.width))


COMMAND = Command(
    run,
    "count tokens, parameters and FLOPs of a configuration, layer by layer",
    (
        CONFIG,
        JSON,
        Flag("markdown", "print the table in Markdown"),
        Flag(
            "chip",
            'also print the roofline on a chip such as "TPU v5e", or on this machine: here',
            "NAME",
        ),
    ),
    overrides=True,
)
