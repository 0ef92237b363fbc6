"""`tokenlab compare`: train what is missing, collect what there is, write the report."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict
from rich.console import Console

from tokenlab import evaluate, train
from tokenlab.compare import report, results
from tokenlab.compare.arms import Arm, resolve
from tokenlab.compare.config import CompareConfig
from tokenlab.core.bucket import is_address
from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import ConfigError, DataError, NonFiniteError
from tokenlab.evaluate import expert_load, tokens_picture
from tokenlab.generate import Samples
from tokenlab.generate.samples import FOLDER as SAMPLES
from tokenlab.layers.program import ItemStep, steps_of
from tokenlab.train.records import write_atomic, write_json

RESULTS = "results.json"


def run(
    config: Mapping[str, Any] | ConfigDict,
    workdir: str | Path,
    *,
    share: tuple[int, int] = (1, 1),
    arms: Sequence[str] = (),
    training: bool = True,
    command: str = "tokenlab compare",
) -> dict[str, Any]:
    """Run a comparison, or go on with it, and write its report.

    Args:
      config: see `CompareConfig`.
      workdir: of the comparison: plan.json, arms/NAME-HASH/seed_N (the workdir of a run each), results.json, report/.
      share: (i, n): only the i-th of n shares of the runs is trained, see `share_of`; 1 <= i <= n.
      arms: names of the arms to train; all when empty.
      training: False trains nothing, and reports what there is.
      command: that was given, for the report.

    Returns:
      What results.json holds.

    Raises:
      TokenLabError: what is wrong, in one line. Whatever can be known before training is said before it.
      NonFiniteError: runs diverged; the others were trained, and results and report written, before it is raised.
      SystemExit: a signal stopped a run, as in `train.run`; the same command goes on.
    """
    comparison = to_dataclass(CompareConfig, config)
    if is_address(workdir):
        raise ConfigError(
            f"--workdir={workdir}: a comparison is of one machine; expected a folder on it, or a mounted bucket."
        )
    folder = Path(workdir)
    known = [arm["name"] for arm in comparison.arms]
    for name in arms:
        if name not in known:
            raise ConfigError(f"--arm={name!r} is the name of no arm; expected one of {', '.join(known)}.")
    _check_results(folder / RESULTS)
    resolved, amount = resolve(comparison, folder, measure=training)
    for arm in resolved:
        _ = arm.experiment  # what is wrong with an arm is said before the first is trained
    console = Console()
    diverged: list[str] = []
    if training:
        chosen = [arm for arm in resolved if not arms or arm.name in arms]
        diverged = _train(share_of(chosen, comparison.seeds, *share), folder, console)
    found = results.collect(comparison, resolved, amount, folder, command)
    _find_loads(resolved, found, folder)
    if comparison.pictures:
        _draw(resolved, found, folder, comparison.pictures)
    _find_samples(found, folder)
    write_json(folder / RESULTS, found)
    for path in (folder / RESULTS, *report.write(found, folder)):
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    console.print(report.markdown(found), markup=False, highlight=False, soft_wrap=True)
    if diverged:
        raise NonFiniteError(
            f"{'; '.join(diverged)} diverged, and the report is of the others; the same command tries again."
        )
    return found


def share_of(arms: Sequence[Arm], seeds: Sequence[int], i: int, n: int) -> list[tuple[Arm, int]]:
    """The i-th of n shares of the runs: whole arms, or parts of arms where there are more shares than arms.

    The seeds of an arm stay together, as they share what is compiled, and their times are compared.
    """
    if n <= len(arms):
        return [(arm, seed) for arm in arms[i - 1 :: n] for seed in seeds]
    every = [(arm, seed) for arm in arms for seed in seeds]
    return every[len(every) * (i - 1) // n : len(every) * i // n]


def _train(runs: Sequence[tuple[Arm, int]], folder: Path, console: Console) -> list[str]:
    """Train the runs that are not finished; says which of them diverged."""
    diverged = []
    for number, (arm, seed) in enumerate(runs, 1):
        where = folder / arm.folder / f"seed_{seed}"
        stack = arm.experiment.usual_model.stack_text
        title = f"{number}/{len(runs)}  {arm.name}, seed {seed}: {arm.steps} steps of {stack}"
        if results.finished(where, arm.steps):
            console.print(f"{title}: is done", markup=False, highlight=False, soft_wrap=True)
            continue
        console.rule(title, align="left", characters="-")
        told = where / results.DIVERGED
        told.unlink(missing_ok=True)
        try:
            train.run(arm.run_config(seed), where, experiment=arm.experiment.with_seed(seed), sampler=Samples)
        except NonFiniteError as error:
            write_atomic(told, f"{error}\n")
            diverged.append(f"{arm.name}, seed {seed}")
            console.print(f"diverged: {error}", markup=False, highlight=False, soft_wrap=True)
    return diverged


def _draw(arms: Sequence[Arm], found: Mapping[str, Any], folder: Path, rows: int) -> None:
    """For every arm that reduces tokens, a picture of what its first finished run keeps."""
    for arm, entry in zip(arms, found["arms"], strict=True):
        steps = steps_of(arm.experiment.eval_model(arm.steps))
        reduces = any(isinstance(step, ItemStep) and step.active for step in steps)
        if not reduces or not entry["runs"] or "image" not in arm.source.spec:
            continue
        seed = entry["runs"][0]["seed"]
        path = folder / "pictures" / f"{Path(arm.folder).name}-seed_{seed}-{rows}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            trained = evaluate.load(folder / entry["runs"][0]["workdir"])
            batch = tokens_picture.examples(arm.source, found["metric"]["split"], rows)
            section = tokens_picture.section(
                trained.model, trained.params, batch, title=trained.model.stack_text
            )
            if not section.columns:
                continue
            tokens_picture.save(path, batch, [section], arm.source.class_names)
        entry["pictures"] = [str(path.relative_to(folder))]


def _find_samples(found: Mapping[str, Any], folder: Path) -> None:
    """For every arm that was sampled during training, the last picture of its first finished run."""
    for entry in found["arms"]:
        if not entry["runs"]:
            continue
        drawn = (folder / entry["runs"][0]["workdir"] / SAMPLES).glob("*.png")
        last = max(drawn, key=lambda path: int(path.stem) if path.stem.isdecimal() else -1, default=None)
        if last is not None:
            entry["pictures"].append(str(last.relative_to(folder)))


def _find_loads(arms: Sequence[Arm], found: Mapping[str, Any], folder: Path) -> None:
    """For every arm with experts, how its first finished run loads them."""
    for arm, entry in zip(arms, found["arms"], strict=True):
        if entry["runs"] and expert_load.has_experts(arm.experiment.eval_model(arm.steps)):
            trained = evaluate.load(folder / entry["runs"][0]["workdir"])
            split = found["metric"]["split"]
            entry["expert_load"] = expert_load.loads(trained.model, trained.params, arm.source, split) or None


def _check_results(path: Path) -> None:
    """A results file that this version did not write is not overwritten."""
    if not path.exists():
        return
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {path}: {error}; move it away, and it is made anew from the runs beside it."
        ) from error
    if not isinstance(said, dict) or said.get("format") != results.FORMAT:
        kind = said.get("format") if isinstance(said, dict) else None
        raise DataError(
            f"{path} is of format {kind!r}; expected {results.FORMAT}: give another --workdir, or move it away."
        )


def read_share(text: str | None) -> tuple[int, int]:
    """ "2/4" as (2, 4); None as (1, 1). Raises ConfigError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--arms={text} is no share: expected I/N with I from 1 to N, such as 2/4.")
    return int(found[1]), int(found[2])


def spelled(flags: Mapping[str, str], overrides: Mapping[str, str]) -> str:
    """The command line of a comparison, to be shown with its results."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += [f"--config.{key}={value}" for key, value in overrides.items()]
    return " ".join(["tokenlab", "compare", *map(shlex.quote, words)])
