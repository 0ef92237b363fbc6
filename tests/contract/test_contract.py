"""The contract: what every item, score, feed-forward layer and feeder of special tokens must do, found by themselves.

A part is tried in the stacks it gives as examples (`Item.examples`). Sharded checks of the same parts are in
`test_sharded.py`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parts
import pytest

from tests import decoders
from tokenlab.core.tokens import Tokens
from tokenlab.cost.flops import count
from tokenlab.layers import execute
from tokenlab.layers.context import Context

KEY = jax.random.key(1)
FOUND = parts.find()
IDENTITIES = parts.identities()
# What further examples of a part add is tried in the slow tests.
NAMES = [(part.role, part.name) for part in FOUND]
each_part = pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=pytest.mark.slow if key in NAMES[:at] else ())
        for at, (part, key) in enumerate(zip(FOUND, NAMES, strict=True))
    ],
    ids=str,
)
# What does not depend on the arguments of a part is tried on its first example.
FIRST = list({(part.role, part.name): part for part in reversed(FOUND)}.values())[::-1]
each_first = pytest.mark.parametrize("part", FIRST, ids=str)


def cached(function):
    """`functools.cache`, apart for machine code that XLA optimises and that it does not (tests/conftest.py)."""
    held = functools.cache(lambda quick, *given: function(*given))
    return lambda *given: held(jax.config.values["jax_disable_most_optimizations"], *given)


@cached
def weights(stack):
    """Weights drawn at random, none of them zero: zeros (heads, biases) and ones (norms) would hide a mistake."""
    return decoders.weights(parts.build(stack))


@cached
def fresh(stack):
    """The weights that a model begins with."""
    return jax.jit(parts.build(stack).init)(KEY)


@cached
def plain(stack):
    """The unrolled program as it is trained, compiled once for the tests that ask it different things.

    A jitted function (state, images, cotangent, key) -> ((sum of logits in a direction, (logits, facts of every item)),
    gradients), and a list that grows with every trace.
    """
    return _train_step(parts.build(stack), execution="unroll", record=True)


def _train_step(model, **how):
    traces = []

    def total(state, images, cotangent, key):
        traces.append(1)
        output = model.apply(state, {"image": images}, train=True, rng=key, **how)
        return jnp.sum(output.logits * cotangent) + sum(output.losses.values()), (
            output.logits,
            _facts(output.trace),
        )

    return jax.jit(jax.value_and_grad(total, has_aux=True)), traces


def _facts(trace):
    """(name of an item, whether it is what the item's body sees) -> position, owner and perhaps size of its tokens."""
    found = {}
    for point in trace or ():
        found[point.name, point.inside] = {"position": point.tokens.position, "owner": point.tokens.owner}
        if point.tokens.size is not None:
            found[point.name, point.inside]["size"] = point.tokens.size
    return found


@pytest.fixture(scope="module")
def unrolled(images, cotangent):
    """Stack -> (logits, facts, gradients) of the plain unrolled program, which several tests compare with."""

    @cached
    def of(stack):
        (_, (logits, facts)), grads = plain(stack)[0](weights(stack), images, cotangent, KEY)
        return logits, facts, grads

    return of


def stochastic(model):
    return any(
        getattr(part, "stochastic", False)
        for step in model.program.flat()
        for part in ((step.item, *step.item.scores()) if hasattr(step, "item") else (step.block.ffn,))
    )


def relative(a, b):
    """Largest difference of two trees over the largest entry."""
    flat = [np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)]) for t in (a, b)]
    return np.abs(flat[0] - flat[1]).max() / np.abs(flat[1]).max()


def test_something_was_found():
    names = {part.name for part in FOUND}
    assert {
        "keep",
        "skip",
        "merge",
        "evit",
        "tome",
        "random",
        "norm",
        "cls",
        "learned",
        "mlp",
        "swiglu",
    } <= names


