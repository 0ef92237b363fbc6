"""The ViT: sizes, positions on other grids, heads, settings that do not fit, weights that fit every stack."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import models
from tokenlab.core.errors import ConfigError, NameLookupError, ShapeError, StackError
from tokenlab.models.vit import SIZES, ViTConfig

KEY = jax.random.key(0)


def build(image=(8, 8, 1), outputs=10, stack_vars=None, train=True, **settings):
    settings = {"size": "nano/2", **settings}
    spec = {"image": (image, "float32")}
    return models.build(
        {"name": "vit", **settings}, spec=spec, num_outputs=outputs, stack_vars=stack_vars, train=train
    )


@functools.cache
def weights(blocks):
    """Of a dense stack."""
    return jax.jit(build(stack=f"block*{blocks}").init)(KEY)


def logits(model, state, images, **how):
    return jax.jit(lambda state, images: model.apply(state, {"image": images}, **how).logits)(state, images)


def parameters(model):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.abstract_state()))


# timm's counts at 224 px and 1,000 classes, less the position of CLS (D), which ours does not have.
@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("Ti/16", 5_717_416 - 192),
        ("S/16", 22_050_664 - 384),
        ("B/16", 86_567_656 - 768),
        ("L/16", 304_326_632 - 1024),
        ("H/14", 632_045_800 - 1280),
    ],
)
def test_published_parameter_counts(size, count):
    assert parameters(build((224, 224, 3), 1000, size=size)) == count


def test_every_size_builds():
    for name, (width, depth, hidden, heads) in SIZES.items():
        model = build((16, 16, 3), size=f"{name}/8")
        assert model.program.depth == depth and model.tokens_per_example == 5
        assert model.settings.dims() == (width, depth, hidden, heads, 8)


@pytest.mark.parametrize("execution", ["scan", "unroll"])
@pytest.mark.parametrize(
    "settings",
    [
        {"position": "sincos", "head": "mean"},
        {"position": "rope", "qk_norm": True, "registers": 2},
        {"position": "none", "layer_scale": 1e-1, "drop_path": 0.3},
        {"num_kv_heads": 1, "activation": "silu", "dtype": "bfloat16"},
        {"head": "mean", "position": "rope", "stack": "block + merge(3) + block"},
    ],
)
def test_settings_run(settings, execution):
    model = build(execution=execution, **settings)
    state = jax.jit(model.init)(KEY)
    images = jax.random.normal(KEY, (3, 8, 8, 1))
    logits = jax.jit(lambda s: model.apply(s, {"image": images}, train=True, rng=KEY).logits)(state)
    assert logits.shape == (3, 10) and logits.dtype == jnp.float32 and np.isfinite(logits).all()


def test_drop_path_is_random_in_training_only():
    model = build(drop_path=0.9, stack="block*4")
    state = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), weights(4))
    images = jax.random.normal(KEY, (4, 8, 8, 1))
    apply = jax.jit(
        lambda key, train: model.apply(state, {"image": images}, rng=key, train=train).logits,
        static_argnums=1,
    )
    a, b = apply(jax.random.key(1), True), apply(jax.random.key(2), True)
    assert (a != b).any()
    np.testing.assert_array_equal(apply(jax.random.key(1), False), apply(jax.random.key(2), False))


def test_positions_move_to_another_grid():
    """Weights made for 4x4 patches run on 8x8: the table is resampled, and a smooth table stays what it was."""
    small = build((8, 8, 1))
    large = build((16, 16, 1), position_grid=(4, 4))
    state = jax.jit(small.init)(KEY)
    assert jax.tree.map(jnp.shape, large.abstract_state()) == jax.tree.map(jnp.shape, state)
    row = np.linspace(-1, 1, 4, dtype=np.float32)
    state["embed"]["position"] = jnp.asarray(np.repeat(row, 4)[:, None] * np.ones(16, np.float32))
    state["embed"]["patch"] = jax.tree.map(jnp.zeros_like, state["embed"]["patch"])
    tokens = large.embed.apply({"params": state["embed"]}, jnp.zeros((1, 16, 16, 1)))
    table = np.asarray(tokens.x[0, 1:, 0]).reshape(8, 8)
    assert np.allclose(table, table[:, :1], atol=1e-6)  # constant along a row, as it was
    assert np.all(np.diff(table[:, 0]) > 0)  # and still rising
    rope = build((16, 16, 1), position="rope", position_grid=(4, 4))
    coords = np.asarray(rope.embed.coordinates((8, 8)))
    np.testing.assert_allclose(coords[0], 0)
    np.testing.assert_allclose(
        coords[1:, 0].max(), 1 + 3.5
    )  # the new grid spans the coordinates of the old one


def test_weights_of_dense_serve_reduced_stacks():
    state = weights(4)
    images = jax.random.normal(KEY, (2, 8, 8, 1))
    for stack in (
        "block*2 + keep(0.5, by=cls) + block*2",
        "block + skip(keep=4)(block*2) + block",
        "(block + merge(3))*4",
    ):
        reduced = build(stack=stack)
        assert jax.tree.structure(reduced.abstract_state()) == jax.tree.structure(state)
        assert logits(reduced, state, images).shape == (2, 10)


def test_train_only_items_go_at_evaluation():
    stack = "block + skip(keep=0.5, train_only=True)(block*2) + keep(0.5, train_only=True) + block"
    training, evaluation = build(stack=stack), build(stack=stack, train=False)
    dense = build(stack="block*4")
    state, images = weights(4), jax.random.normal(KEY, (2, 8, 8, 1))
    assert training.program.after == 9 and evaluation.program.after == 17
    for execution in ("scan", "unroll"):
        np.testing.assert_array_equal(
            logits(evaluation, state, images, execution=execution),
            logits(dense, state, images, execution=execution),
        )


def test_evaluation_is_the_same_at_every_call():
    model = build(stack="block + keep(0.5, by=random) + block", train=False)
    state = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), weights(2))
    images = jax.random.normal(KEY, (2, 8, 8, 1))
    first, second = (logits(model, state, images) for _ in range(2))  # traced anew each time
    np.testing.assert_array_equal(first, second)


WRONG = [
    ({"size": "X/2"}, ConfigError, "Known: .*Ti"),
    ({"size": "S"}, ConfigError, "has no patch side"),
    ({"size": "nano/3"}, ShapeError, "patch 3 does not divide the image 8x8"),
    ({"patch": 0}, ConfigError, "patch must be at least 1"),
    ({"num_heads": 3}, ShapeError, "multiple of num_heads"),
    ({"num_kv_heads": 3}, ShapeError, "num_kv_heads"),
    ({"drop_path": 1.0}, ConfigError, r"drop_path must be in \[0, 1\)"),
    ({"registers": -1}, ConfigError, "registers"),
    ({"activation": "gelo"}, NameLookupError, "Did you mean 'gelu'"),
    ({"position": "rope", "width": 20}, ShapeError, "multiples of 4"),
    ({"position_grid": (0, 4)}, ConfigError, "position_grid"),
    ({"wdith": 32}, ConfigError, "config.model has no key 'wdith'.*Did you mean 'width'"),
    ({"name": "vitt"}, NameLookupError, "Did you mean 'vit'"),
    ({"dtype": "float16"}, ConfigError, "bfloat16"),
    ({"stack": "block*2 + kepe(0.5)"}, StackError, "Did you mean 'keep'"),
    ({"stack": "block + keep(0)"}, StackError, "keep is the count 0"),
    ({"stack": "block + keep(17)"}, StackError, "17"),
    ({"stack": "block + keep(1.5)"}, StackError, "1.5"),
    ({"stack": "block + keep(0.0)"}, StackError, "0.0"),
    ({"stack": "block + keep()"}, StackError, "needs 'amount'"),
    ({"stack": "block + keep(True)"}, StackError, "count .int. or a fraction"),
    ({"stack": "block + keep(0.5, cls)(block)"}, StackError, "takes no body"),
    ({"stack": "block + keep(0.5, 1, 2, 3)"}, StackError, "at most 2 arguments"),
    ({"stack": "block + keep(0.5, amount=2)"}, StackError, "given twice"),
    ({"stack": "block + keep(0.5, bye=cls)"}, StackError, "Did you mean 'by'"),
    ({"stack": "block + keep(0.5, by=clss)"}, StackError, "Did you mean 'cls'"),
    ({"stack": "block + keep(0.5, by=3)"}, StackError, "a score, such as norm"),
    ({"stack": "block + keep(k)"}, StackError, "stack_vars.k"),
    ({"stack": "skip(keep=0.5) + block"}, StackError, "wraps a body"),
    ({"stack": "skip(keep=0.5)(block, block)"}, StackError, "exactly one body"),
    ({"stack": "skip(keep=0.5)(block + merge(2))"}, StackError, "give back as many"),
    ({"stack": "keep(0.5, by=cls) + block"}, StackError, "a block just before"),
    ({"stack": "block + keep(0.5, by=cls) + keep(0.5, by=cls) + block"}, StackError, "a block just before"),
    ({"stack": "skip(keep=0.5)(block) + keep(0.5, by=cls) + block"}, StackError, "a block just before"),
    ({"stack": "block + keep(0.5, by=cls) + block", "head": "mean"}, StackError, "reads the CLS token"),
    ({"stack": "block(between=evit(0.5))", "head": "mean"}, StackError, "reads the CLS token"),
    ({"stack": "block + merge(9)"}, StackError, "0..8"),
    ({"stack": "block + merge(0.6)"}, StackError, r"\[0.0, 0.5\]"),
    ({"stack": "block(ffn=mpl)"}, StackError, "Did you mean 'mlp'"),
    ({"stack": "block(ffn=mlp(hidden=0))"}, StackError, "hidden must be at least 1"),
    ({"stack": "block(fnn=mlp)"}, StackError, "Did you mean 'ffn'"),
    ({"stack": "block(mlp)"}, StackError, "need a name"),
    ({"stack": "block(ffn=3)"}, StackError, "must be a name"),
    ({"stack": "block()(block)"}, StackError, "block takes no body"),
    ({"stack": "block(between=skip(keep=0.5))"}, StackError, "wraps a body"),
    ({"stack": "keep(0.5)"}, StackError, "holds no block"),
    ({"stack": ""}, StackError, "expected an expression"),
    ({"stack": "block(between=evit(1.5))"}, StackError, r"rate must be in \(0, 1\]"),
]


@pytest.mark.parametrize(("settings", "error", "words"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_settings_that_do_not_fit(settings, error, words):
    with pytest.raises(error, match=words) as caught:
        build(**settings)
    lines = str(caught.value).splitlines()
    assert len(lines) == (3 if error is StackError and settings["stack"] else 1)
    if len(lines) == 3:
        assert "^" in lines[2]


def test_unused_stack_variable():
    assert build(stack="block*n", stack_vars={"n": 3}).program.depth == 3
    with pytest.raises(StackError, match=r"stack_vars.k is not used"):
        build(stack="block*n", stack_vars={"n": 3, "k": 0.5})


def test_wrong_inputs():
    model = build()
    with pytest.raises(ShapeError, match="built for images"):
        jax.eval_shape(model.apply, model.abstract_state(), {"image": jnp.zeros((2, 16, 16, 1))})
    with pytest.raises(ShapeError, match=r"\[H, W, C\]"):
        build(image=(8, 8))
    with pytest.raises(ConfigError, match="reads 'image'"):
        models.build({"name": "vit"}, spec={"text": ((8,), "int32")}, num_outputs=2)
    with pytest.raises(ShapeError, match="needs 3 entries"):
        state = build(stack="block*2").abstract_state()
        jax.eval_shape(build(stack="block*3").apply, state, {"image": jnp.zeros((2, 8, 8, 1))})


def test_config_is_hashable_and_frozen():
    assert hash(ViTConfig()) == hash(ViTConfig())
