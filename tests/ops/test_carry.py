"""Whole Tokens are moved together: no leaf is left behind, and what is recorded stays a partition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab.core.errors import ShapeError
from tokenlab.core.tokens import Tokens
from tokenlab.ops import carry
from tokenlab.ops.gate import straight_through
from tokenlab.ops.merge import bipartite_soft_matching

B, N, D = 2, 9, 4


@pytest.fixture
def tokens():
    position = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    return Tokens(
        x=jax.random.normal(jax.random.key(0), (B, N, D)),
        position=position,
        coords=jnp.stack([position, position * 10], axis=-1).astype(jnp.float32),
        valid=position < 8,
        size=jnp.ones((B, N)),
        modality=position % 2,
        segment=position // 5,
        extra={"age": position * 100, "deep": jnp.ones((B, N, 2, 3)) * position[..., None, None]},
        owner=position,
        protected=1,
    )


def test_take_moves_every_leaf(tokens):
    indices = jnp.array([[0, 2, 5], [0, 7, 3]])
    part = carry.take(tokens, indices)
    assert part.count == 3 and part.free == 2 and part.batch == B
    np.testing.assert_array_equal(part.position, indices)
    np.testing.assert_array_equal(part.coords[..., 1], indices * 10)
    np.testing.assert_array_equal(part.modality, indices % 2)
    np.testing.assert_array_equal(part.segment, indices // 5)
    np.testing.assert_array_equal(part.extra["age"], indices * 100)
    np.testing.assert_array_equal(part.extra["deep"][:, :, 1, 2], indices)
    np.testing.assert_array_equal(part.owner[0], [0, -1, 1, -1, -1, 2, -1, -1, -1])
    np.testing.assert_array_equal(part.x[1, 1], tokens.x[1, 7])
    # Taking again composes: what was dropped stays dropped.
    again = carry.take(part, jnp.array([[0, 2], [0, 1]]))
    np.testing.assert_array_equal(again.owner[0], [0, -1, -1, -1, -1, 1, -1, -1, -1])


def test_restore_puts_back(tokens):
    indices = jnp.array([[0, 2, 5], [0, 7, 3]])
    part = carry.take(tokens, indices)
    part = part.replace(x=part.x + 1, extra={**part.extra, "age": part.extra["age"] + 1})
    back = carry.restore(tokens, part, indices)
    moved = np.zeros((B, N, 1), np.float32)
    moved[0, [0, 2, 5]] = moved[1, [0, 7, 3]] = 1
    np.testing.assert_array_equal(back.x, np.where(moved, tokens.x + 1, tokens.x))
    np.testing.assert_array_equal(back.extra["age"], tokens.extra["age"] + moved[..., 0].astype(int))
    np.testing.assert_array_equal(back.position, tokens.position)
    with pytest.raises(ShapeError, match="expected 3 tokens"):
        carry.restore(tokens, carry.take(tokens, indices[:, :2]), indices)


def test_merge_conserves(tokens):
    plan = bipartite_soft_matching(tokens.x, 3, protected=1, valid=tokens.valid)
    merged = carry.merge(tokens, plan)
    assert merged.count == N - 3
    # Sizes count the valid tokens only; every original token has an owner; coordinates are averaged by size.
    np.testing.assert_array_equal(merged.size.sum(axis=1), [8, 8])
    for owner, size, coords in zip(merged.owner, merged.size, merged.coords, strict=True):
        owner = np.asarray(owner)
        assert sorted(set(owner.tolist())) == list(range(N - 3))
        for token in range(N - 3):
            mine = [i for i in np.flatnonzero(owner == token) if i < 8]
            if mine:
                assert size[token] == len(mine)
                np.testing.assert_allclose(coords[token, 0], np.mean(mine), rtol=1e-6)
    np.testing.assert_allclose(
        jnp.sum(merged.x * merged.size[..., None], axis=1), jnp.sum(tokens.x[:, :8], axis=1), atol=1e-5
    )
    np.testing.assert_array_equal(merged.position[:, 0], 0)


def test_append_rest_stands_for_all_others(tokens):
    indices = jnp.array([[0, 2, 5], [0, 7, 3]])
    part = carry.take(tokens, indices)
    joined = carry.append_rest(part, tokens, indices, jnp.full((B, 1, D), 7.0))
    assert joined.count == 4
    np.testing.assert_array_equal(joined.x[:, 3], np.full((B, D), 7.0))
    np.testing.assert_array_equal(joined.size[:, 3], [6, 6])
    np.testing.assert_array_equal(joined.position[:, 3], [1, 1])  # the first that was not kept
    np.testing.assert_array_equal(joined.owner[0], [0, 3, 1, 3, 3, 2, 3, 3, 3])
    assert joined.valid[:, 3].all()


def test_straight_through_gate():
    x = jax.random.normal(jax.random.key(1), (B, 3, D))
    change = jax.random.normal(jax.random.key(2), (B, 3, D))
    gate = jax.random.uniform(jax.random.key(3), (B, 3))
    np.testing.assert_array_equal(straight_through(x, change, gate), x)
    grad = jax.grad(lambda g: jnp.sum(straight_through(x, change, g, protected=1) * 2.0))(gate)
    np.testing.assert_allclose(grad[:, 1:], 2 * change.sum(-1)[:, 1:], rtol=1e-6)
    np.testing.assert_array_equal(grad[:, 0], 0)
