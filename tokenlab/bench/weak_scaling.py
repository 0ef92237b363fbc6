"""Weak scaling on paper: what devices send and the least time of a step, 16 to 4,096 chips at equal work a chip.

python -m tokenlab.bench.weak_scaling                 the record, the table and the picture of docs/scale.md
python -m tokenlab.bench.weak_scaling --compile       first compile further slices that the formulas are held against
python -m tokenlab.bench.weak_scaling --check         only say whether the table is the record's (status 1 when not)

Run it in the root of a checkout. The formulas and what they assume are those of `tokenlab.cost.mapping`; they are held
against the programs of `tokenlab.bench.pods`, and against what `--compile` adds, which needs libtpu and goes on where
it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenlab.bench import page, pods
from tokenlab.bench.pods import PAGE, PODS, Pod, compiled
from tokenlab.core import config as configs
from tokenlab.cost import lookup, pretty
from tokenlab.sharding.slices import Slices
from tokenlab.train.config import TrainConfig
from tokenlab.train.records import write_atomic
from tokenlab.train.scaling import Scaling

RECORD = Path("benchmarks/pods/weak_scaling.json")
PICTURE = Path("docs/images/weak-scaling.png")
BEGIN, END = "<!-- weak-scaling:begin -->", "<!-- weak-scaling:end -->"
HELD = ("vit", "soft_moe", "mod", "moma", "grin", "grin_folded")
"""Of `tokenlab.bench.pods.PODS`, those that the formulas are held against."""
CHIPS = (16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Family:
    """One model on slices of growing size.

    Attributes:
      title: for the table.
      config: as `--config` takes it.
      chip: a name of `tokenlab.cost.hardware.HARDWARE`.
      each: examples a chip.
      axis: of the mesh, along which at most `most` chips lie; "data" takes the rest.
      most: one mesh for each.
      outputs: logits, where the data does not say them.
      checked: further slices whose compiled programs the formulas are held against.
    """

    title: str
    config: str
    chip: str
    each: int
    axis: str
    most: tuple[int, ...]
    outputs: int | None = None
    checked: tuple[str, ...] = ()

    def mesh(self, chips: int, most: int) -> dict[str, int]:
        """Devices by axis."""
        along = min(chips, most)
        return {"data": chips // along, self.axis: along}

    def slices(self, chips: int) -> int:
        """How many slices so many chips take."""
        return max(1, chips // (lookup(self.chip).slice_chips or chips))

    def pods(self) -> list[Pod]:
        """What `checked` names, on the first of the meshes."""
        found = []
        for topology in self.checked:
            chips = Slices.parse(topology).devices
            mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh(chips, self.most[0]).items())
            batch = f"--config.batch_size={self.each * chips}"
            found.append(Pod(self.title, self.config, topology, mesh, self.outputs, (batch,)))
        return found


FAMILIES = (
    Family(
        "ViT-L/16, 64 images a chip",
        "configs/vit.py:L/16",
        "TPU v5e",
        64,
        "fsdp",
        (8, 256),
        checked=("v5e:4x4", "v5e:16x16"),
    ),
    Family(
        "Soft MoE B/16 with 128 experts, 16 images a chip",
        "configs/soft_moe.py:B/16",
        "TPU v5e",
        16,
        "expert",
        (128, 16),
        checked=("v5e:4x4", "v5e:8x8"),
    ),
    Family(
        "mixture-of-depths 3B, 2 sequences of 2,048 a chip",
        "configs/mixture_of_depths.py:3B",
        "TPU v5p",
        2,
        "fsdp",
        (16, 512),
        outputs=32_000,
        checked=("v5p:2x2x4",),
    ),
)


def rows(family: Family) -> list[dict[str, Any]]:
    """What the formulas say, a row for each mesh and number of chips."""
    config = configs.to_dataclass(TrainConfig, configs.load(family.config))
    scaling, chip = Scaling(config, family.outputs), lookup(family.chip)
    found = []
    for most in family.most:
        for chips in CHIPS:
            mesh, slices = family.mesh(chips, most), family.slices(chips)
            sent = scaling.sent(mesh, family.each * chips, slices)
            least = scaling.least(mesh, family.each * chips, chip, slices)
            found.append(
                {
                    "title": family.title,
                    "chips": chips,
                    "slices": slices,
                    "mesh": mesh,
                    "gathered_bytes": sent.parameters,
                    "summed_bytes": sent.gradients,
                    "exchanged_bytes": sent.experts + sent.tensor + sent.sequence,
                    "far_bytes": sent.far,
                    "compute_seconds": least.compute_seconds,
                    "memory_seconds": least.memory_seconds,
                    "near_seconds": least.collective_seconds,
                    "far_seconds": least.network_seconds,
                    "overlapped_seconds": least.seconds,
                    "in_turn_seconds": least.in_turn,
                    "bound": least.bound,
                }
            )
    return found


def held(pod: Pod, report: Mapping[str, Any]) -> dict[str, Any]:
    """What a compiled program sends beside what the formulas say of it."""
    config = configs.to_dataclass(TrainConfig, configs.load(pod.config))
    sent = Scaling(config, pod.outputs).sent(report["mesh"], report["batch_size"])
    return {
        "title": pod.title,
        "topology": pod.topology,
        "mesh": report["mesh"],
        "batch_size": report["batch_size"],
        "command": report["command"],
        "compiled": report["collectives"],
        "compiled_bytes": sum(each["bytes"] for each in report["collectives"]),
        "formula_bytes": sent.near,
        "formula": dataclasses.asdict(sent),
    }


def table(record: Mapping[str, Any]) -> str:
    """The record in Markdown: a table for each model, and one of what is held against compiled programs."""
    parts = []
    for family in FAMILIES:
        lines = [
            f"**{family.title}**, {family.chip}",
            "",
            "| chips | slices | mesh | weights gathered | gradients summed | tokens exchanged | to other slices | "
            "least step | and if nothing overlaps | bound |",
            "|---:|---:|---|---:|---:|---:|---:|---:|---:|---|",
        ]
        for row in record["rows"]:
            if row["title"] == family.title:
                sizes = [
                    pretty(row[f"{name}_bytes"]) + "B" for name in ("gathered", "summed", "exchanged", "far")
                ]
                times = [f"{1e3 * row[f'{name}_seconds']:.3g} ms" for name in ("overlapped", "in_turn")]
                cells = [
                    f"{row['chips']:,}",
                    str(row["slices"]),
                    shown(row["mesh"]),
                    *sizes,
                    *times,
                    row["bound"],
                ]
                lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    lines = [
        "| model | slice and mesh | a device sends, compiled | by formula | formula / compiled |",
        "|---|---|---:|---:|---:|",
    ]
    for each in record["held"]:
        ratio = each["formula_bytes"] / each["compiled_bytes"]
        lines.append(
            f"| {each['title']} | {each['topology']}, {shown(each['mesh'])} | {pretty(each['compiled_bytes'])}B | "
            f"{pretty(each['formula_bytes'])}B | {ratio:.2f} |"
        )
    return "\n\n".join([*parts, "\n".join(lines)])


def shown(mesh: Mapping[str, int]) -> str:
    """A mesh in words: "data=2 x expert=128"."""
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)


def draw(record: Mapping[str, Any], file: Path) -> None:
    """The picture: seconds of a step and bytes that a device sends, over the number of chips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        2, len(FAMILIES), figsize=(4 * len(FAMILIES), 6), sharex=True, squeeze=False
    )
    for column, family in enumerate(FAMILIES):
        above, below = panels[0][column], panels[1][column]
        for number, most in enumerate(family.most):
            own = [row for row in record["rows"] if row["title"] == family.title]
            own = own[number * len(CHIPS) : (number + 1) * len(CHIPS)]
            chips = [row["chips"] for row in own]
            label, colour = f"{family.axis} up to {most:,}", f"C{number}"
            above.plot(
                chips, [1e3 * row["overlapped_seconds"] for row in own], colour, marker="o", label=label
            )
            above.plot(
                chips, [1e3 * row["in_turn_seconds"] for row in own], colour, linestyle="--", marker="."
            )
            near = [row["gathered_bytes"] + row["summed_bytes"] + row["exchanged_bytes"] for row in own]
            below.plot(chips, [size / 1e9 for size in near], colour, marker="o")
            below.plot(chips, [row["far_bytes"] / 1e9 for row in own], colour, linestyle=":", marker="x")
        above.set_title(f"{family.title}\n{family.chip}", fontsize=9)
        above.set_ylim(bottom=0)
        above.legend(fontsize=8)
        below.set_xscale("log", base=2)
        below.set_xticks(CHIPS, [f"{chips:,}" for chips in CHIPS])
        below.set_ylim(bottom=0)
        below.set_xlabel("chips")
        for panel in (above, below):
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ms a step: solid all at once,\ndashed in turn")
    panels[1][0].set_ylabel("GB a device sends: solid within a slice,\ndotted to others")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def read(file: Path) -> dict[str, Any]:
    """The record; an empty one where there is none. Raises DataError when it holds something else."""
    return page.read(file, {"rows": [], "held": []})


