"""`tokenlab evaluate`: evaluate trained weights, with another stack if one is given."""

from __future__ import annotations

from tokenlab.commands.common import HOSTS, JSON, joined, trained_workdir, which_checkpoint, writable
from tokenlab.core.errors import ConfigError
from tokenlab.core.flags import Arguments, Command, Flag


def run(arguments: Arguments) -> None:
    """Evaluate trained weights, with another stack if one is given."""
    workdir = trained_workdir(arguments.values["workdir"])
    if {"pictures", "no-pictures"} <= arguments.switches:
        raise ConfigError("evaluate: --pictures and --no-pictures contradict each other; give one of them.")
    target = writable(arguments.values["json"])
    checkpoint = which_checkpoint(arguments.values["checkpoint"])
    with joined("evaluate", arguments, preemption=False):
        from tokenlab.evaluate import run
        from tokenlab.generate import drawn

        run(
            workdir,
            overrides=dict(arguments.overrides),
            split=arguments.values["split"],
            json=target,
            checkpoint=checkpoint,
            pictures="all" if "pictures" in arguments.switches else "no-pictures" not in arguments.switches,
            per_class="per-class" in arguments.switches,
            probes=arguments.values["probe"],
            painters=(drawn,),
        )


COMMAND = Command(
    run,
    "evaluate trained weights, with another stack if one is given",
    (
        Flag("workdir", "folder of a training run, or gs://BUCKET/FOLDER", "DIR", required=True),
        Flag("split", "split of the data", "NAME", default="test"),
        Flag("checkpoint", "the newest, the best, or that of a step", "latest|best|STEP", default="latest"),
        JSON,
        Flag("per-class", "also print precision, recall and F1 of each class"),
        Flag("probe", "learn from the train split's features: knn, linear or knn,linear", "NAMES"),
        Flag("pictures", "also draw predictions.png, calibration.png and confusion.png into the workdir"),
        Flag("no-pictures", "do not draw report.png, tokens.png and both_ways.png either"),
        *HOSTS,
    ),
    overrides=True,
    more='--config.eval.stack="A; B; C" compares several stacks on the same weights and data.',
    hints={"config": "the workdir knows its configuration; change fields of it with --config.KEY=VALUE"},
)
