"""Tokens a second in generation: with memories, by computing everything again for every token, and what memory allows.

    python experiments/generation/run.py [--json=FILE] [--rounds=9]

A decoder of eight blocks of width 256 (6.4 million weights of 4 bytes), prompts of 256 bytes and 256 that follow,
greedy, dense and with every second block routed. "recompute" is the forward pass over the whole sequence, once a token.
"bound" is what reading every weight once a step allows at the memory bandwidth measured in the same run: a step of any
batch reads them once, so tokens a second of a batch may be B times that. The arms are timed in turn; medians of rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from tokenlab.core import huge_pages

PROMPT, NEW, VOCABULARY, CHUNK = 256, 256, 257, 32
BATCHES = (1, 8)
STACKS = {"dense": "block*8", "mod": "(block + mod(keep=0.125)(block))*4"}
EXECUTIONS = ("unroll", "scan")


def arms(stack: str, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name -> a function that generates and gives back how many tokens an example; and facts of the model."""
    import jax
    import jax.numpy as jnp

    from tokenlab import models
    from tokenlab.cost.flops import count
    from tokenlab.generate import Generator
    from tokenlab.ops.sample import Sampling

    def model(execution: str) -> Any:
        settings = {"name": "decoder_lm", "size": "small", "stack": stack, "execution": execution}
        spec = {"ids": ((PROMPT + NEW,), "int32")}
        return models.build(settings, spec=spec, num_outputs=VOCABULARY, train=False)

    whole = model("auto")
    params = jax.jit(whole.init)(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (batch, PROMPT + NEW), 0, 256)
    length = jnp.full((batch,), PROMPT, jnp.int32)
    found: dict[str, Any] = {}
    memory_bytes = 0
    for execution in EXECUTIONS:
        generator = Generator(
            model(execution), params, prompt=PROMPT, new=NEW, sampling=Sampling(0.0), chunk=CHUNK
        )
        going = jax.block_until_ready(
            generator._start(generator.weights, ids[:, :PROMPT], length, jax.random.key(0))
        )
        memory_bytes = going.memory.nbytes
        state = [going]

        def steps(generator: Any = generator, state: list[Any] = state) -> int:
            tokens, state[0] = generator._more(generator.weights, state[0], jax.random.key(0))
            jax.block_until_ready(tokens)
            return CHUNK

        found[f"memories, {execution}"] = steps
    forward = jax.jit(lambda params, ids: whole.apply(params, {"ids": ids}).logits[:, -1])

    def again() -> int:
        jax.block_until_ready(forward(params, ids))
        return 1

    found["recompute"] = again
    # Of the embedding a step reads one row an example.
    read = sum(
        leaf.nbytes for name, tree in params.items() if name != "embed" for leaf in jax.tree.leaves(tree)
    )
    facts = {
        "weight_bytes": read,
        "memory_bytes": memory_bytes,
        "forward_flops": count(forward, params, ids).flops // batch,
    }
    return found, facts


def main() -> None:
    """Measure, print, and write the figures when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    huge_pages.ensure()
    from tokenlab.cost.hardware import measure_memory_bandwidth

    records = []
    for batch in BATCHES:
        made = {name: arms(stack, batch) for name, stack in STACKS.items()}
        speeds: dict[tuple[str, str], list[float]] = {}
        bandwidth = []
        for turn in range(options.rounds + 1):
            bandwidth.append(measure_memory_bandwidth(repeats=3))
            for name, (functions, _) in made.items():
                for way, once in functions.items():
                    begun = time.perf_counter()
                    tokens = once()
                    if turn:  # the first compiles
                        seconds = time.perf_counter() - begun
                        speeds.setdefault((name, way), []).append(batch * tokens / seconds)
        reached = statistics.median(bandwidth)
        for name, (functions, facts) in made.items():
            bound = batch * reached / facts["weight_bytes"]
            for way in functions:
                speed = statistics.median(speeds[name, way])
                again = statistics.median(
                    a / b for a, b in zip(speeds[name, way], speeds[name, "recompute"], strict=True)
                )
                record = {
                    "batch": batch,
                    "stack": STACKS[name],
                    "way": way,
                    "tokens_per_second": speed,
                    "over_recompute": again,
                    "share_of_bound": speed / bound,
                    "bandwidth": reached,
                    **facts,
                }
                records.append(record)
                print(
                    f"batch {batch}  {name:6} {way:17} {speed:8.0f} tokens/s  {again:6.1f} x recompute  "
                    f"{100 * speed / bound:5.1f} % of the bound at {reached / 1e9:.1f} GB/s  "
                    f"memories {facts['memory_bytes'] / 2**20:.1f} MiB"
                )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
