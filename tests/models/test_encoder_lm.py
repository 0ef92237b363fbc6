"""encoder_lm: padding, documents, places that are guessed, heads, sizes, and what is refused."""

from __future__ import annotations

from functools import partial

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import encoders
from tokenlab import models, tasks
from tokenlab.core.errors import ConfigError, ShapeError
from tokenlab.models.encoder_lm import SIZES
from tokenlab.train.costs import forward_cost

B, N, V = 4, 24, encoders.VOCABULARY
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BATCH = encoders.batch(B, N)
READ = {key: BATCH[key] for key in ("ids", "length")}


@pytest.fixture(scope="module")
def dense():
    """A post-norm encoder at evaluation, its weights and its `apply`."""
    model = encoders.build("block*2", N)
    return model, encoders.weights(model), quick(model.apply)


def test_padding_changes_nothing(dense):
    """Neither what it is nor how much of it there is."""
    model, state, run = dense
    plain = run(state, READ)
    inside = np.arange(N) < BATCH["length"][:, None]
    other = run(state, {**READ, "ids": np.where(inside, BATCH["ids"], (BATCH["ids"] + 7) % V)})
    np.testing.assert_array_equal(plain.tokens[inside], other.tokens[inside])
    assert (np.asarray(plain.tokens) != other.tokens)[~inside].any()
    short = int(BATCH["length"].min())
    shorter = encoders.build("block*2", short, positions=N)
    alone = quick(shorter.apply)(state, {"ids": BATCH["ids"][:, :short]})
    row = int(BATCH["length"].argmin())
    np.testing.assert_allclose(alone.tokens[row], plain.tokens[row, :short], atol=2e-5)


def test_documents_of_a_row_do_not_see_each_other(dense):
    """Two in one row give what each gives alone; padding belongs to none."""
    _, state, run = dense
    ids, first = BATCH["ids"].copy(), 10
    segment = np.broadcast_to(np.where(np.arange(N) < first, 1, np.where(np.arange(N) < 20, 2, 0)), (B, N))
    position = np.broadcast_to(np.where(np.arange(N) < first, np.arange(N), np.arange(N) - first), (B, N))
    packed = {"ids": ids, "segment": segment.astype(np.int32), "position": abs(position).astype(np.int32)}
    together = run(state, packed)
    alone = run(state, {"ids": np.roll(ids, -first, axis=1), "length": np.full(B, 10, np.int32)})
    np.testing.assert_allclose(together.tokens[:, first:20], alone.tokens[:, :10], atol=2e-5)
    changed = ids.copy()
    changed[:, first:] = (changed[:, first:] + 3) % V
    np.testing.assert_array_equal(
        run(state, {**packed, "ids": changed}).tokens[:, :first], together.tokens[:, :first]
    )


