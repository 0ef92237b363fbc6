"""What one JAX primitive costs: tables of names, and a rule for each primitive that needs a formula.

Conventions (those of XLA's own cost analysis, except where a line says otherwise):

* `flops`: a multiply-add is two. Only matrix products: `dot_general`, `ragged_dot_general`, `conv_general_dilated`.
  A ragged product counts every row of its buffer once, whatever the groups are. A convolution does not count products
  with the zeros of padding or dilation, so it costs the same forward, by its input and by its kernel.
* `elementwise`: one for each element written by an arithmetic, comparing, selecting or converting primitive, integer
  ones too; a reduction of n elements to one is n - 1; sorting n is n ceil(log2 n); a cumulative operation one an
  element; random bits one a word; moving data none.
* `transcendental`: one for each element of exp, log, tanh, erf, sqrt, rsqrt, pow and the like.
* `bytes`: operands read and results written by matrix products, reductions, cumulative operations and sorts; the rows
  touched (not the whole array) by gather, scatter and dynamic slices, and the indices. Everything else is taken as
  fused into those, so a program that is only elementwise moves none.
* A grouped product of `tokenlab.ops.grouped` counts as a ragged one, whatever loop computes it.
* Collectives cost nothing here: they move data between devices, not FLOPs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tokenlab.core.errors import CostError


class OperationCost(NamedTuple):
    """What one execution of one primitive costs; see the conventions of this module for the units."""

    flops: int = 0
    elementwise: int = 0
    transcendental: int = 0
    bytes: int = 0


Rule = Callable[[Any], OperationCost]

ELEMENTWISE = frozenset(
    """
    abs add add_any and bitcast_convert_type ceil clamp clz complex conj convert_element_type div eq eq_to
    floor ge gt imag is_finite le le_to lt lt_to max min mul ne neg nextafter not or population_count real
    reduce_precision rem round select_and_gather_add select_n shift_left shift_right_arithmetic shift_right_logical sign
    square sub to_edtype from_edtype xor
    iota_2x32_shape mulhi philox2x32 philox4x32 random_bits random_fold_in random_seed random_split rng_bit_generator
    rng_uniform threefry2x32 threefry4x32
    """.split()
)

TRANSCENDENTAL = frozenset(
    """
    acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cos cosh digamma erf erf_inv erfc exp expm1 igamma
    igamma_grad_a igammac lgamma log log1p log2 polygamma pow regularized_incomplete_beta rsqrt sin sinh sqrt tan tanh
    zeta
    """.split()
)

DATA_MOVEMENT = frozenset(
    """
    after_all broadcast_in_dim broadcast_to concatenate copy create_token device_put empty empty2 iota layout_constraint
    name optimization_barrier pad platform_index random_clone random_unwrap random_wrap relayout reshape reshard rev
    sharding_constraint slice split squeeze stack stop_gradient tile transpose unstack with_memory_space_constraint
    xla_metadata_value zeros_like
    all_gather all_gather_invariant all_gather_reduced all_to_all axis_index pbroadcast pmax pmin ppermute preduced psum
    psum_invariant pvary ragged_all_to_all reduce_scatter reduced_vary_cast reduced_vary_cast_p unreduced_psum
    unreduced_reduce_scatter vary_unreduced_cast vary_unreduced_cast_p
    """.split()
)

# Primitives that execute one inner jaxpr once; and those that choose or repeat.
CALLS = frozenset(
    """
    call closed_call composite custom_jvp_call custom_partitioning custom_vjp_call custom_vmap_call eval_jaxpr jit
    linear_call remat2
    """.split()
)
CONTROL = frozenset({"call_hi_primitive", "cond", "scan", "shard_map", "while"})


def size(atom: Any) -> int:
    """Elements of a variable or literal of a jaxpr; 0 for tokens."""
    return math.prod(getattr(atom.aval, "shape", (0,)))


def num_bytes(atom: Any) -> int:
    """Bytes of a variable or literal of a jaxpr; 0 for tokens."""
    dtype = getattr(atom.aval, "dtype", None)
    return 0 if dtype is None else size(atom) * dtype.itemsize


def _all_bytes(eqn: Any) -> int:
    return sum(map(num_bytes, eqn.invars)) + sum(map(num_bytes, eqn.outvars))


def _written(eqn: Any) -> int:
    return sum(map(size, eqn.outvars))


def dot_general_flops(eqn: Any) -> int:
    """2 x elements written x elements contracted, whatever the dtype."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * size(eqn.outvars[0]) * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def ragged_dot_flops(eqn: Any) -> int:
    """2 M K N: each of the M rows of the buffer meets the matrix of one group, however many groups there are."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left = eqn.invars[0].aval.shape
    (ragged,) = numbers.lhs_ragged_dimensions
    written = size(eqn.outvars[0])
    if (
        ragged in contracted
    ):  # the result has a leading axis of groups, each the product of that group's rows alone
        written //= eqn.outvars[0].aval.shape[0]
    return 2 * written * math.prod(left[axis] for axis in contracted)


def convolution_flops(eqn: Any) -> int:
    """2 x features x pairs of an output and a kernel position that meet an input element; groups divide."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    left, right = (atom.aval.shape for atom in eqn.invars[:2])
    out = eqn.outvars[0].aval.shape
    pairs = 1
    for axis in range(len(params["window_strides"])):
        inputs, kernel = left[numbers.lhs_spec[2 + axis]], right[numbers.rhs_spec[2 + axis]]
        outputs = out[numbers.out_spec[2 + axis]]
        dilation = params["lhs_dilation"][axis]
        place = (
            np.arange(outputs)[:, None] * params["window_strides"][axis]
            + np.arange(kernel)[None, :] * params["rhs_dilation"][axis]
            - params["padding"][axis][0]
        )
        inside = (place >= 0) & (place <= (inputs - 1) * dilation) & (place % dilation == 0)
        pairs *= int(inside.sum())
    batch, features_out = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    features_in = right[numbers.rhs_spec[1]]  # already divided by the feature groups
    return 2 * batch * features_out * features_in * pairs


