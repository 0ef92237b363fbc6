"""A clock for the learning rate that counts layer tokens: what was computed, not how often.

Where a schedule drops tokens in training, steps differ in what they compute. Random-LTD (Yao et al. 2022, arXiv
2211.11586, section 4) therefore lets the learning rate follow the tokens that enter layers. The schedule of the stack
is known before training, so that this clock is a pure function of the step, like everything else a resumed run needs.

Time is told in dense steps: what was computed, over what a step of the dense model of as many blocks computes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from tokenlab.core.errors import ConfigError
from tokenlab.train.pieces import Every
from tokenlab.train.schedule import StackVars, multiples, values_key

CLOCKS = ("steps", "layer_tokens", "effective_tokens")


def tokens_in_layers(model: Any, task: Any = None) -> int:
    """Tokens of one example that enter blocks in a step, summed over blocks; 0 for a model without a stack.

    Args:
        model: for training.
        task: it may run the model more than once.
    """
    if model.program is None:
        return 0
    return task.layer_tokens(model) if hasattr(task, "layer_tokens") else model.layer_tokens


@dataclass(frozen=True, eq=False)
class Clock:
    """Dense steps as a function of train steps.

    In a stretch of steps without another piece of `config.stack_vars` the rate is a constant, or a sum of constants
    over the steps that certain periods divide.

    Attributes:
        starts: [S] int, first steps of the stretches.
        before: [S] float, dense steps up to there.
        strides, rates: [S, G]; in a stretch, every step that `strides[:, g]` divides adds `rates[:, g]`.
        total: dense steps of the whole run.
    """

    starts: np.ndarray
    before: np.ndarray
    strides: np.ndarray
    rates: np.ndarray
    total: float

    def __call__(self, step: Array | int) -> Array:
        """Dense steps after `step` train steps (i32 scalar, traced or not): f32 scalar."""
        step = jnp.asarray(step)
        place = jnp.sum(step >= self.starts) - 1
        stride, start = jnp.asarray(self.strides)[place], jnp.asarray(self.starts)[place]
        times = (step - 1) // stride - (start - 1) // stride
        gone = jnp.sum(jnp.asarray(self.rates, jnp.float32)[place] * times.astype(jnp.float32))
        return jnp.asarray(self.before, jnp.float32)[place] + gone


def build(
    name: str, variables: StackVars, models: Mapping[str, Any], steps: int, task: Any = None
) -> Clock | None:
    """The clock of a run.

    Args:
        name: "steps", for which there is none to build; "layer_tokens", the sum over blocks of the tokens that enter
            them; "effective_tokens", the mean over blocks rounded down to a whole token in each step, as
            Megatron-DeepSpeed counts (`megatron/training.py`).
        variables: of the run.
        models: training model by `values_key`, for each set of values in `steps` steps.
        steps: of the run.
        task: see `tokens_in_layers`.

    Raises:
        ConfigError: the model has no stack, so that no tokens enter layers.
    """
    if name == "steps":
        return None
    first = next(iter(models.values()))
    if not tokens_in_layers(first):
        raise ConfigError(
            f"config.optimizer.schedule.clock is {name!r}, and this model has no stack whose tokens could be counted: "
            "expected 'steps'."
        )
    dense, depth = first.dense_layer_tokens, 1
    if name == "effective_tokens":
        depth = first.program.depth
    rates = {key: tokens_in_layers(model, task) // depth / (dense / depth) for key, model in models.items()}
    starts = variables.changes(steps)
    before, strides, added = [], [], []
    total = 0.0
    for begin, end in itertools.pairwise([*starts, steps]):
        terms = _terms(variables, begin, rates)
        before.append(total)
        strides.append([stride for stride, _ in terms])
        added.append([rate for _, rate in terms])
        total += sum(rate * multiples(stride, begin, end) for stride, rate in terms)
    most = max(map(len, strides))
    return Clock(
        np.asarray(starts, np.int32),
        np.asarray(before, np.float64),
        np.asarray([row + [1] * (most - len(row)) for row in strides], np.int32),
        np.asarray([row + [0.0] * (most - len(row)) for row in added], np.float64),
        total,
    )


def _terms(variables: StackVars, begin: int, rates: Mapping[str, float]) -> list[tuple[int, float]]:
    """(stride, rate) such that a step of this stretch adds the rates of all strides that divide it."""
    rules = dict(variables.rules(begin))
    periods = sorted({rule.period for rule in rules.values() if isinstance(rule, Every)})
    groups = [
        frozenset(group) for n in range(len(periods) + 1) for group in itertools.combinations(periods, n)
    ]
    whole: dict[frozenset[int], float] = {}
    terms = []
    for group in groups:  # smaller ones first
        values = {
            name: (rule.value if rule.period in group else rule.other) if isinstance(rule, Every) else rule
            for name, rule in rules.items()
        }
        rate = rates.get(values_key(values), 0.0)  # of a group that no step has, the rate does not matter
        whole[group] = rate - sum(found for other, found in whole.items() if other < group)
        terms.append((math.lcm(*group), whole[group]))
    return terms
