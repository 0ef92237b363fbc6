"""Generation: prompts and steps give what a forward pass over the whole sequence gives, for every kind of stack."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import decoders
from tokenlab.core.errors import ShapeError, StackError, TokenLabError
from tokenlab.layers.context import Context
from tokenlab.methods.depth.mod import MixtureOfDepths
from tokenlab.ops.select import count

N, P = 24, 10
LENGTHS = np.array([10, 3, 7], np.int32)
B = len(LENGTHS)
LOST = "mod(keep=0.125, room=1.0)(block) + block"
CASES = {
    "dense": ("block*3", {}),
    "grouped heads, qk-norm, tied": ("block*2", {"num_kv_heads": 1, "qk_norm": True, "tied": True}),
    "window": ("block*2", {"window": 4, "position": "none"}),
    "post-norm, layer norm, larger table": (
        "block*2",
        {"norm_placement": "res_post", "norm": "layer", "vocab_multiple": 8},
    ),
    "mod": ("(block + mod(keep=0.25)(block))*2", {}),
    "mod by router": ("block + mod(keep=0.25, gate=sigmoid, decide=router)(block)", {}),
    "mod without room": (LOST, {}),
    "mod by random": ("block + mod(keep=0.25, by=random)(block)", {}),
    "mod around several": ("block + (mod(keep=0.5, gate=tanh_scaled)(block*2) + block)*2", {}),
    "mod in mod": ("block + mod(keep=0.5)(mod(keep=2, room=1.0)(block) + block*2)", {}),
    # Memories of inner and outer blocks have as many rows and so lie in one stack.
    "mod without room around mod": ("mod(keep=0.125, room=1.0)(mod(keep=1.0)(block) + block)", {}),
    "mod in what is train_only": (
        "block + skip(keep=0.5, train_only=True)(mod(keep=0.25)(block) + block)",
        {},
    ),
    "dropless": ("block + block(ffn=dropless(experts=4))", {}),
    "mod around experts": ("block + mod(keep=0.5)(block(ffn=dropless(experts=4)))", {}),
}
# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def follow(functions, state, ids, new):
    """Logits [B, 1 + new, V] behind the prompts of ids [B, N] and behind each of `new` ids that follow; the memory."""
    weights = functions.prepare(state)
    first, memory = functions.prefill(weights, ids[:, :P], jnp.asarray(LENGTHS))

    def step(memory, _):
        token = jnp.take_along_axis(ids, memory.length[:, None], axis=1)[:, 0]
        logits, memory = functions.step(weights, token, memory)
        return memory, logits

    memory, rest = jax.lax.scan(step, memory, length=new)
    return jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], axis=1), memory


@cache
def outcome(name, execution):
    """(logits of the whole sequences, logits of generation by position, tokens lost, metrics), traced together."""
    stack, settings = CASES[name]
    model = decoders.build(stack, N, execution=execution, **settings)
    functions = model.generation(P, N - P)

    def both(state, ids):
        output = model.apply(state, {"ids": ids})
        found, memory = follow(functions, state, ids, N - P)
        return output.logits, found, memory.lost, output.aux.metrics

    return quick(both)(decoders.weights(model), decoders.ids(B, N))


@pytest.mark.quick(  # compiling is nearly all of the time
    "dense-scan",
    "grouped heads, qk-norm, tied-unroll",
    "dropless-unroll",
    "mod-scan",
    "mod in mod-unroll",
    "mod without room-unroll",
)
@pytest.mark.parametrize("execution", ["scan", "unroll"])
@pytest.mark.parametrize("name", CASES)
def test_prompts_and_steps_give_the_logits_of_the_whole_sequence(name, execution):
    """Prompts of 10, 3 and 7 tokens in one batch, then 14 steps; what routes lets some tokens in and others not."""
    whole, found, _, metrics = outcome(name, execution)
    for b, length in enumerate(LENGTHS):
        expected = whole[b, length - 1 : length + N - P, : decoders.VOCABULARY]
        np.testing.assert_allclose(found[b], expected, atol=1e-5, rtol=1e-5)
    if "mod" in CASES[name][0]:
        total, occurrences = metrics["mod_share"]
        assert 0.05 < total / occurrences < 0.95


@pytest.mark.parametrize("execution", ["scan", "unroll"])
def test_tokens_without_room_are_counted(execution):
    """The first K that enter find room; how many more entered is what the memory says is lost."""
    _, _, lost, metrics = outcome("mod without room", execution)
    model = decoders.build(LOST, N)
    state, step = decoders.weights(model), model.program.flat()[0]
    tokens = model._embedded(state, decoders.ids(B, N), *[jnp.broadcast_to(jnp.arange(N), (B, N))] * 2, None)
    params = jax.tree.map(lambda leaf: leaf[0], state["items"]["mod"])
    entering = step.item.decision(params, tokens, step.item.score(params, tokens), jax.random.key(0))
    seen = [int(row[: length + N - P].sum()) for row, length in zip(entering, LENGTHS, strict=True)]
    np.testing.assert_array_equal(lost, np.maximum(np.array(seen) - N // 8, 0))
    assert np.asarray(lost).min() > 0 and metrics["mod_left_out"][0] > 0
    _, _, none, _ = outcome("dense", execution)
    np.testing.assert_array_equal(none, 0)


@pytest.mark.parametrize("execution", ["scan", "unroll"])
def test_memories_have_the_rows_that_may_be_used(execution):
    """A block remembers P + new tokens, a routed one twice its K of them: bytes by the formula."""
    model = decoders.build("(block + mod(keep=0.125)(block))*2", N, execution=execution)
    functions = model.generation(P, N - P)
    shapes = jax.eval_shape(
        lambda s, i, n: functions.prefill(functions.prepare(s), i, n)[1],
        model.abstract_state(),
        jax.ShapeDtypeStruct((B, P), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
    )
    *_, groups, width = model.settings.dims()
    rows = 2 * N + 2 * 2 * (N // 8)
    assert shapes.nbytes == B * rows * groups * width * 2 * 4
    # At most K where the room is K, and never more than the sequence has.
    for stack, wanted in (("mod(keep=0.125, room=1.0)(block)", N // 8), ("mod(keep=0.75)(block)", N)):
        (routed,) = (
            s for s in decoders.build(stack, N).generation(P, N - P).program.flat() if not hasattr(s, "item")
        )
        assert routed.rows == wanted


def products(jaxpr, inside=False):
    """Matrix products of a jaxpr as (outside, inside) of `cond`."""
    found = np.zeros(2, int)
    for equation in jaxpr.eqns:
        deeper = inside or equation.primitive.name == "cond"
        found[int(inside)] += equation.primitive.name == "dot_general"
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += products(inner, deeper)
    return found


def test_a_step_in_which_nothing_enters_computes_nothing_of_the_body():
    """All nine products of the block are in a branch; outside are the router, the predictor and the head."""
    model = decoders.build("mod(keep=0.25)(block)", N, execution="unroll")
    functions = model.generation(P, N - P)
    state = model.abstract_state()
    weights = jax.eval_shape(functions.prepare, state)
    shape = jax.ShapeDtypeStruct((B,), jnp.int32)
    prompts = jax.ShapeDtypeStruct((B, P), jnp.int32)
    _, memory = jax.eval_shape(functions.prefill, weights, prompts, shape)
    outside, inside = products(jax.make_jaxpr(functions.step)(weights, shape, memory).jaxpr)
    assert (outside, inside) == (4, 9)


@pytest.mark.parametrize("execution", ["scan", "unroll"])
def test_fed_the_memberships_of_a_parallel_pass_sampling_gives_its_logits(execution, monkeypatch):
    """The top K of whole sequences as decisions, token by token, in place of the predictor's."""
    inside = "block + mod(keep=0.25{})(block*2)"
    ahead = decoders.build(inside.format(", decide=topk"), N, leaks=True, execution=execution)
    model = decoders.build(inside.format(""), N, execution=execution)
    functions, state, ids = model.generation(P, N - P), decoders.weights(model), decoders.ids(B, N)
    router = {"router": state["items"]["mod"]["router"]}
    own = {**state, "items": {"mod": router}}

    def parallel(state, ids):
        output = ahead.apply(state, {"ids": ids}, record=True)
        (chosen,) = (point.tokens.position for point in output.trace if point.inside)
        return output.logits, chosen

    whole, chosen = quick(parallel)(own, ids)
    member = np.zeros((B, N), bool)
    np.put_along_axis(member, np.asarray(chosen), True, axis=1)
    assert member.sum() == B * N // 4

    def decision(self, params, tokens, score, key):
        return jnp.take_along_axis(jnp.asarray(member), tokens.position, axis=1)

    monkeypatch.setattr(MixtureOfDepths, "decision", decision)

    found, _ = quick(partial(follow, functions, new=N - P))(state, ids)
    for b, length in enumerate(LENGTHS):
        np.testing.assert_allclose(found[b], whole[b, length - 1 : length + N - P], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- pruned prompts

PRUNED = {
    "block + keep(0.5, by=norm) + block*2": (0.5, False),
    "block + keep(4, by=norm) + block": (4, False),
    "block(between=keep(0.7, by=norm)) + block": (0.7, True),
}


def pruned_by_hand(state, ids, length, amount, between):
    """Logits of the last token of a prompt and of those behind it: the second block on sees what is left.

    The first block runs on everything. Then of the prompt the `amount` of the largest norm and its last token go on;
    all that follows goes on.
    """
    depth = state["blocks"]["attention"]["query"]["kernel"].shape[0]
    x = np.asarray(state["embed"]["table"], np.float64)[ids]
    x = decoders.attend(state, 0, x, np.arange(len(x)))
    if not between:
        x = decoders.feed(state, 0, x)
    score = np.linalg.norm(x[:length], axis=-1)
    score[length - 1] = np.inf
    wanted = min(amount, length) if isinstance(amount, int) else count(amount, length)
    position = np.concatenate([np.sort(np.argsort(-score)[:wanted]), np.arange(length, len(x))])
    x = x[position]
    if between:
        x = decoders.feed(state, 0, x)
    for index in range(1, depth):
        x = decoders.block(state, index, x, position)
    return decoders.head(state, x[wanted - 1 :])


@pytest.mark.parametrize("execution", ["scan", "unroll"])
@pytest.mark.parametrize("stack", PRUNED)
def test_pruned_prompts_equal_a_dense_computation_without_what_is_pruned(stack, execution):
    """Each prompt keeps its own share, and its last token; what is generated goes through all layers."""
    new = 5
    model = decoders.build(stack, N, execution=execution)
    functions, state = model.generation(P, new), decoders.weights(model)
    # Distinct in every row, as equal tokens may have equal norms, and rounding would then choose.
    ids = np.random.default_rng(3).permuted(np.tile(np.arange(37), (B, 1)), axis=1)[:, :N]

    found, memory = quick(partial(follow, functions, new=new))(state, ids)
    np.testing.assert_array_equal(memory.lost, 0)
    for b, length in enumerate(LENGTHS):
        expected = pruned_by_hand(state, ids[b, : length + new], length, *PRUNED[stack])
        np.testing.assert_allclose(found[b], expected, atol=1e-5, rtol=1e-5)
    # Blocks behind the pruning have fewer rows.
    kept = model.program.flat()[1].item.count(P, 0)
    last = [step for step in functions.program.flat() if not hasattr(step, "item")][-1]
    assert last.rows == kept + new < P + new


@pytest.mark.parametrize("amount", [0.21, 0.26, 0.5, 0.145])
def test_a_prompt_keeps_the_count_that_its_own_length_asks_for(amount):
    """As many as the same fraction keeps of a sequence of that length, also where float32 would round another way."""
    most = 460
    model = decoders.build(f"keep({amount}, by=norm) + block", most)
    item = model.program.flat()[0].item
    length = np.array([1, 2, 3, 7, 100, 150, 225, 425, most], np.int32)
    place = jnp.broadcast_to(jnp.arange(most), (len(length), most))
    x = jax.random.normal(jax.random.key(0), (*place.shape, 1))
    tokens = model._embedded(decoders.weights(model), place % 37, place, place, place < length[:, None])
    part, _ = item({}, tokens.replace(x=x), Context(jax.random.key(0), mode="prefill"), {}, jax.random.key(0))
    # Of a prompt so short that nothing would be left its last token is.
    wanted = [count(amount, int(n), least=1) for n in length]
    np.testing.assert_array_equal(part.valid.sum(1), wanted)
    for row, n in enumerate(length):
        alive = np.asarray(part.position[row])[np.asarray(part.valid[row])]
        assert (np.diff(alive) > 0).all() and alive[-1] == n - 1


# ---------------------------------------------------------------------------------------------- what is refused


def test_counts_that_make_no_sense_are_refused():
    model = decoders.build("block", N)
    for given, says in (((0, 5), "prompt is 0"), ((5, 0), "new is 0"), ((True, 1), "prompt is True")):
        with pytest.raises(TokenLabError, match=f"generation: {says}; expected a number of tokens >= 1"):
            model.generation(*given)


def test_other_shapes_than_it_was_made_for_are_refused():
    model = decoders.build("block", N)
    functions = model.generation(4, 2)
    state = decoders.weights(model)
    weights = functions.prepare(state)
    for ids, length in ((np.zeros((2, 5), int), np.ones(2, int)), (np.zeros((2, 4), int), np.ones(3, int))):
        with pytest.raises(ShapeError, match=r"expected \[B, 4\] and \[B\]"):
            functions.prefill(weights, ids, length)


@pytest.mark.parametrize(
    "stack",
    ["block + merge(2) + block", "block + skip(keep=0.5)(block)", "block + mod(keep=4, decide=topk)(block)"],
)
def test_stacks_that_cannot_run_token_by_token_say_so(stack):
    model = decoders.build(stack, N, leaks=True)
    with pytest.raises(StackError, match="cannot run token by token, as generation does"):
        model.generation(P, 2)


def test_a_wrapper_of_nothing_but_a_wrapper_is_refused():
    """What enters it and nothing further in is remembered nowhere, so its room could not be known."""
    model = decoders.build("mod(keep=0.5)(mod(keep=0.5)(block)) + block", N)
    functions = model.generation(P, 2)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B, P), (B,))]
    weights = jax.eval_shape(functions.prepare, model.abstract_state())
    with pytest.raises(
        StackError, match="mod_00 cannot run token by token: .*Put a block beside what it wraps"
    ):
        jax.eval_shape(functions.prefill, weights, *shapes)


def test_a_prompt_of_fewer_tokens_than_are_kept_is_refused():
    with pytest.raises(StackError, match=r"keep is the count 8; a count must lie in 1\.\.4"):
        decoders.build("block + keep(8) + block", N).generation(4, 2)
