"""The decoder language model: what a token may see, packed documents, sizes, ways of running, what does not fit."""

from __future__ import annotations

from functools import cache, partial

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import decoders
from tokenlab import models
from tokenlab.core.errors import ConfigError, ShapeError, StackError
from tokenlab.models.decoder_lm import SIZES, DecoderLMConfig

N, B, V = 24, 3, decoders.VOCABULARY
KEY = jax.random.key(0)
# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

CAUSAL = {
    "dense": ("block*2", {}),
    "window": ("block*2", {"window": 4}),
    "grouped heads": ("block*2", {"num_kv_heads": 1}),
    "mod by predictor": ("block + mod(keep=0.25)(block)", {}),
    "mod by router": ("block + mod(keep=0.25, decide=router, gate=sigmoid)(block)", {}),
    "mod by random": ("block + mod(keep=0.25, by=random)(block)", {}),
    "dropless": ("block + block(ffn=dropless(experts=4))", {}),
    "grin": ("block + block(ffn=grin(experts=4))", {}),
}


@cache
def ready(stack, **settings):
    """(model, weights, a jitted function (weights, batch) -> logits)."""
    model = decoders.build(stack, N, **settings)
    return model, decoders.weights(model), quick(lambda s, batch: model.apply(s, batch).logits)


def parameters(model):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.abstract_state()))


# ---------------------------------------------------------------------------------------------- what a token sees


@pytest.mark.parametrize("name", CAUSAL)
def test_a_future_token_changes_no_earlier_logit(name):
    """Bit for bit, wherever in the sequence it stands; and it does change its own."""
    stack, settings = CAUSAL[name]
    _, state, logits = ready(stack, **settings)
    ids = decoders.ids(B, N)
    plain = logits(state, {"ids": ids})
    for at in (1, 11, N - 1):
        other = logits(state, {"ids": ids.at[:, at:].set((ids[:, at:] + 5) % V)})
        np.testing.assert_array_equal(other[:, :at], plain[:, :at])
        assert (np.asarray(other)[:, at] != plain[:, at]).any(axis=-1).all()


def test_what_looks_ahead_does_when_it_is_let():
    """With leaks=True the top K of a whole sequence decide, and a later token does change an earlier logit."""
    _, state, logits = ready("block + mod(keep=0.25, decide=topk)(block)", leaks=True)
    ids = decoders.ids(B, N)
    other = ids.at[:, 12:].set((ids[:, 12:] + 5) % V)
    assert (logits(state, {"ids": ids}) != logits(state, {"ids": other}))[:, :12].any()


def test_a_window_is_as_far_as_a_token_sees():
    """Through two blocks with a window of 4, a token reaches those up to 6 before it and none further."""
    _, state, logits = ready("block*2", window=4)
    ids = decoders.ids(B, N)
    changed = (
        logits(state, {"ids": ids}) != logits(state, {"ids": ids.at[:, 5].set((ids[:, 5] + 1) % V)})
    ).any(-1)
    np.testing.assert_array_equal(
        changed, np.broadcast_to((np.arange(N) >= 5) & (np.arange(N) <= 11), (B, N))
    )


@pytest.mark.parametrize(
    "stack", ["block*2", "block + mod(keep=0.5)(block)", "block + block(ffn=dropless(experts=4))"]
)
def test_packed_documents_equal_each_alone(stack):
    """Three documents and padding in one row, each with a segment and positions of its own."""
    model, state, logits = ready(stack)
    sizes = [9, 4, 7]
    ids, ends = decoders.ids(1, N)[0], np.cumsum(sizes)
    packed = {name: np.zeros((4, N), np.int32) for name in ("ids", "segment", "position")}
    for row, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        own = slice(end - size, end)
        for name, value in (("ids", ids[own]), ("segment", row + 1), ("position", np.arange(size))):
            packed[name][3, own] = value
            packed[name][row, :size] = 1 if name == "segment" else value
    found = logits(state, packed)
    for row, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        np.testing.assert_allclose(found[3, end - size : end], found[row, :size], atol=1e-5, rtol=1e-5)
    # Without segments they meet.
    joined = logits(state, {"ids": packed["ids"], "position": packed["position"]})
    assert np.abs(joined - found)[3, 9:20].max() > 1e-2
    assert model.batch_spec(4).keys() == packed.keys()


def test_tokens_know_their_modality(monkeypatch):
    """As the batch says it, where the data has it."""
    model = decoders.build("block + mod(keep=0.5)(block)", N, modal=True)
    assert "modality" in model.batch_spec(B)
    seen = []
    run = type(model).run
    monkeypatch.setattr(
        type(model),
        "run",
        lambda self, state, tokens, *a, **k: seen.append(tokens) or run(self, state, tokens, *a, **k),
    )
    ids = decoders.ids(B, N)
    jax.eval_shape(model.apply, model.abstract_state(), {"ids": ids, "modality": ids % 2})
    assert seen[0].modality.shape == (B, N)
    with pytest.raises(ShapeError, match=r"modality is \[3, 3\]"):
        jax.eval_shape(model.apply, model.abstract_state(), {"ids": ids, "modality": ids[:, :3]})


