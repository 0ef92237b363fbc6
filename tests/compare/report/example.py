"""Results of a comparison as results.json holds them: a baseline, six arms, three seeds.

One arm waits, one is half done, one has no peak memory, one has experts, one pictures, and one is called by
characters that mean something to HTML, to Markdown and to plotly.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

SEEDS = [0, 1, 2]
BLOCKS = 12
ODD = 'merge <b>&amp; "half"</b> %{x} | $a_b$'
STUDENT = {2: 12.706, 3: 4.303}

# name: (stack, mean accuracy, speed, forward FLOPs, step seconds, peak bytes, parameters, active, tokens by block)
ARMS: dict[str, tuple[str, float, float, int, float, int | None, int, int, list[int]]] = {
    "dense": ("block*12", 0.9632, 1.0, 2_508_000_000, 0.0812, 612_000_000, 5_717_416, 5_717_416, [197] * 12),
    "keep": (
        "block*4 + keep(0.7) + block*4 + keep(0.7) + block*4",
        0.9705,
        1.25,
        1_790_000_000,
        0.0604,
        448_000_000,
        5_717_801,
        5_717_801,
        [197] * 4 + [138] * 4 + [97] * 4,
    ),
    ODD: (
        "(block + merge(16))*12",
        0.9668,
        1.4,
        1_455_000_000,
        0.0571,
        None,
        5_717_416,
        5_717_416,
        [197 - 16 * k for k in range(12)],
    ),
    "soft-moe": (
        "block*6 + moe(soft_moe, experts=8)*6",
        0.9741,
        0.95,
        2_611_000_000,
        0.1042,
        905_000_000,
        22_316_000,
        5_912_000,
        [197] * 12,
    ),
    "random": (
        "block*4 + keep(0.5, scores=random) + block*8",
        0.9402,
        1.3,
        1_560_000_000,
        0.0549,
        401_000_000,
        5_717_416,
        5_717_416,
        [197] * 4 + [99] * 8,
    ),
    "depth": (
        "skip(block, capacity=0.5)*12",
        0.9611,
        1.1,
        1_502_000_000,
        0.0688,
        431_000_000,
        5_722_024,
        5_722_024,
        [99] * 12,
    ),
    "registers": (
        "register(4) + block*12",
        0.0,
        1.0,
        2_560_000_000,
        0.0,
        None,
        5_718_184,
        5_718_184,
        [201] * 12,
    ),
}
BUDGET = 2.4e14


def results() -> dict[str, Any]:
    """Results of format 1."""
    arms = [_arm(name) for name in ARMS]
    base = arms[0]
    for arm in arms[1:]:
        arm["versus_baseline"] = _versus(arm, base)
    return {
        "format": 1,
        "title": "Vision transformers on digits at equal training FLOPs",
        "baseline": "dense",
        "metric": {"name": "accuracy", "split": "test", "higher_is_better": True},
        "budget": {"kind": "flops", "amount": BUDGET, "tolerance": 0.01},
        "device": "cpu, 2 cores",
        "versions": {"tokenlab": "0.1.0", "python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8"},
        "seeds": SEEDS,
        "arms": arms,
        "notes": ["the last step of keep ran past the budget by 0.3 %, within the tolerance"],
    }


def one_seed() -> dict[str, Any]:
    """The same with a single seed: no interval anywhere."""
    found = results()
    found["seeds"] = [0]
    for arm in found["arms"]:
        arm["runs"] = arm["runs"][:1]
        if arm["quality"] is not None:
            arm["quality"] = {"mean": arm["runs"][0]["metrics"]["accuracy"], "low": None, "high": None}
        if arm["versus_baseline"] is not None:
            arm["versus_baseline"] |= {"low": None, "high": None, "pairs": 1}
    return found


def _arm(name: str) -> dict[str, Any]:
    stack, accuracy, speed, forward, step_seconds, peak, parameters, active, tokens = ARMS[name]
    waiting = name == "registers"
    seeds = [] if waiting else SEEDS[:2] if name == "depth" else SEEDS
    steps = round(BUDGET / (3 * forward * 128))
    runs = [_run(name, seed, accuracy, speed, steps, 3 * forward * 128, step_seconds) for seed in seeds]
    return {
        "name": name,
        "stack": stack,
        "hash": "1a2b3c4d",
        "overrides": {"model.stack": stack},
        "config": {
            "model": {"name": "vit", "stack": stack, "width": 192, "heads": 3},
            "data": {"name": "digits", "batch_size": 128},
            "steps": steps,
            "learning_rate": 0.001,
        },
        "command": f"tokenlab train --config=configs/compare/vit_digits.py --config.model.stack='{stack}'",
        "status": "waiting" if waiting else "partial" if name == "depth" else "finished",
        "steps": steps,
        "steps_of": None,
        "train_flops": steps * 3 * forward * 128,
        "train_flops_with_recompute": steps * 4 * forward * 128,
        "layer_tokens": steps * 128 * sum(tokens),
        "forward_flops": forward,
        "parameters": parameters,
        "active_parameters": active,
        "peak_bytes": peak,
        "step_seconds": None if waiting else step_seconds,
        "seconds": None if waiting else runs[0]["seconds"],
        "tokens_by_layer": [{"layer": f"block_{k:02d}", "tokens": n} for k, n in enumerate(tokens)],
        "expert_load": _load() if name == "soft-moe" else None,
        "pictures": ["arms/keep-1a2b3c4d/tokens.png", "arms/keep-1a2b3c4d/gone.png"]
        if name == "keep"
        else [],
        "runs": runs,
        "quality": _quality([run["metrics"]["accuracy"] for run in runs]),
        "versus_baseline": None,
    }


def _run(
    name: str, seed: int, accuracy: float, speed: float, steps: int, flops: int, step_seconds: float
) -> dict[str, Any]:
    def at(step: int, wobble: float) -> tuple[float, float]:
        gone = speed * step / steps
        noise = 0.02 * math.sin(1.7 * step + 3 * seed + len(name)) * math.exp(-4 * gone) * wobble
        value = (
            accuracy
            - (accuracy - 0.1) * math.exp(-6 * gone)
            + noise
            + 0.0011 * math.sin(5 * seed + len(name))
        )
        return round(value, 5), round(2.3 * math.exp(-5 * gone) + 0.08 + 2 * abs(noise), 5)

    curve = []
    for step in [round(steps * k / 24) for k in range(1, 25)]:
        for split, wobble in (("train", 1.5), ("validation", 1.0)):
            value, loss = at(step, wobble)
            curve.append(
                {
                    "step": step,
                    "train_flops": step * flops,
                    "seconds": round(step * step_seconds * (1 + 0.01 * seed), 3),
                    "split": split,
                    "loss": loss,
                    "accuracy": min(1.0, value),
                }
            )
    final, loss = at(steps, 1.0)
    return {
        "seed": seed,
        "workdir": f"arms/arm-1a2b3c4d/seed_{seed}",
        "metrics": {"accuracy": final, "loss": loss},
        "steps": steps,
        "train_flops": steps * flops,
        "seconds": round(steps * step_seconds * (1 + 0.01 * seed), 3),
        "step_seconds": step_seconds,
        "curve": curve,
    }


def _quality(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    mean, half = statistics.mean(values), _half(values)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _versus(arm: dict[str, Any], base: dict[str, Any]) -> dict[str, Any] | None:
    theirs = {run["seed"]: run["metrics"]["accuracy"] for run in base["runs"]}
    apart = [run["metrics"]["accuracy"] - theirs[run["seed"]] for run in arm["runs"]]
    if not apart:
        return None
    mean, half = statistics.mean(apart), _half(apart)
    return {"difference": mean, "low": mean - half, "high": mean + half, "pairs": len(apart)}


def _half(values: list[float]) -> float:
    return STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def _load() -> dict[str, list[float]]:
    return {
        f"block_{layer:02d}": [
            round((1 + 0.6 * math.sin(2.1 * expert + layer)) / 8, 4) for expert in range(8)
        ]
        for layer in range(6, 12)
    }


def waiting() -> dict[str, Any]:
    """The same before the first run."""
    found = results()
    found["notes"] = []
    for arm in found["arms"]:
        nothing = dict.fromkeys(
            ("quality", "versus_baseline", "step_seconds", "seconds", "peak_bytes", "expert_load")
        )
        arm |= {"status": "waiting", "runs": [], "pictures": [], **nothing}
    return found
