"""Four ways to spend tokens on real digits: dense, keep, skip and merge, as many steps each.

    python experiments/demo/run.py --workdir=runs/demo [--steps=N]

Every arm is `configs/quickstart.py` with another stack. Written are `results.json`, `report.png` (test accuracy against
counted training FLOPs and against measured seconds) and `tokens.png` (what keep and merge do to test images), and a
table is printed. An arm that is finished is not run again, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from ml_collections.config_dict import ConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tokenlab import evaluate, train
from tokenlab.core import config as configs
from tokenlab.core import huge_pages
from tokenlab.core.errors import ConfigError, TokenLabError
from tokenlab.cost import pretty
from tokenlab.evaluate import style, tokens_picture
from tokenlab.train.records import read_config, write_json

BASE = Path(__file__).resolve().parents[2] / "configs" / "quickstart.py"

ARMS = {
    "dense": "block*4",
    "keep": "block + keep(0.5, by=cls) + block*3",
    "skip": "block + skip(keep=0.5, by=random, train_only=True)(block)*2 + block",
    "merge": "block + merge(4) + block + merge(4) + block*2",
}
"""Name -> stack. Evaluation uses the same one, but `skip(train_only=True)` lets every token through."""

PICTURED = ("keep", "merge")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--workdir", required=True, type=Path, help="folder for results, a folder in it for each arm"
    )
    parser.add_argument(
        "--steps", type=int, help="training steps of every arm, instead of the configuration's"
    )
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        wanted = {name: arm_config(stack, arguments.steps) for name, stack in ARMS.items()}
        for name, config in wanted.items():
            check(arguments.workdir / name, config)
        arms = []
        for name, config in wanted.items():
            console.rule(f"{name}: {ARMS[name]}", align="left", characters="-")
            arms.append(run_arm(name, config, arguments.workdir / name))
        written = write(arms, arguments.workdir)
    except TokenLabError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    console.print(table(arms))
    for path in written:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def arm_config(stack: str, steps: int | None) -> ConfigDict:
    """The quickstart with another stack."""
    changes: dict[str, Any] = {"model.stack": stack}
    if steps is not None:
        changes["steps"] = steps
    return configs.override(configs.load(BASE), changes)


def check(workdir: Path, config: ConfigDict) -> None:
    """Raise a ConfigError when the workdir holds another run, say one of another number of steps."""
    if (workdir / "config.json").exists():
        differences = configs.diff(read_config(workdir), config)
        if differences:
            raise ConfigError(
                f"{workdir} holds another run ({'; '.join(differences)}): give another --workdir, or remove it."
            )


def run_arm(name: str, config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Train one arm, or go on with it, or only read what a finished one said; then evaluate it."""
    said = train.run(config, workdir)
    trained = evaluate.load(workdir)
    result = evaluate.measure(trained, "test")
    return {
        "name": name,
        "stack": config.model.stack,
        "test_accuracy": result["accuracy"],
        "test_loss": result["loss"],
        "train_flops": said["flops"],
        "seconds": said["test"]["seconds"],
        "steps": said["step"],
        "flops_per_example": result["flops_per_example"],
        "parameters": result["parameters"],
        "test_examples": result["examples"],
    }


def write(arms: Sequence[Mapping[str, Any]], workdir: Path) -> list[Path]:
    """Write results.json, report.png and tokens.png."""
    write_json(workdir / "results.json", list(arms))
    report(arms, workdir / "report.png")
    loaded = {name: evaluate.load(workdir / name) for name in PICTURED}
    batch = tokens_picture.examples(loaded[PICTURED[0]].source, "test")
    sections = [
        tokens_picture.section(
            trained.model, trained.params, batch, title=f"{name}: {trained.model.stack_text}"
        )
        for name, trained in loaded.items()
    ]
    tokens_picture.save(workdir / "tokens.png", batch, sections)
    return [workdir / name for name in ("results.json", "report.png", "tokens.png")]


def table(arms: Sequence[Mapping[str, Any]]) -> Table:
    """The arms side by side; in brackets costs as shares of the first arm's."""
    found = Table(box=SIMPLE_HEAD, pad_edge=False)
    found.add_column("arm", style="bold")
    found.add_column("stack", overflow="fold", min_width=24)
    for name in ("test\naccuracy", "training\nFLOPs", "training\nseconds"):
        found.add_column(name, justify="right", no_wrap=True)
    flops, seconds = (arms[0][key] for key in ("train_flops", "seconds"))
    for arm in arms:
        found.add_row(
            arm["name"],
            arm["stack"],
            f"{arm['test_accuracy']:.4f}",
            f"{pretty(arm['train_flops'])} ({arm['train_flops'] / flops:.2f})",
            f"{arm['seconds']:.1f} ({arm['seconds'] / seconds:.2f})",
        )
    return found


def report(arms: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Test accuracy against counted training FLOPs, and against measured seconds of training."""
    figure = style.new(9.5, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    labels = {"train_flops": "counted training FLOPs", "seconds": "measured seconds of training"}
    for panel, (key, label) in zip(axes, labels.items(), strict=True):
        style.plain(panel)
        _points(panel, arms, key)
        panel.set_xlabel(label)
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes[0].set_ylabel("test accuracy")
    examples, steps = arms[0]["test_examples"], arms[0]["steps"]
    title = f"Digits, {steps} steps each; bars: one standard error of {examples} test images"
    figure.suptitle(title, fontsize=10)
    figure.draw_without_rendering()  # so that the panels are where they will be when labels are placed
    for panel, key in zip(axes, labels, strict=True):
        _labels(panel, arms, key)
    return style.save(figure, path)


def _points(panel: Axes, arms: Sequence[Mapping[str, Any]], key: str) -> None:
    """A point an arm, with the standard error of its accuracy."""
    for arm, color, marker in zip(arms, style.COLORS, style.MARKERS, strict=False):
        accuracy = arm["test_accuracy"]
        error = math.sqrt(accuracy * (1 - accuracy) / arm["test_examples"])
        looks = {"color": color, "marker": marker, "markersize": 8, "elinewidth": 1, "capsize": 3}
        panel.errorbar(arm[key], accuracy, error, **looks)
    panel.set_xlim(0, 1.2 * max(arm[key] for arm in arms))


def _labels(panel: Axes, arms: Sequence[Mapping[str, Any]], key: str) -> None:
    """The names beside the points, pushed up where one would meet the one below."""
    points = panel.get_figure().dpi / 72
    place = {
        arm["name"]: panel.transData.transform((arm[key], arm["test_accuracy"])) / points for arm in arms
    }
    colors = dict(zip(place, style.COLORS, strict=False))
    lowest = -math.inf
    for arm in sorted(arms, key=lambda arm: (arm["test_accuracy"], arm[key])):
        height = place[arm["name"]][1]
        lowest = max(height, lowest + 11)
        panel.annotate(
            arm["name"],
            (arm[key], arm["test_accuracy"]),
            (8, lowest - height),
            textcoords="offset points",
            color=colors[arm["name"]],
            va="center",
            fontsize=9,
        )


if __name__ == "__main__":
    huge_pages.ensure()
    sys.exit(main())
