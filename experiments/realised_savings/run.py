"""How much of a counted saving is real: train steps of reduced stacks timed beside the dense one.

    python experiments/realised_savings/run.py [--json=FILE] [--repeats=9] [--batch=8]

A ViT-Ti/16 at 224 px (196 patches and CLS), float32. Every stack is compiled scanned and unrolled and the faster is
taken, for the dense one too; repeats are interleaved, so that what else the machine does falls on all alike.

    realised = (1 - seconds / seconds of dense) / (1 - FLOPs / FLOPs of dense)

FLOPs are counted (`tokenlab.cost`), of the train step without the optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from tokenlab import models, tasks
from tokenlab.core import huge_pages
from tokenlab.cost.flops import count

DENSE = "block*12"
STACKS = {
    "dense": DENSE,
    "keep after 2": "block*2 + keep(0.5, by=cls) + block*10",
    "keep after 4": "block*4 + keep(0.5, by=cls) + block*8",
    "skip 10 of 12": "block + skip(keep=0.5)(block)*10 + block",
    "skip span": "block*2 + skip(keep=0.5)(block*8) + block*2",
    "merge 8 a block": "block(between=merge(8))*12",
}
EXECUTIONS = ("scan", "unroll")


class Arm:
    """One stack in one way of running it: its compiled train step, its state, its times."""

    def __init__(self, stack: str, execution: str, batch: int):
        spec = {"image": ((224, 224, 3), "float32")}
        settings = {"size": "Ti/16", "stack": stack, "execution": execution}
        model, task = models.build(settings, spec=spec, num_outputs=1000), tasks.build({"name": "classify"})
        optimizer = optax.adamw(1e-3)
        key = jax.random.key(0)
        self.batch = {
            "image": jax.random.normal(key, (batch, 224, 224, 3)),
            "label": jnp.zeros((batch,), jnp.int32),
            "mask": jnp.ones((batch,)),
        }

        def gradients(params: Any, batch: Any) -> Any:
            loss = lambda p: task.loss(model, p, batch, rng=key, train=True)[0]  # noqa: E731
            return jax.value_and_grad(loss)(params)

        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
            loss, grads = gradients(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        self.params = jax.jit(model.init)(key)
        self.state = optimizer.init(self.params)
        self.flops = count(gradients, self.params, self.batch).flops
        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, self.batch).compile()
        self.seconds: list[float] = []

    def run(self) -> float:
        """Time one step."""
        start = time.perf_counter()
        self.params, self.state, loss = self.step(self.params, self.state, self.batch)
        loss.block_until_ready()
        return time.perf_counter() - start


def main() -> None:
    """Measure, print, and write the figures when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()

    fastest: dict[str, Arm] = {}
    modes: dict[str, str] = {}
    for name, stack in STACKS.items():
        arms = {how: Arm(stack, how, options.batch) for how in EXECUTIONS}
        for _ in range(3):  # the first warms up
            trial = {how: arm.run() for how, arm in arms.items()}
        modes[name] = min(trial, key=trial.__getitem__)
        fastest[name] = arms[modes[name]]
        print(f"{name}: {', '.join(f'{how} {1e3 * t:.0f} ms' for how, t in trial.items())}", flush=True)
    for _ in range(options.repeats):
        for arm in fastest.values():
            arm.seconds.append(arm.run())

    dense = fastest["dense"]
    base = statistics.median(dense.seconds)
    records = []
    table = Table("stack", "runs", "s/step", "time ratio", "FLOPs ratio", "realised")
    for name, arm in fastest.items():
        seconds = statistics.median(arm.seconds)
        # One ratio a round, so that slow rounds are compared with slow rounds.
        ratio = statistics.median(a / b for a, b in zip(arm.seconds, dense.seconds, strict=True))
        flops = arm.flops / dense.flops
        realised = None if arm is dense else (1 - ratio) / (1 - flops)
        records.append(
            {
                "name": name,
                "stack": STACKS[name],
                "execution": modes[name],
                "step_seconds": seconds,
                "time_ratio": ratio,
                "flops_ratio": flops,
                "realised": realised,
                "flops_per_second": arm.flops / seconds,
            }
        )
        shown = "" if realised is None else f"{realised:.2f}"
        table.add_row(name, modes[name], f"{seconds:.3f}", f"{ratio:.3f}", f"{flops:.3f}", shown)
    Console().print(table)
    print(f"dense: {dense.flops / base / 1e9:.0f} GFLOP/s, batch {options.batch}, {options.repeats} rounds")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    huge_pages.ensure()
    main()
