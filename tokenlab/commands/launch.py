"""`tokenlab launch`: train on several processes: here, under Slurm, on TPU VMs or on Kubernetes."""

from __future__ import annotations

from tokenlab.commands.common import CONFIG
from tokenlab.core.flags import Arguments, Command, Flag


def run(arguments: Arguments) -> None:
    """Train on several processes: here, under Slurm, on TPU VMs or on Kubernetes."""
    from tokenlab.launch import run

    given = arguments.values
    run(
        given["target"],
        given["config"],
        given["workdir"],
        changes=arguments.overrides,
        settings=arguments.settings,
        dry_run="dry-run" in arguments.switches,
    )


COMMAND = Command(
    run,
    "train on several processes: here, under Slurm, on TPU VMs or on Kubernetes",
    (
        Flag("target", "where: local, slurm, tpu-vm, gke or jobset", "NAME", required=True),
        CONFIG,
        Flag("workdir", "folder of the run, or gs://BUCKET/FOLDER", "DIR", required=True),
        Flag("dry-run", "print what would be run; write and run nothing"),
    ),
    overrides=True,
    settings="launch",
    more="docs/launch.md has the settings of each target. The same command again goes on with the run.",
)
