"""Mixture-of-depths: who enters, what comes out, gradients, losses, cost, and one routed block against plain numpy."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import decoders
from tokenlab.core.errors import NameLookupError, StackError, TokenLabError
from tokenlab.core.tokens import Tokens
from tokenlab.cost.flops import count
from tokenlab.layers import execute
from tokenlab.layers.context import Context
from tokenlab.methods.depth.mod import MixtureOfDepths

N, B, D, K = 24, 3, 16, 6
KEY = jax.random.key(0)
GATES = {
    "raw": lambda r: r,
    "sigmoid": lambda r: 1 / (1 + np.exp(-r)),
    "tanh": np.tanh,
    "tanh_scaled": lambda r: 0.2 * np.tanh(r) + 1,
    "one": np.ones_like,
}
# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def placed(x, valid=None):
    """Tokens at 0, 1, ... of their sequences."""
    place = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return Tokens(x, place, place[..., None].astype(jnp.float32), valid)


@cache
def routed(arguments, train=True, body="block"):
    """(model, weights, jitted (weights, x, valid, key) -> features, losses, metrics) of `mod(arguments)(body)`."""
    model = decoders.build(f"mod({arguments})({body})", N, train=train, leaks=True)

    def run(state, x, valid=None, key=KEY):
        tokens, aux = execute.run(model.program, state, placed(x, valid), Context(key, train))
        return tokens.x, aux.losses, {name: total / n for name, (total, n) in aux.metrics.items()}

    return model, decoders.weights(model), quick(run)


def gradients(run, pick, state, x):
    """Of `pick(features, losses)` with respect to weights and tokens."""
    plain = run.__wrapped__  # options of the compiler are for the outermost function
    return quick(jax.grad(lambda s, x: pick(*plain(s, x)[:2]), (0, 1)))(state, x)


def own(state):
    """The item's weights."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], state["items"]["mod"])


def features(seed=0, batch=B):
    return np.asarray(jax.random.normal(jax.random.key(seed), (batch, N, D)))


def largest(score, k=K):
    """Which are among the k largest of each row, [B, N] bool; of equals the lower index."""
    member = np.zeros(score.shape, bool)
    np.put_along_axis(member, np.argsort(-np.asarray(score), axis=1, kind="stable")[:, :k], True, axis=1)
    return member


