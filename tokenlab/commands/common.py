"""What several commands share: flags, and checks of what was given to them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from tokenlab.core.bucket import is_address
from tokenlab.core.errors import ConfigError
from tokenlab.core.files import check_writable
from tokenlab.core.flags import Arguments, Flag, decimal, number

PIPE_WIDTH = 160  # columns of a table that does not go to a terminal
EXIT_DOES_NOT_FIT = 3

CONFIG = Flag("config", "a Python file, an argument for it after a colon", "FILE[:ARG]", required=True)
JSON = Flag("json", "also write the result to this file", "FILE")
_WAITS = ("start-timeout", "host-timeout", "stuck-timeout")
HOSTS = (
    Flag("coordinator", "of a job of several processes: address of process 0 (docs/scale.md)", "HOST:PORT"),
    Flag("process-id", "of this process, from 0", "K"),
    Flag("num-processes", "of the job; 1: this one is alone, whatever Slurm or a TPU says", "N"),
    Flag("start-timeout", "in which all processes have to report (default: 300)", "SECONDS"),
    Flag("host-timeout", "of silence after which a process counts as gone (default: 60)", "SECONDS"),
    Flag("stuck-timeout", "without a step anywhere after which the job is stuck (default: 1800)", "SECONDS"),
)


def joined(name: str, arguments: Arguments, *, preemption: bool = True) -> AbstractContextManager[None]:
    """The job of several processes that this one is part of, by its flags or its surroundings; see `sharding.hosts`."""
    given = arguments.values
    count, which = (number(f"{name}: --{flag}", given[flag]) for flag in ("num-processes", "process-id"))
    waits = {flag: decimal(f"{name}: --{flag}", given[flag]) for flag in _WAITS if given[flag] is not None}
    from tokenlab.sharding import hosts

    place = hosts.find(given["coordinator"], count, which)
    for flag, seconds in waits.items():
        if place is None:
            raise ConfigError(
                f"{name}: --{flag} is for jobs of several processes, and this one is alone: leave it out."
            )
        if not 0 < seconds < float("inf"):
            raise ConfigError(f"{name}: --{flag}={given[flag]}: expected seconds > 0.")
    return hosts.joined(
        place, preemption=preemption, **{flag.replace("-", "_"): seconds for flag, seconds in waits.items()}
    )


def writable(path: str | None) -> str | None:
    """Check before the work is done that its result can be written."""
    if path is not None:
        check_writable(path, "--json")
    return path


def trained_workdir(text: str) -> str:
    """Check that there is a folder, where `--workdir` is not an address."""
    if not is_address(text) and not Path(text).is_dir():
        raise ConfigError(f"--workdir={text} is not a folder: expected the workdir of a training run.")
    return text


def which_checkpoint(text: str) -> int | str:
    """What `--checkpoint` names: "latest", "best", or a step."""
    if text in ("latest", "best"):
        return text
    if text.isdecimal() and len(text) < 16:
        return int(text)
    raise ConfigError(f"--checkpoint={text}: expected latest, best, or a step such as 3000.")
