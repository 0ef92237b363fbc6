"""tokenlab.ops.attention: against a float64 loop, masks, rows without a visible key, gradients, dtypes, cudnn."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tokenlab.core.errors import ShapeError, TokenLabError
from tokenlab.ops.attention import attention, attention_bias, attention_rows, visible_keys

B, N, M, H, G, DH = 2, 3, 5, 4, 2, 8
COLLECTIVE = re.compile(
    r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(-start)?\("
)
MASKS = ("size", "valid", "causal_positions", "segments", "bias")


def draw(seed, n=N, m=M):
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal(s).astype(np.float32) for s in ((B, n, H, DH), (B, m, G, DH), (B, m, G, DH))
    )
    bias = rng.standard_normal([(B, H, n, m), (1, H, 1, m), (B, 1, n, m), (1, 1, 1, m)][seed % 4])
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    masks = {
        "size": rng.integers(0, 4, (B, m)).astype(np.float32),
        "valid": rng.random((B, m)) < 0.6,
        "causal_positions": (rng.integers(0, 9, (B, n)), rng.integers(0, 9, (B, m))),
        "segments": (rng.integers(0, 2, (B, n)), rng.integers(0, 2, (B, m))),
        "bias": bias.astype(np.float32),
    }
    return q, k, v, masks


def by_hand(q, k, v, *, size=None, valid=None, causal_positions=None, segments=None, bias=None, scale=None):
    """Loops in float64. Returns the output and the attention map [B, H, N, M]."""
    batch, n, heads, width = q.shape
    m, groups = k.shape[1:3]
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    y, rows = np.zeros(q.shape), np.zeros((batch, heads, n, m))
    bias = None if bias is None else np.broadcast_to(bias, rows.shape)
    for b, h, i in np.ndindex(batch, heads, n):
        group = h // (heads // groups)
        weights = {}
        for j in range(m):
            seen = size is None or size[b, j] > 0
            seen = seen and (valid is None or valid[b, j])
            seen = seen and (
                causal_positions is None or causal_positions[0][b, i] >= causal_positions[1][b, j]
            )
            seen = seen and (segments is None or segments[0][b, i] == segments[1][b, j])
            seen = seen and (bias is None or bias[b, h, i, j] > -np.inf)
            if seen:
                logit = q[b, i, h] @ k[b, j, group] * (width**-0.5 if scale is None else scale)
                logit += 0 if bias is None else bias[b, h, i, j]
                weights[j] = np.exp(logit) * (1 if size is None else size[b, j])
        for j, weight in weights.items():
            rows[b, h, i, j] = weight / sum(weights.values())
        y[b, i, h] = rows[b, h, i] @ v[b, :, group]
    return y, rows


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.sets(st.sampled_from(MASKS)), st.sampled_from([None, 0.7]))
def test_against_a_float64_loop(seed, names, scale):
    q, k, v, masks = draw(seed)
    masks = {name: masks[name] for name in sorted(names)}
    y, rows = by_hand(q, k, v, scale=scale, **masks)
    np.testing.assert_allclose(attention(q, k, v, scale=scale, **masks), y, atol=2e-6)
    np.testing.assert_allclose(attention_rows(q, k, scale=scale, **masks), rows, atol=2e-6)
    # One query alone is one row of the map.
    one = {name: (m[0][:, 1:2], m[1]) if isinstance(m, tuple) else m for name, m in masks.items()}
    if "bias" in one and one["bias"].shape[2] > 1:
        one["bias"] = one["bias"][:, :, 1:2]
    np.testing.assert_allclose(attention_rows(q[:, 1:2], k, scale=scale, **one), rows[:, :, 1:2], atol=2e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_query_heads_equal_repeated_key_heads(groups):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((B, N, H, DH)).astype(np.float32)
    k, v = (rng.standard_normal((B, M, groups, DH)).astype(np.float32) for _ in range(2))
    bias = rng.standard_normal((1, H, 1, M)).astype(np.float32)
    repeated = (np.repeat(a, H // groups, axis=2) for a in (k, v))
    expected = attention(q, *repeated, bias=bias)
    np.testing.assert_allclose(attention(q, k, v, bias=bias), expected, atol=1e-6)


def test_agrees_with_jax():
    q, k, v, masks = draw(1, 7, 9)
    mask = np.broadcast_to(masks["valid"][:, None, None, :], (B, 1, 7, 9))
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask)
    np.testing.assert_allclose(attention(q, k, v, valid=masks["valid"]), expected, atol=1e-6)
    np.testing.assert_array_equal(attention(q, k, v, implementation="xla"), attention(q, k, v))


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient():
    q, k, v, masks = draw(2)
    q_segment = np.zeros((B, N), int)
    q_segment[0, 1] = 5  # nobody is in segment 5
    segments = (q_segment, np.zeros((B, M), int))
    valid = np.ones((B, M), bool)
    valid[1] = False  # the second example is all padding
    bias, size = np.zeros((1, H, 1, M), np.float32), np.ones((B, M), np.float32)
    size[0, 2] = 0

    def loss(q, k, v, bias, size):
        y = attention(q, k, v, valid=valid, segments=segments, bias=bias, size=size)
        rows = attention_rows(q, k, valid=valid, segments=segments, bias=bias, size=size)
        return (jnp.cos(y) * 1e3).sum() + (rows**2).sum(), (y, rows)

    (_, (y, rows)), gradients = jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True)(q, k, v, bias, size)
    assert all(np.isfinite(g).all() for g in gradients)
    for hidden in (y[0, 1], rows[0, :, 1], y[1], rows[1], *(g[1] for g in gradients[:3]), gradients[0][0, 1]):
        np.testing.assert_array_equal(hidden, 0)
    for hidden in (gradients[1][0, 2], gradients[2][0, 2], gradients[4][0, 2], gradients[4][1]):
        np.testing.assert_array_equal(hidden, 0)
    assert all((np.asarray(g)[0] != 0).any() for g in gradients)


def test_gradients_equal_those_of_the_plain_formula():
    q, k, v, masks = draw(3)
    names = ("valid", "segments", "size")
    masks = {name: masks[name] for name in names}
    masks["size"] = masks["size"] + 1
    bias, scale = np.random.default_rng(0).standard_normal((1, H, 1, M)).astype(np.float32), 0.6
    seen = (
        masks["valid"][:, None, None, :]
        & (masks["segments"][0][:, :, None] == masks["segments"][1][:, None])[:, None]
    )
    cotangent = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)

    def plain(q, k, v, bias, size):
        k, v = jnp.repeat(k, H // G, 2), jnp.repeat(v, H // G, 2)
        logits = scale * jnp.einsum("bnhd,bmhd->bhnm", q, k) + bias
        weights = jnp.where(seen, jnp.exp(logits) * size[:, None, None], 0)
        total = weights.sum(-1, keepdims=True)
        return (jnp.einsum("bhnm,bmhd->bnhd", weights / jnp.where(total == 0, 1, total), v) * cotangent).sum()

    def ours(q, k, v, bias, size):
        rest = {"valid": masks["valid"], "segments": masks["segments"]}
        return (attention(q, k, v, bias=bias, size=size, scale=scale, **rest) * cotangent).sum()

    arguments = (q, k, v, bias, masks["size"])
    for found, expected in zip(*(jax.grad(f, range(5))(*arguments) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_proportional_attention_stands_for_duplicated_keys():
    q, k, v, _ = draw(4)
    size = np.array([[1, 2, 1, 3, 1]] * B, np.float32)
    repeats = size[0].astype(int)
    expected = attention(q, np.repeat(k, repeats, 1), np.repeat(v, repeats, 1))
    np.testing.assert_allclose(attention(q, k, v, size=size), expected, atol=1e-6)
    np.testing.assert_array_equal(attention(q, k, v, size=np.ones((B, M))), attention(q, k, v))
    np.testing.assert_array_equal(attention(q, k, v, size=np.ones((B, M), int)), attention(q, k, v))


@pytest.mark.parametrize("groups", [1, 3])
def test_masks_that_hide_nothing_change_no_bit(groups):
    """Compiled as a whole, where a mask could make XLA fuse and round in another way."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, 17, 3, 6)).astype(np.float32)
    k, v = (rng.standard_normal((3, 17, groups, 6)).astype(np.float32) for _ in range(2))
    ones, zeros = np.ones((3, 17), np.float32), np.zeros((3, 17), np.int32)
    run = jax.jit(lambda q, k, v, masks: attention(q, k, v, **masks))
    plain = run(q, k, v, {})
    for masks in (
        {"size": ones},
        {"valid": ones > 0},
        {"segments": (zeros, zeros)},
        {"causal_positions": (zeros, zeros)},
        {"bias": np.zeros((1, 3, 1, 17), np.float32)},
    ):
        np.testing.assert_array_equal(run(q, k, v, masks), plain, err_msg=str(list(masks)))


