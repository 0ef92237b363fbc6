"""`tokenlab benchmark`: time a configuration or a suite beside the dense stack of as many blocks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tokenlab.commands.common import CONFIG, JSON, writable
from tokenlab.core.errors import ConfigError
from tokenlab.core.flags import Arguments, Command, Flag, number


def run(arguments: Arguments) -> None:
    """Time a configuration or a suite beside the dense stack of as many blocks."""
    given = arguments.values
    numbers = {name: number(f"benchmark: --{name}", given[name]) for name in ("rounds", "batch")}
    target, wanted = writable(given["json"]), None
    if given["config"] is not None:
        from tokenlab.core import config

        wanted = config.override(config.load(given["config"]), arguments.overrides)
    elif arguments.overrides:
        raise ConfigError(
            "benchmark: --config.KEY=VALUE changes a configuration; give it with --config=FILE."
        )
    from tokenlab.bench import run

    run(
        wanted,
        name=Path((given["config"] or "").partition(":")[0]).stem,
        suite=given["suite"],
        size=given["size"],
        mode=given["mode"],
        json=target,
        markdown="markdown" in arguments.switches,
        profile=given["profile"],
        **numbers,
    )


COMMAND = Command(
    run,
    "time train step and inference of a configuration or a suite beside the dense stack",
    (
        dataclasses.replace(CONFIG, required=False),
        Flag("suite", "what to time instead: core, every item and method", "NAME"),
        Flag("size", "of the suite: cpu or accelerator (default: by the device)", "NAME"),
        Flag("mode", "train, inference or both", "NAME", default="both"),
        Flag("rounds", "timed rounds, at least 3", "N"),
        Flag("batch", "examples a step (default: the configuration's or the suite's)", "N"),
        JSON,
        Flag("markdown", "print the table in Markdown"),
        Flag("profile", "trace three steps of each stack into folders of this one", "DIR"),
    ),
    overrides=True,
    more="docs/benchmark.md says how to read the figures.",
)
