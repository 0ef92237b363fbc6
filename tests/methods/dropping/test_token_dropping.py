"""Token dropping: who is kept, what the bridge computes, what dropped tokens are, and how importances move."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import decoders, encoders
from tokenlab import models, tasks
from tokenlab.core.errors import ShapeError, StackError, TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.cost.flops import count
from tokenlab.layers.context import Aux, Context
from tokenlab.layers.scores.importance import PINNED, TokenImportance
from tokenlab.layers.scores.norm import Norm
from tokenlab.methods.dropping.token_dropping import TokenDropping, top_k_tokens
from tokenlab.ops.gather import gather, scatter
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import DEFAULT_RULES
from tokenlab.train import optimizer as optimizers
from tokenlab.train import state as states
from tokenlab.train.config import OptimizerConfig
from tokenlab.train.step import make_train_step, metric_names

N, B = 24, 4
CLS, PAD, MASK = 0, 1, encoders.MASK
STACK = "block + token_dropping({}keep=11)(block*2) + block"
KEY = jax.random.key(0)


def build(arguments="", stack=STACK, *, train=True, **settings):
    settings = {"always_kept": (CLS, MASK), "first_dropped": (PAD,), **settings}
    return encoders.build(stack.format(arguments), N, train=train, **settings)


@cache
def state(seed=0):
    """Weights, and importances that differ from id to id."""
    model = build()
    drawn = encoders.weights(model, seed)
    known = model.statistics["importance"]
    values = np.random.default_rng(seed).permutation(np.linspace(1, 9, encoders.VOCABULARY))
    return {**drawn, "statistics": {"importance": known.pinned(jnp.asarray(values, jnp.float32))}}


def batch(**how):
    found = encoders.batch(B, N, **how)
    found["ids"][:, 5] = np.where(found["length"] > 5, MASK, PAD)
    return {key: jnp.asarray(leaf) for key, leaf in found.items()}


def kept(model, given, own=None):
    """Positions inside the body [B, K]."""

    def positions(state):
        trace = model.apply(state, given, train=True, rng=KEY, record=True).trace
        return next(point for point in trace if point.inside).tokens.position

    return np.asarray(jax.jit(positions)(state() if own is None else own))


@cache
def run(arguments="", train=True, padding_noise=0):
    """Output of a training step's forward pass, with what comes into blocks 0, 1 (of a dense twin) and the last."""
    model, given = build(arguments, train=train), batch()
    if padding_noise:
        there = jnp.arange(N) < given["length"][:, None]
        given["position"] = jnp.where(there, jnp.arange(N), (jnp.arange(N) * 7 + padding_noise) % N)
    return jax.jit(lambda s: model.apply(s, given, train=True, rng=KEY, entering=(0, 3)))(state())


# ------------------------------------------------------------------------------------------------ who is kept


def test_keep_and_drop_are_a_permutation_and_merging_gives_back_what_was_split():
    scores = jax.random.normal(KEY, (B, N))
    x = jax.random.normal(jax.random.key(1), (B, N, 3))
    for order in ("score", "position"):
        for n_random in (0, 3, 9):
            keep, drop = top_k_tokens(scores, 9, order, n_random, key=KEY, protected=2)
            assert keep.shape == (B, 11) and drop.shape == (B, N - 11)
            both = np.concatenate([keep, drop], axis=1)
            np.testing.assert_array_equal(np.sort(both, axis=1), np.broadcast_to(np.arange(N), (B, N)))
            blank = jnp.zeros_like(x)
            again = scatter(scatter(blank, keep, gather(x, keep)), drop, gather(x, drop))
            np.testing.assert_array_equal(again, x)
    keep, _ = top_k_tokens(scores, 9, "position")
    assert (np.diff(keep, axis=1) > 0).all()
    np.testing.assert_array_equal(
        top_k_tokens(scores, N, "position")[0], np.broadcast_to(np.arange(N), (B, N))
    )


def test_ties_go_to_the_lower_position():
    keep, drop = top_k_tokens(jnp.array([[1.0, 2.0, 1.0, 2.0, 1.0]]), 3)
    assert keep.tolist() == [[1, 3, 0]] and drop.tolist() == [[2, 4]]


def test_some_of_the_best_and_some_at_random():
    """The best are always among them, the others are uniform over the rest, padding is taken last."""
    scores = jnp.broadcast_to(jnp.arange(10.0), (4000, 10))
    valid = jnp.broadcast_to(jnp.arange(10) != 4, (4000, 10))
    keep, _ = top_k_tokens(scores, 5, "score", 2, key=KEY, valid=valid)
    assert (keep[:, :3] == jnp.array([9, 8, 7])).all()
    drawn = np.bincount(np.ravel(keep[:, 3:]), minlength=10) / 8000
    assert drawn[4] == 0 and (drawn[7:] == 0).all()
    np.testing.assert_allclose(drawn[[0, 1, 2, 3, 5, 6]], 1 / 6, atol=0.02)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 25}, "in 1..24"),
        ({"k": 4, "n_random": 5, "key": KEY}, "in 0..4"),
        ({"k": 4, "n_random": 2}, "no key"),
    ],
)
def test_what_cannot_be_chosen(how, words):
    with pytest.raises(TokenLabError, match=words):
        top_k_tokens(jnp.zeros((B, N)), **how)


