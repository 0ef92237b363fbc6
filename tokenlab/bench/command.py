"""`tokenlab benchmark`: a configuration or a suite beside its dense twin, counted and timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections.config_dict import ConfigDict
from rich.console import Console

from tokenlab.bench import suite as suites
from tokenlab.bench import table
from tokenlab.bench.arm import MODES, Mode, Setting
from tokenlab.bench.measure import Case, measure
from tokenlab.core.errors import ConfigError, suggest
from tokenlab.train import experiment as experiments
from tokenlab.train import records

LEAST_ROUNDS = 3
ROUNDS = 11
"""Rounds of a configuration where none are asked for; a suite has its own."""

PIPE_WIDTH = 200  # columns of a table that does not go to a terminal


def run(
    config: ConfigDict | None = None,
    *,
    name: str = "config",
    suite: str | None = None,
    size: str | None = None,
    rounds: int | None = None,
    batch: int | None = None,
    mode: str = "both",
    json: str | Path | None = None,
    markdown: bool = False,
    profile: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Measures, prints a table, and writes what is asked for. Progress goes to standard error.

    Args:
      config: of a run, whose model is compared with the dense stack of as many blocks; or None.
      name: of the configuration in tables.
      suite: a name in `tokenlab.bench.suite.SUITES`; either this or `config` is given.
      size: of the suite, a name in `tokenlab.bench.suite.SIZES`; None: "cpu" on a CPU, else "accelerator".
      rounds, batch: in place of the suite's or the configuration's.
      mode: "train", "inference" or "both".
      json: file for the records.
      markdown: print Markdown instead of a table.
      profile: folder for a profile of every arm.

    Returns:
      The records, see docs/benchmark.md.

    Raises:
      ConfigError: what is asked for contradicts itself or is out of range.
      TokenLabError: what is wrong with the configuration, or a file that cannot be written.
    """
    modes = _modes(mode)
    for what, value, least in (("rounds", rounds, LEAST_ROUNDS), ("batch", batch, 1)):
        if value is not None and value < least:
            raise ConfigError(f"benchmark: --{what}={value}: expected a number of at least {least}.")
    if (config is None) == (suite is None):
        given = "neither is" if config is None else "both are"
        raise ConfigError(f"benchmark: {given} given: expected --config=FILE or --suite=NAME.")
    if config is not None:
        if size is not None:
            raise ConfigError("benchmark: --size is of a suite; a configuration has its own model.")
        setting, dense, cases = _of_config(config, name, batch)
        settings = dict.fromkeys(modes, setting)
        rounds = rounds or ROUNDS
    else:
        cases, silent = suites.cases(suite)
        for module in silent:
            _note(f"left out: {module}, which declares no {suites.DECLARES} in its file")
        chosen = suites.size_of(size or ("cpu" if jax.default_backend() == "cpu" else "accelerator"))
        settings = {mode: suites.setting(chosen, batch, mode) for mode in modes}
        dense = suites.DENSE
        rounds = rounds or chosen.rounds
    folder = None if profile is None else Path(profile)
    found = [
        record
        for mode in modes
        for record in measure(
            settings[mode], dense, cases, modes=(mode,), rounds=rounds, note=_note, profiles=folder
        )
    ]
    if json is not None:
        records.write_json(json, found)
    if markdown:
        print(table.to_markdown(found), end="")
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=PIPE_WIDTH)
        for each in table.to_rich(found, console.width):
            console.print(each)
    return found


def _modes(mode: str) -> tuple[Mode, ...]:
    if mode == "both":
        return MODES
    if mode not in MODES:
        raise ConfigError(
            f"benchmark: --mode={mode}: expected one of {', '.join([*MODES, 'both'])}."
            f"{suggest(mode, [*MODES, 'both'])}"
        )
    return (mode,)


def _of_config(config: ConfigDict, name: str, batch: int | None) -> tuple[Setting, Case, list[Case]]:
    """The setting of a configuration with its first training batch; the dense case, and its own.

    Numbers in the stack that change during training are those of the last step, and inference runs what evaluation
    does.
    """
    wanted = ConfigDict(config)
    if batch is not None:
        wanted.batch_size = batch
    experiment = experiments.build(wanted)
    steps = experiment.config.steps
    trained, evaluated = experiment.models[experiment.values(steps - 1)], experiment.eval_model(steps)
    if trained.program is None:
        raise ConfigError(
            "benchmark times a stack beside the dense one, and this model has none; tokenlab train --profile tells "
            "where its time goes."
        )
    if name == suites.DENSE.name:
        raise ConfigError(f"benchmark: a configuration cannot be named {name!r} here; rename its file.")
    setting = Setting(
        model=experiment.config.model,
        spec=experiment.source.spec,
        num_outputs=experiment.task.num_outputs(experiment.source),
        task=experiment.task,
        optimizer=experiment.optimizer,
        mesh=experiment.mesh,
        batch=experiment.put(experiment.stream.batch(0)),
        rule=experiment.hardware,
    )
    if experiment.hardware is not None:
        _note(str(experiment.hardware))
    stack = f"block*{trained.program.depth}"
    dense = Case("dense", stack, stack, getattr(trained, "dense_settings", {}))
    return setting, dense, [Case(name, trained.stack_text, evaluated.stack_text)]


def _note(line: str) -> None:
    print(f"benchmark: {line}", file=sys.stderr, flush=True)
