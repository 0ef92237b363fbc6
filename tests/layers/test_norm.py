"""Norms, the three ways of norming a block, and the axes that attention says its parameters have."""

from __future__ import annotations

import itertools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ShapeError
from tokenlab.core.tokens import Tokens
from tokenlab.layers.attention import Attention
from tokenlab.layers.block import Block, Depth, dropout
from tokenlab.layers.context import Context
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.layers.ffn.swiglu import SwiGLU
from tokenlab.layers.norm import NORMS, LayerNorm, RMSNorm

B, N, D, EPS = 2, 5, 8, 1e-3
rng = np.random.default_rng(0)


def by_hand(name, x, params):
    """In float64."""
    x = np.asarray(x, np.float64)
    if name == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * params["scale"]
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * params["scale"] + params["bias"]


def drawn(module):
    """Parameters drawn anew, so that ones and zeros hide nothing."""
    params = module.init(jax.random.key(0), jnp.zeros((1, D)))["params"]
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("name", NORMS)
def test_against_numpy(name):
    module, x = NORMS[name](eps=EPS), 3 * rng.standard_normal((B, N, D)).astype(np.float32) + 1
    params = drawn(module)
    np.testing.assert_allclose(module.apply({"params": params}, x), by_hand(name, x, params), atol=1e-5)
    assert set(module.axes()) == set(params)


@pytest.mark.parametrize("name", NORMS)
def test_statistics_are_float32_in_bfloat16(name):
    """Of numbers whose squares lie beyond bfloat16's eight bits: as in float32, rounded once at the end."""
    module, wide = NORMS[name](jnp.bfloat16, EPS), NORMS[name](jnp.float32, EPS)
    x = jnp.asarray(100 + rng.standard_normal((B, N, 512)), jnp.bfloat16)
    params = jax.tree.map(jnp.ones_like, module.init(jax.random.key(0), x)["params"])
    found = module.apply({"params": params}, x)
    assert found.dtype == jnp.bfloat16 and all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    expected = wide.apply({"params": params}, x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found, expected)


def test_zeros_stay_zeros_with_finite_gradients():
    for module in (RMSNorm(), LayerNorm()):
        params = module.init(jax.random.key(0), jnp.zeros((1, D)))["params"]
        value, grad = jax.value_and_grad(lambda x, m=module, p=params: m.apply({"params": p}, x).sum())(
            jnp.zeros((N, D))
        )
        assert value == 0 and np.isfinite(grad).all()