@each_part
def test_gradients_and_ways_of_running(part, unrolled, images, cotangent):
    """Gradients are finite and reach every parameter; unrolled, and scanned with blocks computed again, agree."""
    model, state = parts.build(part.stack), weights(part.stack)
    logits, _, grads = unrolled(part.stack)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), f"{name} has gradients that are not finite"
        # Adding a constant to all keys changes no softmax, so the bias of keys has none.
        if "['key']['bias']" not in name:
            stacked = name.startswith(("['blocks']", "['items']"))  # every block and item for itself
            per_entry = np.abs(leaf).reshape(leaf.shape[0] if stacked else 1, -1).max(axis=1)
            assert (per_entry > 0).all(), f"{name} gets no gradient"
    run, _ = _train_step(model, execution="scan", remat="full")
    (_, (scanned, _)), scanned_grads = run(state, images, cotangent, KEY)
    np.testing.assert_array_equal(scanned, logits)
    assert relative(scanned_grads, grads) < 1e-6


@pytest.mark.slow
@each_first
def test_bfloat16(part, images, cotangent):
    """In bfloat16 gradients stay finite, parameters stay float32, and logits are near those of float32."""
    run, _ = _train_step(parts.build(part.stack, dtype="bfloat16"))
    (_, (logits, _)), grads = run(weights(part.stack), images, cotangent, KEY)
    assert logits.dtype == jnp.float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all(), jax.tree_util.keystr(path)


@each_part
def test_tokens_stay_consistent(part, unrolled):
    """Counts are as the program says; positions distinct; owners a partition; sizes what was merged."""
    model = parts.build(part.stack)
    expected = [s for s in model.program.flat() if hasattr(s, "item")]
    if not expected:
        assert part.role in ("ffn", "special")  # every token of which stays where it is
        return
    _, seen, _ = unrolled(part.stack)
    for step in expected:
        tokens = seen[step.name, False]
        assert tokens["position"].shape[1] == step.after
        for row in tokens["position"]:
            assert len(set(row.tolist())) == len(row), f"{step.name}: two tokens claim one position"
        size, count_in = tokens.get("size"), model.tokens_per_example
        for example, owner in enumerate(tokens["owner"]):
            assert owner.min() >= -1 and owner.max() < step.after
            carried = np.bincount(owner[owner >= 0], minlength=step.after)
            assert (carried >= 1).all(), f"{step.name}: a token that carries nothing"
            np.testing.assert_array_equal(owner[: model.embed.special], np.arange(model.embed.special))
            if size is not None:
                np.testing.assert_array_equal(size[example], carried)
            assert carried.sum() <= count_in


@each_first
def test_examples_do_not_meet(part, unrolled, images, cotangent):
    """Permuting the batch permutes the outputs; random choices are tied to the row and so are left out."""
    model = parts.build(part.stack)
    if stochastic(model):
        # What is drawn belongs to the row, so the rows that stay keep their outputs when others change.
        other = images.at[3:].set(images[3:][::-1])
        order, rows = slice(None), slice(0, 3)
    else:
        order = np.array([5, 3, 0, 1, 4, 2])
        other, rows = images[order], slice(None)
    (_, (found, _)), _ = plain(part.stack)[0](weights(part.stack), other, cotangent, KEY)
    expected = np.asarray(unrolled(part.stack)[0])[order]
    np.testing.assert_allclose(found[rows], expected[rows], atol=2e-5, rtol=2e-5)


@each_first
def test_padding_changes_nothing(part):
    """What stands in padding tokens cannot change a valid token."""
    model = parts.build(part.stack)
    state, program = weights(part.stack), model.program
    count_in, width = program.present, model.settings.dims()[0]
    x = jax.random.normal(jax.random.key(5), (3, count_in, width))
    # Enough valid tokens that padding is never needed to fill a count.
    valid = jnp.broadcast_to(jnp.arange(count_in) < count_in - 2, (3, count_in))
    noise = 5 * jax.random.normal(jax.random.key(6), x.shape)

    def run(x):
        position = jnp.broadcast_to(jnp.arange(count_in), (3, count_in))
        size = jnp.where(valid, 1.0, 0.0) if program.merges else None
        tokens = Tokens(x, position, valid=valid, size=size, protected=model.embed.special)
        done, _ = execute.run(program, state, tokens, Context(KEY, train=True))
        return done.x, done.valid

    run = jax.jit(run)
    (zeros, alive), (other, alive_too) = run(x), run(jnp.where(valid[..., None], x, noise))
    np.testing.assert_array_equal(alive, alive_too)
    np.testing.assert_allclose(np.asarray(zeros)[alive], np.asarray(other)[alive], atol=1e-5)
    assert np.asarray(alive).any()


