"""Scopes: one path for the forward, backward and recomputed work of a layer, however JAX wraps it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax

from tokenlab.cost import count

W = jax.ShapeDtypeStruct((4, 4), jnp.float32)
X = jax.ShapeDtypeStruct((2, 4), jnp.float32)
ONE = 2 * 2 * 4 * 4  # FLOPs of x @ w
scope = jax.named_scope


def layer(w: Array, x: Array) -> Array:
    with scope("attention"), scope("maps"):
        return jnp.tanh(x @ w)


def scanned(body: Callable[..., Array]) -> Callable[..., Array]:
    def call(w: Array, x: Array) -> Array:
        def step(carry: Array, _: None) -> tuple[Array, None]:
            with scope("inner"):
                return body(w, carry), None

        return lax.scan(step, x, None, length=3)[0]

    return call


def train(body: Callable[..., Array]) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    def loss(w: Array, x: Array) -> Array:
        with scope("block_00"):
            return body(w, x).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))


WRAPPED = {
    "plain": layer,
    "jit": jax.jit(layer),
    "checkpoint": jax.checkpoint(layer),
    "jit of checkpoint": jax.jit(jax.checkpoint(layer)),
    "checkpoint of jit": jax.checkpoint(jax.jit(layer)),
    "checkpoint of checkpoint": jax.checkpoint(jax.checkpoint(layer)),
    "vmap": lambda w, x: jax.vmap(layer, (None, 0))(w, x),
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, layer, lambda w, x: x, w, x),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("in_scan", [False, True])
def test_a_layer_has_one_path_forward_backward_and_recomputed(wrapper: str, in_scan: bool) -> None:
    body = scanned(WRAPPED[wrapper]) if in_scan else WRAPPED[wrapper]
    cost = count(train(body), W, X)
    path = "block_00/inner/attention/maps" if in_scan else "block_00/attention/maps"
    times = (3 if in_scan else 1) * (4 if "checkpoint" in wrapper else 3)
    assert cost.by_scope == {path: times * ONE}


def test_scopes_inside_nested_scans_are_multiplied_by_both_lengths() -> None:
    def body(w: Array, x: Array) -> Array:
        return scanned(jax.checkpoint(scanned(layer)))(w, x)

    cost = count(train(body), W, X)
    # "inner" of the inner scan is directly inside "inner" of the outer one, but in another jaxpr: both are kept.
    assert cost.by_scope == {"block_00/inner/inner/attention/maps": 4 * 9 * ONE}
    assert cost.recomputed == 9 * ONE


def test_scope_around_jit_prefixes_the_scopes_inside() -> None:
    @jax.jit
    def inside(w: Array, x: Array) -> Array:
        with scope("mlp"):
            return x @ w

    def model(w: Array, x: Array) -> Array:
        with scope("block_00"):
            x = inside(w, x)
        with scope("block_01"):
            x = inside(w, x)
        return x @ w

    assert count(model, W, X).by_scope == {"block_00/mlp": ONE, "block_01/mlp": ONE, "": ONE}


def test_names_with_slashes_and_einsum_subscripts() -> None:
    def model(w: Array, x: Array) -> Array:
        with scope("block_00/mlp"):
            return jnp.einsum("nd,df->nf", x, w)

    assert count(model, W, X).by_scope == {"block_00/mlp": ONE}
    assert count(jax.value_and_grad(lambda w, x: model(w, x).sum()), W, X).by_scope == {
        "block_00/mlp": 2 * ONE
    }


def test_bytes_are_kept_by_scope_too() -> None:
    def model(w: Array, x: Array) -> Array:
        with scope("a"):
            x = x @ w
        with scope("b"):
            return x.sum(1)

    cost = count(model, W, X)
    assert cost.bytes_by_scope == {"a": 4 * (8 + 16 + 8), "b": 4 * (8 + 2)}
    assert sum(cost.bytes_by_scope.values()) == cost.bytes
