"""What encoders are worth for sentences: each run of a comparison is tuned, and one from nothing beside it.

    tokenlab compare --config=configs/compare/sctd.py --workdir=runs/compare_sctd
    python experiments/sctd/run.py --comparison=runs/compare_sctd --workdir=runs/sctd_sentences [--labels=256,2048]

Sentences are those of configs/sentences.py: is a line of the standard library one of a docstring, or of code? Arms are
tuned dense, whatever they were trained with, each from its last checkpoint with its own seed. What is finished is not
run again, and what was stopped goes on. `results.json` and a table of test accuracies are written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections.config_dict import ConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tokenlab import evaluate, train
from tokenlab.core import config as configs
from tokenlab.core import huge_pages
from tokenlab.core.errors import DataError, TokenLabError
from tokenlab.train.records import TOKENIZER, write_json

SENTENCES = Path(__file__).resolve().parents[2] / "configs" / "sentences.py"
NOTHING = "from nothing"
SHAPE = ("size", "width", "num_heads", "mlp_dim", "types", "norm_placement", "norm_eps", "activation")
"""Settings of an encoder that its weights go with."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--comparison", required=True, type=Path, help="the workdir of `tokenlab compare`")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--labels", default="256", help="labelled lines to learn from, one or more numbers")
    parser.add_argument("--steps", type=int, help="of tuning, instead of the configuration's")
    options = parser.parse_args(argv)
    console = Console()
    try:
        runs = trained(options.comparison)
        records = []
        for labels in map(int, options.labels.split(",")):
            for arm, seed, folder in [*runs, *nothing(runs)]:
                console.rule(f"{arm}, seed {seed}, {labels} lines", align="left", characters="-")
                config = tuning(folder, arm, seed, labels, options.steps)
                where = options.workdir / f"{labels}_{arm.replace(' ', '_')}_{seed}"
                said = train.run(config, where)
                records.append(
                    {
                        "arm": arm,
                        "seed": seed,
                        "labels": labels,
                        "steps": config.steps,
                        "accuracy": said["test"]["accuracy"],
                    }
                )
    except TokenLabError as error:
        print(f"sctd: error: {error}", file=sys.stderr)
        return 2
    write_json(options.workdir / "results.json", records)
    console.print(table(records))
    return 0


def trained(comparison: Path) -> list[tuple[str, int, Path]]:
    """(arm, seed, workdir) of every finished run of a comparison.

    Raises:
        DataError: it has no results.json that can be read, or no finished run.
    """
    file = comparison / "results.json"
    try:
        arms = json.loads(file.read_text(encoding="utf-8"))["arms"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"cannot read {file}: {error!r}; expected what `tokenlab compare` writes at its end"
        ) from error
    found = [(arm["name"], run["seed"], comparison / run["workdir"]) for arm in arms for run in arm["runs"]]
    if not found:
        raise DataError(f"{file} holds no finished run; end the comparison first")
    return found


def nothing(runs: Sequence[tuple[str, int, Path]]) -> list[tuple[str, int, Path]]:
    """A run from nothing for each seed, of the shape of the first arm's."""
    return [(NOTHING, seed, folder) for arm, seed, folder in runs if arm == runs[0][0]]


def tuning(folder: Path, arm: str, seed: int, labels: int, steps: int | None) -> ConfigDict:
    """configs/sentences.py for an encoder that was trained in `folder`, dense, with its vocabulary."""
    model = evaluate.load(folder).model
    config = configs.load(SENTENCES)
    changes: dict[str, Any] = {
        **{f"model.{key}": getattr(model.settings, key) for key in SHAPE},
        "model.stack": f"block*{model.program.depth}",
        "model.vocab_size": model.vocab_size,
        "model.positions": model.settings.positions or model.length,
        "data.tokenizer": str(folder / TOKENIZER),
        "data.examples": labels,
        "seed": seed,
        "steps": steps or config.steps,
        "eval_every": 0,
        "checkpoint_every": 0,
    }
    if arm != NOTHING:
        changes |= {"init_from.path": str(folder), "init_from.fresh": ("head",)}
    return configs.override(config, changes)


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Mean and standard deviation of test accuracy over seeds: an arm a row, a number of labels a column."""
    labels = list(dict.fromkeys(record["labels"] for record in records))
    shown = Table(box=SIMPLE_HEAD)
    shown.add_column("arm")
    for count in labels:
        shown.add_column(f"{count:,} lines", justify="right")
    for arm in dict.fromkeys(record["arm"] for record in records):
        cells = []
        for count in labels:
            own = [r["accuracy"] for r in records if (r["arm"], r["labels"]) == (arm, count)]
            spread = f" ± {statistics.stdev(own):.4f}" if len(own) > 1 else ""
            cells.append(f"{statistics.mean(own):.4f}{spread}")
        shown.add_row(arm, *cells)
    return shown


if __name__ == "__main__":
    huge_pages.ensure()
    sys.exit(main())
