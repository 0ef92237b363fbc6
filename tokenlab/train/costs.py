"""What a model costs per example, counted: forward, training, and the table of both layer by layer."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax import Array

from tokenlab.cost import Cost, CostTable, RowInfo, count
from tokenlab.cost.table import KINDS
from tokenlab.layers.program import SHARED, BlockStep, ItemStep, steps_of
from tokenlab.layers.statistics import split
from tokenlab.train.step import loss_and_gradients

Spec = Mapping[str, tuple[tuple[int, ...], str]]


class _Unrolled:
    """A model whose stack is not folded into loops, so that every layer is counted under its own name.

    Of `batch_size` examples: layers that rank the tokens of more of them together (`sequences`) do so by example.
    """

    def __init__(self, model: Any, batch_size: int, execution: str = "unroll") -> None:
        self._model, self._batch_size, self._execution = model, batch_size, execution
        if any(_together(step, batch_size) for step in steps_of(model)):
            self._model = copy.copy(model)
            steps = _by_example(model.program.steps, batch_size)
            self._model.__dict__["program"] = dataclasses.replace(model.program, steps=steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def rebuilt(self, **how: Any) -> _Unrolled:
        return _Unrolled(self._model.rebuilt(**how), self._batch_size, self._execution)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        if self._model.program is not None:
            kwargs["execution"] = self._execution
        return self._model.apply(*args, **kwargs)


def _together(step: BlockStep | ItemStep, batch_size: int) -> bool:
    """Whether a block's layer ranks together what a batch of this size has no whole groups of."""
    return isinstance(step, BlockStep) and batch_size % getattr(step.block.ffn, "sequences", 1) > 0


def _by_example(steps: tuple[Any, ...], batch_size: int) -> tuple[Any, ...]:
    found = []
    for step in steps:
        if _together(step, batch_size):
            block = dataclasses.replace(step.block, ffn=step.block.ffn.clone(sequences=1))
            step = dataclasses.replace(step, block=block)
        elif isinstance(step, ItemStep) and step.body:
            step = dataclasses.replace(step, body=_by_example(step.body, batch_size))
        found.append(step)
    return tuple(found)


def batch_shapes(spec: Spec, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `size` examples as ShapeDtypeStructs, "mask" included."""
    keys = {**spec, "mask": ((), "float32")}
    return {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in keys.items()}


def forward_cost(model: Any, task: Any, spec: Spec, batch_size: int = 1) -> Cost:
    """Counted cost of the forward pass of one example, or of a batch of so many, up to the loss.

    Args:
      model: from `models.build`; its stack counts as it stands, with or without `train_only` items.
      task: has `loss`, see `tokenlab.tasks.Task`.
      spec: key -> (shape, dtype) of one example, as data sources say it.
    """

    def loss(params: Any, batch: Any, key: Array) -> Array:
        return task.loss(_Unrolled(model, batch_size), params, batch, rng=key, train=False)[0]

    return count(loss, model.abstract_state(), batch_shapes(spec, batch_size), _key())


def train_cost(
    model: Any,
    task: Any,
    spec: Spec,
    batch_size: int = 1,
    only: Sequence[str] = (),
    *,
    execution: str = "unroll",
) -> Cost:
    """Counted cost of loss and gradients, without the optimizer.

    Arguments as `forward_cost`; `only` are the patterns of the parameters that are trained, all by default. Where
    nobody asks for layers by their names, `execution="scan"` counts the same and is quicker for deep models.
    """
    function = partial(loss_and_gradients, _Unrolled(model, batch_size, execution), task, only=only)
    return count(function, model.abstract_state(), batch_shapes(spec, batch_size), _key())


def cost_table(model: Any, task: Any, spec: Spec, batch_size: int = 1, only: Sequence[str] = ()) -> CostTable:
    """Tokens, parameters and counted FLOPs of one example (or of a batch), forward and in training, a row a layer.

    Arguments as `train_cost`. A row's tokens are those that come into the layer; inside a wrapper such as `skip`
    they are those its body sees. Rows are in the order of execution, "embed" first and "head" last; what a model has
    behind its head follows (`further_rows`), and a model without a stack names its own. What blocks share has a row of
    its own for its parameters; its FLOPs are those of the blocks.
    """
    steps = steps_of(model)
    named = {
        name for s in steps if isinstance(s, BlockStep) for name in (s.block.ffn_name, s.block.special_name)
    }
    kinds = (*KINDS, *sorted(named - {*KINDS, ""}))
    costs = forward_cost(model, task, spec, batch_size), train_cost(model, task, spec, batch_size, only)
    return CostTable.from_costs(*costs, rows=_rows(model, steps), kinds=kinds)


def _rows(model: Any, steps: list[BlockStep | ItemStep]) -> list[RowInfo]:
    if model.program is None:
        return model.cost_rows()
    state = model.abstract_state()
    rows = [RowInfo("embed", model.tokens_per_example, _size(state["embed"]))]
    # No scope "shared" stands before such a name, so that nothing is ever filed under these.
    rows += [RowInfo(f"{SHARED}/{name}", None, _size(tree)) for name, tree in state.get(SHARED, {}).items()]
    for step in steps:
        kinds = [kind for _, kind in step.kinds] if isinstance(step, BlockStep) else [step.kind]
        # Leaves are stacked [n, ...] over the blocks or items of their kind; this step's share is one entry.
        stacks = [state.get(group, {}).get(name, {}) for group, name in kinds if group != SHARED]
        own = sum(_size(stack, stacked=True) for stack in stacks)
        rows.append(RowInfo(step.name, step.present, own))
    rows.append(RowInfo("head", model.program.after, _size(state["head"])))
    return [*rows, *getattr(model, "further_rows", list)()]


def _size(tree: Any, *, stacked: bool = False) -> int:
    return sum(math.prod(leaf.shape[1:] if stacked else leaf.shape) for leaf in jax.tree.leaves(tree))


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def active_parameters(model: Any) -> int:
    """Parameters that one token meets, on average: of E experts, as many as are computed for each token.

    For Soft MoE that is S / N of E, the slots computed for each token, although every slot is a mean of all of them.
    """
    shapes, _ = split(model.abstract_state())
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    for step in steps_of(model):
        if not isinstance(step, BlockStep) or not hasattr(step.block.ffn, "num_experts"):
            continue
        layer, kind = step.block.ffn, dict(step.kinds)["ffn"]
        own = shapes[kind[0]][kind[1]]  # a layer may hold several banks, each [layers of this kind, E, ...]
        stacked = jax.tree.leaves([bank for name, bank in own.items() if name.startswith("experts")])
        of_experts = sum(math.prod(leaf.shape[1:]) for leaf in stacked)
        used = min(1.0, layer.experts_per_token(step.fed) / layer.num_experts)
        total -= round(of_experts * (1 - used))
    return total
