"""What more experts cost at equal work: Soft MoE's layer at fixed slots, and beside the dense layer; timed in turn.

    python experiments/expert_cost/run.py [--json=FILE] [--repeats=15]

Forward and backward of one layer (weights and input differentiated), float32, width 128, hidden 512, 128 tokens and
128 slots an example. Rows of an expert are batch x slots / experts. "over FLOPs" is the time over the dense layer's,
divided by the counted FLOPs over the dense layer's: 1 means that a FLOP takes as long as there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from tokenlab.core import huge_pages

TOKENS, WIDTH, HIDDEN, SLOTS = 128, 128, 512, 128
BATCHES, EXPERTS = (256, 32), (8, 32, 128)


def arms(batch: int) -> dict[str, tuple[Any, int]]:
    """Name -> (a function that takes one step and waits for it, its counted FLOPs)."""
    import jax

    from tokenlab import SoftMoE
    from tokenlab.cost.flops import count
    from tokenlab.layers.ffn.mlp import MLP

    x = jax.random.normal(jax.random.key(0), (batch, TOKENS, WIDTH))

    def arm(layer: Any) -> tuple[Any, int]:
        weights = jax.jit(layer.init)(jax.random.key(1), x)

        def total(weights: Any, x: Any) -> Any:
            y = layer.apply(weights, x)
            return (y[0] if isinstance(y, tuple) else y).sum()

        backward = jax.grad(total, argnums=(0, 1))
        run = jax.jit(backward)
        return lambda: jax.block_until_ready(run(weights, x)), count(backward, weights, x).flops

    expert = MLP(HIDDEN, "gelu_tanh")
    layers: dict[str, Any] = {"dense": expert}
    layers |= {f"{e} experts": SoftMoE(e, slots=SLOTS // e, expert=expert) for e in EXPERTS}
    return {name: arm(layer) for name, layer in layers.items()}


def main() -> None:
    """Measure, print, and write the figures when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    huge_pages.ensure()
    records = []
    for batch in BATCHES:
        found = arms(batch)
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(options.repeats + 2):
            for name, (once, _) in found.items():
                start = time.perf_counter()
                once()
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)

        def ratio(name: str, to: str, times: dict[str, list[float]] = times) -> float:
            return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))

        for name, (_, flops) in found.items():
            count = int(name.split()[0]) if name != "dense" else 1
            record = {
                "batch": batch,
                "name": name,
                "rows_of_an_expert": batch * SLOTS // count,
                "seconds": statistics.median(times[name]),
                "flops_over_dense": flops / found["dense"][1],
                "over_dense": ratio(name, "dense"),
                "over_8_experts": ratio(name, "8 experts"),
            }
            record["over_flops"] = record["over_dense"] / record["flops_over_dense"]
            records.append(record)
            print(
                f"batch {batch:3}  {name:12} rows {record['rows_of_an_expert']:6}  {1e3 * record['seconds']:7.1f} ms  "
                f"/ dense {record['over_dense']:.2f} (FLOPs {record['flops_over_dense']:.2f}, "
                f"over FLOPs {record['over_flops']:.2f})  / 8 experts {record['over_8_experts']:.2f}"
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
