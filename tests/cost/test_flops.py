"""`count` against formulas worked out by hand; every figure must be exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from tokenlab.core.errors import CostError
from tokenlab.cost import Cost, OperationCost, count, operations, register_cost
from tokenlab.ops.grouped import grouped_matmul

B, N, D, F, H = 2, 6, 8, 32, 2


def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def mlp(p: dict[str, Array], x: Array) -> Array:
    return jax.nn.gelu(x @ p["up"]) @ p["down"]


def attention(p: dict[str, Array], x: Array, heads: int = H, groups: int = H) -> Array:
    *batch, n, d = x.shape
    q = (x @ p["q"]).reshape(*batch, n, groups, heads // groups, d // heads)
    k, v = ((x @ p[name]).reshape(*batch, n, groups, d // heads) for name in "kv")
    weights = jax.nn.softmax(jnp.einsum("bngrc,bmgc->bgrnm", q, k))
    return jnp.einsum("bgrnm,bmgc->bngrc", weights, v).reshape(x.shape) @ p["o"]


def mlp_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    return {"up": shape(D, F, dtype=dtype), "down": shape(F, D, dtype=dtype)}


def attention_params(groups: int = H) -> dict[str, Any]:
    kv = D * groups // H
    return {"q": shape(D, D), "k": shape(D, kv), "v": shape(D, kv), "o": shape(D, D)}


def training(forward: Callable[..., Array], argnums: int | tuple[int, ...] = 0) -> Callable[..., Any]:
    return jax.value_and_grad(lambda *args: forward(*args).sum(), argnums)


MLP = B * 2 * 2 * N * D * F
ATTENTION = B * (4 * 2 * N * D * D + 2 * 2 * N * N * D)
X = shape(B, N, D)


def test_mlp_forward_and_training() -> None:
    assert count(mlp, mlp_params(), X).flops == MLP
    assert count(training(mlp, (0, 1)), mlp_params(), X).flops == 3 * MLP
    # The gradient with respect to the network's input is not computed: one product of the first layer less.
    assert count(training(mlp), mlp_params(), X).flops == 3 * MLP - MLP // 2


def test_attention_forward_and_training() -> None:
    assert count(attention, attention_params(), X).flops == ATTENTION
    assert count(training(attention, (0, 1)), attention_params(), X).flops == 3 * ATTENTION
    inputs = 3 * B * 2 * N * D * D
    assert count(training(attention), attention_params(), X).flops == 3 * ATTENTION - inputs


def test_grouped_query_attention_saves_in_the_projections_only() -> None:
    cost = count(functools.partial(attention, groups=1), attention_params(groups=1), X)
    assert cost.flops == ATTENTION - B * 2 * 2 * N * D * (D - D // H)


def test_gathered_tokens_cost_what_is_left() -> None:
    def model(p: dict[str, Array], x: Array, indices: Array) -> Array:
        return mlp(p, jnp.take_along_axis(x, indices[..., None], axis=1))

    kept = shape(B, N // 2, dtype=jnp.int32)
    assert count(model, mlp_params(), X, kept).flops == MLP // 2
    assert count(training(model), mlp_params(), X, kept).flops == (3 * MLP - MLP // 2) // 2


def test_bfloat16_has_the_flops_of_float32_and_half_the_bytes() -> None:
    full = count(mlp, mlp_params(), X)
    half = count(mlp, mlp_params(jnp.bfloat16), shape(B, N, D, dtype=jnp.bfloat16))
    assert half.flops == full.flops
    assert 2 * half.bytes == full.bytes == 4 * (2 * D * F + 2 * B * N * D + 2 * B * N * F)


def test_unused_work_is_not_counted() -> None:
    def model(p: dict[str, Array], x: Array) -> Array:
        _ = jax.jit(mlp)(p, x)
        hidden, out = jax.jit(lambda p, x: (x @ p["up"], x.sum()))(p, x)
        return out

    assert count(model, mlp_params(), X).flops == 0


def test_scan_equals_unrolled() -> None:
    depth = 3
    stacked = {name: shape(depth, *leaf.shape) for name, leaf in (mlp_params() | attention_params()).items()}

    def block(p: dict[str, Array], x: Array) -> Array:
        with jax.named_scope("attention"):
            x = x + attention(p, x)
        with jax.named_scope("mlp"):
            return x + mlp(p, x)

    def scanned(p: dict[str, Array], x: Array) -> Array:
        return lax.scan(lambda x, p: (block(p, x), None), x, p)[0]

    def unrolled(p: dict[str, Array], x: Array) -> Array:
        for layer in range(depth):
            x = block({name: leaf[layer] for name, leaf in p.items()}, x)
        return x

    forward = count(scanned, stacked, X)
    assert forward == count(unrolled, stacked, X)
    assert forward.flops == depth * (MLP + ATTENTION)
    together, apart = (count(training(fn, (0, 1)), stacked, X) for fn in (scanned, unrolled))
    assert together.flops == apart.flops == 3 * forward.flops
    assert together.by_scope == apart.by_scope
    assert together.transcendental == apart.transcendental


def chain(wrap: Callable[..., Any], depth: int = 3) -> Callable[..., Array]:
    def model(p: list[dict[str, Array]], x: Array) -> Array:
        for layer in range(depth):
            x = wrap(lambda p, x: x + mlp(p, x + attention(p, x)))(p[layer], x)
        return x

    return model


def test_remat_counts_what_is_recomputed() -> None:
    depth = 3
    params = [mlp_params() | attention_params()] * depth
    plain = count(training(chain(lambda f: f)), params, X)
    assert plain.recomputed == 0 and plain.model_flops == plain.flops
    # Everything but the last product of each block, whose result only the forward pass needs.
    full = count(training(chain(jax.checkpoint)), params, X)
    assert full.recomputed == depth * (ATTENTION + MLP // 2)
    saved = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    dots = count(training(chain(saved)), params, X)
    assert dots.recomputed == 0
    maps = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    weights_only = count(training(chain(maps)), params, X)
    assert weights_only.recomputed == depth * B * 2 * 2 * N * N * D
    for cost in (full, dots, weights_only):
        assert cost.flops - cost.recomputed == cost.model_flops == plain.flops


def test_remat_under_scan_counts_the_same() -> None:
    depth = 4
    stacked = {name: shape(depth, *leaf.shape) for name, leaf in mlp_params().items()}

    def scanned(p: dict[str, Array], x: Array) -> Array:
        def body(x: Array, p: dict[str, Array]) -> tuple[Array, None]:
            return x + mlp(p, x), None

        return lax.scan(jax.checkpoint(body), x, p)[0]

    cost = count(training(scanned, (0, 1)), stacked, X)
    assert (cost.flops, cost.recomputed) == (depth * (3 * MLP + MLP // 2), depth * MLP // 2)


def test_remat_in_a_forward_pass_recomputes_nothing() -> None:
    cost = count(jax.checkpoint(mlp), mlp_params(), X)
    assert (cost.flops, cost.recomputed) == (MLP, 0)


def test_custom_derivatives_are_entered() -> None:
    @jax.custom_vjp
    def product(w: Array, x: Array) -> Array:
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, ct: (saved[1].T @ ct, ct @ saved[0].T))

    @jax.custom_jvp
    def squared(w: Array) -> Array:
        return w @ w

    squared.defjvp(
        lambda primals, tangents: (squared(*primals), primals[0] @ tangents[0] + tangents[0] @ primals[0])
    )
    w, x, one = shape(D, D), shape(N, D), 2 * N * D * D
    assert count(product, w, x).flops == one
    assert count(training(product, (0, 1)), w, x).flops == 3 * one
    assert count(squared, w).flops == 2 * D**3
    assert count(training(squared), w).flops == 3 * 2 * D**3


CALLS: dict[str, Callable[[Array], Array]] = {
    "composite": lambda x: lax.composite(lambda x: x @ x, "library.product")(x),
    "custom_vmap_call": jax.custom_batching.custom_vmap(lambda x: x @ x),
    "linear_call": lambda x: jax.custom_derivatives.linear_call(
        lambda r, x: x @ r, lambda r, ct: ct @ r.T, x, x
    ),
    "platform_dependent": lambda x: lax.platform_dependent(x, cpu=lambda x: x + 1, default=lambda x: x @ x),
}
CALLS["custom_vmap_call"].def_vmap(lambda size, batched, x: (x @ x, True))


@pytest.mark.parametrize("name", CALLS)
def test_other_calls_are_entered(name: str) -> None:
    assert count(CALLS[name], shape(D, D)).flops == 2 * D**3


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_ragged_dot_counts_the_rows_of_its_buffer(groups: int) -> None:
    def experts(w: Array, x: Array, sizes: Array) -> Array:
        return lax.ragged_dot(x, w, sizes)

    args = shape(groups, D, F), shape(N, D), shape(groups, dtype=jnp.int32)
    cost = count(experts, *args)
    assert cost.flops == 2 * N * D * F
    assert cost.by_kind == {"ragged_dot_general": cost.flops}
    assert cost.bytes == 4 * (groups * D * F + N * D + N * F + groups)
    assert count(training(experts, (0, 1)), *args).flops == 3 * cost.flops


def convolve(w: Array, x: Array, stride: int, padding: str, groups: int) -> Array:
    return lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_patch_embedding_is_a_matrix_product() -> None:
    embed = functools.partial(convolve, stride=4, padding="VALID", groups=1)
    weights, image = shape(4, 4, 3, D), shape(B, 16, 16, 3)
    assert count(embed, weights, image).flops == 2 * B * 16 * (4 * 4 * 3) * D
    assert count(training(embed), weights, image).flops == 2 * 2 * B * 16 * (4 * 4 * 3) * D


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution_with_feature_groups(groups: int) -> None:
    conv = functools.partial(convolve, stride=1, padding="VALID", groups=groups)
    args = shape(3, 3, 4 // groups, 8), shape(B, 6, 6, 4)
    flops = 2 * B * 4 * 4 * 8 * (3 * 3 * 4 // groups)
    assert count(conv, *args).flops == flops
    assert count(training(conv, (0, 1)), *args).flops == 3 * flops


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_convolution_does_not_count_padding_or_dilation(stride: int) -> None:
    conv = functools.partial(convolve, stride=stride, padding="SAME", groups=2)
    args = shape(3, 3, 2, 8), shape(B, 7, 7, 4)
    forward = count(conv, *args).flops
    # Three products meet the image at every position of a row of 7, but two at its ends, which padding fills up.
    pairs = {1: 3 * 7 - 2, 2: 3 * 4 - 2, 3: 3 * 3 - 2}[stride]
    assert forward == 2 * B * pairs**2 * 8 * 2
    assert count(training(conv, (0, 1)), *args).flops == 3 * forward


def test_cond_counts_its_dearest_branch() -> None:
    def model(p: dict[str, Array], x: Array, which: Array) -> Array:
        return lax.switch(which, [lambda: x, lambda: mlp(p, x), lambda: x + 1], *())

    cost = count(model, mlp_params(), X, shape(dtype=jnp.int32))
    assert cost.flops == MLP


def test_loops_with_a_fixed_number_of_trips() -> None:
    def body(_: Any, x: Array) -> Array:
        return x @ x

    w, one = shape(D, D), 2 * D**3
    assert count(lambda w: lax.fori_loop(0, 5, body, w), w).flops == 5 * one
    assert (
        count(lambda w: lax.fori_loop(0, jnp.int32(5), body, w), w).flops == 5 * one
    )  # a while loop in the jaxpr
    assert count(lambda w: lax.fori_loop(7, jnp.int32(5), body, w), w).flops == 0

    def by_threes(w: Array) -> Array:
        return lax.while_loop(lambda s: s[0] < 10, lambda s: (s[0] + 3, s[1] @ s[1]), (0, w))[1]

    assert count(by_threes, w).flops == 4 * one


@pytest.mark.parametrize(
    "trips", ["bound given", "condition on values", "step on values", "counts down", "moving bound"]
)
def test_loops_without_a_fixed_number_of_trips_are_refused(trips: str) -> None:
    def model(w: Array, n: Array) -> Any:
        with jax.named_scope("search"):
            match trips:
                case "bound given":
                    return lax.fori_loop(0, n, lambda _, x: x @ x, w)
                case "condition on values":
                    return lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, w)
                case "step on values":
                    return lax.while_loop(lambda s: s[0] < 9, lambda s: (s[0] + n, s[1] @ s[1]), (0, w))
                case "counts down":
                    return lax.while_loop(lambda s: s[0] > 0, lambda s: (s[0] - 1, s[1] @ s[1]), (9, w))
                case "moving bound":
                    return lax.while_loop(
                        lambda s: s[0] < s[1], lambda s: (s[0] + 2, s[1] + 1, s[2] @ s[2]), (0, 9, w)
                    )

    with pytest.raises(CostError, match=r"while loop in scope 'search' .* use lax.scan"):
        count(model, shape(D, D), shape(dtype=jnp.int32))


def kernel(x: Array) -> Array:
    from jax.experimental import pallas

    def double(read: Any, write: Any) -> None:
        write[...] = read[...] * 2

    return pallas.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


UNKNOWN = {
    "pallas_call": kernel,
    "ffi_call": lambda x: jax.ffi.ffi_call("library_function", jax.ShapeDtypeStruct(x.shape, x.dtype))(x),
    "pure_callback": lambda x: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
    "debug_print": lambda x: (jax.debug.print("{}", x), x)[1],
    "cholesky": jnp.linalg.cholesky,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_operation_of_unknown_cost_is_an_error(name: str) -> None:
    def model(x: Array) -> Array:
        with jax.named_scope("block_03"):
            return lax.scan(lambda x, _: (UNKNOWN[name](x), None), x, None, length=2)[0]

    with pytest.raises(
        CostError, match=rf"'{name}' in scope 'block_03.*register_cost\('{name}', rule\)"
    ) as caught:
        count(model, shape(4, 4))
    assert "\n" not in str(caught.value)
    assert name != "ffi_call" or "library_function" in str(caught.value)


def test_a_registered_rule_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_registered", {})
    register_cost("pallas_call", lambda eqn: OperationCost(flops=7 * eqn.outvars[0].aval.size, bytes=5))
    cost = count(lambda x: lax.scan(lambda x, _: (kernel(x), None), x, None, length=3)[0], shape(2, 4))
    assert (cost.flops, cost.bytes, cost.by_kind) == (3 * 7 * 8, 15, {"pallas_call": 3 * 7 * 8})
    for taken in ("pallas_call", "dot_general", "tanh", "add", "reshape", "scan", "jit"):
        with pytest.raises(CostError, match="already has a cost"):
            register_cost(taken, lambda eqn: OperationCost())


def test_shard_map_counts_all_devices_and_tells_replication_apart() -> None:
    mesh = AbstractMesh((4, 2), ("data", "tensor"), (AxisType.Auto, AxisType.Auto))
    rows, features = PartitionSpec("data", None), PartitionSpec(None, "tensor")

    def sharded(x: Array, w: Array, check: bool = True) -> Array:
        def local(x: Array, w: Array) -> Array:
            return lax.psum((x @ w).sum(1, keepdims=True) + (w @ w.T)[:1, :1], "tensor")

        return jax.shard_map(local, mesh=mesh, in_specs=(rows, features), out_specs=rows, check_vma=check)(
            x, w
        )

    x, w = shape(16, D), shape(D, F)
    useful, alike = 2 * 16 * D * F, 2 * D * F * D
    cost = count(sharded, x, w)
    assert cost.flops == useful + 4 * alike  # w @ w.T is done alike by the 4 devices of the data axis
    assert (cost.replicated, cost.model_flops) == (3 * alike, useful + alike)
    unchecked = count(functools.partial(sharded, check=False), x, w)
    assert (unchecked.flops, unchecked.replicated) == (cost.flops, 0)


def test_shard_map_over_some_axes_multiplies_by_those() -> None:
    mesh = AbstractMesh((4, 2), ("data", "tensor"), (AxisType.Auto, AxisType.Auto))
    rows = PartitionSpec("data", None)
    fn = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, axis_names={"data"}
    )
    assert count(jax.jit(fn), shape(16, D), shape(D, F)).flops == 2 * 16 * D * F


def test_train_step_with_adamw_adds_no_matrix_products() -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(optimizer.init, mlp_params())

    @jax.jit
    def step(p: Any, state: Any, x: Array) -> Any:
        loss, gradients = training(mlp)(p, x)
        updates, state = optimizer.update(gradients, state, p)
        return optax.apply_updates(p, updates), state, loss

    cost = count(step, mlp_params(), state, X)
    assert cost.flops == 3 * MLP - MLP // 2
    assert cost.elementwise > count(training(mlp), mlp_params(), X).elementwise + 5 * 2 * D * F


def test_arguments_may_be_arrays_structs_keywords_and_static() -> None:
    def model(x: Array, w: Array, *, depth: int, activation: Callable[[Array], Array], name: str) -> Array:
        assert name == "deep"
        for _ in range(depth):
            x = activation(x @ w)
        return x

    cost = count(model, jnp.ones((N, D)), w=shape(D, D), depth=3, activation=jnp.tanh, name="deep")
    assert (cost.flops, cost.transcendental) == (3 * 2 * N * D * D, 3 * N * D)


def test_costs_add_and_scale() -> None:
    one = count(mlp, mlp_params(), X)
    assert one + Cost() == one
    assert one + one == 2 * one == one * 2
    assert (3 * one).flops == 3 * one.flops and (3 * one).by_scope == {"": 3 * one.flops}
    assert sum([one, one], Cost()).by_kind == {"dot_general": 2 * one.flops}
    with pytest.raises(TypeError):
        one * 0.5
    with pytest.raises(TypeError):
        one * -1
    with pytest.raises(TypeError):
        one + 1


@pytest.mark.parametrize("implementation", ["blocks", "ragged"])
def test_a_grouped_product_counts_its_rows_whatever_computes_it(implementation: str) -> None:
    groups, rows = 5, 24

    def total(x: Array, w: Array, sizes: Array) -> Array:
        return grouped_matmul(x, w, sizes, implementation=implementation).sum()

    given = shape(rows, D), shape(groups, D, F), shape(groups, dtype=jnp.int32)
    assert count(total, *given).flops == 2 * rows * D * F
    assert count(jax.grad(total, argnums=(0, 1)), *given).flops == 2 * 2 * rows * D * F