def test_special_tokens_are_kept_and_padding_is_dropped_first():
    given = batch()
    inside, length = kept(build(), given), np.asarray(given["length"])
    assert (inside[:, 0] == 0).all() and (np.diff(inside, axis=1) > 0).all()
    for row, places in enumerate(inside):
        assert 5 in places  # the mask
        assert (places < length[row]).all()  # 12 tokens or more are there, as many as are kept
        importance = np.asarray(state()["statistics"]["importance"])[np.asarray(given["ids"])[row]]
        rest = np.setdiff1d(np.arange(length[row]), places)
        assert importance[places[1:]].min() >= importance[rest].max(initial=-np.inf)


def test_when_special_tokens_find_no_room_that_is_told():
    model, given = build(), batch(full=True)
    given["ids"] = given["ids"].at[:, 2:22].set(MASK)
    metrics = jax.jit(lambda s: model.apply(s, given, train=True).aux.metrics)(state())
    lost, there = metrics["pinned_left_out"]
    assert float(there) == B * 21 and float(lost) == B * (21 - 12)
    lost, there = run().aux.metrics["pinned_left_out"]
    assert float(lost) == 0 and float(there) == 2 * B


# ------------------------------------------------------------------------------------------------ what is computed


def test_the_order_of_kept_tokens_changes_nothing():
    np.testing.assert_allclose(run("order=score, ").tokens, run().tokens, atol=1e-5)


def test_with_all_kept_it_is_the_dense_encoder():
    """Bit for bit in the order of positions (the contract holds that, too), to rounding in that of importance."""
    given = batch()

    def features(model):
        return jax.jit(lambda s: model.apply(s, given, train=True, rng=KEY).tokens)(state())

    dense = features(build(train=False))
    everything = "block + token_dropping(keep=1.0{})(block*2) + block"
    np.testing.assert_array_equal(features(build(stack=everything.format(""))), dense)
    np.testing.assert_allclose(features(build(stack=everything.format(", order=score"))), dense, atol=1e-5)


def test_dropped_tokens_are_as_before_the_bridge_and_teach_blocks_inside_nothing():
    model, given = build(), batch()
    inside = kept(model, given)
    rest = np.stack([np.setdiff1d(np.arange(N), row) for row in inside])
    before = encoders.build("block", N, train=True)

    def dropped(params):
        whole = {**params, "statistics": state()["statistics"]}
        x = model.apply(whole, given, train=True, rng=KEY, entering=(3,)).entering[3]
        return jnp.sum(gather(x, rest) ** 2), x

    params = {key: leaf for key, leaf in state().items() if key != "statistics"}
    (_, x), grads = jax.jit(jax.value_and_grad(dropped, has_aux=True))(params)
    first = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:1], params["blocks"])}
    plain = jax.jit(lambda s: before.apply(s, given, train=True).tokens)(first)
    np.testing.assert_allclose(gather(x, rest), gather(plain, rest), atol=2e-6)
    assert not np.array_equal(gather(x, inside), gather(plain, inside))
    for leaf in jax.tree.leaves(grads["blocks"]):
        assert (np.asarray(leaf[1:]) == 0).all()
    assert np.abs(grads["blocks"]["mlp"]["up"]["kernel"][0]).max() > 0


def test_dropped_tokens_go_around_the_body_bit_for_bit():
    item = TokenDropping(keep=11, by=Norm())
    x = jax.random.normal(KEY, (B, N, 5))
    tokens = Tokens(x, jnp.broadcast_to(jnp.arange(N), (B, N)), protected=1)
    seen = []

    def body(part, outside):
        seen.append(outside.x)
        return part.replace(x=part.x + 1), Aux()

    done, _ = item({}, tokens, Context(KEY, True), {}, KEY, body)
    inside = np.asarray(done.x != x).all(axis=-1)
    assert (inside.sum(axis=1) == 12).all() and seen[0] is x
    np.testing.assert_array_equal(np.asarray(done.x)[~inside], np.asarray(x)[~inside])
    np.testing.assert_array_equal(np.asarray(done.x)[inside], np.asarray(x + 1)[inside])


