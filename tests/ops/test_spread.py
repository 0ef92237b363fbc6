"""Parameters split over data: gathered in the dtype they are used in, gradients summed in it and left split."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from tokenlab import Dropless, SoftMoE
from tokenlab.layers.attention import Attention
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.layers.ffn.swiglu import SwiGLU
from tokenlab.sharding.check import collectives
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import row_sharding, shardings

B, N, D, F, E = 8, 6, 16, 40, 4
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (B, N, D), jnp.bfloat16)
SIZES = {"data": 2, "fsdp": 2, "expert": 2}
PLACE = jnp.broadcast_to(jnp.arange(N), (B, N))


class Unsaid(MLP):
    """Says nothing of what it casts."""

    rounded = ()


LAYERS = {
    "dropless": Dropless(E, k=2, expert=SwiGLU(F, jnp.bfloat16)),
    "soft_moe": SoftMoE(E, slots=2, expert=MLP(F, dtype=jnp.bfloat16)),
    "unsaid": Dropless(E, k=2, expert=Unsaid(F, dtype=jnp.bfloat16)),
    "by_modality": Attention(num_heads=4, modalities=2, use_bias=False, dtype=jnp.bfloat16),
}
# Elements of each kernel of one device's experts, as it computes with them.
WHOLE = dict.fromkeys(LAYERS, E // SIZES["expert"] * D * F) | {"by_modality": 2 * D * D}


def made(name):
    """The layer, what it is called with beside x, and the shapes of its parameters."""
    layer, more = LAYERS[name], {"modality": PLACE % 2} if name == "by_modality" else {}
    return layer, more, jax.eval_shape(lambda: layer.init({"params": KEY, "ffn": KEY}, X, **more))["params"]


def gradients(layer, more, params, x):
    def total(params):
        y = layer.apply({"params": params}, x, rngs={"ffn": KEY}, **more)
        return (y if isinstance(y, jax.Array) else y[0]).astype(jnp.float32).sum()

    return jax.grad(total)(params)


def sent(jaxpr):
    """(primitive, elements of the larger of operand and result, dtype) of what devices send in a traced program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("psum", "psum_invariant", "reduce_scatter", "all_gather"):
            for before, after in zip(eqn.invars, eqn.outvars, strict=True):
                size = max(before.aval.size, after.aval.size)
                yield eqn.primitive.name.split("_inv")[0], size, before.aval.dtype.name
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sent(inner)


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_are_gathered_and_their_gradients_scattered_in_the_dtype_of_computation(name):
    """As traced: XLA:CPU itself sends bfloat16 as float32."""
    layer, more, params = made(name)
    with jax.set_mesh(make_mesh(SIZES)):
        found = set(sent(jax.make_jaxpr(partial(gradients, layer, more))(params, X).jaxpr))
    dtype, whole = "float32" if name == "unsaid" else "bfloat16", WHOLE[name]
    moved = {(kind, of) for kind, size, of in found if size == whole}
    assert moved == {("all_gather", dtype), ("reduce_scatter", dtype)}, found
    assert ("psum", whole // SIZES["fsdp"], dtype) in found  # a device's own part, over the axes left
    assert max(size for kind, size, _ in found if kind == "psum") < whole, found


def test_the_compiled_program_sums_no_whole_kernel():
    layer, more, params = made("dropless")
    mesh = make_mesh({"fsdp": 4, "expert": 2})
    places = shardings(params, layer.axes(), mesh)
    with jax.set_mesh(mesh):
        run = jax.jit(
            partial(gradients, layer, more), in_shardings=(places, row_sharding(mesh)), out_shardings=places
        )
        program = run.lower(params, X).compile()
    sizes = {"reduce-scatter": [], "all-reduce": [0]}
    for each in collectives(program):
        sizes.get(each.kind, []).extend(map(math.prod, each.shapes))
    whole = E // 2 * D * F
    assert sizes["reduce-scatter"] == [whole // 4] * 3  # of the gate's, up's and down's
    assert max(sizes["all-reduce"]) < whole


def test_what_is_summed_over_units_comes_back_without_a_sum():
    """Two sums over devices that share heads and units: of results, and of the gradient of what came in."""
    layer, more, params = made("dropless")
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 2, "expert": 2})):

        def total(x, params):
            return layer.apply({"params": params}, x, rngs={"ffn": KEY}, **more)[0].astype(jnp.float32).sum()

        found = list(sent(jax.make_jaxpr(jax.grad(total))(X, params).jaxpr))
    rows = X.size // 4  # of one device's tokens
    assert len([kind for kind, size, _ in found if (kind, size) == ("psum", rows)]) == 2, found
