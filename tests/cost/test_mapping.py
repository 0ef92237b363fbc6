"""Traffic of mappings by formula, against what compiled programs send."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import pytest

from tokenlab import Dropless, SoftMoE
from tokenlab.core.config import to_dataclass
from tokenlab.cost.mapping import BlockSizes, Leaf, Sent, activation_bytes, exchanged, step_bytes
from tokenlab.layers.ffn.swiglu import SwiGLU
from tokenlab.sharding.constrain import constrain
from tokenlab.sharding.plan import ParallelPlan, every_plan
from tokenlab.sharding.rules import row_sharding, shardings
from tokenlab.sharding.traffic import executed, sent
from tokenlab.train.config import TrainConfig, default_config
from tokenlab.train.offline import compile_step

B, N, D, F, E, K = 8, 8, 16, 24, 8, 2
FOLDED, UNFOLDED = ParallelPlan(tp=2, cp=2, dp=2, etp=1, ep=8), ParallelPlan(dp=8, ep=8)
PLANS = (
    FOLDED,
    UNFOLDED,
    pytest.param(ParallelPlan(tp=4, dp=2, etp=2, ep=4), marks=pytest.mark.slow),
    pytest.param(ParallelPlan(cp=2, dp=4, etp=4, ep=2), marks=pytest.mark.slow),
    pytest.param(ParallelPlan(tp=4, dp=2, etp=1, ep=2), marks=pytest.mark.slow),
)


def travelled(plan, layer=None):
    """Numbers that a device sends in a layer of experts, forward, by kind of collective; tables of sizes left out."""
    layer, mesh = layer or Dropless(E, k=K, expert=SwiGLU(F)), plan.mesh()
    x = jax.random.normal(jax.random.key(1), (B, N, D))
    params = layer.init(jax.random.key(0), x)["params"]

    def run(params, x):
        x = constrain(x, "batch", "sequence", None)
        return constrain(layer.apply({"params": params}, x)[0], "batch", "sequence", None)

    with jax.set_mesh(mesh):
        given = (
            jax.device_put(params, shardings(params, layer.axes(), mesh)),
            jax.device_put(x, row_sharding(mesh)),
        )
        program = jax.jit(run).lower(*given).compile()
    found = {}
    for each, times in executed(program):
        tokens = each.shapes[0][-1] == D and len(each.shapes[0]) > 2
        if tokens:
            found[each.kind] = found.get(each.kind, 0) + times * sent(each, 8) / 4
    return found


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_layers_of_experts_send_what_the_formula_says(plan):
    wanted, found = exchanged(plan.sizes, B * N, K, D), travelled(plan)
    # XLA:CPU has no ragged all-to-all: there every device gets room for all rows, EP times what is needed.
    assert found.get("all-to-all", 0) == wanted["exchange"] * plan.ep
    rest = sum(value for kind, value in found.items() if kind != "all-to-all")
    assert rest == pytest.approx(wanted["join"] + wanted["add up"] + wanted["gather"])
    n = B * N // 8
    if plan.etp == 1:  # the published formula
        assert wanted["exchange"] == 2 * n * K * D * (plan.ep - 1) / plan.ep and wanted["join"] == 0


@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(dp=8, etp=2, ep=4),
        pytest.param(ParallelPlan(tp=2, dp=4, etp=2, ep=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layers_on_buffers_send_places(plan):
    """Two for each token here; where devices share experts, places are joined or added up."""
    layer = SoftMoE(E, slots=2 * N // E, expert=SwiGLU(F))
    wanted, found = exchanged(plan.sizes, B * N, 2, D, buffers=True), travelled(plan, layer)
    assert found["all-to-all"] == wanted["exchange"]
    assert sum(found.values()) == pytest.approx(sum(wanted.values()))
    tokens = exchanged(plan.sizes, B * N, 2, D)
    assert wanted["join"] + wanted["add up"] == 2 * (tokens["join"] + tokens["add up"]) > 0


def test_what_is_computed_again_is_sent_again_but_not_what_ends_a_block():
    block = BlockSizes(tokens=16, width=8, heads=4, kv_heads=2, head_dim=2, hidden=32, choices=2)
    for plan in (ParallelPlan(tp=4, dp=2, etp=2, ep=4), ParallelPlan(dp=8, etp=2, ep=4)):
        for buffers in (False, True):
            own = dataclasses.replace(block, buffers=buffers)
            each = exchanged(plan.sizes, 4 * 16, 2, 8, buffers=buffers)
            once, again = (
                step_bytes(plan.sizes, [own], [], batch=4, itemsize=2, remat=remat).experts
                for remat in ("none", "full")
            )
            more = each["exchange"] + (each["join"] + each["add up"] if buffers else each["join"] / 2)
            assert once == 2 * 2 * sum(each.values()) and again - once == 2 * more


def test_rules_of_ones_own_gather_and_sum_along_what_they_split():
    """What is split over "data" too is gathered along it; experts that a rule leaves whole are summed along theirs."""
    sizes = {"data": 2, "fsdp": 4}
    found = step_bytes(sizes, [], [Leaf(640, ("fsdp", "data"))], batch=8, itemsize=1)
    assert found.parameters == 2 * 640 * 7 / 8 and found.gradients == 640 * 7 / 8
    far = step_bytes(sizes, [], [Leaf(640, ("fsdp", "data"))], batch=8, itemsize=1, slices=2)
    assert far.far == 3 * 640 / 4 / 2 and far.parameters == 2 * 640 * 3 / 4
    assert step_bytes({"expert": 4}, [], [Leaf(640, (), expert=True)], 8, 1).gradients == 2 * 640 * 3 / 4
    assert step_bytes({"expert": 4}, [], [Leaf(640, ("expert",), expert=True)], 8, 1).gradients == 0


@pytest.mark.slow
def test_parameters_and_gradients_travel_once_for_each_microbatch():
    found = []
    for count in (1, 3):
        config = default_config(model="vit", task="classify", data="digits")
        config.update(batch_size=96)
        config.model.update(size="nano/4", stack="block*2")
        config.optimizer.accumulate = count
        spec = {"image": ((28, 28, 1), "float32"), "label": ((), "int32")}
        train = to_dataclass(TrainConfig, config)
        program = compile_step(train, spec, 10, jax.devices(), {"fsdp": 8}).compiled
        bytes_by_kind = Counter()
        for each, times in executed(program):
            bytes_by_kind[each.kind] += times * sent(each, 8)
        found.append(bytes_by_kind)
    once, thrice = found
    for kind in ("all-gather", "all-reduce"):  # XLA:CPU sums whole gradients, and each device keeps its part
        assert thrice[kind] == pytest.approx(3 * once[kind], rel=0.1)  # a little is once a step


def test_what_a_step_sends_by_hand():
    block = BlockSizes(tokens=16, width=8, heads=4, kv_heads=2, head_dim=2, hidden=32)
    experts = BlockSizes(tokens=16, width=8, heads=4, kv_heads=2, head_dim=2, hidden=32, choices=2)
    plan = ParallelPlan(tp=2, cp=2, dp=2, etp=1, ep=8)
    leaves = [
        Leaf(640, ("tensor_expert",)),
        Leaf(6400, ("expert", "sequence_expert", "tensor_expert"), expert=True),
    ]
    found = step_bytes(plan.sizes, [block, experts], leaves, batch=4, itemsize=2)
    here = 4 * 16 / 4  # tokens of attention on a device
    n = 4 * 16 / 8
    assert found == Sent(
        experts=round(2 * 2 * (2 * n * 2 * 8 * 7 / 8 + here * 8 / 2)),
        tensor=round(2 * (2 + 1) * 2 * 2 * here * 8 / 2),
        sequence=round(2 * 2 * 2 * (4 / 2) * 16 * (2 * 2 * 2 / 2) / 2),
        gradients=round(2 * 2 * 320 * 3 / 4),
    )
    split = ParallelPlan(dp=8, fsdp=4, ep=2)  # fsdp_expert 2, fsdp 2, data 2
    leaves = [Leaf(640, ("fsdp_expert", "fsdp")), Leaf(6400, ("fsdp_expert", "fsdp"), expert=True)]
    found = step_bytes(split.sizes, [], leaves, batch=8, itemsize=4)
    assert found.parameters == 4 * (2 * 640 * 3 / 4 + 2 * 3200 / 2)
    assert found.gradients == 4 * (640 * 3 / 4 + 3200 / 2 + 2 * 160 / 2 + 2 * 1600 / 2)


def test_every_plan_sends_nothing_negative_and_one_device_nothing():
    block = BlockSizes(tokens=16, width=8, heads=4, kv_heads=2, head_dim=2, hidden=32, choices=2)
    assert step_bytes({}, [block], [Leaf(640, ())], 8, 4) == Sent()
    for plan in every_plan(8, fsdp=True, beyond=True):
        assert min(dataclasses.astuple(step_bytes(plan.sizes, [block], [], 8, 4))) >= 0
        assert activation_bytes(plan.sizes, [block], 8, 4, outputs=10, remat=False) > 0
    whole = activation_bytes({"data": 8}, [block] * 4, 8, 4, outputs=10, remat=False)
    assert activation_bytes({"data": 8}, [block] * 4, 8, 4, outputs=10, remat=True) < whole


def test_tokens_that_do_not_come_to_a_layer_are_not_sent():
    """Between the halves of a block an item may leave fewer."""
    block = BlockSizes(tokens=16, width=8, heads=4, kv_heads=2, head_dim=2, hidden=32, choices=2)
    half = dataclasses.replace(block, fed=8)
    sizes = {"expert": 8}
    assert 2 * step_bytes(sizes, [half], [], 8, 4).experts == step_bytes(sizes, [block], [], 8, 4).experts