@pytest.mark.parametrize("placement", ["pre", "res_post", "post"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_block_is_its_modules_composed_by_hand(norm, placement):
    attention = Attention(num_heads=2, use_bias=False, causal=True, norm=norm)
    block = Block(
        attention=attention,
        ffn=SwiGLU(12),
        ffn_name="swiglu",
        norm=norm,
        norm_eps=EPS,
        norm_placement=placement,
    )
    x = rng.standard_normal((B, N, D)).astype(np.float32)
    position = jnp.broadcast_to(jnp.arange(N), (B, N))
    params = {}
    for slot, module in block.modules().items():
        facts = {"position": position} if slot == "attention" else {}
        own = module.init(jax.random.key(1), x, **facts)["params"]
        params[slot] = jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype(np.float32), own)

    def add(x, half, module, **facts):
        def normed(x):
            return by_hand(norm, x, params[f"{half}_norm"]).astype(np.float32)

        y = module.apply({"params": params[half]}, normed(x) if placement == "pre" else x, **facts)
        if placement == "post":
            return normed(x + np.asarray(y))
        return x + (normed(y) if placement == "res_post" else np.asarray(y))

    expected = add(add(x, "attention", attention, position=position), "ffn", block.ffn)
    tokens, context, depth = (
        Tokens(x, position),
        Context(jax.random.key(0)),
        Depth(jnp.int32(0), jnp.float32(0)),
    )
    tokens, _ = block.attend(params, tokens, context, depth, {})
    tokens, _ = block.feed(params, tokens, context, depth)
    np.testing.assert_allclose(tokens.x, expected, atol=2e-5)


def test_dropout_drops_features_of_what_is_added_in_training_only():
    attention = Attention(num_heads=2)
    plain, dropping = (
        Block(attention=attention, ffn=MLP(12), norm_placement="post", dropout=r) for r in (0.0, 0.25)
    )
    x = rng.standard_normal((64, N, D)).astype(np.float32)
    tokens, depth = Tokens(x, jnp.zeros(x.shape[:2], int)), Depth(jnp.int32(3), jnp.float32(0))
    modules = plain.modules().items()
    params = {slot: module.init(jax.random.key(1), x)["params"] for slot, module in modules}
    run = {
        (block, train): block.feed(params, tokens, Context(jax.random.key(0), train), depth)[0].x
        for block in (plain, dropping)
        for train in (False, True)
    }
    assert (run[dropping, False] == run[plain, False]).all() and (run[plain, True] == run[plain, False]).all()
    assert not np.allclose(run[dropping, True], run[plain, True], atol=0.1)

    y = dropout(jnp.ones((64, N, D)), 0.25, jax.random.key(5))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    deviation = 0.25 * 0.75 / y.size
    assert abs((np.asarray(y) == 0).mean() - 0.25) < 4 * deviation**0.5


def test_kernels_start_from_the_normal_that_was_asked_for():
    x = jnp.zeros((1, 2, 64))
    for module in (Attention(num_heads=4, kernel_std=0.02), MLP(256, kernel_std=0.02)):
        flat = flax.traverse_util.flatten_dict(module.init(jax.random.key(0), x)["params"])
        kernels = [leaf for path, leaf in flat.items() if path[-1] == "kernel"]
        for kernel in kernels:
            assert abs(kernel).max() <= 0.04
            np.testing.assert_allclose(kernel.std(), 0.02 * 0.8796, rtol=0.05)


@pytest.mark.parametrize(
    ("use_bias", "qk_norm", "norm", "groups"),
    list(itertools.product([True, False], [True, False], ["layer", "rms"], [None, 1])),
)
def test_attention_names_the_axes_of_exactly_its_parameters(use_bias, qk_norm, norm, groups):
    module = Attention(num_heads=2, num_kv_heads=groups, use_bias=use_bias, qk_norm=qk_norm, norm=norm)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 3, D))))["params"]
    found = {"/".join(path): leaf.ndim for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}
    assert found == {name: len(axes) for name, axes in module.axes().items()}
    assert any(name.endswith("_norm/scale") for name in found) == qk_norm
    assert any(name in ("query/bias", "out/bias") for name in found) == use_bias


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_qk_norm_takes_the_length_out_of_queries_and_keys(norm):
    """The norm is over Dh, before rotary positions: scaling the input changes nothing but the values."""
    module = Attention(num_heads=2, use_bias=False, qk_norm=True, norm=norm, rope_theta=100.0)
    x, coords = rng.standard_normal((B, N, D)).astype(np.float32), np.arange(N)[None].repeat(B, 0)
    params = module.init(jax.random.key(0), x, coords=coords)["params"]
    one, two = (module.apply({"params": params}, k * x, coords=coords, projections=True)[1] for k in (1, 7))
    np.testing.assert_allclose(two.query, one.query, atol=1e-4)
    np.testing.assert_allclose(two.key, one.key, atol=1e-4)
    np.testing.assert_allclose(two.value, 7 * one.value, rtol=1e-5, atol=1e-5)
    plain = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[norm](epsilon=1e-6)
    key = np.einsum("bnd,dhe->bnhe", x[:, :1], params["key"]["kernel"])
    np.testing.assert_allclose(
        one.key[:, :1], plain.apply({"params": params["key_norm"]}, key), atol=1e-5
    )  # at coordinate 0


def test_a_causal_layer_needs_positions():
    module = Attention(num_heads=2, causal=True)
    with pytest.raises(ShapeError, match="a causal layer needs the positions of its tokens"):
        module.init(jax.random.key(0), jnp.zeros((1, 3, D)))