def test_no_collective_when_batch_and_heads_are_sharded():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def step(q, k, v, valid, positions, cotangent):
        def forward(q, k, v):
            masks = {
                "valid": valid,
                "size": valid.astype(jnp.float32),
                "causal_positions": (positions, positions),
            }
            return attention(q, k, v, **masks)

        y, backward = jax.vjp(forward, q, k, v)
        return y, backward(cotangent), attention_rows(q[:, :1], k)

    with jax.set_mesh(mesh):
        heads, rows = (NamedSharding(mesh, P("data", None, *axes)) for axes in (("tensor",), ()))
        q, k = (jax.device_put(np.ones((8, 6, n, 8), np.float32), heads) for n in (H, G))
        valid = jax.device_put(np.ones((8, 6), bool), rows)
        positions = jax.device_put(np.ones((8, 6), np.int32), rows)
        arguments = (q, k, k, valid, positions, q)
        program = jax.jit(step).lower(*arguments).compile()
        assert not COLLECTIVE.findall(program.as_text())
        y, gradients, row = program(*arguments)
        assert all(leaf.sharding.shard_shape(leaf.shape)[0] == 2 for leaf in (y, *gradients, row))
        assert (
            y.sharding.shard_shape(y.shape)[2] == H // 2 and row.sharding.shard_shape(row.shape)[1] == H // 2
        )
        assert COLLECTIVE.findall(jax.jit(lambda q: q.sum(2)).lower(q).compile().as_text())