def test_dropped_tokens_are_seen_by_the_bridge():
    """Another token where none is kept changes what is kept, through the keys of the bridge."""
    model, given = build(stack="token_dropping(keep=11)(block)"), batch(full=True)
    own = {**state(), "blocks": jax.tree.map(lambda leaf: leaf[:1], state()["blocks"])}
    inside = kept(model, given, own)
    place = next(p for p in range(N) if p not in inside[0])
    types = jnp.zeros((B, N), jnp.int32)
    apply = jax.jit(lambda types: model.apply(own, {**given, "type": types}, train=True).tokens)
    change = np.asarray(apply(types.at[0, place].set(1)) - apply(types))
    assert np.abs(change[0, inside[0]]).max() > 1e-4 and (change[1:] == 0).all()


def test_padding_changes_no_token():
    there = np.arange(N) < np.asarray(batch()["length"])[:, None]
    assert not there.all()
    plain, other = run(), run(padding_noise=3)
    assert not np.array_equal(np.asarray(plain.entering[0])[~there], np.asarray(other.entering[0])[~there])
    np.testing.assert_allclose(np.asarray(plain.tokens)[there], np.asarray(other.tokens)[there], atol=1e-5)


def test_the_counted_cost_is_the_formula():
    """Of each block: 24 N D^2 + 4 N^2 D; the bridge 20 K D^2 + 4 N D^2 + 4 K N D; with a hidden width of 4 D."""
    n, k, d = 32, 16, 16
    model = encoders.build("block*2 + token_dropping(keep=15)(block*3) + block", n, train=True, mlp_dim=64)
    given = {"ids": jnp.zeros((1, n), jnp.int32), "predict": jnp.zeros((1, 1), jnp.int32)}
    cost = count(
        lambda s: model.apply(s, given, train=True, execution="unroll").logits, model.abstract_state()
    )

    def block(n):
        return 24 * n * d**2 + 4 * n**2 * d

    bridge = 20 * k * d**2 + 4 * n * d**2 + 4 * k * n * d
    expected = [block(n), block(n), bridge, block(k), block(k), block(n)]
    for index, flops in enumerate(expected):
        own = sum(value for name, value in cost.by_scope.items() if f"block_{index:02d}" in name.split("/"))
        assert own == flops, index


def test_a_causal_decoder_sees_no_later_token_through_the_bridge():
    """In order of position, with rotary coordinates; which tokens go in is drawn without a look at them."""
    stack = "block + token_dropping(keep=0.5, by=random)(block*2) + block"
    model = decoders.build(stack, N, train=True)
    own, ids = decoders.weights(model), decoders.ids(B, N)
    apply = jax.jit(lambda ids: model.apply(own, {"ids": ids}, train=True, rng=KEY).logits)
    change = np.abs(np.asarray(apply(ids.at[:, 15].set(3)) - apply(ids))).max(axis=(0, 2))
    assert (change[:15] == 0).all() and (change[15:] > 0).any()


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ("block + token_dropping(keep=0)(block) + block", "keep is the count 0"),
        ("block + token_dropping(keep=24)(block) + block", "must lie in 1..23"),
        ("block + token_dropping(keep=0.5, random=13)(block) + block", "random is the count 13"),
        ("block + token_dropping(keep=0.5, by=importance(beta=1.0))(block)", "beta must lie in"),
        ("block + token_dropping(keep=0.5, by=importance(initial=10000.0))(block)", "initial must lie"),
        ("block + token_dropping(keep=0.5)(skip(keep=0.5)(block) + block)", "begin with a plain block"),
        (
            "block + token_dropping(keep=0.5)(block + skip(keep=0.5, by=cls)(block))",
            "begin with a plain block",
        ),
        ("token_dropping(keep=5)(block) + skip(keep=5, by=importance(beta=0.5))(block)", "in two ways"),
        ("block + token_dropping(keep=0.5, order=up)(block)", "position, score"),
    ],
)
def test_stacks_that_make_no_sense(stack, words):
    with pytest.raises(StackError, match=words):
        build(stack=stack)


def test_it_does_not_generate_and_pictures_have_no_ids():
    stack = "block + token_dropping(keep=0.5, by=random, train_only=False)(block)"
    with pytest.raises(StackError, match="cannot run token by token"):
        decoders.build(stack, N).generation(4, 4)
    assert decoders.build(stack.replace(", train_only=False", ""), N).generation(4, 4)
    with pytest.raises(StackError, match="ranks tokens by their ids"):
        models.build(
            {"name": "vit", "size": "nano/2", "stack": "block + keep(0.5, by=importance) + block"},
            spec={"image": ((8, 8, 1), "float32")},
            num_outputs=2,
        )


# ------------------------------------------------------------------------------------------------ importances


