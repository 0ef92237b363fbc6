"""Published models compiled for TPU slices that are not there: benchmarks/pods, and the table of docs/scale.md.

python -m tokenlab.bench.pods                   compile what the record lacks, then write the table
python -m tokenlab.bench.pods --only=moma       one of them
python -m tokenlab.bench.pods --again           compile all, also those that are there
python -m tokenlab.bench.pods --check           only say whether the table is the record's (exit status 1 when not)

Run it in the root of a checkout where libtpu is installed. Every model is compiled in a process of its own and written
as soon as it is there, so what is stopped goes on where it was. A model whose experts would be gathered between devices
of different experts, or whose gradients would be summed whole, is not written: that is an error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokenlab.bench import page
from tokenlab.core.errors import ShardingError, TokenLabError
from tokenlab.cost import pretty
from tokenlab.sharding.axes import of_experts
from tokenlab.train.records import write_atomic

RECORD = Path("benchmarks/pods/slices.json")
PAGE = Path("docs/scale.md")
BEGIN, END = "<!-- pods:begin -->", "<!-- pods:end -->"


@dataclass(frozen=True)
class Pod:
    """A model, the slice it is compiled for, and how it lies there.

    Attributes:
      title: for the table.
      config: as `--config` takes it.
      topology: as `--topology` takes it.
      mesh: as `--mesh` takes it.
      outputs: logits, where the data does not say them.
      changes: further flags, `--config.key=value`.
      expert: elements of one expert's smallest kernel; None for a model without experts.
      kernels: how many of about that size all layers have together.
      others: elements of all kernels that are not experts', about.
      tokens: elements of the tokens that one device attends to, where it shares axes of experts with others that attend
        to them too: those are gathered along these axes, as are the other kernels.
    """

    title: str
    config: str
    topology: str
    mesh: str
    outputs: int | None = None
    changes: tuple[str, ...] = ()
    expert: int | None = None
    kernels: int = 0
    others: int = 0
    tokens: int = 0

    @property
    def command(self) -> list[str]:
        """The words after `tokenlab`."""
        words = ["compile", f"--config={self.config}", f"--topology={self.topology}", f"--mesh={self.mesh}"]
        return [*words, *([f"--outputs={self.outputs}"] if self.outputs else []), *self.changes]


PODS: Mapping[str, Pod] = {
    "soft_moe": Pod(
        "Soft MoE B/16, 128 experts",
        "configs/soft_moe.py:B/16",
        "v5e:16x16",
        "data=2,expert=128",
        expert=768 * 3072,
        kernels=6 * 128 * 2,
        others=59_000_000,
    ),
    "vit": Pod("ViT-L/16", "configs/vit.py:L/16", "v5e:8x8", "fsdp=64"),
    "jumbo": Pod("Jumbo base", "configs/jumbo.py:base", "v5e:4x4", "data=16"),
    "mod": Pod(
        "mixture-of-depths 3B, 2,048 tokens",
        "configs/mixture_of_depths.py:3B",
        "v5p:4x4x4",
        "data=4,fsdp=16",
        outputs=32_000,
    ),
    "moma": Pod(
        "MoMa 1.4B 4t4i, 4,096 tokens",
        "configs/moma.py:1.4B-4t4i",
        "v5p:8x8x8",
        "fsdp=128,expert=4",
        outputs=65_536,
        expert=2048 * 5461,
        kernels=24 * 8 * 3,
        others=772_000_000,
    ),
    "grin": Pod(
        "GRIN 16x3.8B, 4,096 tokens",
        "configs/grin.py",
        "v5p:4x8x8",
        "fsdp=32,expert=8",
        outputs=32_064,
        expert=4096 * 6400,
        kernels=32 * 16 * 3,
        others=1_608_000_000,
    ),
    "grin_folded": Pod(
        "GRIN, experts folded over heads and data",
        "configs/grin.py",
        "v5p:4x8x8",
        "fsdp=16,fsdp_expert=8,tensor_expert=2",
        outputs=32_064,
        expert=4096 * 6400,
        kernels=32 * 16 * 3,
        others=1_608_000_000,
        tokens=1024 // 128 * 4096 * 4096,
    ),
}


def check(pod: Pod, report: Mapping[str, Any]) -> None:
    """Raise a ShardingError unless the program fits and, with experts, sends tokens to them and not them to tokens.

    An all-gather across the axes of experts may bring together counts and such; none may be as large as one expert's
    smallest kernel in bfloat16. Where attention shares these axes (`Pod.tokens`) its tokens and the other kernels are
    gathered along them: none may be larger than those, and all together may not send what experts would. All-reduces
    between devices of the same experts, which is where experts' gradients are summed, may send those of the experts
    that a device holds, in bfloat16, and once those of all other weights, which the compiler may sum there first and
    elsewhere then. Whole experts of many devices are more.
    """
    where = f"{pod.title} on {pod.topology}"
    if not report["fits"]:
        raise ShardingError(f"{where} does not fit: {report['bytes_per_device']:,} bytes a device.")
    if pod.expert is None:
        return
    if report["collectives"] is None:
        why = report.get("collectives_unknown") or "expected the libtpu of jax[tpu]"
        raise ShardingError(f"{where}: what devices send is not known: {why}.")
    if report["across_expert"] is None:
        raise ShardingError(f"{where}: no axis of {pod.mesh} has experts on it; give it expert=2 or more.")
    kinds = {each["kind"]: each for each in report["across_expert"]}
    if not {"all-to-all", "ragged-all-to-all"} & set(kinds):
        raise ShardingError(f"{where}: no tokens are exchanged along the axis of experts: {sorted(kinds)}.")
    gathered = kinds.get("all-gather", {"largest": 0, "bytes": 0})
    if gathered["largest"] >= max(2 * pod.expert, 4 * pod.tokens + 1):
        raise ShardingError(
            f"{where}: an all-gather of {gathered['largest']:,} bytes crosses the axis of experts, where no more than "
            f"counts{' and tokens' if pod.tokens else ''} should; one expert's kernel has {pod.expert:,} elements."
        )
    over = of_experts(report["mesh"], "expert")
    ways = math.prod(report["mesh"][axis] for axis in over)
    parts = report["mesh"].get("fsdp", 1)  # in layers of experts its other axes are those of experts
    once = 2 * pod.expert * pod.kernels * (ways - 1) // ways  # all experts' kernels in bfloat16
    if pod.tokens and gathered["bytes"] >= once // 2:
        raise ShardingError(
            f"{where}: all-gathers across the axes of experts send {gathered['bytes']:,} bytes a device; the experts' "
            f"kernels would be {once:,}, and tokens and other kernels are to be less than half of it."
        )
    held, ring = pod.expert * pod.kernels // (ways * parts), report["devices"] // ways
    allowed = 2 * 2 * (held + pod.others) * (ring - 1) // ring
    everywhere = {each["kind"]: each["bytes"] for each in report["collectives"]}
    summed = everywhere.get("all-reduce", 0) - kinds.get("all-reduce", {"bytes": 0})["bytes"]
    if summed > allowed:
        raise ShardingError(
            f"{where}: all-reduces between devices of the same experts send {summed:,} bytes a device, where the "
            f"{held:,} weights of experts that it holds and the {pod.others:,} others need {allowed:,} at most: "
            "gradients of experts are summed whole."
        )


def read(file: Path) -> dict[str, Any]:
    """The record; an empty one where there is none. Raises DataError when it holds something else."""
    return page.read(file, {"pods": {}})


def compiled(pod: Pod) -> dict[str, Any]:
    """What `tokenlab compile --json` says of it, in a process of its own, and the versions that said so.

    Raises:
      TokenLabError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "said.json"
        words = [sys.executable, "-m", "tokenlab", *pod.command, f"--json={file}"]
        done = subprocess.run(words, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
        if done.returncode not in (0, 3):
            raise TokenLabError(f"tokenlab {' '.join(pod.command)} ended with status {done.returncode}.")
        report = json.loads(file.read_text(encoding="utf-8"))
    return {"command": " ".join(pod.command), "versions": versions(), **report}


def versions() -> dict[str, str]:
    """Of what decides about the program."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def table(pods: Mapping[str, Mapping[str, Any]]) -> str:
    """The record as two tables in Markdown: what it takes, and what is sent.

    Args:
      pods: name -> report, those of `PODS` in any order.
    """
    first = [
        "| model | slice and mesh | batch | memory a device, of it state | FLOPs a device | least time of a step | "
        "batch that fits | compiled in, of one core |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    second = [
        "| model | a device sends in a step | of it between devices of different experts |",
        "|---|---|---|",
    ]
    for name, pod in PODS.items():
        if (said := pods.get(name)) is None:
            continue
        memory = f"{gigabytes(said['bytes_per_device'])} of {gigabytes(said['hbm_bytes'])} GB"
        first.append(
            f"| {pod.title} | {pod.topology}, {pod.mesh.replace(',', ' x ')} | {said['batch_size']:,} | "
            f"{memory}, {gigabytes(said['state_bytes'])} GB | {pretty(said['flops_per_device'])} | "
            f"{1e3 * said['step_seconds_bound']:.3g} ms, {said['bound']} | {said['batch_that_fits']:,} | "
            f"{said['compile_seconds']:.0f} s ({said['compile_cpu_seconds']:.0f} s) |"
        )
        second.append(f"| {pod.title} | {_sent(said['collectives'])} | {_sent(said['across_expert'])} |")
    missing = [f"{pod.title} on {pod.topology}" for name, pod in PODS.items() if name not in pods]
    last = ["", f"Not in the record yet: {'; '.join(missing)}."] if missing else []
    return "\n".join([*first, "", *second, *last])


def gigabytes(size: int) -> str:
    """In three digits, 1e9 bytes each."""
    return f"{size / 1e9:.3g}"


def _sent(kinds: Sequence[Mapping[str, Any]] | None) -> str:
    if not kinds:
        return ""
    return ", ".join(f"{each['count']:,} {each['kind']} {pretty(each['bytes'])}B" for each in kinds)


def main(argv: Sequence[str] | None = None, root: Path = Path(".")) -> int:
    """Run the command in the root of a checkout; returns the exit status: 0, 1 (not up to date) or 2 (a mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenlab.bench.pods", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", choices=sorted(PODS), help="one of them")
    parser.add_argument("--again", action="store_true", help="compile also what the record has")
    parser.add_argument(
        "--check", action="store_true", help="compile and write nothing; exit with 1 when out of date"
    )
    given = parser.parse_args(argv)

    def tables() -> str:
        record = read(root / RECORD)
        for name, pod in {} if given.check else PODS.items():
            same = record["pods"].get(name, {}).get("command") == " ".join(pod.command)
            if given.only not in (None, name) or (same and not given.again):
                continue
            report = compiled(pod)
            check(pod, report)
            record["pods"] = {
                each: (record["pods"] | {name: report})[each]
                for each in PODS
                if each in record["pods"] or each == name
            }
            (root / RECORD).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(root / RECORD, json.dumps(record, indent=1) + "\n")
        return table(record["pods"])

    command = "python -m tokenlab.bench.pods"
    return page.refresh(root / PAGE, BEGIN, END, tables, check=given.check, command=command)


if __name__ == "__main__":
    sys.exit(main())
