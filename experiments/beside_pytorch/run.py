"""Beside PyTorch on the same CPU: a dense ViT train step, and a Soft MoE layer against the package soft-moe-pytorch.

    pip install -e ".[parity]"
    python experiments/beside_pytorch/run.py [--torch=PYTHON] [--json=FILE] [--repeats=11] [--only=NAME]

Two processes take turns, one with JAX, one with PyTorch (`--torch` names an interpreter that has it; by default this
one). Both compute in float32 with as many threads as there are cores. Reported are medians over rounds, the ratio of
the two in the same round, FLOPs counted by TokenLab for both, and the speed of each beside what its own library reaches
in one product of two 2048 x 2048 matrices in the same rounds.

* vit: train step (forward, backward, AdamW) of a ViT-S/16, width 384, 12 blocks, 197 tokens, batch 8.
* soft_moe: forward and backward of one layer, weights and input differentiated; batch 16, 196 tokens, width 256, hidden
  1024, 16 experts with 12 slots each (192 slots). TokenLab's experts use the tanh form of GELU as the authors do, the
  package the exact one; `soft_moe_erf` is TokenLab with the exact one, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenlab.core import huge_pages

VIT = {
    "image": 224,
    "patch": 16,
    "width": 384,
    "depth": 12,
    "heads": 6,
    "hidden": 1536,
    "classes": 1000,
    "batch": 8,
}
SOFT = {"batch": 16, "tokens": 196, "width": 256, "experts": 16, "slots": 12}
PRODUCT = 2048
Arm = tuple[Callable[[], None], int]


def jax_arms() -> dict[str, Arm]:
    """Name -> (a function that takes one step and waits for it, its counted FLOPs)."""
    import jax
    import jax.numpy as jnp
    import optax

    from tokenlab import SoftMoE, models, tasks
    from tokenlab.cost.flops import count
    from tokenlab.layers.ffn.mlp import MLP

    key = jax.random.key(0)
    side = VIT["image"]
    spec = {"image": ((side, side, 3), "float32")}
    model = models.build({"size": "S/16", "execution": "unroll"}, spec=spec, num_outputs=VIT["classes"])
    task, optimizer = tasks.build({"name": "classify"}), optax.adamw(1e-3)
    rows = VIT["batch"]
    batch = {
        "image": jax.random.normal(key, (rows, side, side, 3)),
        "label": jnp.zeros((rows,), jnp.int32),
        "mask": jnp.ones((rows,)),
    }

    def gradients(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: task.loss(model, p, batch, rng=key, train=True)[0])(params)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(key)
    held = [params, optimizer.init(params)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*held, batch).compile()

    def vit() -> None:
        held[:] = compiled(*held, batch)
        jax.block_until_ready(held)

    x = jax.random.normal(key, (SOFT["batch"], SOFT["tokens"], SOFT["width"]))

    def soft(activation: str) -> Arm:
        expert = MLP(4 * SOFT["width"], activation)
        layer = SoftMoE(num_experts=SOFT["experts"], slots=SOFT["slots"], expert=expert)
        weights = jax.jit(layer.init)(key, x)
        backward = jax.grad(lambda weights, x: layer.apply(weights, x)[0].sum(), argnums=(0, 1))
        run = jax.jit(backward)
        return lambda: jax.block_until_ready(run(weights, x)), count(backward, weights, x).flops

    a = jax.random.normal(key, (PRODUCT, PRODUCT))
    product = jax.jit(jnp.matmul)
    return {
        "vit": (vit, count(gradients, params, batch).flops),
        "soft_moe": soft("gelu_tanh"),
        "soft_moe_erf": soft("gelu"),
        "product": (lambda: product(a, a).block_until_ready(), 2 * PRODUCT**3),
    }


def torch_arms() -> dict[str, Arm]:
    """The same with PyTorch; FLOPs are counted by the other process."""
    import torch
    import torch.nn.functional as F
    from soft_moe_pytorch import SoftMoE
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    width, heads, hidden = VIT["width"], VIT["heads"], VIT["hidden"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

        def forward(self, x: Any) -> Any:
            b, n, d = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
            x = x + self.out(mixed)
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            tokens = (VIT["image"] // VIT["patch"]) ** 2
            self.patch = nn.Conv2d(3, width, VIT["patch"], VIT["patch"])
            self.position, self.cls = (
                nn.Parameter(torch.zeros(tokens, width)),
                nn.Parameter(torch.zeros(1, 1, width)),
            )
            self.blocks = nn.Sequential(*[Block() for _ in range(VIT["depth"])])
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VIT["classes"])

        def forward(self, image: Any) -> Any:
            x = self.patch(image).flatten(2).transpose(1, 2) + self.position
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
            return self.head(self.norm(self.blocks(x))[:, 0])

    model = ViT()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    image = torch.randn(VIT["batch"], 3, VIT["image"], VIT["image"])
    label = torch.zeros(VIT["batch"], dtype=torch.long)

    def vit() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(image), label).backward()
        optimizer.step()

    layer = SoftMoE(dim=SOFT["width"], num_experts=SOFT["experts"], num_slots=SOFT["slots"])
    x = torch.randn(SOFT["batch"], SOFT["tokens"], SOFT["width"], requires_grad=True)

    def soft() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).sum().backward()

    a = torch.randn(PRODUCT, PRODUCT)
    same = dict.fromkeys(("soft_moe", "soft_moe_erf"), (soft, 0))
    return {"vit": (vit, 0), **same, "product": (lambda: a @ a, 0)}


def serve(library: str) -> None:
    """Be one of the two processes: names come in, one a line; seconds go out."""
    arms = jax_arms() if library == "jax" else torch_arms()
    for once, _ in arms.values():
        once()
        once()
    import importlib.metadata

    version = importlib.metadata.version(library)
    print(
        json.dumps({"version": version, "flops": {name: flops for name, (_, flops) in arms.items()}}),
        flush=True,
    )
    for line in sys.stdin:
        once = arms[line.strip()][0]
        start = time.perf_counter()
        once()
        print(time.perf_counter() - start, flush=True)


class Server:
    """A process that serves."""

    def __init__(self, python: str, library: str):
        # Both may use the C library's huge pages, which they gain by alike.
        environment = {**os.environ, huge_pages.VARIABLE: huge_pages.TUNABLE}
        command, pipe = [python, __file__, f"--serve={library}"], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.facts: dict[str, Any] = json.loads(self._answer())

    def run(self, arm: str) -> float:
        """Seconds of one step."""
        self._process.stdin.write(arm + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a measuring process ended; its message is above")
        return line


def main() -> None:
    """Measure, print, and write the figures when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--only", choices=("vit", "soft_moe", "soft_moe_erf"))
    parser.add_argument("--serve", choices=("jax", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    servers = {"jax": Server(sys.executable, "jax"), "torch": Server(options.torch, "torch")}
    arms = [options.only] if options.only else ["vit", "soft_moe", "soft_moe_erf"]
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(options.repeats):
        order = list(servers) if turn % 2 else list(servers)[::-1]
        for arm in (*arms, "product"):
            for library in order:
                times.setdefault((arm, library), []).append(servers[library].run(arm))
    flops = servers["jax"].facts["flops"]
    records = []
    for arm in arms:
        ratio = [a / b for a, b in zip(times[arm, "jax"], times[arm, "torch"], strict=True)]
        record: dict[str, Any] = {
            "what": arm,
            "flops": flops[arm],
            "jax_over_torch": statistics.median(ratio),
        }
        for library in servers:
            seconds = times[arm, library]
            peak = flops["product"] / min(times["product", library])
            low, _, high = statistics.quantiles(seconds, n=4)
            speed = flops[arm] / statistics.median(seconds)
            record[library] = {
                "version": servers[library].facts["version"],
                "seconds": statistics.median(seconds),
                "quartiles": [low, high],
                "flops_per_second": speed,
                "product_flops_per_second": peak,
                "share_of_product": speed / peak,
            }
            print(
                f"{arm:9} {library:6} {1e3 * statistics.median(seconds):8.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})"
                f"  {speed / 1e9:6.1f} GFLOP/s, {100 * speed / peak:.0f} % of its product's {peak / 1e9:.0f}"
            )
        print(f"{arm:9} jax / torch {record['jax_over_torch']:.2f}")
        records.append(record)
    for server in servers.values():
        server.close()
    if options.json:
        facts = {
            "repeats": options.repeats,
            "cores": os.cpu_count(),
            "settings": {"vit": VIT, "soft_moe": SOFT},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
