"""Weights for each modality: equal ones are those of a plain layer, and each is met by its own tokens alone."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import decoders
from tokenlab.core.errors import ShapeError, StackError, TokenLabError
from tokenlab.layers.attention import Attention
from tokenlab.layers.by_modality import NormByModality
from tokenlab.layers.norm import NORMS
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import DEFAULT_RULES, shardings

B, N, D = 2, 8, 16
X = jax.random.normal(jax.random.key(0), (B, N, D))
IDS = jnp.asarray([[0, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 1]], jnp.int32)
MOT = "block(attention=by_modality, ffn=moma(text=1, image=1, slack=2.0))*2"
close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
equal = np.testing.assert_array_equal


def drawn(module, *given, seed=1, **more):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *given, **more))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def twice(tree):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_norm_has_the_scale_of_the_modality(norm):
    module, plain = NormByModality(2, norm), NORMS[norm]()
    params = drawn(module, X)
    found = module.apply({"params": params}, X, IDS)
    each = [plain.apply({"params": jax.tree.map(lambda leaf, m=m: leaf[m], params)}, X) for m in (0, 1)]
    close(found, np.where(np.asarray(IDS)[..., None] == 0, *each))
    assert set(module.axes()) == set(params)


@pytest.mark.parametrize(
    "settings", [{"use_bias": True, "qk_norm": True}, {"use_bias": False, "norm": "rms"}]
)
def test_attention_with_equal_weights_is_plain_attention(settings):
    plain = Attention(num_heads=4, num_kv_heads=2, **settings)
    module = plain.clone(modalities=2)
    params = drawn(plain, X)
    assert jax.tree.structure(twice(params)) == jax.tree.structure(drawn(module, X))
    assert {k: len(v) for k, v in module.axes().items()} == {k: len(v) + 1 for k, v in plain.axes().items()}
    close(
        jax.jit(module.apply)({"params": twice(params)}, X, modality=IDS),
        jax.jit(plain.apply)({"params": params}, X),
        atol=1e-4,
    )


def test_every_token_meets_the_weights_of_its_modality():
    """Against one plain attention whose projections are picked token by token."""
    module = Attention(num_heads=4, use_bias=False, modalities=2)
    params = drawn(module, X)
    kernel = {name: np.asarray(leaf["kernel"])[np.asarray(IDS)] for name, leaf in params.items()}
    q, k, v = (np.einsum("bnd,bndhe->bnhe", X, kernel[name]) for name in ("query", "key", "value"))
    weight = jax.nn.softmax(np.einsum("bnhe,bmhe->bhnm", q, k) / np.sqrt(q.shape[-1]), axis=-1)
    mixed = np.einsum("bhnm,bmhe->bnhe", weight, v)
    close(
        module.apply({"params": params}, X, modality=IDS),
        np.einsum("bnhe,bnhed->bnd", mixed, kernel["out"]),
        atol=1e-4,
    )


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "expert": 4}], ids=str)
def test_on_a_mesh_it_is_as_on_one_device(sizes):
    """Queries, keys and values of different widths, each with its own kernel; weights can be made there, too."""
    module = Attention(num_heads=4, num_kv_heads=2, modalities=2, use_bias=False, causal=True)
    x = jax.random.normal(jax.random.key(3), (8, N, D))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, N)), jnp.int32)
    place = jnp.broadcast_to(jnp.arange(N), (8, N))
    params = jax.tree.map(lambda leaf: 0.2 * leaf, drawn(module, x, position=place))

    def total(params, x):
        y = module.apply({"params": params}, x, modality=ids, position=place)
        return jnp.sum(y**2), y

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, alone), grads = run(params, x)
    mesh = make_mesh(sizes)
    places = shardings(params, module.axes(), mesh)
    rows = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES["batch"]))
    with jax.set_mesh(mesh):
        (_, found), other = jax.jit(jax.value_and_grad(total, has_aux=True))(
            jax.device_put(params, places), jax.device_put(x, rows)
        )
        made = jax.jit(lambda: module.init(jax.random.key(0), x[:1], position=place[:1])["params"])()
    close(found, alone)
    jax.tree.map(partial(close, rtol=1e-4, atol=1e-4), other, grads)
    expected = jax.jit(module.init)(jax.random.key(0), x[:1], position=place[:1])["params"]
    jax.tree.map(partial(close, atol=1e-6), made, expected)


def test_ids_that_are_no_modality_reach_no_other_token():
    """Where they cannot be seen; in padding they may be anything, seen or not."""
    module = Attention(num_heads=4, use_bias=False, modalities=2, causal=True)
    place = jnp.broadcast_to(jnp.arange(N), (B, N))
    params = drawn(module, X, position=place)
    run = lambda ids, valid=None: module.apply(  # noqa: E731
        {"params": params}, X, modality=ids, position=place, valid=valid
    )
    plain = run(IDS)
    for wrong in (-1, 2, 9):
        found = jax.jit(run)(IDS.at[1, 5].set(wrong))
        close(found[0], plain[0])
        close(found[1, :5], plain[1, :5])
    valid = jnp.ones((B, N), bool).at[1, 5:].set(False)
    close(run(IDS.at[1, 5:].set(-1), valid)[1, :5], plain[1, :5])


def test_text_alone_gives_weights_for_images_no_gradient():
    model = decoders.build(MOT, N, modal=True, train=True, qk_norm=True)
    batch = {"ids": decoders.ids(B, N), "modality": jnp.zeros((B, N), jnp.int32)}

    def total(state):
        return jnp.sum(model.apply(state, batch, train=True, rng=jax.random.key(0)).logits ** 2)

    grads = jax.jit(jax.grad(total))(decoders.weights(model))["blocks"]
    for name in ("attention", "attention_norm", "ffn_norm"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads[name]):
            assert (np.asarray(leaf)[:, 0] != 0).any(), path  # [L, M, ...]
            equal(np.asarray(leaf)[:, 1], 0)


def test_it_is_causal_and_generates_what_the_whole_gives():
    model, prompt = decoders.build(MOT, N, modal=True), 5
    state, ids = decoders.weights(model), decoders.ids(B, N)
    functions = model.generation(prompt, N - prompt)

    @jax.jit
    def run(state, ids):
        whole = model.apply(state, {"ids": ids, "modality": IDS}).logits
        weights = functions.prepare(state)
        first, memory = functions.prefill(
            weights, ids[:, :prompt], jnp.full(B, prompt), modality=IDS[:, :prompt]
        )

        def step(memory, now):
            logits, memory = functions.step(weights, now[0], memory, modality=now[1])
            return memory, logits

        _, later = jax.lax.scan(step, memory, (ids[:, prompt:].T, IDS[:, prompt:].T))
        return whole, jnp.concatenate([first[None], later])

    whole, found = run(state, ids)
    close(np.moveaxis(found, 0, 1), np.asarray(whole)[:, prompt - 1 :])
    moved, _ = run(state, ids.at[:, 6:].set((ids[:, 6:] + 5) % 37))
    equal(np.asarray(moved)[:, :6], np.asarray(whole)[:, :6])


def test_parameters_are_doubled_and_flops_are_not():
    from tokenlab.cost.flops import count

    def facts(stack):
        model = decoders.build(stack, N, modal=True)
        batch = dict.fromkeys(("ids", "modality"), jax.ShapeDtypeStruct((1, N), jnp.int32))
        flops = count(lambda s, b: model.apply(s, b).logits, model.abstract_state(), batch).flops
        return sum(leaf.size for leaf in jax.tree.leaves(model.abstract_state()["blocks"])), flops

    dense, untied = facts("block*2"), facts("block(attention=by_modality, ffn=moma(text=1, image=1))*2")
    assert untied[0] == 2 * dense[0]
    norms, weights = (
        2 * 2 * 2 * D * N,
        2 * (3 + 1) * D * N,
    )  # picking scales [M, D], and adding up one choice a token
    assert untied[1] == dense[1] + 2 * (norms + weights)


def test_bad_input():
    module = Attention(num_heads=4, modalities=2)
    params = drawn(module, X)
    with pytest.raises(ShapeError, match="weights for each modality got none"):
        module.apply({"params": params}, X)
    with pytest.raises(ShapeError, match=r"modality is int32\[2, 7\]"):
        module.apply({"params": params}, X, modality=IDS[:, 1:])
    with pytest.raises(TokenLabError, match="modalities are 0..1"):
        module.apply({"params": params}, X, modality=IDS + 1)
    with pytest.raises(StackError, match="attention must be by_modality"):
        decoders.build("block(attention=tied)", N, modal=True)
    with pytest.raises(StackError, match="weights for text and for images"):
        decoders.build("block(attention=by_modality)", N)