@pytest.mark.slow
@each_first
def test_block_weights_belong_to_blocks(part):
    """Block k starts from the same weights whatever wraps it."""
    model = parts.build(part.stack)
    state, dense = jax.jit(model.init)(KEY), fresh(f"block*{model.program.depth}")
    for kind, tree in dense["blocks"].items():
        if (
            kind in state["blocks"]
            and jax.tree.leaves(state["blocks"][kind])[0].shape[0] == model.program.depth
        ):
            jax.tree.map(np.testing.assert_array_equal, state["blocks"][kind], tree)
    np.testing.assert_array_equal(state["embed"]["cls"], dense["embed"]["cls"])


@each_part
def test_counted_cost(part, images):
    """Scanned and unrolled count the same; where tokens are fewer, so are the FLOPs."""
    model = parts.build(part.stack)
    shapes = model.abstract_state()

    def forward(how):
        return lambda s: model.apply(s, {"image": images}, rng=KEY, execution=how).logits

    scanned, unrolled = (count(forward(how), shapes).flops for how in ("scan", "unroll"))
    assert scanned == unrolled
    if model.program.after < model.program.present:
        dense = parts.build(f"block*{model.program.depth}")
        full = count(lambda s: dense.apply(s, {"image": images}).logits, dense.abstract_state()).flops
        assert unrolled < full


@each_first
def test_one_trace_for_all_steps(part, images, cotangent):
    """Another batch, another key, another step: no retrace."""
    run, traces = plain(part.stack)
    run(weights(part.stack), images, cotangent, KEY)
    before = len(traces)
    for i in range(1, 3):
        run(weights(part.stack), images + i, cotangent, jax.random.fold_in(KEY, i))
    assert len(traces) == before > 0


@pytest.mark.exact
@pytest.mark.parametrize("execution", ["scan", "unroll"])
@pytest.mark.parametrize("part", IDENTITIES, ids=str)
def test_identity_equals_dense(part, execution, images, cotangent):
    """With everything kept, logits equal the dense stack's bit for bit, and gradients to 1e-6 of the largest."""
    model, dense = parts.build(part.stack), parts.build(parts.dense(part.stack))
    state = weights(part.stack)
    (_, (expected, _)), expected_grads = _train_step(dense, execution=execution)[0](
        {k: v for k, v in state.items() if k != "items"}, images, cotangent, KEY
    )
    (_, (logits, _)), grads = _train_step(model, execution=execution)[0](state, images, cotangent, KEY)
    np.testing.assert_array_equal(logits, expected)
    grads.pop("items", None)
    assert relative(grads, expected_grads) < 1e-6
    # The operation is really there: the program is not the dense one.
    text = (
        jax.jit(lambda s: model.apply(s, {"image": images}, execution=execution).logits)
        .lower(state)
        .as_text()
    )
    assert "sort" in text and "gather" in text, "the item was elided"


@pytest.mark.parametrize("name", sorted({p.name for p in FOUND if p.role == "item"}))
def test_composes_with_others(name, images):
    """Before a keep, after a skip, beside a merge: two methods in one stack."""
    own = next(p.stack for p in FOUND if p.name == name)
    stack = (
        f"block + skip(keep=0.75, by=norm)(block) + {own} + block + merge(1) + keep(0.75, by=norm) + block"
    )
    model = parts.build(stack)
    logits = jax.jit(lambda s: model.apply(s, {"image": images}, train=True, rng=KEY).logits)(weights(stack))
    assert logits.shape == (6, parts.OUTPUTS) and np.isfinite(logits).all()