def test_every_token_sees_both_sides(dense):
    _, state, run = dense
    plain = run(state, {"ids": BATCH["ids"]}).tokens
    for at in (0, N // 2, N - 1):
        ids = BATCH["ids"].copy()
        ids[:, at] = (ids[:, at] + 1) % V
        assert (np.asarray(run(state, {"ids": ids}).tokens) != plain).any(-1).all()


def test_logits_of_the_places_that_are_asked_for_are_those_of_all(dense):
    _, state, run = dense
    predict = np.array([[3, 1, 1], [0, 5, 2], [9, 8, 7], [2, 2, 2]], np.int32)
    every, some = run(state, READ), run(state, {**READ, "predict": predict})
    wanted = np.take_along_axis(np.asarray(every.logits), predict[..., None], 1)
    np.testing.assert_allclose(some.logits, wanted, atol=1e-5)
    np.testing.assert_array_equal(some.places, predict)
    np.testing.assert_array_equal(every.places, np.broadcast_to(np.arange(N), (B, N)))
    np.testing.assert_array_equal(some.features, every.tokens[:, 0])


@pytest.mark.parametrize(
    "stack",
    # Of 23 tokens beside CLS the second keeps 22 and puts one for the rest at the end, so that there are 24 again.
    ["block + keep(0.5, by=norm) + block", "block + evit(0.95) + block"],
)
def test_places_of_tokens_that_a_stack_has_dropped_say_so(stack):
    model = encoders.build(stack, N)
    state = encoders.weights(model)
    given = {"ids": BATCH["ids"]}  # of no padding, which would be what is dropped
    every = np.broadcast_to(np.arange(N, dtype=np.int32), (B, N))
    left = quick(model.apply)(state, given)
    asked = quick(model.apply)(state, {**given, "predict": every})
    for row in range(B):
        kept = set(np.asarray(left.places[row]).tolist())
        assert [place for place in asked.places[row].tolist() if place >= 0] == sorted(kept)
        at = {place: k for k, place in enumerate(np.asarray(left.places[row]).tolist())}
        for place, k in at.items():
            np.testing.assert_allclose(asked.logits[row, place], left.logits[row, k], atol=1e-5)
    assert (np.asarray(asked.places)[:, 0] == 0).all()  # CLS is never dropped


def test_ids_outside_the_vocabulary_give_nan_and_no_other_row_sees_them(dense):
    _, state, run = dense
    for wrong in (V, -1):
        ids = BATCH["ids"].copy()
        ids[1, 2] = wrong
        found = np.isnan(np.asarray(run(state, {"ids": ids}).tokens)).any((1, 2))
        assert found.tolist() == [False, True, False, False]


def test_a_model_for_classes_reads_the_first_token_through_the_pooler():
    model = encoders.build("block", N, outputs=3, head="classify", vocab_size=V, norm_placement="pre")
    state = encoders.weights(model)
    found = quick(model.apply)(state, READ)
    first = np.asarray(found.tokens[:, 0], np.float64)
    norm, head = state["head"]["final_norm"], state["head"]
    first = first - first.mean(-1, keepdims=True)
    first = first / np.sqrt((first**2).mean(-1, keepdims=True) + 1e-12) * norm["scale"] + norm["bias"]
    pooled = np.tanh(first @ head["pooler"]["kernel"] + head["pooler"]["bias"])
    np.testing.assert_allclose(found.features, pooled, atol=2e-5)
    logits = pooled @ head["classifier"]["kernel"] + head["classifier"]["bias"]
    np.testing.assert_allclose(found.logits, logits, atol=2e-5)
    assert found.logits.shape == (B, 3) and model.abstract_state()["embed"]["table"].shape == (V, 16)


def test_types_tell_the_texts_of_a_pair_apart(dense):
    _, state, run = dense
    zeros = np.zeros((B, N), np.int32)
    plain = run(state, READ).tokens
    np.testing.assert_array_equal(run(state, {**READ, "type": zeros}).tokens, plain)
    ones = zeros.copy()
    ones[:, 5:] = 1
    assert (np.asarray(run(state, {**READ, "type": ones}).tokens) != plain).any(-1).all()


@pytest.mark.parametrize("placement", ["post", "pre", "res_post"])
@pytest.mark.parametrize("head", ["masked_lm", "classify"])
def test_axes_are_named_for_exactly_the_parameters(placement, head):
    model = encoders.build("block*2", N, head=head, vocab_size=V, outputs=V, norm_placement=placement)
    flat = flax.traverse_util.flatten_dict(model.abstract_state())
    shapes = {"/".join(path): leaf.shape for path, leaf in flat.items()}
    axes = model.logical_axes()
    assert set(axes) == set(shapes)
    for path, names in axes.items():
        assert len(names) == len(shapes[path]) - path.startswith("blocks/"), path
    assert any("final_norm" in path for path in shapes) is (placement != "post")


@pytest.mark.parametrize(
    ("size", "millions"),
    # Of BERT as released, less its pooler and next-sentence head, plus this head's D^2 + 3 D + V.
    [("tiny", 4.4), ("mini", 11.2), ("small", 28.8), ("medium", 41.4), ("base", 109.5), ("large", 335.1)],
)
def test_sizes_have_the_parameters_of_the_published_models(size, millions):
    spec = {"ids": ((512,), "int32")}
    model = models.build({"name": "encoder_lm", "size": size}, spec=spec, num_outputs=30_522)
    found = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_state()))
    assert abs(found / 1e6 / millions - 1) < 0.01
    assert model.program.depth == SIZES[size][1]