def _matrix_product(count: Callable[[Any], int]) -> Rule:
    return lambda eqn: OperationCost(flops=count(eqn), bytes=_all_bytes(eqn))


def _integer_pow(eqn: Any) -> OperationCost:
    exponent = abs(eqn.params["y"])
    products = exponent.bit_length() - 1 + exponent.bit_count() - 1 if exponent else 0  # by repeated squaring
    return OperationCost(elementwise=(products + (eqn.params["y"] < 0)) * _written(eqn))


def _elementwise_and_transcendental(elementwise: int) -> Rule:
    return lambda eqn: OperationCost(elementwise=elementwise * _written(eqn), transcendental=_written(eqn))


def _several_elementwise(count: int) -> Rule:
    return lambda eqn: OperationCost(elementwise=count * _written(eqn))


def _polynomial(eqn: Any) -> OperationCost:
    return OperationCost(
        elementwise=2 * (len(eqn.invars) - 1) * _written(eqn)
    )  # Horner: a product and a sum each


def _reduction(eqn: Any) -> OperationCost:
    return OperationCost(elementwise=size(eqn.invars[0]) - size(eqn.outvars[0]), bytes=_all_bytes(eqn))


def _general_reduction(eqn: Any) -> OperationCost:
    steps = len(getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"]).eqns)
    return OperationCost(
        elementwise=steps * (size(eqn.invars[0]) - size(eqn.outvars[0])), bytes=_all_bytes(eqn)
    )


def _window_reduction(eqn: Any) -> OperationCost:
    window = math.prod(eqn.params["window_dimensions"])
    return OperationCost(elementwise=(window - 1) * size(eqn.outvars[0]), bytes=_all_bytes(eqn))


def _select_and_scatter(eqn: Any) -> OperationCost:
    # For every source element: compare the elements of its window, then add to the one chosen.
    window = math.prod(eqn.params["window_dimensions"])
    return OperationCost(elementwise=window * size(eqn.invars[0]), bytes=_all_bytes(eqn))


def _cumulative(eqn: Any) -> OperationCost:
    return OperationCost(elementwise=size(eqn.invars[0]), bytes=_all_bytes(eqn))


def _cumulative_logsumexp(eqn: Any) -> OperationCost:
    elements = size(eqn.invars[0])
    return OperationCost(elementwise=elements, transcendental=elements, bytes=_all_bytes(eqn))


def _sort(eqn: Any) -> OperationCost:
    shape = eqn.invars[0].aval.shape
    axis = eqn.params.get("dimension", eqn.params.get("axis", eqn.params.get("reduction_dimension", -1)))
    length = shape[axis] if shape else 1
    comparisons = (
        size(eqn.invars[0]) * (length - 1).bit_length() if length else 0
    )  # bit_length(n-1) = ceil(log2 n)
    return OperationCost(elementwise=comparisons, bytes=_all_bytes(eqn))


def _gather(eqn: Any) -> OperationCost:
    return OperationCost(bytes=2 * num_bytes(eqn.outvars[0]) + sum(map(num_bytes, eqn.invars[1:])))


def _dynamic_update_slice(eqn: Any) -> OperationCost:
    return OperationCost(bytes=2 * num_bytes(eqn.invars[1]) + sum(map(num_bytes, eqn.invars[2:])))


def _scatter(eqn: Any) -> OperationCost:
    _, indices, updates = eqn.invars[:3]
    return OperationCost(bytes=2 * num_bytes(updates) + num_bytes(indices))


def _scatter_combining(eqn: Any) -> OperationCost:
    _, indices, updates = eqn.invars[:3]  # reads the rows it adds to, besides
    return OperationCost(elementwise=size(updates), bytes=3 * num_bytes(updates) + num_bytes(indices))


_RULES: dict[str, Rule] = {
    "dot_general": _matrix_product(dot_general_flops),
    "ragged_dot_general": _matrix_product(ragged_dot_flops),
    "conv_general_dilated": _matrix_product(convolution_flops),
    "reduce": _general_reduction,
    "integer_pow": _integer_pow,
    "one_minus_square": _several_elementwise(3),  # (1 - x) (1 + x)
    "polynomial": _polynomial,
    "logistic": _elementwise_and_transcendental(3),  # 1 / (1 + exp(-x))
    "exp2": _elementwise_and_transcendental(1),  # exp(x log 2)
    "cumlogsumexp": _cumulative_logsumexp,
    "select_and_scatter_add": _select_and_scatter,
    "gather": _gather,
    "dynamic_slice": _gather,
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter,
}
_RULES |= dict.fromkeys(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split(),
    _reduction,
)
_RULES |= dict.fromkeys("reduce_window_sum reduce_window_max reduce_window_min".split(), _window_reduction)
_RULES |= dict.fromkeys("cumsum cumprod cummax cummin".split(), _cumulative)
_RULES |= dict.fromkeys("sort top_k approx_top_k".split(), _sort)
_RULES |= dict.fromkeys(
    "scatter-add scatter-sub scatter-mul scatter-min scatter-max".split(), _scatter_combining
)


_GROUPED = re.compile(r"grouped_(rows|weights)_(\d+)x(\d+)x(\d+)")
"""The name of a jitted product of `tokenlab.ops.grouped`: M rows, each with one matrix [D, F] of E."""


def _grouped_product(eqn: Any) -> OperationCost:
    """Every row with one matrix, as `lax.ragged_dot`, however the loop cuts them; times what `vmap` put in front."""
    kind, *sizes = _GROUPED.fullmatch(eqn.params["name"]).groups()
    rows, width, out = map(int, sizes)
    tail = (rows, out) if kind == "rows" else (width, out)
    found = [tuple(each.aval.shape) for each in eqn.outvars if tuple(each.aval.shape[-2:]) == tail]
    extra = max((len(shape) for shape in found), default=0) - (2 if kind == "rows" else 3)
    batch = max((math.prod(shape[:extra]) for shape in found), default=1) if extra > 0 else 1
    return OperationCost(flops=2 * batch * rows * width * out, bytes=_all_bytes(eqn))


def named_call(eqn: Any) -> bool:
    """Whether an equation is a call that stands for one operation; what it is made of does not count.

    JAX may cut such a call in two, with the same name: the part that holds the product stands for it.
    """
    if eqn.primitive.name not in ("jit", "pjit") or not _GROUPED.fullmatch(str(eqn.params.get("name"))):
        return False
    return _multiplies(eqn.params["jaxpr"].jaxpr)


def _multiplies(jaxpr: Any) -> bool:
    """Whether a product, or a kernel, stands anywhere in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "ragged_dot", "ragged_dot_general", "pallas_call"):
            return True
        values = [
            each
            for value in eqn.params.values()
            for each in (value if isinstance(value, tuple) else (value,))
        ]
        inner = [getattr(value, "jaxpr", value) for value in values]
        if any(_multiplies(each) for each in inner if hasattr(each, "eqns")):
            return True
    return False


_registered: dict[str, Rule] = {}


def register_cost(primitive: str, rule: Rule) -> None:
    """Teaches `count` what a primitive costs that it does not know: a kernel, a foreign call, a callback.

    Args:
      primitive: name of the JAX primitive, as the CostError about it gave it, e.g. "pallas_call". All calls of that
        primitive come to the one rule, which tells them apart by `eqn.params`.
      rule: from the jaxpr equation (`invars`, `outvars`, `params`) to the OperationCost of executing it once.

    Raises:
      CostError: the primitive already has a cost.
    """
    if is_known(primitive) or primitive in CALLS or primitive in CONTROL:
        raise CostError(
            f"register_cost: {primitive!r} already has a cost; only an unknown primitive can be given a rule."
        )
    _registered[primitive] = rule


def is_known(primitive: str) -> bool:
    """Whether the cost of a primitive of this name can be told from one equation, without looking into inner jaxprs."""
    return (
        primitive in ELEMENTWISE | TRANSCENDENTAL | DATA_MOVEMENT
        or primitive in _RULES
        or primitive in _registered
    )


def operation_cost(eqn: Any) -> OperationCost:
    """What executing one equation costs; `is_known(eqn.primitive.name)` or `named_call(eqn)` must hold."""
    name = eqn.primitive.name
    if named_call(eqn):
        return _grouped_product(eqn)
    if name in DATA_MOVEMENT:
        return OperationCost()
    if name in ELEMENTWISE:
        return OperationCost(elementwise=_written(eqn))
    if name in TRANSCENDENTAL:
        return OperationCost(transcendental=_written(eqn))
    return _RULES[name](eqn) if name in _RULES else _registered[name](eqn)