def main(argv: Sequence[str] | None = None, root: Path = Path(".")) -> int:
    """Run the command in the root of a checkout; returns the exit status: 0, 1 (not up to date) or 2 (a mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenlab.bench.weak_scaling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--compile", action="store_true", help="compile what the formulas are held against")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when out of date")
    given = parser.parse_args(argv)

    def tables() -> str:
        record = read(root / RECORD)
        if not given.check:
            record = _made(record, root, compiling=given.compile)
            draw(record, root / PICTURE)
        return table(record)

    command = "python -m tokenlab.bench.weak_scaling"
    return page.refresh(root / PAGE, BEGIN, END, tables, check=given.check, command=command)


def _made(record: dict[str, Any], root: Path, *, compiling: bool) -> dict[str, Any]:
    """The record with what the formulas say today; written after every program."""
    record["rows"] = [row for family in FAMILIES for row in rows(family)]
    reports = {each["command"]: each | {"collectives": each["compiled"]} for each in record["held"]}
    reports |= {each["command"]: each for each in pods.read(root / pods.RECORD)["pods"].values()}
    wanted = [pod for name, pod in PODS.items() if name in HELD]
    wanted += [pod for family in FAMILIES for pod in family.pods()]
    named = {" ".join(pod.command): pod for pod in wanted}
    found = {command: held(pod, reports[command]) for command, pod in named.items() if command in reports}
    missing = [command for command in named if command not in found] if compiling else []
    for command in (None, *missing):
        if command is not None:
            found[command] = held(named[command], compiled(named[command]))
        record["held"] = [found[each] for each in named if each in found]
        (root / RECORD).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(root / RECORD, json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    sys.exit(main())
