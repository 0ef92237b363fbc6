"""Which saved weights fit which model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tokenlab import models
from tokenlab.core.errors import CheckpointError
from tokenlab.models.state import fill, fit_state, flat

SPEC = {"image": ((8, 8, 1), "float32")}
LEARNED = "block + keep(0.5, by=learned) + block"


def shapes(stack: str, **settings: Any) -> Any:
    found = {"size": "nano/2", "stack": stack, **settings}
    return models.build(found, spec=SPEC, num_outputs=10, train=False).abstract_state()


def saved(stack: str) -> Any:
    """Weights in which every leaf is told apart by its values."""
    leaves, structure = jax.tree.flatten(shapes(stack))
    return jax.tree.unflatten(structure, [np.full(leaf.shape, i) for i, leaf in enumerate(leaves)])


@pytest.mark.parametrize(
    "stack", ["block*2", "block + keep(0.5) + block", "(block + merge(2))*2", "block + skip(keep=4)(block)"]
)
def test_the_weights_of_as_many_blocks_fit_whatever_stands_around_them(stack: str) -> None:
    weights = saved("block*2")
    leaves, notes = fit_state(weights, shapes(stack))
    assert not notes and leaves.keys() == flat(weights).keys()
    filled = fill(shapes(stack), leaves)
    assert jax.tree.all(jax.tree.map(np.array_equal, filled, weights))


def test_what_an_item_learned_is_left_out_and_told_when_the_stack_has_no_such_item() -> None:
    leaves, notes = fit_state(saved(LEARNED), shapes("block*2"), source="the run")
    assert notes == ["the run holds items/keep, which the stack does not use: left out"]
    assert leaves.keys() == flat(saved("block*2")).keys()


def test_a_part_of_what_an_item_learned_is_told_by_its_name() -> None:
    stack = "block + mod(keep=0.5{})(block)"
    _, notes = fit_state(saved(stack.format("")), shapes(stack.format(", decide=router")), source="the run")
    assert notes == [
        f"the run holds items/mod/predictor_{name}, which the stack does not use: left out"
        for name in ("bias", "hidden", "out", "out_bias")
    ]


def test_fresh_leaves_are_not_taken() -> None:
    leaves, notes = fit_state(saved("block*2"), shapes(LEARNED), fresh=("items/keep", "head"))
    assert not notes
    assert not [path for path in leaves if path.startswith(("items", "head"))]
    assert "blocks/attention/query/kernel" in leaves
    # Also where both sides have it in other shapes, and only those under the very path.
    leaves, _ = fit_state(saved("block*3"), shapes("block*2"), fresh=("blocks",))
    assert {path.split("/")[0] for path in leaves} == {"embed", "head"}
    with pytest.raises(CheckpointError, match="parameter head/classifier"):
        fit_state(
            {k: v for k, v in saved("block*2").items() if k != "head"}, shapes("block*2"), fresh=("embed",)
        )


def test_fresh_leaves_may_be_named_by_a_pattern() -> None:
    leaves, _ = fit_state(saved("block*2"), shapes("block*2"), fresh=("blocks/*_norm/*", "head/*"))
    assert leaves and not any("_norm/" in path or path.startswith("head") for path in leaves)
    with pytest.raises(CheckpointError, match=r"fresh has 'blocks/\*_norms/\*', which is no parameter"):
        fit_state(saved("block*2"), shapes("block*2"), fresh=("blocks/*_norms/*",))


@pytest.mark.parametrize(
    ("weights", "wanted", "fresh", "words"),
    [
        (
            "block*2",
            LEARNED,
            (),
            ["items/keep/score/", "does not have it", "needs it as (1,", "('items/keep',)"],
        ),
        (
            "block*2",
            "block*3",
            (),
            ["blocks/attention/", "has it as (2, ", "needs it as (3, ", "a stack with 2 blocks"],
        ),
        (LEARNED, f"({LEARNED})*1 + keep(2, by=learned)", (), ["items/keep/score", "1 such items", "not 2"]),
        (
            "block*2",
            "block + block(ffn=swiglu)",
            (),
            ["blocks/", "parameter", "a stack with 2 blocks of this kind, as it was trained, not 1."],
        ),
        ("block*2", "block*2", ("item/keep",), ["config.init_from.fresh has 'item/keep'", "no parameter"]),
        ("block*2", "block*2", ("blocks/attention_nrm",), ["Did you mean 'blocks/attention_norm'?"]),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    weights: str, wanted: str, fresh: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        fit_state(saved(weights), shapes(wanted), fresh, source="checkpoint 7")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message
    assert fresh or "checkpoint 7" in message


def test_only_a_run_that_starts_from_weights_is_told_to_start_parts_anew() -> None:
    given = saved("block*2"), shapes("block + block(ffn=swiglu)")
    with pytest.raises(
        CheckpointError, match=r"start it anew in a run with config\.init_from\.fresh=\('blocks/"
    ):
        fit_state(*given, left_out=False)
    with pytest.raises(CheckpointError) as caught:
        fit_state(*given)
    assert "init_from" not in str(caught.value)


def test_other_widths_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"needs it as .*use a model that fits"):
        fit_state(saved("block*2"), shapes("block*2", width=32))


def test_the_embedding_of_another_grid_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"embed/patch/kernel.*\('embed/patch',\)"):
        fit_state(saved("block*2"), shapes("block*2", size="nano/4"), left_out=False)