def test_an_update_by_hand():
    known = TokenImportance(6, allow=(4,), deny=(5,))
    value = known.init()
    assert value.tolist() == [10, 10, 10, 10, PINNED, -PINNED]
    ids, losses = jnp.array([[1, 2, 2], [3, 4, 5]]), jnp.array([[2.0, 4.0, 8.0], [7.0, 1.0, 1.0]])
    weights = jnp.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    found = known.update(value, ids, losses, weights)
    mean = 0.995 * 10 + 0.005 * 6.0  # of a label that occurs twice, whatever the order
    np.testing.assert_allclose(found, [10, 0.995 * 10 + 0.005 * 2, mean, 10, PINNED, -PINNED], rtol=1e-6)
    np.testing.assert_array_equal(known.update(value, ids[:, ::-1], losses[:, ::-1], weights[:, ::-1]), found)
    drifting = known.update(value, ids, losses, pin=False)
    assert drifting[3] != 10 and drifting[4] < PINNED and drifting[5] > -PINNED


def test_pinned_ones_stay_for_good():
    known = TokenImportance(4, allow=(1,), deny=(2,), beta=0.95)
    ids = jnp.array([0, 1, 2])
    step = lambda _, value: known.update(value, ids, jnp.array([3.0, 3.0, 3.0]))  # noqa: E731
    found = jax.jit(lambda value: jax.lax.fori_loop(0, 1000, step, value))(known.init())
    assert found[1] == PINNED and found[2] == -PINNED and found[3] == 10
    np.testing.assert_allclose(found[0], 3.0, rtol=1e-5)


def test_there_is_no_gradient_and_no_wrong_id():
    known = TokenImportance(4)
    looked = known.lookup(jnp.arange(4.0), jnp.array([[0, 3, 4, -1]]))
    np.testing.assert_array_equal(looked, [[0, 3, np.nan, np.nan]])
    assert top_k_tokens(looked, 2)[0].tolist() == [[1, 0]]  # what is no id comes last
    grad = jax.grad(lambda value: jnp.sum(known.lookup(value, jnp.array([[0, 1]]))))(jnp.ones(4))
    assert (grad == 0).all()
    total, counts = known.observe(jnp.array([7, -1, 2]), jnp.ones(3), jnp.ones(3))
    assert total.tolist() == counts.tolist() == [0, 0, 1, 0]
    total, _ = known.observe(jnp.array([1, 2]), jnp.array([jnp.nan, 1.0]), jnp.array([0.0, 1.0]))
    assert total.tolist() == [0, 0, 1, 0]  # what does not count may be anything
    with pytest.raises(ShapeError, match="expected one shape"):
        known.observe(jnp.array([1, 2]), jnp.ones(3))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"allow": (1,), "deny": (1,)}, "always kept and dropped first"),
        ({"allow": (6,)}, r"0\.\.5"),
        ({"deny": (-1,)}, r"0\.\.5"),
        ({"beta": 0.0}, "beta"),
        ({"beta": 1.0}, "beta"),
        ({"initial": float("nan")}, "initial"),
    ],
)
def test_importances_that_make_no_sense(how, words):
    with pytest.raises(TokenLabError, match=words):
        TokenImportance(6, **how)


def test_ids_of_the_model_are_checked_with_its_stack():
    with pytest.raises(StackError, match=r"id 99 is to be always kept; expected ids in 0\.\.36"):
        build(always_kept=(99,))
    assert build(always_kept=(99,), train=False).statistics == {}


def trained(sizes):
    """Importances on every device and the last loss, after five steps over a mesh."""
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    model, task = build(vocab_multiple=8), tasks.build({"name": "masked_lm"})
    optimizer = optimizers.build(OptimizerConfig(learning_rate=1e-3), 5)
    given = encoders.batch(16, N)
    shapes = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in given.items()}
    names = metric_names(model, task, model.abstract_state(), shapes)

    def create():
        return states.create(model, optimizer, names, 0)

    places = states.shardings(jax.eval_shape(create), model, mesh)
    assert places.statistics["importance"].is_fully_replicated
    rows = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES["batch"]))
    with jax.set_mesh(mesh):
        current = jax.jit(create, out_shardings=places)()
        step = make_train_step(model, task, optimizer, shardings=places, batch_sharding=rows)
        for seed in range(5):
            current, report = step(current, jax.device_put(encoders.batch(16, N, seed=seed), rows))
    held = current.statistics["importance"]
    return [np.asarray(shard.data) for shard in held.addressable_shards], float(report.loss)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_every_device_has_the_same_importances(sizes):
    """Over eight devices as over one; nobody holds a part of them."""
    (alone,), loss = trained({"data": 1})
    every, same = trained(sizes)
    assert len(every) == 8 and all(np.array_equal(each, every[0]) for each in every)
    np.testing.assert_allclose(every[0], alone, rtol=1e-5)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    assert (alone != TokenImportance(encoders.VOCABULARY, (CLS, MASK), (PAD,)).init()).any()