def test_the_head_costs_what_is_guessed_and_no_more():
    """FLOPs of products of the forward pass, by hand: blocks on N tokens, the head on K places."""
    settings = {"name": "encoder_lm", "size": "micro"}
    spec = {key: (leaf.shape[1:], str(leaf.dtype)) for key, leaf in BATCH.items() if key != "mask"}
    model = models.build(settings, spec=spec, num_outputs=V)
    task = tasks.build({"name": "masked_lm", "ratio": 0.15})
    width, depth, hidden, _ = SIZES["micro"]
    places = 4  # ceil(0.15 * 24)
    blocks = depth * (2 * N * width * (4 * width + 2 * hidden) + 4 * N * N * width)
    head = 2 * places * width * (width + V)
    assert forward_cost(model, task, spec).flops == blocks + head


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"size": "tinny"}, ConfigError, "Did you mean 'tiny'"),
        ({"positions": 8}, ConfigError, "config.model.positions is 8, and examples have 24 tokens"),
        ({"num_heads": 3}, ConfigError, "width must be a multiple of num_heads"),
        ({"dropout": 1.0}, ConfigError, r"config.model.dropout must be in \[0, 1\)"),
        ({"dropout": -0.1}, ConfigError, "config.model.dropout"),
        ({"attention_dropout": 1.0}, ConfigError, r"config.model.attention_dropout must be in \[0, 1\)"),
        ({"attention_dropout": 0.1, "attention": "cudnn"}, ConfigError, "'cudnn' drops no weights"),
        ({"norm_eps": 0.0}, ConfigError, "config.model.norm_eps must be above 0"),
        ({"kernel_std": 0.0}, ConfigError, "config.model.kernel_std must be above 0"),
        ({"types": -1}, ConfigError, "config.model.types must be at least 0"),
        ({"vocab_size": 0}, ConfigError, "config.model.vocab_size must be at least 1"),
        ({"vocab_size": 9}, ConfigError, "config.model.vocab_size is 9, and the data's tokenizer has 37 ids"),
        ({"head": "classify"}, ConfigError, "config.model.vocab_size is None"),
        ({"activation": "gelo"}, Exception, "Did you mean 'gelu'"),
        ({"norm_placement": "behind"}, ConfigError, "config.model.norm_placement"),
        ({"stack": "block*2 + kep(0.5)"}, Exception, "Did you mean 'keep'"),
        ({"stack": "block + keep(400) + block"}, Exception, "400"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings, error, says):
    with pytest.raises(error, match=says):
        encoders.build(**{"stack": "block", "length": N, **settings})


def test_data_that_does_not_fit():
    def build(spec, **settings):
        return models.build({"name": "encoder_lm", "size": "nano", **settings}, spec=spec, num_outputs=V)

    with pytest.raises(ConfigError, match="encoder_lm reads 'ids'; the data has image"):
        build({"image": ((8, 8, 1), "float32")})
    with pytest.raises(ShapeError, match=r"encoder_lm reads ids \[N\]"):
        build({"ids": ((8, 8), "int32")})
    with pytest.raises(ConfigError, match="config.model.types is 0, and the data says the 'type'"):
        build({"ids": ((8,), "int32"), "type": ((8,), "int32")}, types=0)
    model = build({"ids": ((8,), "int32")})
    with pytest.raises(ShapeError, match=r"built for ids \[B, 8\], got \[2, 9\]"):
        model.apply({}, {"ids": jnp.zeros((2, 9), jnp.int32)})


@pytest.mark.parametrize("what", ["dropout", "attention_dropout"])
def test_dropout_is_of_training_alone(what):
    model = encoders.build("block", N, **{what: 0.3})
    state = encoders.weights(model)
    run = quick(partial(model.apply, train=True))
    one, same, other = (run(state, READ, rng=jax.random.key(i)).tokens for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other, atol=0.1)
    plain = encoders.build("block", N)
    calm = quick(model.apply)(state, READ, rng=jax.random.key(1)).tokens
    np.testing.assert_array_equal(calm, quick(plain.apply)(state, READ).tokens)
