"""What bounds a train step on the CPU: pages of memory, how blocks are run, activations; all timed side by side.

    python experiments/cpu_step/run.py [--json=FILE] [--repeats=15] [--batch=128]

The model of `configs/fashion_mnist.py` (width 64, six blocks, 50 tokens), float32, forward, backward and AdamW. Two
processes take turns, one with the 4 KiB pages that glibc gives, one with huge pages (`tokenlab.core.huge_pages`).
Times are medians of interleaved rounds, FLOPs are counted. "faults" are page faults a step, "kernel" CPU seconds a step
inside the kernel, on whichever core. The last row is a single product of two 1024 x 1024 matrices, as a measure of what
the cores can do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenlab.core import huge_pages

PAGES = {"4 KiB": "", "huge": huge_pages.TUNABLE}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "dense": {"stack": "block*6"},
    "dense, scanned": {"stack": "block*6", "execution": "scan"},
    "dense, exact gelu": {"stack": "block*6", "activation": "gelu"},
    "dense, relu": {"stack": "block*6", "activation": "relu"},
    "keep(0.5) after 2": {"stack": "block*2 + keep(0.5, by=cls) + block*4"},
}
PRODUCT = "one product, 1024 x 1024"


def train_step(settings: Mapping[str, Any], batch_size: int) -> tuple[Callable[[], None], int]:
    """A function that takes one step and waits for it, and the FLOPs of that step without the optimizer."""
    import jax
    import jax.numpy as jnp
    import optax

    from tokenlab import models, tasks
    from tokenlab.cost.flops import count

    spec = {"image": ((28, 28, 1), "float32")}
    config = {"size": "toy/4", "execution": "unroll", **settings}
    model, task = models.build(config, spec=spec, num_outputs=10), tasks.build({"name": "classify"})
    optimizer, key = optax.adamw(1e-3), jax.random.key(0)
    batch = {
        "image": jax.random.normal(key, (batch_size, 28, 28, 1)),
        "label": jnp.zeros((batch_size,), jnp.int32),
        "mask": jnp.ones((batch_size,)),
    }

    def gradients(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: task.loss(model, p, batch, rng=key, train=True)[0])(params)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(key)
    held = [params, optimizer.init(params)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*held, batch).compile()

    def once() -> None:
        held[:] = compiled(*held, batch)
        jax.block_until_ready(held)

    return once, count(gradients, params, batch).flops


def product(size: int = 1024) -> tuple[Callable[[], None], int]:
    """A function that multiplies two matrices, and its FLOPs."""
    import jax
    import jax.numpy as jnp

    x, multiply = jnp.ones((size, size)), jax.jit(jnp.matmul)
    return lambda: multiply(x, x).block_until_ready(), 2 * size**3


def serve(batch_size: int) -> None:
    """Be one of the two processes: names of arms come in, one line each; one measurement goes out for each."""
    arms = {name: train_step(settings, batch_size) for name, settings in ARMS.items()} | {PRODUCT: product()}
    for once, _ in arms.values():
        once()
    print(json.dumps({name: flops for name, (_, flops) in arms.items()}), flush=True)
    for line in sys.stdin:
        once = arms[line.strip()][0]
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        once()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        faults, kernel = after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime
        print(json.dumps({"seconds": seconds, "faults": faults, "kernel": kernel}), flush=True)


class Server:
    """A process that serves, with one setting of the C library."""

    def __init__(self, tunables: str, batch_size: int):
        command = [sys.executable, __file__, "--serve", f"--batch={batch_size}"]
        environment = {**os.environ, huge_pages.VARIABLE: tunables}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.flops: dict[str, int] = self._answer()

    def run(self, arm: str) -> dict[str, float]:
        """One measurement."""
        self._process.stdin.write(arm + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a measuring process ended; its message is above")
        return json.loads(line)


def main() -> None:
    """Measure, print, and write the figures when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.batch)
        return

    from rich.console import Console
    from rich.table import Table

    servers = {pages: Server(tunables, options.batch) for pages, tunables in PAGES.items()}
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.repeats):
        for arm in (*ARMS, PRODUCT):
            for pages, server in servers.items():
                found.setdefault((arm, pages), []).append(server.run(arm))
    records = []
    table = Table("step", "pages", "ms", "GFLOP", "GFLOP/s", "faults", "kernel ms")
    for (arm, pages), rounds in found.items():
        seconds, faults, kernel = (statistics.median(r[key] for r in rounds) for key in rounds[0])
        flops = servers[pages].flops[arm]
        record = {"arm": arm, "pages": pages, "seconds": seconds, "flops": flops, "faults": faults}
        records.append({**record, "kernel_seconds": kernel, "all_seconds": [r["seconds"] for r in rounds]})
        speed, shown = flops / seconds / 1e9, [f"{1e3 * seconds:.0f}", f"{flops / 1e9:.2f}"]
        table.add_row(arm, pages, *shown, f"{speed:.0f}", f"{faults:,.0f}", f"{1e3 * kernel:.0f}")
    for server in servers.values():
        server.close()
    Console().print(table)
    print(f"batch {options.batch}, {options.repeats} rounds")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
