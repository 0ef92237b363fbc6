"""tokenlab.ops.cache: rows fill from the front as lists would, what finds no room is counted, empty rows are unseen."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenlab.core.errors import ShapeError
from tokenlab.ops.attention import attention
from tokenlab.ops.cache import EMPTY, KVCache, Stacked

B, M, G, DH = 3, 7, 2, 4


def draw(rng, count):
    """Keys, values and positions of `count` tokens, and which of them are to be kept."""
    key, value = (rng.standard_normal((B, count, G, DH)).astype(np.float32) for _ in range(2))
    return key, value, rng.integers(0, 99, (B, count)).astype(np.int32), rng.random((B, count)) < 0.6


def as_lists(cache):
    """What each example holds: a list of (position, key, value)."""
    rows = []
    for b, used in enumerate(np.asarray(cache.used)):
        rows.append(
            [(int(cache.position[b, i]), cache.key[b, :, i], cache.value[b, :, i]) for i in range(used)]
        )
    return rows


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_insert_appends_as_to_a_list_until_the_rows_are_full(seed, counts):
    """Any number of insertions of ragged tokens: the same as a list an example that takes M and no more."""
    rng = np.random.default_rng(seed)
    cache, wanted, lost = KVCache.empty(B, M, G, DH), [[] for _ in range(B)], np.zeros(B, int)
    for count in counts:
        key, value, position, valid = draw(rng, count)
        cache = cache.insert(key, value, position, valid)
        for b, i in np.argwhere(valid):
            if len(wanted[b]) < M:
                wanted[b].append((position[b, i], key[b, i], value[b, i]))
            else:
                lost[b] += 1
    np.testing.assert_array_equal(cache.used, [len(rows) for rows in wanted])
    np.testing.assert_array_equal(cache.lost, lost)
    np.testing.assert_array_equal(cache.has_room(), [len(rows) < M for rows in wanted])
    for found, rows in zip(as_lists(cache), wanted, strict=True):
        for one, other in zip(found, rows, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)
    for b, rows in enumerate(wanted):
        np.testing.assert_array_equal(cache.position[b, len(rows) :], EMPTY)
        np.testing.assert_array_equal(cache.key[b, :, len(rows) :], 0)


def test_without_valid_all_are_kept():
    key, value, position, _ = draw(np.random.default_rng(0), 3)
    found, everything = KVCache.empty(B, M, G, DH), np.ones((B, 3), bool)
    jax.tree.map(
        np.testing.assert_array_equal,
        found.insert(key, value, position),
        found.insert(key, value, position, everything),
    )
    assert found.rows == M


def test_overflow_is_counted_and_overwrites_nothing():
    key, value, position, _ = draw(np.random.default_rng(1), M)
    full = KVCache.empty(B, M, G, DH).insert(key, value, position)
    assert not np.asarray(full.has_room()).any() and not np.asarray(full.lost).any()
    valid = np.array([[True, True], [False, True], [False, False]])
    over = full.insert(np.full((B, 2, G, DH), 9.0), np.full((B, 2, G, DH), 9.0), np.full((B, 2), 200), valid)
    np.testing.assert_array_equal(over.lost, [2, 1, 0])
    jax.tree.map(np.testing.assert_array_equal, over.replace(lost=full.lost), full)


def test_a_causal_mask_hides_the_empty_rows():
    """Attention to a cache that is partly empty is attention to what it holds, example by example."""
    rng = np.random.default_rng(2)
    key, value, _, valid = draw(rng, 5)
    valid[:, 0] = True
    position = np.broadcast_to(np.arange(5, dtype=np.int32), (B, 5))
    empty = KVCache.empty(B, M, G, DH)
    # Empty rows hold loud numbers, so that seeing one would show.
    loud = empty.replace(key=empty.key + 1e4, value=empty.value - 1e4)
    cache = loud.insert(key, value, position, valid)
    query = rng.standard_normal((B, 1, G, DH)).astype(np.float32)
    now = np.full((B, 1), 2**30, np.int32)
    keys, values = (jnp.moveaxis(held, 1, 2) for held in (cache.key, cache.value))
    found = attention(query, keys, values, causal_positions=(now, cache.position))
    for b in range(B):
        own = valid[b]
        expected = attention(query[b : b + 1], key[b : b + 1, own], value[b : b + 1, own])
        np.testing.assert_allclose(found[b], expected[0], atol=1e-6)


def test_keys_are_cast_to_the_dtype_of_the_cache():
    key, value, position, _ = draw(np.random.default_rng(3), 2)
    cache = KVCache.empty(B, M, G, DH, jnp.bfloat16).insert(key, value, position)
    assert cache.key.dtype == cache.value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(cache.key[:, :, :2], np.moveaxis(key, 1, 2).astype(jnp.bfloat16))


@pytest.mark.parametrize("count", [1, 3])
def test_a_layer_in_a_stack_is_filled_as_a_cache_of_its_own(count):
    """Whichever layer, known when traced or not; the others stay as they are."""
    rng = np.random.default_rng(4)
    apart = [KVCache.empty(B, M, G, DH, jnp.bfloat16).insert(*draw(rng, 2)) for _ in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
    insert = jax.jit(lambda stack, at, *new: Stacked(stack, at).insert(*new).stack)
    for at in (0, 2, 1, 1, 1, 1):
        new = draw(rng, count)
        apart[at] = apart[at].insert(*new)
        stack = insert(stack, at, *new)
        wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
        jax.tree.map(np.testing.assert_array_equal, stack, wanted)
        view = Stacked(stack, at)
        for name in ("key", "value", "position"):
            np.testing.assert_array_equal(getattr(view, name), getattr(apart[at], name))
    assert count == 1 or np.asarray(stack.lost).any()


def test_a_layer_in_a_stack_keeps_its_batch_where_it_is():
    """Over devices no key moves: each writes the rows of its own examples."""
    mesh = jax.make_mesh((3,), ("data",), devices=jax.devices()[:3])
    sharded = jax.NamedSharding(mesh, jax.P(None, "data"))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), KVCache.empty(B, M, G, DH))
    stack = jax.device_put(stack, sharded)
    new = jax.device_put(draw(np.random.default_rng(5), 1), jax.NamedSharding(mesh, jax.P("data")))
    program = jax.jit(lambda stack, new: Stacked(stack, 1).insert(*new).stack).lower(stack, new).compile()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", program.as_text())


@pytest.mark.parametrize(
    "change",
    [
        {"key": np.zeros((B, 3, G, DH))},
        {"value": np.zeros((B, 2, G, DH + 1))},
        {"key": np.zeros((B, 2, G + 1, DH)), "value": np.zeros((B, 2, G + 1, DH))},
        {"position": np.zeros((B, 3), np.int32)},
        {name: np.zeros((B - 1, 2, G, DH)) for name in ("key", "value")}
        | {"position": np.zeros((B - 1, 2), np.int32)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(change):
    given = {name: np.zeros((B, 2, G, DH)) for name in ("key", "value")} | {
        "position": np.zeros((B, 2), np.int32)
    }
    with pytest.raises(ShapeError, match=r"do not fit; expected \[B, N, G, Dh\] and \[B, N\]"):
        KVCache.empty(B, M, G, DH).insert(**(given | change))
    stack = jax.tree.map(lambda leaf: leaf[None], KVCache.empty(B, M, G, DH))
    with pytest.raises(ShapeError, match="do not fit"):
        Stacked(stack, 0).insert(**(given | change))
