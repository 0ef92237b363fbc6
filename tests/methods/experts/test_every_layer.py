"""What every expert layer must do, whatever its router: soft or hard, chosen by tokens or by experts."""

from __future__ import annotations

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import models
from tokenlab.core.errors import ConfigError, NameLookupError, ShapeError, StackError, TokenLabError
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.methods.experts.dropless import Dropless
from tokenlab.methods.experts.experts_choice import ExpertsChoice
from tokenlab.methods.experts.grin import GRIN
from tokenlab.methods.experts.soft_moe import SoftMoE
from tokenlab.methods.experts.tokens_choice import TokensChoice

EXPERTS = 3  # divides neither the 7 tokens nor the 21 of the batch
BASE = MLP(6)
LAYERS = {
    "soft_moe": SoftMoE(EXPERTS, slots=2, expert=BASE),
    # Some choices are dropped; by priority, since a queue in order of position is not equivariant.
    "tokens_choice": TokensChoice(
        EXPERTS, 2, capacity=0.8, noise=0.0, load=0.0, gshard=0.01, z=0.01, batch_priority=True, expert=BASE
    ),
    "experts_choice": ExpertsChoice(EXPERTS, 1.5, expert=BASE),
    "dropless": Dropless(EXPERTS, 2, z=0.01, expert=BASE),
    "grin": GRIN(EXPERTS, 2, r=0.5, expert=BASE),
}
LOSSES = {
    "soft_moe": set(),
    "tokens_choice": {"importance_loss", "gshard_loss", "router_z_loss"},
    "experts_choice": set(),
    "dropless": {"balance_loss", "router_z_loss"},
    "grin": {"balance_loss"},
}
each_layer = pytest.mark.parametrize("name", LAYERS)
close = partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-5)
equal = np.testing.assert_array_equal

# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNGS = {"ffn": jax.random.key(3)}


@cache
def forward(name):
    """(params, x, valid) -> y, aux at inference, compiled once."""
    return quick(lambda params, x, valid: LAYERS[name].apply({"params": params}, x, valid=valid))


@pytest.fixture(scope="module")
def ready(x, weights):
    """name -> (params, (params, x, valid=all) -> y)."""

    @cache
    def params(name):
        return weights(LAYERS[name], x)

    def one(name):
        own = params(name)

        def run(x, valid=None, params=own):
            valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
            return forward(name)(params, x, valid)[0]

        return own, run

    return one


@each_layer
def test_tokens_in_another_order_give_the_same_in_that_order(name, ready, x):
    _, run = ready(name)
    order = np.array([4, 0, 6, 2, 5, 1, 3])
    close(run(x[:, order]), run(x)[:, order])


@each_layer
def test_examples_do_not_meet(name, ready, x):
    _, run = ready(name)
    y, changed = run(x), run(x.at[1].set(2 * x[1, ::-1] + 1))
    close(changed[jnp.array([0, 2])], y[jnp.array([0, 2])])
    assert np.abs(changed[1] - y[1]).max() > 0.1


@each_layer
def test_experts_in_another_order_give_the_same(name, ready, x):
    params, run = ready(name)
    order = np.array([2, 0, 1])
    router = params["router"]
    moved = (
        {"mu": router["mu"][:, order], "scale": router["scale"]} if name == "soft_moe" else router[:, order]
    )
    experts = jax.tree.map(lambda leaf: leaf[order], params["experts"])
    close(run(x, params={"router": moved, "experts": experts}), run(x))


@each_layer
def test_padding_changes_nothing_and_gets_zeros(name, ready, x):
    params, run = ready(name)
    valid = np.ones(x.shape[:2], bool)
    valid[0, 2:4] = valid[1, 5:] = valid[2, 0] = False
    others = jnp.where(valid[..., None], x, -30 * x[:, ::-1] + 7)
    y, aux = forward(name)(params, x, valid)
    again, same = forward(name)(params, others, valid)
    close(again, y)
    equal(np.asarray(y)[~valid], 0)
    jax.tree.map(close, same, aux)
    assert np.abs(run(x) - y)[valid].max() > 0.01 or name in ("dropless", "grin")


@each_layer
def test_no_mask_is_a_mask_of_ones(name, ready, x):
    params, run = ready(name)
    y, _ = quick(lambda params, x: LAYERS[name].apply({"params": params}, x))(params, x)
    close(y, run(x))


@pytest.mark.parametrize("name", ["soft_moe", "dropless", "grin"])
def test_padding_is_as_if_it_were_not_there(name, ready, x):
    """Where nothing depends on the length: a capacity does."""
    _, run = ready(name)
    valid = jnp.arange(7)[None] < jnp.array([[5]] * 3)
    close(run(x[:, :5]), run(x, valid)[:, :5])


