"""Parallel folding on eight emulated devices: the same training under three mappings, and what each of them sends.

    python experiments/folding/run.py [--steps=200] [--json=FILE]

A decoder of bytes on Tiny Shakespeare: width 64, two blocks, the second with 8 experts of which every token takes 2.

* curves: it is trained from one seed under three plans, unfolded and folded; the losses have to coincide to 1e-5. What
  is the same mathematics is not the same sum, though, and where a token's second and third expert are as good as equal
  rounding decides between them: from there on these are two runs. So where losses part, the choices just before are
  looked at, on one device: they have to differ, at a margin that rounding explains.
* traffic: bytes that a device sends forward in the layer of experts, of the compiled program and by the formula of
  tokenlab/cost/mapping.py. XLA:CPU has no ragged all-to-all: every device gets room for all rows, EP times more.
* capacity: the share of choices dropped and the loss with room for 1 and 1.25 times an even spread, and for all.

Nothing here says how fast folding is: emulated devices share one processor and have no links.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEVICES = 8
LENGTH, BATCH, WIDTH, HIDDEN, EXPERTS, CHOICES = 64, 8, 64, 128, 8, 2
APART, MARGIN = 1e-5, 1e-5  # losses that do not coincide; logits of two experts that rounding may swap
LAYERS = {
    "none": f"dropless(experts={EXPERTS}, k={CHOICES})",
    "1.25": f"tokens_choice(experts={EXPERTS}, k={CHOICES}, capacity=1.25)",
    "1": f"tokens_choice(experts={EXPERTS}, k={CHOICES}, capacity=1.0)",
}


def batches(steps: int) -> Iterator[dict[str, Any]]:
    """The same rows of text for every plan."""
    import numpy as np

    from tokenlab import data
    from tokenlab.train import default_config

    config = default_config(model="decoder_lm", task="next_token", data="shakespeare")
    config.data.length = LENGTH
    stream = data.TrainStream(data.build(config.data), "train", BATCH, seed=0, rows=np.arange(BATCH))
    for step in range(steps):
        yield stream.batch(step)


def built(layer: str) -> tuple[Any, Any]:
    """The model and its task."""
    from tokenlab import data, models, tasks
    from tokenlab.train import default_config

    config = default_config(model="decoder_lm", task="next_token", data="shakespeare")
    config.data.length = LENGTH
    source, task = data.build(config.data), tasks.build(config.task)
    stack = f"block + block(ffn={layer})"
    settings = {
        "name": "decoder_lm",
        "size": "toy",
        "width": WIDTH,
        "mlp_dim": HIDDEN,
        "stack": stack,
        "vocab_multiple": DEVICES,
        # With a capacity, whether a token is computed depends on those behind it: the loss is a comparison's alone.
        "leaks": "tokens_choice" in layer,
    }
    return models.build(settings, spec=source.spec, num_outputs=task.num_outputs(source)), task


def trained(plan: Any, layer: str, steps: int) -> tuple[list[float], float, list[Any]]:
    """Losses under a plan, the share of choices that the last step dropped, and the parameters before every step."""
    import jax

    from tokenlab.sharding.rules import row_sharding
    from tokenlab.train import optimizer as optimizers
    from tokenlab.train import state as states
    from tokenlab.train.config import OptimizerConfig, ScheduleConfig
    from tokenlab.train.step import make_train_step, metric_names

    model, task = built(layer)
    schedule = ScheduleConfig(name="constant", warmup_steps=20)
    optimizer = optimizers.build(OptimizerConfig(learning_rate=1e-3, schedule=schedule), steps + 20)
    first = next(batches(1))
    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in first.items()}
    names = metric_names(model, task, model.abstract_state(), shapes)
    mesh, losses, dropped, kept = plan.mesh(), [], 0.0, []
    places = states.shardings(jax.eval_shape(lambda: states.create(model, optimizer, names, 0)), model, mesh)
    rows = row_sharding(mesh)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: states.create(model, optimizer, names, 0), out_shardings=places)()
        step = make_train_step(model, task, optimizer, shardings=places, batch_sharding=rows)
        for batch in batches(steps):
            before = jax.device_get(state.metrics)
            kept.append(jax.device_get(state.params))
            state, report = step(state, jax.device_put(batch, rows))
            losses.append(float(report.loss))
        after = jax.device_get(state.metrics)
        for name in after:
            if name.endswith("dropped"):
                dropped = float(
                    (after[name][0] - before[name][0]) / max(after[name][1] - before[name][1], 1e-9)
                )
    return losses, dropped, kept


def routed(params: Any, batch: dict[str, Any]) -> Any:
    """What the router says of a batch on one device: logits [B N, E]."""
    from unittest import mock

    import jax
    import numpy as np

    from tokenlab.layers import experts

    told, plain = [], experts.router_kernel

    def telling(*given: Any) -> Any:
        logits = plain(*given)
        jax.debug.callback(lambda found: told.append(np.asarray(found)), logits)
        return logits

    with mock.patch.object(experts, "router_kernel", telling):
        jax.block_until_ready(built(LAYERS["none"])[0].apply(params, batch, train=False))
        jax.effects_barrier()
    return told[0].reshape(-1, EXPERTS)


def parting(step: int, one: Any, other: Any) -> dict[str, Any]:
    """Where two runs part: how far their parameters are apart before this step, and what their routers choose in it."""
    import jax
    import numpy as np

    *_, batch = batches(step + 1)
    apart = max(
        float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
    logits = [routed(params, batch) for params in (one, other)]
    chosen = [np.sort(np.argsort(-each, axis=-1)[:, :CHOICES], axis=-1) for each in logits]
    differ = (chosen[0] != chosen[1]).any(axis=-1)
    ordered = -np.sort(-logits[0], axis=-1)
    margins = (ordered[:, CHOICES - 1] - ordered[:, CHOICES])[differ]
    return {
        "step": step,
        "parameters_apart": apart,
        "tokens": len(differ),
        "tokens_that_differ": int(differ.sum()),
        "largest_margin": float(margins.max(initial=0.0)),
    }


def spread_of(*curves: list[float]) -> list[float]:
    """At each step, how far the highest is from the lowest."""
    return [max(at) - min(at) for at in zip(*curves, strict=True)]


def sent(plan: Any) -> dict[str, float]:
    """Bytes that a device sends forward in one layer of experts: as compiled, and by formula."""
    import jax

    from tokenlab import Dropless
    from tokenlab.cost.mapping import exchanged
    from tokenlab.layers.ffn.swiglu import SwiGLU
    from tokenlab.sharding.constrain import constrain
    from tokenlab.sharding.rules import row_sharding, shardings
    from tokenlab.sharding.traffic import executed
    from tokenlab.sharding.traffic import sent as bytes_of

    layer, mesh = Dropless(EXPERTS, k=CHOICES, expert=SwiGLU(HIDDEN)), plan.mesh()
    x = jax.numpy.ones((BATCH, LENGTH, WIDTH))
    params = layer.init(jax.random.key(0), x)["params"]

    def run(params: Any, x: Any) -> Any:
        x = constrain(x, "batch", "sequence", None)
        return constrain(layer.apply({"params": params}, x)[0], "batch", "sequence", None)

    with jax.set_mesh(mesh):
        given = (
            jax.device_put(params, shardings(params, layer.axes(), mesh)),
            jax.device_put(x, row_sharding(mesh)),
        )
        program = jax.jit(run).lower(*given).compile()
    tokens = [(e, n) for e, n in executed(program) if e.shapes[0][-1] == WIDTH and len(e.shapes[0]) > 2]
    by_formula = exchanged(plan.sizes, BATCH * LENGTH, CHOICES, WIDTH)
    return {
        "exchange compiled": sum(n * bytes_of(e, DEVICES) for e, n in tokens if e.kind == "all-to-all")
        / plan.ep,
        "exchange formula": 4 * by_formula.pop("exchange"),
        "other compiled": sum(n * bytes_of(e, DEVICES) for e, n in tokens if e.kind != "all-to-all"),
        "other formula": 4 * sum(by_formula.values()),
    }


def main() -> None:
    """All three, told on the way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", help="write everything to this file")
    given = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"

    from tokenlab.sharding.plan import ParallelPlan

    plans = [
        ParallelPlan(dp=8, ep=8),
        ParallelPlan(tp=2, dp=4, etp=2, ep=2),
        ParallelPlan(tp=2, cp=2, dp=2, etp=1, ep=8),
    ]
    found: dict[str, Any] = {"steps": given.steps, "plans": {}, "capacity": {}}
    kept: list[list[Any]] = []
    for plan in plans:
        losses, _, params = trained(plan, LAYERS["none"], given.steps)
        kept.append(params)
        found["plans"][str(plan)] = {"losses": losses, "folded": plan.folded, **sent(plan)}
        print(f"{str(plan):24} loss {losses[0]:.5f} -> {losses[-1]:.5f}", flush=True)
    wrong, curves = False, [each["losses"] for each in found["plans"].values()]
    print(f"\n{'beside ' + str(plans[0]):24} losses apart")
    for name, losses, params in list(zip(found["plans"], curves, kept, strict=True))[1:]:
        apart = spread_of(curves[0], losses)
        parts = next((step for step, size in enumerate(apart) if size > APART), None)
        said = found["plans"][name]["beside_the_first"] = {"largest_before": max(apart[:parts], default=0.0)}
        before = f"{said['largest_before']:.1e}" + ("" if parts is None else f" before step {parts}")
        print(f"{name:24} {before}", flush=True)
        if parts is not None:
            said |= parting(parts, kept[0][parts], params[parts]) | {"largest": max(apart)}
            print(
                f"{'':24} at that step parameters are {said['parameters_apart']:.1e} apart, and of {said['tokens']} "
                f"tokens {said['tokens_that_differ']} choose others, at margins up to {said['largest_margin']:.1e}; "
                f"at most {said['largest']:.1e} after it"
            )
            wrong |= not said["tokens_that_differ"] or said["largest_margin"] > MARGIN
    print(f"\n{'bytes a device, forward':24} {'exchange':>22} {'besides':>22}")
    for name, each in found["plans"].items():
        pairs = ((each[f"{what} compiled"], each[f"{what} formula"]) for what in ("exchange", "other"))
        print(
            f"{name:24} " + " ".join(f"{compiled:>10,.0f} ={formula:>10,.0f}" for compiled, formula in pairs)
        )
    for factor, layer in LAYERS.items():
        losses, dropped, _ = trained(plans[-1], layer, given.steps)
        found["capacity"][factor] = {"loss": losses[-1], "dropped": dropped}
        print(f"capacity {factor:5} dropped {dropped:.3f}, loss {losses[-1]:.4f}", flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if wrong:
        raise SystemExit("the curves do not coincide, and no tie between experts is why")


if __name__ == "__main__":
    main()