def test_hidden_keys_change_nothing():
    q, k, v, _ = draw(5)
    valid = np.ones((B, M), bool)
    valid[:, 3:] = False
    loud_k, loud_v = k.copy(), v.copy()
    loud_k[:, 3:], loud_v[:, 3:] = 1e4, -1e4
    expected = attention(q, k, v, valid=valid)
    np.testing.assert_array_equal(attention(q, loud_k, loud_v, valid=valid), expected)
    np.testing.assert_allclose(attention(q, k[:, :3], v[:, :3]), expected, atol=1e-6)
    np.testing.assert_array_equal(
        attention(q, k, v, bias=np.where(valid, 0, -np.inf)[:, None, None, :]), expected
    )


def test_causal_by_carried_positions():
    """What is causal follows the positions that tokens carry, not the places they stand at."""
    q, k, v, _ = draw(6, 6, 6)
    plain = np.broadcast_to(np.arange(6), (B, 6))
    full = attention(q, k, v, causal_positions=(plain, plain))
    order = np.array([4, 0, 5, 2, 1, 3])
    shuffled = attention(
        q[:, order], k[:, order], v[:, order], causal_positions=(plain[:, order], plain[:, order])
    )
    np.testing.assert_allclose(shuffled, full[:, order], atol=1e-6)
    louder = k.copy()
    louder[:, 5] += 9
    later = attention(q, louder, v, causal_positions=(plain, plain))
    np.testing.assert_array_equal(later[:, :5], full[:, :5])
    # A query sees its own position.
    alone = attention(q[:, :1], k, v, causal_positions=(plain[:, :1], plain))
    np.testing.assert_allclose(alone[:, 0], np.repeat(v[:, 0], H // G, 1), atol=1e-6)


@pytest.mark.parametrize("window", [1, 2, 4, 99])
def test_a_window_hides_what_is_too_far_behind(window):
    """Against a mask by numpy, with positions in any order and with gaps; with every other mask beside it."""
    q, k, v, masks = draw(12)
    query, key = masks["causal_positions"]
    behind = query[:, :, None] - key[:, None, :]
    seen = (behind >= 0) & (behind < window)
    rest = {name: masks[name] for name in ("size", "valid", "segments")}
    hidden = np.where(seen, 0, -np.inf).astype(np.float32)[:, None]
    given = {"causal_positions": (query, key), "window": window, **rest}
    np.testing.assert_allclose(
        attention(q, k, v, **given), attention(q, k, v, bias=hidden, **rest), atol=1e-6
    )
    np.testing.assert_allclose(
        attention_rows(q, k, **given), attention_rows(q, k, bias=hidden, **rest), atol=1e-6
    )
    np.testing.assert_array_equal(visible_keys(causal_positions=(query, key), window=window)[:, 0], seen)
    # As wide as the positions it hides nothing more than causality does.
    wide = attention(q, k, v, causal_positions=(query, key))
    assert np.array_equal(attention(q, k, v, causal_positions=(query, key), window=window), wide) == (
        window > 9
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_has_float32_logits_and_softmax(dtype):
    q, k, v, masks = draw(7)
    q, k, v = (jnp.asarray(a, dtype) for a in (10 * q, k, v))
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    rows = attention_rows(q, k, valid=masks["valid"])
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows, attention_rows(wide[0], wide[1], valid=masks["valid"]), atol=1e-6)
    y = attention(q, k, v, size=masks["size"])
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(np.float32), attention(*wide, size=masks["size"]), atol=2e-2)
    gradients = jax.grad(lambda *a: attention(*a, size=masks["size"]).astype(jnp.float32).sum(), (0, 1, 2))(
        q, k, v
    )
    assert all(g.dtype == dtype and np.isfinite(g.astype(np.float32)).all() for g in gradients)


def test_large_logits_do_not_overflow():
    q, k, v, _ = draw(8)
    y = attention(1e3 * q, 1e3 * k, v)
    best = np.einsum("bnhd,bmhd->bnhm", q, np.repeat(k, H // G, 2)).argmax(-1)
    expected = np.repeat(v, H // G, 2)[np.arange(B)[:, None, None], best, np.arange(H)]  # one key takes all
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_the_mask_is_composed_in_one_place_and_no_larger_than_need_be():
    _, _, _, masks = draw(9)
    assert attention_bias() is None and visible_keys() is None
    assert attention_bias(valid=masks["valid"], size=masks["size"]).shape == (B, 1, 1, M)
    assert attention_bias(segments=masks["segments"]).shape == (B, 1, N, M)
    assert attention_bias(bias=np.zeros((1, H, 1, M))).shape == (1, H, 1, M)
    together = visible_keys(valid=masks["valid"], causal_positions=masks["causal_positions"])
    assert together.dtype == jnp.bool_ and together.shape == (B, 1, N, M)
    np.testing.assert_array_equal(np.isfinite(attention_bias(size=masks["size"])[:, 0, 0]), masks["size"] > 0)


def test_dropout_is_of_weights_of_the_softmax():
    """With the unit matrix as values the result is the weights: some 0, the others scaled, 1 a row on average."""
    n = 48
    q, k = jax.random.normal(jax.random.key(0), (2, 2, n, 3, 8))
    eye = jnp.broadcast_to(jnp.eye(n)[:, None], (2, n, 3, n))
    wide = [jnp.pad(x, [(0, 0)] * 3 + [(0, n - 8)]) for x in (q, k)]
    valid = jnp.arange(n)[None] < jnp.array([[n], [n - 5]])
    how = {"valid": valid, "scale": 8**-0.5}
    run = jax.jit(lambda key: attention(*wide, eye, dropout=(0.25, key), **how))
    found = np.moveaxis(np.asarray(run(jax.random.key(1))), 1, 2)
    whole = np.asarray(attention_rows(q, k, valid=valid))
    alive = found > 0
    np.testing.assert_allclose(found, np.where(alive, whole / 0.75, 0), rtol=1e-5, atol=1e-7)
    there = np.broadcast_to(np.asarray(valid)[:, None, None], alive.shape)
    assert not alive[~there].any() and abs(alive[there].mean() - 0.75) < 0.02
    assert alive[0, 0].any(axis=1).all() and (alive[0, 0] != alive[0, 1]).any()
    assert (np.asarray(run(jax.random.key(2))) != np.asarray(run(jax.random.key(1)))).any()


def test_cudnn_is_refused_where_it_cannot_serve():
    q, k, v, masks = draw(0)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    with pytest.raises(TokenLabError, match="needs an NVIDIA GPU, not cpu"):
        attention(*half, implementation="cudnn")
    with pytest.raises(TokenLabError, match="float32"):
        attention(q, k, v, implementation="cudnn")
    with pytest.raises(TokenLabError, match="does not take size or bias"):
        attention(*half, size=masks["size"], bias=masks["bias"], implementation="cudnn")
    with pytest.raises(TokenLabError, match='"cudnn" does not take dropout'):
        attention(*half, dropout=(0.1, jax.random.key(0)), implementation="cudnn")


def test_what_cudnn_is_given(monkeypatch):
    """Without a GPU, the arguments of the call can be tested by handing them to JAX's own XLA implementation."""
    q, k, v, masks = draw(10)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    masks["valid"][0] = False
    masks = {name: masks[name] for name in ("valid", "causal_positions", "segments")}
    original, asked = jax.nn.dot_product_attention, []

    def recorded(*arguments, implementation, mask, **options):
        asked.append((implementation, None if mask is None else mask.shape))
        return original(*arguments, mask=mask, implementation="xla", **options)

    expected = attention(*half, scale=0.5, **masks)
    everything = attention(*half)
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = attention(*half, scale=0.5, implementation="cudnn", **masks)
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=2e-2)
    np.testing.assert_array_equal(found[0], 0)
    found = attention(*half, implementation="cudnn")
    np.testing.assert_allclose(found.astype(np.float32), everything.astype(np.float32), atol=2e-2)
    assert asked == [("cudnn", (B, 1, N, M)), ("cudnn", None)]


q0, k0, v0, _ = draw(0)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"q": q0[0]}, ShapeError, "[B, N, H, Dh]"),
        ({"q": q0[..., :4]}, ShapeError, "do not fit"),
        ({"k": k0[:1]}, ShapeError, "do not fit"),
        ({"v": v0[:, :4]}, ShapeError, "one shape"),
        ({"q": q0[:, :, :3]}, ShapeError, "must be a multiple"),
        ({"k": k0.astype(int)}, ShapeError, "floats"),
        ({"size": np.ones((B, M, 1))}, ShapeError, "size"),
        ({"valid": np.ones((B, M))}, ShapeError, "valid"),
        ({"valid": np.ones((B, N), bool)}, ShapeError, "valid"),
        ({"causal_positions": np.ones((B, N), int)}, ShapeError, "causal_positions must be a tuple"),
        (
            {"causal_positions": (np.ones((B, M), int), np.ones((B, N), int))},
            ShapeError,
            "causal_positions have",
        ),
        ({"segments": (np.ones(N, int), np.ones((B, M), int))}, ShapeError, "segments have"),
        ({"bias": np.zeros((H, N, M))}, ShapeError, "bias"),
        ({"bias": np.zeros((B, G, N, M))}, ShapeError, "bias"),
        ({"bias": np.zeros((B, H, N, 1))}, ShapeError, "bias"),
        ({"window": 2}, ShapeError, "window is 2; expected at least 1, and causal_positions"),
        (
            {"window": 0, "causal_positions": (np.ones((B, N), int), np.ones((B, M), int))},
            ShapeError,
            "window is 0",
        ),
        ({"implementation": "cuda"}, TokenLabError, "Did you mean 'cudnn'"),
    ],
)
def test_rejects(change, error, says):
    arguments = {"q": q0, "k": k0, "v": v0} | change
    with pytest.raises(error) as raised:
        attention(**arguments)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    if not {"v", "implementation"} & set(change):
        del arguments["v"]
        with pytest.raises(error):
            attention_rows(**arguments)