@each_layer
def test_gradients_reach_everything_and_are_right(name, ready, x):
    """Against a central difference along one direction; GRIN's at inference, where nothing is estimated."""
    params, _ = ready(name)
    cotangent = jax.random.normal(jax.random.key(1), x.shape)

    @quick
    @jax.value_and_grad
    def total(params_and_x):
        y, _ = LAYERS[name].apply({"params": params_and_x[0]}, params_and_x[1])
        return (y * cotangent).sum()

    point = (params, x)
    _, gradient = total(point)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all()
        by_expert = (
            leaf.reshape(EXPERTS, -1) if "experts" in jax.tree_util.keystr(path) else leaf.reshape(1, -1)
        )
        assert (np.abs(by_expert).max(1) > 1e-6).all(), path
    generator = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), point)
    step = 5e-4  # so small that nobody chooses otherwise
    ahead, behind = (
        total(jax.tree.map(lambda a, d, s=sign: a + s * step * d, point, direction))[0] for sign in (1, -1)
    )
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), gradient, direction)))
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-2, abs=0.1)


@each_layer
def test_losses_are_for_training_and_metrics_for_both(name, ready, x):
    params, _ = ready(name)
    layer = LAYERS[name]
    _, silent = forward(name)(params, x, jnp.ones(x.shape[:2], bool))
    _, aux = quick(lambda params, x: layer.apply({"params": params}, x, train=True, rngs=RNGS))(params, x)
    assert silent.losses == {}
    assert set(aux.losses) == LOSSES[name]
    assert set(aux.metrics) == set(silent.metrics) and aux.metrics
    for value in jax.tree.leaves(aux):
        assert np.isfinite(value).all()
    if name == "soft_moe":
        assert aux.load is None
    else:
        assert aux.load.shape == (EXPERTS,)
        close(aux.load.sum(), 1.0)


@each_layer
def test_bfloat16_tokens(name, ready, x):
    """The router stays float32, so the choices are those of the rounded tokens."""
    params, run = ready(name)
    rounded = x.astype(jnp.bfloat16)
    y = run(rounded)
    assert y.dtype == jnp.bfloat16 and np.isfinite(y).all()
    close(np.asarray(y, np.float32), run(rounded.astype(jnp.float32)), atol=5e-2, rtol=2e-2)


@each_layer
def test_bfloat16_transport(name, ready, x):
    params, run = ready(name)
    layer = LAYERS[name].clone(transport="bfloat16")
    y, _ = quick(lambda params, x: layer.apply({"params": params}, x))(params, x)
    assert y.dtype == jnp.float32
    assert 1e-5 < np.abs(y - run(x)).max() < 0.1


class Plain(nn.Module):
    """A user's module: it takes neither `valid` nor `train`, and knows nothing of groups or sharding."""

    @nn.compact
    def __call__(self, x):
        return MLP(6, name="inner")(x)


@each_layer
def test_any_module_is_an_expert(name, ready, x):
    params, run = ready(name)
    layer = LAYERS[name].clone(expert=Plain())
    wrapped = {**params, "experts": {"inner": params["experts"]}}
    y, _ = quick(lambda params, x: layer.apply({"params": params}, x))(wrapped, x)
    close(y, run(x))
    with pytest.raises(ConfigError, match=r"Plain does not say how its parameters are sharded"):
        layer.axes()


@each_layer
def test_a_library_module_is_an_expert(name, x, weights):
    layer = LAYERS[name].clone(expert=nn.Dense(5, use_bias=False))
    params = weights(layer, x)
    assert params["experts"]["kernel"].shape == (EXPERTS, 5, 5)
    same = {**params, "experts": {"kernel": np.tile(np.eye(5, dtype=np.float32), (EXPERTS, 1, 1))}}
    y, _ = quick(lambda params, x: layer.apply({"params": params}, x))(same, x)
    # Identity experts: a hard router scales every token, a soft one mixes them within their hull.
    if name == "soft_moe":
        assert np.all(y.max(1) <= x.max(1) + 1e-5)
    else:
        scale = np.einsum("bnd,bnd->bn", y, x) / np.einsum("bnd,bnd->bn", x, x)
        close(y, scale[..., None] * x)
        assert ((scale >= -1e-6) & (scale <= 2 + 1e-6)).all()


@each_layer
def test_experts_begin_alike_on_demand(name, x):
    for same in (True, False):
        layer = LAYERS[name].clone(same_init=same)
        made = quick(layer.init)({"params": jax.random.key(0), **RNGS}, x)["params"]["experts"]
        kernel = np.asarray(made["up"]["kernel"])
        assert kernel.shape[0] == EXPERTS and np.abs(kernel[0]).max() > 0
        assert (kernel == kernel[:1]).all() == same


@each_layer
def test_shared_experts_are_added_for_every_token(name, ready, x, weights, each_expert):
    params, run = ready(name)
    layer = LAYERS[name].clone(shared=2)
    more = {**params, "shared": weights(layer, x)["shared"]}
    y, _ = quick(lambda params, x: layer.apply({"params": params}, x))(more, x)
    close(y, run(x) + each_expert(more["shared"], x).sum(0), atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        TokensChoice(1, capacity=1.0, noise=0.0, load=0.0, expert=BASE),
        ExpertsChoice(1, expert=BASE),
        Dropless(1, 1, expert=BASE),
        Dropless(1, 1, expert=Plain()),
        GRIN(1, 1, expert=BASE),
    ],
    ids=["tokens_choice", "experts_choice", "dropless", "dropless of any module", "grin"],
)
def test_one_expert_is_the_dense_layer(layer, x, weights):
    params = weights(layer, x)
    y, _ = quick(lambda params, x: layer.apply({"params": params}, x, train=True, rngs=RNGS))(params, x)
    alone = jax.tree.map(lambda leaf: leaf[0], params["experts"])
    close(y, layer.expert.apply({"params": alone}, x))