def test_what_stands_in_padding_changes_nothing():
    _, state, logits = ready("block + mod(keep=0.5)(block)")
    ids = decoders.ids(B, N)
    real = np.arange(N) < np.array([[N], [15], [6]])
    batch = {"ids": ids, "segment": real.astype(np.int32), "position": np.where(real, np.arange(N), 0)}
    plain, other = logits(state, batch), logits(state, {**batch, "ids": jnp.where(real, ids, (ids + 3) % V)})
    np.testing.assert_array_equal(np.asarray(plain)[real], np.asarray(other)[real])
    assert (np.asarray(plain)[~real] != np.asarray(other)[~real]).any()


def test_shifting_all_positions_changes_nothing_with_rope():
    _, state, logits = ready("block + mod(keep=0.25)(block)")
    ids, place = decoders.ids(B, N), jnp.broadcast_to(jnp.arange(N), (B, N))
    plain = logits(state, {"ids": ids, "position": place})
    np.testing.assert_array_equal(plain, logits(state, {"ids": ids}))
    np.testing.assert_allclose(logits(state, {"ids": ids, "position": place + 50}), plain, atol=1e-4)
    assert np.abs(logits(state, {"ids": ids, "position": 2 * place}) - plain).max() > 1e-2


def test_without_rope_positions_are_not_read():
    model, state, logits = ready("block*2", position="none")
    ids, place = decoders.ids(B, N), jnp.broadcast_to(jnp.arange(N), (B, N))
    np.testing.assert_array_equal(
        logits(state, {"ids": ids, "position": 2 * place}), logits(state, {"ids": ids})
    )


