"""Jumbo beside 16 registers at equal width, 224 px: a train step and a forward pass, counted, and timed in turn.

    python experiments/jumbo/run.py [--json=FILE] [--sizes=nano,tiny] [--batch=N] [--rounds=N]

Models are those of configs/jumbo.py, images noise, the optimizer AdamW; one device. By default 64 examples a step in
float32 on a CPU, 256 in bfloat16 elsewhere: few rows do not repay reading the wide weights. Of the ways of running
a stack the faster one counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from tokenlab.core import huge_pages

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "jumbo.py"
KINDS = {"registers": ",registers", "jumbo": ""}


def settings(size: str, batch: int, dtype: str) -> dict[str, Any]:
    """Kind -> what its arms are made of: the model of the configuration, on one batch."""
    from tokenlab.bench import suite
    from tokenlab.core import config as configs

    common = suite.setting(suite.Size({"name": "vit"}, batch=batch, rounds=1))
    found = {}
    for kind, words in KINDS.items():
        model = {**configs.load(f"{CONFIG}:{size}{words}").model.to_dict(), "dtype": dtype}
        found[kind] = dataclasses.replace(common, model=model)
    return found


def measure(size: str, mode: Any, batch: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A record for each kind."""
    from tokenlab.bench import timing
    from tokenlab.bench.arm import Shelf, prepare_each
    from tokenlab.bench.statistics import time_ratio
    from tokenlab.train.records import environment

    shelf = Shelf()
    arms = {
        (kind, how): arm
        for kind, setting in settings(size, batch, dtype).items()
        for how, arm in prepare_each(setting, None, mode, shelf, print).items()
    }
    timed = timing.interleaved({name: arm.run for name, arm in arms.items()}, rounds)
    best = {
        kind: min((name for name in arms if name[0] == kind), key=lambda name: statistics.median(timed[name]))
        for kind in KINDS
    }
    facts = environment()
    base = best["registers"]
    return [
        {
            "size": size,
            "kind": kind,
            "mode": mode,
            "stack": arms[name].model.stack_text,
            "execution": name[1],
            "batch_size": batch,
            "dtype": dtype,
            "rounds": rounds,
            "flops": arms[name].cost.model_flops,
            "flops_over_registers": arms[name].cost.model_flops / arms[base].cost.model_flops,
            "step_seconds": statistics.median(timed[name]),
            "examples_per_second": batch / statistics.median(timed[name]),
            "time_over_registers": time_ratio(timed[name], timed[base]),
            "peak_bytes": arms[name].peak_bytes,
            "environment": facts,
        }
        for kind, name in best.items()
    ]


def main() -> None:
    """Measure, print, and write the figures when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", default="nano,tiny")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    huge_pages.ensure()
    import jax

    from tokenlab.bench.arm import MODES
    from tokenlab.train.records import write_json

    cpu = jax.default_backend() == "cpu"
    batch, dtype = options.batch or (64 if cpu else 256), "float32" if cpu else "bfloat16"
    found = []
    for size in options.sizes.split(","):
        for mode in MODES:
            for record in measure(size, mode, batch, dtype, options.rounds):
                found.append(record)
                print(
                    f"{size:6} {mode:9} {record['kind']:9} {1e3 * record['step_seconds']:8.1f} ms, "
                    f"{record['examples_per_second']:8.0f} images/s  / registers: "
                    f"FLOPs {record['flops_over_registers']:.3f}, time {record['time_over_registers']:.3f}",
                    flush=True,
                )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, found)


if __name__ == "__main__":
    main()