@each_layer
def test_every_parameter_has_axes(name, x):
    layer = LAYERS[name].clone(shared=1, **({"bias": 0.1} if name == "tokens_choice" else {}))
    shapes = jax.eval_shape(lambda: layer.init({"params": jax.random.key(0), **RNGS}, x))["params"]
    found = {
        "/".join(key.key for key in path): leaf.ndim
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert {path: len(axes) for path, axes in layer.axes().items()} == found


# Bad input


@each_layer
@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [
        ((7, 5), "float32", r"takes tokens \[B, N, D\]"),
        ((1, 3, 7, 5), "float32", r"takes tokens \[B, N, D\]"),
        ((3, 7, 5), "int32", "floating dtype; got int32"),
    ],
)
def test_tokens_that_are_none(name, shape, dtype, says, ready):
    params, _ = ready(name)
    with pytest.raises(ShapeError, match=says):
        LAYERS[name].apply({"params": params}, jnp.ones(shape, dtype))


@each_layer
def test_an_example_of_padding_alone(name, ready, x):
    params, _ = ready(name)
    valid = np.ones(x.shape[:2], bool)
    valid[2] = False
    with pytest.raises(ShapeError, match="example 2 is padding alone"):
        LAYERS[name].apply({"params": params}, x, valid=jnp.asarray(valid))
    # Inside a compiled program it cannot be seen, and gives zeros.
    equal(forward(name)(params, x, valid)[0][2], 0)


class Wider(nn.Module):
    """Gives back another width."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1] + 1)(x)


class Drawing(nn.Module):
    """Drops at random in training."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(x.shape[-1])(x))


class Misspelt(MLP):
    """Says of a parameter that it has not how it is sent."""

    rounded = ("up/kernel", "down/kernels")


@each_layer
def test_an_expert_that_draws_is_refused_in_training(name, x):
    layer = LAYERS[name].clone(expert=Drawing())
    params = jax.eval_shape(layer.init, {"params": jax.random.key(0), **RNGS}, x)
    jax.eval_shape(layer.apply, params, x)
    with pytest.raises(ConfigError, match="experts get no rng, and Drawing draws at random"):
        train = partial(layer.apply, train=True, rngs={**RNGS, "dropout": jax.random.key(1)})
        jax.eval_shape(train, params, x)


@each_layer
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"expert": nn.BatchNorm(True)}, ConfigError, "parameters alone; BatchNorm keeps batch_stats too"),
        ({"expert": Misspelt(8)}, ConfigError, "rounded names 'down/kernels', .* Did you mean 'down/kernel'"),
        ({"expert": nn.Dense}, ConfigError, "an expert is a Linen module, such as nn.Dense"),
        ({"num_experts": 0}, TokenLabError, "at least 1; got 0"),
        ({"num_experts": -2}, TokenLabError, "at least 1; got -2"),
        ({"shared": -1}, ConfigError, "shared must be at least 0; got -1"),
        ({"expert": Wider()}, ShapeError, r"experts take and give \[B, N, D\]"),
        ({"expert": SoftMoE(2, slots=1)}, ConfigError, "router of its own cannot be an expert"),
    ],
    ids=["statistics", "misspelt", "class", "none", "negative", "shared", "width", "nested"],
)
def test_settings_out_of_range(name, change, error, says, x):
    layer = LAYERS[name].clone(**change)
    with pytest.raises(error, match=says) as raised:
        jax.eval_shape(lambda: layer.init({"params": jax.random.key(0), **RNGS}, x))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("ffn", "says"),
    [
        ("soft_mo(experts=4)", "soft_moe"),
        ("soft_moe()", "needs 'experts'"),
        ("soft_moe(experts=4, slot=2)", "'slots'"),
        ("soft_moe(experts=4, dispatch=sofft)", "soft"),
        ("tokens_choice(experts=4, form=index)", "indexed"),
        ("experts_choice(experts=4, score=softmx)", "softmax"),
        ("dropless(experts=4, gate=sigmod)", "sigmoid"),
        ("dropless(experts=4, implementation=megabloks)", "megablox"),
        ("dropless(experts=4, exchange=pad)", "padded"),
        ("grin(experts=4, rule=codes)", "code"),
        ("grin(experts=4, expert=swiglue)", "swiglu"),
        ("grin(experts=4, transport=float16)", "bfloat16"),
    ],
)
def test_names_that_a_stack_does_not_know(ffn, says):
    spec = {"image": ((8, 8, 1), "float32")}
    with pytest.raises((StackError, NameLookupError), match=says):
        models.build({"size": "nano/2", "stack": f"block(ffn={ffn})"}, spec=spec, num_outputs=5)