def test_a_plain_block_equals_numpy():
    """Embedding, one block with grouped heads, head, in float64."""
    model, state, logits = ready("block", num_heads=4, num_kv_heads=2)
    ids = decoders.ids(B, N)
    found = logits(state, {"ids": ids})
    for row in range(B):
        x = np.asarray(state["embed"]["table"], np.float64)[ids[row]]
        expected = decoders.head(state, decoders.block(state, 0, x, np.arange(N)))
        np.testing.assert_allclose(found[row], expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- vocabulary and head


def test_tied_the_head_reads_the_table():
    model, state, logits = ready("block", tied=True)
    assert "kernel" not in state["head"]
    ids = decoders.ids(B, N)
    output = quick(lambda s: model.apply(s, {"ids": ids}))(state)
    np.testing.assert_allclose(output.logits, output.features @ state["embed"]["table"].T, atol=1e-5)
    untied = decoders.build("block", N).abstract_state()
    assert untied["head"]["kernel"].shape == (16, V)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_only_fill_the_table_never_win(tied):
    model, state, logits = ready("block", tied=tied, vocab_multiple=16)
    assert state["embed"]["table"].shape == (48, 16)
    table = (state["embed"] if tied else state["head"])["table" if tied else "kernel"]
    loud = jax.tree.map(lambda leaf: leaf, state)
    (loud["embed"] if tied else loud["head"])["table" if tied else "kernel"] = (
        table.at[V:].set(1e3) if tied else table.at[:, V:].set(1e3)
    )
    found = logits(loud, {"ids": decoders.ids(B, N)})
    assert found.shape == (B, N, 48)
    np.testing.assert_array_equal(jax.nn.softmax(found)[..., V:], 0)
    assert (np.argmax(found, -1) < V).all()
    np.testing.assert_array_equal(found[..., :V], logits(state, {"ids": decoders.ids(B, N)})[..., :V])


def test_an_id_outside_the_table_shows_as_nan():
    _, state, logits = ready("block")
    for outside in (V, -1, -V):
        found = logits(state, {"ids": decoders.ids(B, N).at[1, 4].set(outside)})
        assert np.isnan(found[1, 4:]).all() and np.isfinite(found[0]).all() and np.isfinite(found[2]).all()


# ---------------------------------------------------------------------------------------------- ways of running


def value_and_grad(model, state, **how):
    """(sum of logits in a direction, logits), gradients: as in training."""
    ids, direction = decoders.ids(B, N), jax.random.normal(KEY, (B, N, V))

    def total(state):
        output = model.apply(state, {"ids": ids}, train=True, rng=KEY, **how)
        return jnp.sum(output.logits * direction) + sum(output.losses.values()), output.logits

    return quick(jax.value_and_grad(total, has_aux=True))(state)


def test_ways_of_running_agree():
    """Scanned and rematerialised equal unrolled bit for bit in logits, gradients to rounding; bfloat16 is near."""
    stack = "(block + mod(keep=0.25)(block))*2"
    model = decoders.build(stack, N, train=True)
    state = decoders.weights(model, scale=0.1)
    (_, logits), grads = value_and_grad(model, state, execution="unroll")
    for how in ({"execution": "scan"}, {"execution": "unroll", "remat": "full"}):
        (_, other), other_grads = value_and_grad(model, state, **how)
        np.testing.assert_array_equal(other, logits)
        for a, b in zip(*map(jax.tree.leaves, (other_grads, grads)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        each = np.abs(leaf).reshape(leaf.shape[0], -1).max(axis=1)
        assert np.isfinite(leaf).all() and each.max() > 0, jax.tree_util.keystr(path)


def test_bfloat16_is_near_and_keeps_parameters_and_logits_in_float32():
    ids, (_, state, logits) = decoders.ids(B, N), ready("block*2")
    small = jax.tree.map(lambda leaf: 0.5 * leaf, state)
    narrow = decoders.build("block*2", N, dtype="bfloat16")
    (_, found), grads = value_and_grad(narrow, small)
    assert found.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    expected = np.asarray(logits(small, {"ids": ids}))
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert (np.asarray(found) != expected).any()


def test_places_say_where_the_tokens_of_the_logits_stand():
    """Random dropping looks at no token, so it is causal; the logits are of those that are left."""
    model = decoders.build("block + keep(0.5, by=random) + block", N, train=True)
    state = decoders.weights(model)
    output = quick(lambda s, i: model.apply(s, {"ids": i}, rng=KEY))(state, decoders.ids(B, N))
    assert output.logits.shape == (B, N // 2, V) and output.places.shape == (B, N // 2)
    assert (np.diff(output.places) > 0).all()


# ---------------------------------------------------------------------------------------------- sizes and parameters


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied": True},
        {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": True},
        {"width": 24, "mlp_dim": 40, "vocab_multiple": 8},
    ],
    ids=str,
)
def test_parameters_are_counted_by_the_formula(settings):
    model = decoders.build("block*3", N, **settings)
    width, _, hidden, heads, groups, head = model.settings.dims()
    attention = 2 * width * heads * head + 2 * width * groups * head
    block = attention + 3 * width * hidden + 2 * width + (2 * head if settings.get("qk_norm") else 0)
    tables = model.rows * width * (1 if settings.get("tied") else 2)
    assert parameters(model) == 3 * block + tables + width


@pytest.mark.parametrize("name", [name for name in SIZES if name[0].isdigit()])
def test_sizes_have_the_parameters_that_their_names_say(name):
    """Within 15 %, with a tied table of 32,000 rows."""
    spec = {"ids": ((8,), "int32")}
    model = models.build({"name": "decoder_lm", "size": name, "tied": True}, spec=spec, num_outputs=32_000)
    wanted = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
    assert abs(parameters(model) / wanted - 1) < 0.15
    assert model.program.depth == SIZES[name][1]


@pytest.mark.parametrize(
    "settings",
    [{}, {"tied": True, "qk_norm": True}, {"norm": "layer", "qk_norm": True, "norm_placement": "res_post"}],
    ids=str,
)
def test_axes_are_named_for_exactly_the_parameters(settings):
    model = decoders.build("block + mod(keep=0.25)(block)", N, **settings)
    flat = flax.traverse_util.flatten_dict(model.abstract_state())
    shapes = {"/".join(path): leaf.shape for path, leaf in flat.items()}
    axes = model.logical_axes()
    assert set(axes) == set(shapes)
    for path, names in axes.items():
        stacked = path.startswith(("blocks/", "items/"))
        assert len(names) == len(shapes[path]) - stacked, path


@pytest.mark.parametrize(("old", "placement"), [(False, "pre"), (True, "res_post")])
def test_settings_of_runs_that_said_post_norm_still_build(old, placement):
    assert decoders.build("block", N, post_norm=old).settings.norm_placement == placement


def test_weights_belong_to_blocks_whatever_wraps_them():
    """Blocks of one number start alike in every stack, so the weights of one serve the other."""
    dense, routed = (
        jax.jit(decoders.build(stack, N).init)(KEY)
        for stack in ("block*4", "(block + mod(keep=0.25)(block))*2")
    )
    del routed["items"]
    jax.tree.map(np.testing.assert_array_equal, dense, routed)


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("stack", "says"),
    [
        ("block(ffn=soft_moe(experts=2))", "soft_moe lets a token's result depend on those after it"),
        ("block(ffn=experts_choice(experts=2))", "experts_choice lets a token's result depend"),
        ("block(ffn=tokens_choice(experts=4, k=2))", "tokens_choice lets a token's result depend"),
        ("block + keep(0.5, by=norm) + block", "keep chooses tokens by what comes after them"),
        ("block + skip(keep=0.5, by=norm)(block)", "skip chooses tokens by what comes after them"),
        ("block + merge(2) + block", "merge chooses tokens by what comes after them"),
        (
            "block + mod(keep=0.5)(skip(keep=0.5, by=random)(block) + block)",
            "skip ranks the tokens that mod lets in",
        ),
        ("block + mod(keep=4, decide=topk)(block)", "mod chooses tokens by what comes after them"),
    ],
)
def test_stacks_that_look_ahead_are_refused(stack, says):
    for train in (True, False):
        if train or "keep(0.5, by" not in stack:
            with pytest.raises(StackError) as raised:
                decoders.build(stack, N, train=train)
            assert f"in a language model {says}" in str(raised.value)
            assert "config.model.leaks=True" in str(raised.value) and stack in str(raised.value)
    model = decoders.build(stack, N, train=True, leaks=True)
    output = jax.eval_shape(
        lambda s: model.apply(s, {"ids": decoders.ids(B, N)}, rng=KEY), model.abstract_state()
    )
    assert output.logits.shape == (B, model.program.after, V)


def test_what_is_train_only_may_look_ahead_only_if_it_is_gone():
    """In training it is there, so the loss would be wrong there too."""
    stack = "block + skip(keep=0.5, by=norm, train_only=True)(block)"
    with pytest.raises(StackError, match="skip chooses tokens by what comes after them"):
        decoders.build(stack, N, train=True)
    assert decoders.build(stack, N, train=False).program.depth == 2


def test_what_prunes_prompts_generates_and_refuses_a_loss():
    model = decoders.build("block + keep(0.5, by=norm) + block", N, train=False)
    assert model.generation(8, 4).program.after == 4
    with pytest.raises(StackError, match="keep chooses tokens by what comes after them"):
        model.apply(model.abstract_state(), {"ids": decoders.ids(B, N)})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"size": "60m"}, "config.model.size '60m' is unknown. Did you mean '60M'"),
        ({"width": 18, "num_heads": 4}, "width must be a multiple of num_heads unless head_dim is given"),
        ({"num_heads": 3, "num_kv_heads": 2, "head_dim": 4}, "and num_heads of num_kv_heads"),
        ({"width": 18, "num_heads": 2}, "rotary positions need an even head width; got 9"),
        ({"window": 0}, "config.model.window must be at least 1; got 0"),
        ({"vocab_multiple": 0}, "config.model.vocab_multiple must be at least 1"),
        ({"norm_eps": 0.0}, "config.model.norm_eps must be above 0"),
        ({"rope_theta": float("nan")}, "config.model.rope_theta must be above 0"),
        ({"norm": "group"}, "config.model.norm"),
        ({"heads": 2}, "config.model"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(ConfigError) as raised:
        decoders.build("block", N, **settings)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_other_data_and_lengths_are_refused():
    with pytest.raises(ConfigError, match="decoder_lm reads 'ids'; the data has image. Choose data of text"):
        models.build({"name": "decoder_lm"}, spec={"image": ((8, 8, 1), "float32")}, num_outputs=5)
    with pytest.raises(ShapeError, match=r"decoder_lm reads ids \[N\]"):
        models.build({"name": "decoder_lm"}, spec={"ids": ((8, 8), "int32")}, num_outputs=5)
    model = decoders.build("block", N)
    with pytest.raises(ShapeError, match=r"built for ids \[B, 24\], got \[3, 25\]"):
        model.apply(model.abstract_state(), {"ids": decoders.ids(B, 25)})


def test_what_needs_a_cls_token_or_an_unused_variable_is_refused():
    with pytest.raises(StackError, match="reads the CLS token, and this model has none"):
        decoders.build("block + keep(0.5, by=cls) + block", N)
    with pytest.raises(StackError, match=r"stack_vars\.k is not used in the stack"):
        models.build(
            {"name": "decoder_lm", "size": "nano", "stack": "block"},
            spec={"ids": ((N,), "int32")},
            num_outputs=V,
            stack_vars={"k": 2},
        )


def test_what_is_wrong_with_a_stack_is_said_when_the_model_is_built_leaks_or_not():
    for leaks in (False, True):
        with pytest.raises(StackError, match="reads the CLS token, and this model has none"):
            decoders.build("block + keep(0.5, by=cls) + block", N, leaks=leaks)


def test_another_number_of_heads_keeps_a_key_head_for_each():
    """Where the size has as many; a size of fewer key heads keeps those."""
    assert DecoderLMConfig(size="nano", num_heads=8).dims()[3:5] == (8, 8)
    assert DecoderLMConfig(size="nano", num_heads=8, num_kv_heads=2).dims()[3:5] == (8, 2)
