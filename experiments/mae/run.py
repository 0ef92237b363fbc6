"""Masked autoencoders, then what their features are worth: a CLS token, registers, or a Jumbo token; several seeds.

    python experiments/mae/run.py --workdir=runs/mae_study --data=cifar10 [--seeds=0,1,2] [--steps=N] [--tuning=N]

Each arm is pre-trained by configs/mae.py for as many counted FLOPs as the plain one spends. Its features of
whole images are then judged by nearest neighbours and a logistic regression, a classifier is trained on them frozen
(configs/linear_probe.py), all is fine-tuned (configs/finetune.py), and the same is trained from nothing, as many steps.
What is finished is not run again, and what was stopped goes on. `results.json` and a table are written.
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

from tokenlab import train
from tokenlab.compare.budget import Spending
from tokenlab.core import config as configs
from tokenlab.core import huge_pages
from tokenlab.core.errors import TokenLabError
from tokenlab.evaluate import command
from tokenlab.train import experiment
from tokenlab.train.records import write_json

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ARMS = ("plain", "registers", "jumbo")
DATA = ("digits", "fashion", "cifar10")
COLUMNS = ("knn", "linear", "probe", "finetuned", "scratch")
"""Test accuracies: of k-NN and logistic regression on frozen features, of a classifier trained on them, of all trained
from there, and of all trained from nothing."""

FRESH = {"init_from.path": None, "init_from.fresh": (), "optimizer.layer_decay": None}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument(
        "--steps", type=int, help="of the plain arm's pre-training, instead of its configuration's"
    )
    parser.add_argument("--tuning", type=int, help="of probing and of fine-tuning, instead of theirs")
    options = parser.parse_args(argv)
    console = Console()
    try:
        pretraining = arms(options.data, options.arms.split(","), options.steps)
        records = []
        for seed in map(int, options.seeds.split(",")):
            for name, config in pretraining.items():
                console.rule(f"{name}, seed {seed}", align="left", characters="-")
                records.append(study(options, name, config, seed))
    except TokenLabError as error:
        print(f"mae: error: {error}", file=sys.stderr)
        return 2
    write_json(options.workdir / "results.json", records)
    console.print(table(records))
    return 0


def load(name: str, data: str, arm: str) -> ConfigDict:
    """One of configs/ for an arm."""
    return configs.load(f"{CONFIGS / name}.py:{data},{arm}")


def arms(data: str, names: Sequence[str], steps: int | None) -> dict[str, ConfigDict]:
    """The configuration of each arm's pre-training, with the steps that spend what the plain arm does."""
    base = load("mae", data, ARMS[0])
    base.steps = steps or base.steps
    amount = Spending(experiment.build(base), "flops")(base.steps)
    found = {}
    for name in names:
        config = load("mae", data, name)
        config.steps = base.steps
        found[name] = configs.override(
            config, {"steps": Spending(experiment.build(config), "flops").steps(amount), **every(base.steps)}
        )
    return found


def every(steps: int) -> dict[str, Any]:
    """Evaluation and checkpoint at the end alone, and records a hundred times at most."""
    return {"eval_every": 0, "checkpoint_every": max(steps // 5, 1), "log_every": max(steps // 100, 1)}


def study(options: argparse.Namespace, name: str, config: ConfigDict, seed: int) -> dict[str, Any]:
    """Pre-trains one arm with one seed, and everything after it; what is found."""
    folder = options.workdir / f"{options.data}_{name}_{seed}"
    said = finished(folder / "mae", configs.override(config, {"seed": seed}))
    probes = probed(folder / "mae")
    record = {
        "data": options.data,
        "arm": name,
        "seed": seed,
        "steps": config.steps,
        "train_flops": said["flops"],
        "mae_loss": said["test"]["loss"],
        **{key: probes["probe"][key]["accuracy"] for key in ("knn", "linear")},
    }
    for stage, file, changes in (
        ("probe", "linear_probe", {}),
        ("finetuned", "finetune", {}),
        ("scratch", "finetune", FRESH),
    ):
        tuned = load(file, options.data, name)
        steps = options.tuning or tuned.steps
        start = {
            "init_from.path": str(folder / "mae"),
            "seed": seed,
            "steps": steps,
            **every(steps),
            **changes,
        }
        record[stage] = finished(folder / stage, configs.override(tuned, start))["test"]["accuracy"]
    return record


def finished(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """What a run says of itself at its end; it goes on where it was stopped."""
    return train.run(config, workdir)


def probed(workdir: Path) -> dict[str, Any]:
    """What probes make of a run's features; measured once."""
    file = workdir / "probes.json"
    if not file.is_file():
        command.run(workdir, json=file, probes="knn,linear")
    return json.loads(file.read_text(encoding="utf-8"))


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Mean and standard deviation over seeds of every column, an arm a row."""
    shown = Table(box=SIMPLE_HEAD)
    for column in ("arm", "steps", "mae loss", *COLUMNS):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for name in dict.fromkeys(record["arm"] for record in records):
        own = [record for record in records if record["arm"] == name]
        cells = [spread([record[key] for record in own]) for key in ("mae_loss", *COLUMNS)]
        shown.add_row(name, f"{own[0]['steps']:,}", *cells)
    return shown


def spread(values: Sequence[float]) -> str:
    """ "0.712 ± 0.004", or the value where there is one."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


if __name__ == "__main__":
    huge_pages.ensure()
    sys.exit(main())