# ---------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("execution", ["scan", "unroll"])
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_with_everything_let_in_it_is_the_dense_stack_bit_for_bit(execution, train):
    stack = "(block + mod(keep=1.0, gate=one, decide=topk)(block))*2"
    ids = decoders.ids(B, N)
    dense, model = (
        decoders.build(s, N, train=train, leaks=True, execution=execution) for s in ("block*4", stack)
    )
    state = decoders.weights(dense)
    full = {**state, "items": decoders.weights(model)["items"]}
    expected, found = (
        quick(lambda s, m=m: m.apply(s, {"ids": ids}, train=train, rng=KEY).logits)(s)
        for m, s in ((dense, state), (model, full))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("gate", GATES)
def test_a_routed_block_equals_a_loop_in_numpy(gate):
    """Sequence by sequence and token by token: the K largest scores enter, in order, at their own positions."""
    _, state, run = routed(f"keep=0.25, gate={gate}")
    x = features()
    found, *_ = run(state, x)
    router = np.asarray(own(state)["router"], np.float64)
    for row in range(B):
        wide = np.asarray(x[row], np.float64)
        score = np.array([token @ router for token in wide])
        chosen = np.sort(np.argsort(-score, kind="stable")[:K])
        expected = wide.copy()
        added = decoders.block(state, 0, wide[chosen], chosen) - wide[chosen]
        expected[chosen] += GATES[gate](score[chosen])[:, None] * added
        np.testing.assert_allclose(found[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decide", ["predictor", "router"])
def test_each_deciding_for_itself_equals_a_loop_in_numpy(decide):
    """Outside training: a token enters by its own decision while there is room, and weighs by the router's score."""
    _, state, run = routed(f"keep=0.25, decide={decide}, room=1.5", train=False)
    x, weights = features(), {name: np.asarray(leaf, np.float64) for name, leaf in own(state).items()}
    found, losses, metrics = run(state, x)
    shares, left = [], []
    for row in range(B):
        wide = np.asarray(x[row], np.float64)
        score = logit = wide @ weights["router"]
        if decide == "predictor":
            hidden = wide @ weights["predictor_hidden"] + weights["predictor_bias"]
            logit = hidden / (1 + np.exp(-hidden)) @ weights["predictor_out"] + weights["predictor_out_bias"]
        wanted = np.flatnonzero(logit > 0)
        chosen = wanted[:9]  # 1.5 K
        shares.append(len(chosen) / N)
        left.append(len(wanted[9:]) / N)
        expected = wide.copy()
        if len(chosen):
            added = decoders.block(state, 0, wide[chosen], chosen) - wide[chosen]
            expected[chosen] += score[chosen][:, None] * added
        np.testing.assert_allclose(found[row], expected, atol=1e-5, rtol=1e-5)
    assert metrics["mod_share"] == pytest.approx(np.mean(shares))
    assert metrics["mod_left_out"] == pytest.approx(np.mean(left))
    assert not losses and 0 < np.mean(shares) < 1 and np.mean(left) > 0


def test_tokens_that_do_not_enter_come_out_as_they_went_in():
    _, state, run = routed("keep=0.25", body="block*2")
    x = features()
    found, *_ = run(state, x)
    member = largest(x @ own(state)["router"])
    np.testing.assert_array_equal(np.asarray(found)[~member], np.asarray(x)[~member])
    assert (np.asarray(found)[member] != np.asarray(x)[member]).any(axis=-1).all()


def test_those_that_enter_see_nothing_of_the_others():
    """Any content of the others that leaves their scores below the cut: the same result, bit for bit."""
    _, state, run = routed("keep=0.25")
    x, router = features(), own(state)["router"]
    member = largest(x @ router)
    noise = 9 * features(1)
    noise -= (noise @ router / (router @ router))[..., None] * router  # which no score reads
    other = np.where(member[..., None], x, x + noise)
    assert (largest(other @ router) == member).all()
    np.testing.assert_array_equal(
        np.asarray(run(state, x)[0])[member], np.asarray(run(state, other)[0])[member]
    )


def test_a_permuted_batch_gives_the_results_permuted():
    order = np.array([2, 0, 1])
    for train in (True, False):
        _, state, run = routed("keep=0.25", train)
        x = features()
        np.testing.assert_array_equal(run(state, x[order])[0], run(state, x)[0][order])


@pytest.mark.parametrize(("train", "decide"), [(True, "predictor"), (False, "predictor"), (False, "topk")])
def test_those_inside_stand_in_their_order(train, decide):
    model = decoders.build(f"mod(keep=0.25, decide={decide})(block)", N, train=train, leaks=True)
    tokens = placed(features())

    @quick
    def run(state):
        trace = []
        execute.run(model.program, state, tokens, Context(KEY, train), trace=trace)
        (inside,) = (point.tokens for point in trace if point.inside)
        return inside

    inside = jax.tree.map(np.asarray, run(decoders.weights(model)))
    assert inside.count == (K if train or decide == "topk" else 2 * K)
    for row in range(B):
        real = slice(None) if inside.valid is None else inside.valid[row]
        position = inside.position[row][real]
        assert (np.diff(position) > 0).all() and len(position)
        np.testing.assert_array_equal(inside.x[row][real], tokens.x[row, position])
        np.testing.assert_array_equal(inside.coords[row][real, 0], position)


def test_of_equal_scores_the_first_enter():
    _, state, run = routed("keep=0.25, gate=tanh_scaled")
    state = {**state, "items": {"mod": {**state["items"]["mod"], "router": jnp.zeros((1, D))}}}
    x = features()
    changed = (run(state, x)[0] != x).any(-1)
    np.testing.assert_array_equal(changed, np.broadcast_to(np.arange(N) < K, (B, N)))


def test_padding_does_not_enter():
    """With fewer real tokens than K, padding fills the places and comes out as it went in, whatever its score."""
    for train in (True, False):
        _, state, run = routed("keep=0.25", train)
        x = features()
        valid = np.arange(N) < np.array([[N], [4], [15]])
        found = np.asarray(run(state, x, valid)[0])
        np.testing.assert_array_equal(found[~valid], x[~valid])
        loud, *_ = run(state, np.where(valid[..., None], x, 50 * features(2)), valid)
        np.testing.assert_allclose(np.asarray(loud)[valid], found[valid], atol=1e-5)
        assert (found[1, :4] != x[1, :4]).any()


def test_protected_tokens_weigh_one():
    """What a router does not choose, such as a CLS token, it does not scale either."""
    item = MixtureOfDepths(0.5)
    x, done = features(), features(1)
    score = jnp.full((B, N), 0.5)
    found = quick(item.weighted)(x, placed(done).replace(protected=2), score)
    np.testing.assert_allclose(found[:, :2], done[:, :2], atol=1e-6)
    np.testing.assert_allclose(found[:, 2:], ((x + done) / 2)[:, 2:], atol=1e-6)


# ---------------------------------------------------------------------------------------------- gradients and losses


@pytest.mark.parametrize("gate", ["raw", "sigmoid", "tanh_scaled"])
def test_the_router_learns_and_the_others_pass_gradients_unchanged(gate):
    _, state, run = routed(f"keep=0.25, gate={gate}, decide=topk")
    x, direction = features(), features(1)
    grads, to_x = gradients(run, lambda y, _: jnp.sum(y * direction), state, x)
    assert (np.asarray(own(grads)["router"]) != 0).all()
    member = largest(x @ own(state)["router"])
    np.testing.assert_array_equal(np.asarray(to_x)[~member], np.asarray(direction)[~member])
    assert (np.asarray(to_x)[member] != np.asarray(direction)[member]).any(axis=-1).all()


def test_fresh_routers_are_small_and_not_zero():
    """Zeros as raw gates would teach neither router nor block anything; each layer draws its own."""
    init = decoders.build("mod(keep=0.5)(block)*4", N, width=256).program.init
    routers = np.asarray(quick(init)(KEY)["items"]["mod"]["router"])
    np.testing.assert_allclose(routers.std(axis=1), 0.02, rtol=0.2)
    assert len(np.unique(routers[:, 0])) == 4


def test_gate_one_has_no_gradient_to_the_router():
    _, state, run = routed("keep=0.25, gate=one, decide=topk")
    grads, _ = gradients(run, lambda y, _: jnp.sum(y**2), state, features())
    np.testing.assert_array_equal(own(grads)["router"], 0)


def cross_entropy(logit, member):
    """Mean binary cross-entropy in float64."""
    logit = np.asarray(logit, np.float64)
    return np.mean(np.log1p(np.exp(-np.abs(logit))) + np.maximum(logit, 0) - logit * member)


def test_the_predictor_learns_the_members_and_moves_nothing_else():
    """Its loss is the cross-entropy to the top K, and no gradient of it reaches tokens, router or block."""
    model, state, run = routed("keep=0.25, weight=0.5")
    x, item = features(), model.program.flat()[0].item
    member = largest(x @ own(state)["router"])
    logit = item.predicted(own(state), placed(x))
    _, losses, metrics = run(state, x)
    assert losses["mod_loss"] == pytest.approx(0.5 * cross_entropy(logit, member), rel=1e-5)
    assert metrics["mod_accuracy"] == pytest.approx(np.mean((np.asarray(logit) > 0) == member))
    grads, to_x = gradients(run, lambda _, losses: losses["mod_loss"], state, x)
    np.testing.assert_array_equal(to_x, 0)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), grads["blocks"])
    for name, leaf in own(grads).items():
        assert (np.asarray(leaf) != 0).any() == name.startswith("predictor"), name


def test_as_decision_the_router_is_taught_by_the_same_loss():
    _, state, run = routed("keep=0.25, decide=router, weight=2.0")
    x = features()
    score = x @ own(state)["router"]
    _, losses, metrics = run(state, x)
    assert losses["mod_loss"] == pytest.approx(2 * cross_entropy(score, largest(score)), rel=1e-5)
    assert metrics["mod_accuracy"] == pytest.approx(np.mean((np.asarray(score) > 0) == largest(score)))
    grads, _ = gradients(run, lambda _, losses: losses["mod_loss"], state, x)
    assert set(own(grads)) == {"router"} and (np.asarray(own(grads)["router"]) != 0).all()


def test_padding_is_not_judged():
    model, state, run = routed("keep=0.25")
    x, valid = features(), jnp.broadcast_to(jnp.arange(N) < 15, (B, N))
    _, losses, _ = run(state, x, valid)
    logit = model.program.flat()[0].item.predicted(own(state), placed(x))[:, :15]
    member = largest((x @ own(state)["router"])[:, :15])
    assert losses["mod_loss"] == pytest.approx(0.01 * cross_entropy(logit, member), rel=1e-5)


@pytest.mark.parametrize("arguments", ["keep=0.25, decide=topk", "keep=0.25, by=random"])
def test_where_nothing_is_to_be_decided_there_is_no_loss(arguments):
    _, state, run = routed(arguments)
    _, losses, metrics = run(state, features())
    assert not losses and not metrics
    assert not any(name.startswith("predictor") for name in own(state))


def test_two_routed_blocks_add_their_losses_and_average_their_accuracies():
    """Scanned: the loss is the sum over layers, the metric their mean."""
    stack = "(block + mod(keep=0.25)(block))*2"
    found = []
    for execution in ("scan", "unroll"):
        model = decoders.build(stack, N, train=True, execution=execution)
        state = decoders.weights(model)
        found.append(
            quick(lambda s, m=model: m.apply(s, {"ids": decoders.ids(B, N)}, train=True, rng=KEY).aux)(state)
        )
    scan, unroll = found
    assert scan.losses["mod_loss"] == pytest.approx(float(unroll.losses["mod_loss"]), rel=1e-6)
    assert scan.metrics["mod_accuracy"][1] == unroll.metrics["mod_accuracy"][1] == 2


# ---------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("k", [3, 6, 12])
def test_flops_of_a_routed_block_are_those_of_its_tokens(k):
    """2 K (4 D^2 + 3 D F) for the products with weights, 4 K^2 D for the maps, 2 N D for the router: within 5 %."""
    model = decoders.build(f"block + mod(keep={k}, decide=topk)(block)", N, train=True, leaks=True)
    ids = jnp.zeros((1, N), jnp.int32)
    cost = count(lambda s: model.apply(s, {"ids": ids}, train=True, rng=KEY).logits, model.abstract_state())
    _, _, hidden, *_ = model.settings.dims()
    wanted = 2 * k * (4 * D * D + 3 * D * hidden) + 4 * k * k * D + 2 * N * D
    found = sum(flops for scope, flops in cost.by_scope.items() if scope.startswith("mod_00"))
    assert found == pytest.approx(wanted, rel=0.05)
    dense = sum(flops for scope, flops in cost.by_scope.items() if scope.startswith("block_00"))
    assert dense == pytest.approx(2 * N * (4 * D * D + 3 * D * hidden) + 4 * N * N * D, rel=0.05)


# ---------------------------------------------------------------------------------------------- the random control


def test_random_draws_k_in_training_and_looks_at_no_content():
    _, state, run = routed("keep=0.25, by=random")
    x = features()
    entered = [np.asarray((run(state, y, None, k)[0] != y).any(-1)) for y, k in
               ((x, KEY), (features(1), KEY), (x, jax.random.key(1)))]  # fmt: skip
    for each in entered:
        np.testing.assert_array_equal(each.sum(1), K)
    np.testing.assert_array_equal(entered[0], entered[1])
    assert (entered[0] != entered[2]).any()
    assert (entered[0][0] != entered[0][1]).any()  # each row for itself
    assert set(own(state)) == {"router"}  # which is its gate
    assert "mod" not in routed("keep=0.25, by=random, gate=one")[1].get("items", {})


def test_at_evaluation_each_enters_with_the_probability_of_k():
    """Over 256 rows: within five standard deviations, and a token's draw is that of its row and position alone."""
    item, rows = MixtureOfDepths(0.25, by="random"), 256
    tokens = placed(features(0, rows))
    decision = quick(lambda tokens: item.decision({}, tokens, jnp.zeros((rows, tokens.count)), KEY))
    entering = np.asarray(decision(tokens))
    assert abs(entering.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / (rows * N))
    assert (np.abs(entering.mean(0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / rows)).all()
    some = np.array([3, 4, 17])
    part = jax.tree.map(lambda leaf: leaf[:, some], tokens)
    np.testing.assert_array_equal(decision(part), entering[:, some])


# ---------------------------------------------------------------------------------------------- room


def open_doors(state):
    """Weights with which every token's predictor says that it enters."""
    mod = {**state["items"]["mod"], "predictor_out_bias": jnp.full((1,), 1e3)}
    return {**state, "items": {"mod": mod}}


@pytest.mark.parametrize(("room", "inside"), [(1.0, 6), (1.4, 9), (2.0, 12), (9.0, 24)])
def test_room_is_a_multiple_of_k_and_the_rest_is_left_out_and_told(room, inside):
    model, state, run = routed(f"keep=0.25, room={room}", train=False)
    assert model.program.flat()[0].inside == inside
    x = features()
    found, _, metrics = run(open_doors(state), x)
    changed = (found != x).any(-1)
    np.testing.assert_array_equal(changed, np.broadcast_to(np.arange(N) < inside, (B, N)))
    assert metrics["mod_share"] == pytest.approx(inside / N)
    assert metrics["mod_left_out"] == pytest.approx(1 - inside / N)


def test_training_lets_in_k_whatever_the_room():
    assert decoders.build("mod(keep=0.25, room=3.0)(block)", N, train=True).program.flat()[0].inside == K


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("stack", "says"),
    [
        ("mod(keep=0)(block)", "a count must lie in 1..24"),
        ("mod(keep=25)(block)", "a count must lie in 1..24"),
        ("mod(keep=0.0)(block)", "a fraction must lie in (0, 1]"),
        ("mod(keep=1.5)(block)", "a fraction must lie in (0, 1]"),
        ("mod(keep=-0.5)(block)", "a fraction must lie in (0, 1]"),
        ("mod(keep=True)(block)", "mod: keep must be a count (int) or a fraction (float)"),
        ("mod()(block)", "mod needs 'keep'"),
        ("mod(keep=0.5)", "mod wraps a body"),
        ("mod(keep=0.5, room=0.5)(block)", "mod: room is 0.5; expected at least 1"),
        ("mod(keep=0.5, weight=-1.0)(block)", "mod: weight is -1.0; expected at least 0"),
        ("mod(keep=4, by=random)(block)", "needs the fraction of tokens that enter; write it as a float"),
        ("mod(keep=0.5, gate=softmax)(block)", "gate must be one of raw, sigmoid, tanh, tanh_scaled, one"),
        ("mod(keep=0.5, decide=all)(block)", "decide must be one of predictor, router, topk"),
        ("mod(keep=0.5, by=norm)(block)", "by must be one of learned, random"),
        ("mod(keep=0.5, capacity=2)(block)", "mod has no argument 'capacity'"),
        ("mod(keep=0.5)(block + keep(0.5, by=random))", "it must give back as many"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(stack, says):
    with pytest.raises((StackError, NameLookupError)) as raised:
        decoders.build(stack, N)
    assert says in str(raised.value)


@pytest.mark.parametrize("given", [{"room": float("nan")}, {"room": float("inf")}, {"weight": float("nan")}])
def test_numbers_that_are_not_finite_are_refused(given):
    with pytest.raises(TokenLabError, match=f"mod: {next(iter(given))} is"):
        MixtureOfDepths(0.5, **given)
