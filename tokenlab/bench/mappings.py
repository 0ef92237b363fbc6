"""What folding gains by the roofline: the best folded and the best unfolded mapping of one model on several slices.

python -m tokenlab.bench.mappings            rank them all, then write the record and the table of docs/folding.md
python -m tokenlab.bench.mappings --check    only say whether the table is the record's (exit status 1 when not)

Run it in the root of a checkout; nothing is compiled, and no libtpu is needed. It ranks as `tokenlab compile --search`
does, whose words stand in the record.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenlab.bench import page
from tokenlab.core import config as configs
from tokenlab.sharding.slices import Slices
from tokenlab.train import search
from tokenlab.train.config import TrainConfig
from tokenlab.train.records import write_atomic

RECORD = Path("benchmarks/pods/mappings.json")
PAGE = Path("docs/folding.md")
BEGIN, END = "<!-- mappings:begin -->", "<!-- mappings:end -->"


@dataclass(frozen=True)
class Case:
    """A model on a slice, or on several.

    Attributes:
      topology: as `--topology` takes it.
      batch, length: examples of a step, and tokens of each.
      config: as `--config` takes it.
      outputs: logits.
    """

    topology: str
    batch: int
    length: int
    config: str = "configs/grin.py"
    outputs: int = 32_064

    @property
    def command(self) -> list[str]:
        """The words after `tokenlab`."""
        changes = [f"--config.batch_size={self.batch}", f"--config.data.length={self.length}"]
        given = [f"--config={self.config}", f"--topology={self.topology}", f"--outputs={self.outputs}"]
        return ["compile", "--search", *given, *changes]

    def ranked(self, root: Path = Path(".")) -> list[search.Ranked]:
        """All mappings, the best first."""
        config = configs.load(str(root / self.config))
        config.batch_size, config.data.length = self.batch, self.length
        asked, wanted = Slices.parse(self.topology), configs.to_dataclass(TrainConfig, config)
        chip = search.chip_of(asked)
        return search.rank(wanted, asked.devices, chip, slices=asked.count, num_outputs=self.outputs)


CASES = (
    Case("v5p:4x8x8", 4, 4096),
    Case("v5p:4x8x8", 4, 8192),
    Case("v5p:4x8x8", 16, 4096),
    Case("v5p:4x8x8", 256, 4096),
    Case("v5p:4x4x4*4", 16, 8192),
    Case("v5e:4x4*16", 16, 4096),
    Case("H100 SXM:8*16", 64, 4096),
)
"""GRIN's 16 experts of 3.8B on 256 chips, in one slice and in several, and on 128 GPUs."""


def row(case: Case, root: Path = Path(".")) -> dict[str, Any]:
    """What the record says of a case."""
    found = case.ranked(root)
    said: dict[str, Any] = {"command": shlex.join(case.command), "mappings": len(found)}
    for what, folded in (("folded", True), ("unfolded", False)):
        best = next(each for each in found if each.plan.folded == folded)
        said[what] = {
            "plan": str(best.plan),
            "settings": best.plan.settings,
            "fits": best.fits,
            "bound": best.least.bound,
            "seconds": best.least.seconds,
            "in_turn_seconds": best.least.in_turn,
            **dataclasses.asdict(best.least),
            "bytes_per_device": best.bytes_per_device,
        }
    return said


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The record in Markdown."""
    lines = [
        "| devices | batch x tokens | best folded | best without | least step | and if nothing overlaps | links |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for case in CASES:
        said = next((each for each in rows if each["command"] == shlex.join(case.command)), None)
        if said is None:
            continue
        one, other = said["folded"], said["unfolded"]

        def both(name: str, one: Any = one, other: Any = other) -> str:
            return f"{1e3 * one[name]:.3g} ms, {1e3 * other[name]:.3g} ms"

        cells = [
            case.topology,
            f"{case.batch} x {case.length:,}",
            *(
                f"{each['plan'].replace('|', '/')}" + ("" if each["fits"] else ", too large")
                for each in (one, other)
            ),
            f"{both('seconds')} ({one['bound']}, {other['bound']})",
            both("in_turn_seconds"),
            both("collective_seconds"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read(file: Path) -> dict[str, Any]:
    """The record; an empty one where there is none. Raises DataError when it holds something else."""
    return page.read(file, {"rows": []})


def main(argv: Sequence[str] | None = None, root: Path = Path(".")) -> int:
    """Run the command in the root of a checkout; returns the exit status: 0, 1 (not up to date) or 2 (a mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenlab.bench.mappings", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when out of date")
    given = parser.parse_args(argv)

    def tables() -> str:
        record = read(root / RECORD)
        if not given.check:
            record["rows"] = []
            for case in CASES:
                print(f"tokenlab {shlex.join(case.command)}", flush=True)
                record["rows"].append(row(case, root))
            write_atomic(root / RECORD, json.dumps(record, indent=1) + "\n")
        return table(record["rows"])

    command = "python -m tokenlab.bench.mappings"
    return page.refresh(root / PAGE, BEGIN, END, tables, check=given.check, command=command)


if __name__ == "__main__":
    sys.exit(main())
