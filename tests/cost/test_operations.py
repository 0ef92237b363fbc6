"""Elementwise and transcendental counts of single operations, against XLA's own analysis of the same operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from tokenlab.cost import count, operations

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
I = jax.ShapeDtypeStruct((8, 16), jnp.int32)  # noqa: E741
SIZE = 8 * 16

ONE_OPERAND = """
sin cos tan atan exp exp2 expm1 log log1p sqrt rsqrt cbrt tanh logistic erf abs neg sign floor ceil round is_finite
square reciprocal
""".split()
TWO_OPERANDS = "add sub mul div rem max min pow atan2 eq lt ge".split()

SAME_AS_XLA: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    **{name: (getattr(lax, name), [X]) for name in ONE_OPERAND},
    **{name: (getattr(lax, name), [X, X]) for name in TWO_OPERANDS},
    **{
        f"integer_pow {n}": (lambda x, n=n: lax.integer_pow(x, n), [X])
        for n in (2, 3, 4, 5, 7, 15, 16, -1, -2, -3)
    },
    "integer add": (lax.add, [I, I]),
    "bitwise": (lambda i: (~i & i) | (i ^ (i + 1)), [I]),
    "shift": (lax.shift_left, [I, I]),
    "select": (lambda x: lax.select(x > 0, x, -x), [X]),
    "clamp": (lambda x: lax.clamp(0.0, x, 1.0), [X]),
    "to bfloat16": (lambda x: x.astype(jnp.bfloat16), [X]),
    "from integer": (lambda i: i.astype(jnp.float32), [I]),
    "bitcast": (lambda x: lax.bitcast_convert_type(x, jnp.int32), [X]),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 5, 5), [X]),
    "sum of rows": (lambda x: x.sum(1), [X]),
    "sum of all": (lambda x: x.sum(), [X]),
    "max": (lambda x: x.max(0), [X]),
    "prod": (lambda x: x.prod(1), [X]),
    "any": (lambda x: (x > 0).any(1), [X]),
    "general reduction": (lambda x: lax.reduce(x, 0.0, lambda a, b: a + b * 2, (1,)), [X]),
    "window sum": (lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 4), (1, 2), "VALID"), [X]),
    "window max": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 4), (1, 2), "VALID"), [X]),
    "scatter": (lambda x: jax.vmap(lambda row: row.at[2:5].set(1.0, mode="promise_in_bounds"))(x), [X]),
    "scatter-add": (lambda x, y: lax_scatter(lax.scatter_add, x, y), [X, X]),
    "scatter-max": (lambda x, y: lax_scatter(lax.scatter_max, x, y), [X, X]),
    "moving": (lambda x: jnp.concatenate([x.T.reshape(8, 16)[::-1], x[:, :]])[2:9, None], [X]),
    "iota": (lambda: lax.iota(jnp.int32, 9), []),
    "sort one line": (lambda x: lax.sort(x.reshape(-1)), [X]),
    "sigmoid linear unit": (jax.nn.silu, [X]),
    "gelu with tanh": (jax.nn.gelu, [X]),
    "softmax": (jax.nn.softmax, [X]),
}


def lax_scatter(scatter: Callable[..., Array], x: Array, y: Array) -> Array:
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,)
    )
    return scatter(x, jnp.zeros((3, 1), jnp.int32), y[:3], numbers, mode="promise_in_bounds")


@pytest.mark.parametrize("name", SAME_AS_XLA)
def test_an_operation_counts_as_xla_counts_it(name: str) -> None:
    fn, args = SAME_AS_XLA[name]
    cost = count(fn, *args)
    analysis = jax.jit(fn).lower(*args).cost_analysis() or {}
    assert cost.flops == 0
    assert cost.elementwise == analysis.get("flops", 0)
    assert cost.transcendental == analysis.get("transcendentals", 0)


# Where XLA's figure depends on how it happens to expand the operation, the convention is ours.
OURS: dict[str, tuple[Callable[..., Any], list[Any], int, int]] = {
    "cumsum": (lambda x: lax.cumsum(x, 1), [X], SIZE, 0),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), [X], SIZE, SIZE),
    "sort rows of 16": (lambda x: lax.sort(x, dimension=1), [X], SIZE * 4, 0),
    "sort columns of 8": (lambda x: lax.sort(x, dimension=0), [X], SIZE * 3, 0),
    "argsort": (
        lambda x: lax.sort([x, lax.iota(jnp.int32, 16)[None].repeat(8, 0)], dimension=1),
        [X],
        SIZE * 4,
        0,
    ),
    "top_k": (lambda x: lax.top_k(x, 3), [X], SIZE * 4, 0),
    "argmax": (lambda x: lax.argmax(x, 1, jnp.int32), [X], SIZE - 8, 0),
    "erf_inv": (lax.erf_inv, [X], 0, SIZE),
    "lgamma": (lax.lgamma, [X], 0, SIZE),
}


@pytest.mark.parametrize("name", OURS)
def test_conventions_of_our_own(name: str) -> None:
    fn, args, elementwise, transcendental = OURS[name]
    cost = count(fn, *args)
    assert (cost.elementwise, cost.transcendental) == (elementwise, transcendental)


ROW = 4 * 16
MOVED: dict[str, tuple[Callable[..., Any], list[Any], int]] = {
    "elementwise and layout are fused": (lambda x: jnp.tanh(x).T + 1.0, [X], 0),
    "gather reads the rows it takes": (
        lambda x: x.at[jnp.array([1, 2, 3])].get(mode="promise_in_bounds", wrap_negative_indices=False),
        [X],
        2 * 3 * ROW + 3 * 4,
    ),
    "dynamic_slice": (lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 16)), [X, jnp.int32(1)], 2 * 2 * ROW + 8),
    "dynamic_update_slice": (
        lambda x, i: lax.dynamic_update_slice(x, jnp.ones((2, 16)), (i, 0)),
        [X, jnp.int32(1)],
        2 * 2 * ROW + 8,
    ),
    "scatter-add reads, adds and writes": (
        lambda x, y: lax_scatter(lax.scatter_add, x, y),
        [X, X],
        3 * 3 * ROW + 3 * 4,
    ),
    "sum": (lambda x: x.sum(1), [X], 8 * ROW + 8 * 4),
    "sort": (lambda x: lax.sort(x, dimension=1), [X], 2 * 8 * ROW),
    "product in bfloat16": (
        lambda x: lax.dot_general(x.astype(jnp.bfloat16), x.astype(jnp.bfloat16), (((1,), (1,)), ((), ()))),
        [X],
        2 * (2 * SIZE + 8 * 8),
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_bytes(name: str) -> None:
    fn, args, moved = MOVED[name]
    assert count(fn, *args).bytes == moved


def test_the_tables_do_not_overlap() -> None:
    tables = [
        operations.ELEMENTWISE,
        operations.TRANSCENDENTAL,
        operations.DATA_MOVEMENT,
        frozenset(operations._RULES),
        frozenset(operations.CALLS),
        operations.CONTROL,
    ]
    assert sum(map(len, tables)) == len(frozenset().union(*tables))


ACTIVATIONS = """
relu relu6 sigmoid softplus soft_sign silu log_sigmoid leaky_relu hard_sigmoid hard_silu hard_tanh elu celu selu gelu
glu squareplus mish softmax log_softmax standardize logsumexp sparse_plus identity
""".split()
DRAWS = """
bits uniform normal bernoulli gumbel exponential laplace logistic cauchy rademacher
""".split()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_and_its_gradient_is_counted(name: str) -> None:
    fn = getattr(jax.nn, name)
    assert count(jax.value_and_grad(lambda x: (fn(x) * 2.0).sum()), X).flops == 0


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_is_counted(name: str) -> None:
    cost = count(lambda key: getattr(jax.random, name)(key, shape=(8, 16)), jax.random.key(0))
    assert cost.flops == 0 and cost.elementwise >= SIZE


def test_the_rest_of_what_models_use_is_counted() -> None:
    def everything(x: Array, i: Array, key: Array) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, 3), 4)
        old_style = jax.random.split(jax.random.PRNGKey(0))
        return (
            jax.random.permutation(keys[0], 16),
            jax.random.categorical(keys[1], x),
            jax.random.randint(keys[2], (4,), 0, 9),
            jax.random.truncated_normal(keys[1], -2.0, 2.0, (4,)),
            jax.random.choice(keys[3], 16, (4,), replace=False),
            old_style,
            jnp.sort(x),
            jnp.argsort(x),
            jnp.take_along_axis(x, jnp.clip(i, 0, 7), axis=1),
            x.at[i[:, 0] % 8].add(x),
            x.at[i[:, 0] % 8].mul(2.0),
            x.at[i[:, 0] % 8].min(0.0),
            jnp.cumsum(x, 1),
            jnp.cumprod(x, 1),
            lax.cummax(x, axis=1),
            jnp.median(x, 1),
            jnp.quantile(x, 0.3),
            jnp.var(x, 1),
            jnp.linalg.norm(x, axis=1),
            jnp.nan_to_num(x),
            jnp.isfinite(x).all(),
            jnp.pad(x, 2, mode="reflect"),
            jnp.roll(x, 3, 1),
            jnp.tile(x, 2),
            jnp.where(x > 0, x, 0.0),
            jnp.unstack(x),
            jnp.split(x, 4, axis=1),
            jnp.searchsorted(x[0], x[1]),
            jnp.floor_divide(i, 3),
            jnp.mod(x, 2.0),
            jnp.interp(x, x[0], x[1]),
            jax.nn.one_hot(i, 8),
            jax.image.resize(x, (16, 24), "bicubic"),
            lax.associative_scan(jnp.add, x, axis=1),
            lax.stop_gradient(lax.optimization_barrier(x)),
            lax.erf_inv(x),
            jax.scipy.special.gammaln(x),
            checkpoint_name(x, "x"),
        )

    cost = count(everything, X, I, jax.random.key(0))
    assert cost.elementwise > 0 and cost.transcendental > 0 and cost.bytes > 0
