"""Counted cost per example, whole and layer by layer, against hand formulas."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from tokenlab import data, models, tasks
from tokenlab.cost import CostRow
from tokenlab.train.costs import cost_table, forward_cost, train_cost

DIGITS = data.build({"name": "digits"})
TASK = tasks.build({})
D, F, P, CLASSES = 16, 32, 4, 10  # of nano/2 on digits: width, hidden, pixels of a patch


def model(stack: str, **settings: Any) -> Any:
    return models.build({"size": "nano/2", "stack": stack, **settings}, spec=DIGITS.spec, num_outputs=CLASSES)


def block(n: int) -> int:
    return 2 * n * (4 * D * D + 2 * D * F) + 4 * n * n * D


def rows(stack: str, **settings: Any) -> dict[str, CostRow]:
    return {row.name: row for row in cost_table(model(stack, **settings), TASK, DIGITS.spec).rows}


ENDS = 2 * 16 * P * D + 2 * D * CLASSES  # patches and classifier


@pytest.mark.parametrize("execution", ["scan", "unroll"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_dense_forward_and_training(execution: str, remat: str) -> None:
    built = model("block*3", execution=execution, remat=remat)
    assert forward_cost(built, TASK, DIGITS.spec).flops == 3 * block(17) + ENDS
    # Backward is twice the forward pass, but nothing flows back into the image.
    cost = train_cost(built, TASK, DIGITS.spec)
    assert cost.model_flops == 3 * (3 * block(17) + ENDS) - 2 * 16 * P * D
    assert bool(cost.recomputed) == (remat == "full")


def test_rows_of_a_stack_that_keeps_half() -> None:
    found = rows("block + keep(0.5, by=cls) + block*2")
    names = ["embed", "block_00", "keep_00", "block_01", "block_02", "head"]
    assert list(found)[:6] == names and set(found) <= {*names, "other"}
    assert [found[name].tokens for name in names] == [17, 17, 17, 9, 9, 9]
    score_row = 2 * 17 * D  # the class token's row of attention, computed once more
    assert found["block_00"].forward_flops == block(17) + score_row
    assert found["block_01"].forward_flops == found["block_02"].forward_flops == block(9)
    assert found["block_01"].train_flops == 3 * block(9)
    assert found["embed"].forward_flops == 2 * 16 * P * D


def test_rows_inside_a_wrapper_and_between_halves() -> None:
    found = rows("skip(keep=4)(block) + block(between=merge(6))")
    assert [found[name].tokens for name in ("skip_00", "block_00", "block_01", "merge_00", "head")] == [
        17,
        5,
        17,
        17,
        11,
    ]
    assert found["block_00"].forward_flops == block(5)
    assert found["block_01"].forward_flops == 2 * 17 * 4 * D * D + 4 * 17 * 17 * D + 2 * 11 * 2 * D * F
    similarity = 2 * 8 * 8 * (D // 2)
    assert found["merge_00"].forward_flops == similarity


@pytest.mark.parametrize(
    "stack",
    ["block*2", "block + keep(0.5, by=learned) + block(ffn=swiglu)", "skip(keep=4, by=learned)(block)*2"],
)
def test_parameters_add_up(stack: str) -> None:
    built = model(stack)
    total = sum(leaf.size for leaf in jax.tree.leaves(built.abstract_state()))
    table = cost_table(built, TASK, DIGITS.spec)
    assert table.total.parameters == total
    assert table.total.forward_flops == forward_cost(built, TASK, DIGITS.spec).flops
    assert table.total.train_flops == train_cost(built, TASK, DIGITS.spec).flops
    assert "swiglu" in table.kinds or "swiglu" not in stack


def test_what_stays_as_it_is_costs_no_gradient() -> None:
    """Training the head alone: the forward pass, and both gradients of its product (its norm comes before that)."""
    built = model("block*3")
    cost = train_cost(built, TASK, DIGITS.spec, only=("head/*",))
    assert cost.model_flops == forward_cost(built, TASK, DIGITS.spec).flops + 2 * 2 * D * CLASSES


def test_active_parameters_of_experts_by_modality() -> None:
    """A token meets one of four experts in either group, so a quarter of both groups' weights a token."""
    from tokenlab.train.costs import active_parameters

    built = models.build(
        {
            "name": "decoder_lm",
            "size": "nano",
            "stack": "block(ffn=moma(text=4, image=4, decide=topk))",
            "leaks": True,
        },
        spec={"ids": ((16,), "int32"), "modality": ((16,), "int32")},
        num_outputs=CLASSES,
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(built.abstract_state()))
    of_experts = 8 * 3 * D * F
    assert active_parameters(built) == total - of_experts * 7 // 8


def test_counting_in_loops_counts_the_same() -> None:
    """What asks for no layer by its name may count a deep model in its loops."""
    built = model("block*3 + keep(0.5, by=cls) + block*3")
    apart, looped = (train_cost(built, TASK, DIGITS.spec, execution=how) for how in ("unroll", "scan"))
    assert looped.flops == apart.flops and looped.recomputed == apart.recomputed
    assert looped.bytes == pytest.approx(apart.bytes, rel=1e-2)
