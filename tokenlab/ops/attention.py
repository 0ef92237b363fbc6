"""Softmax attention over a static number of tokens, with all masks composed in one place.

Logits and softmax are float32 whatever the dtype of the inputs. A hidden key has the logit -inf and exactly no
weight; a query that sees no key at all gives zeros, with zero gradients, never NaN.

Layout: public arrays are [B, N, H, Dh]. Inside, heads go before tokens and the product with v is divided by the
softmax sum afterwards, which saves a pass over the [N, M] map. Best of 7 on two CPU cores (B 8, N 197, H 6, Dh 64,
float32, jax 0.10.2): 4.3 ms forward and 19 ms with the backward pass, where einsums straight on [B, N, H, Dh] around
a plain softmax take 10 ms and 25 ms. Key masks cost nothing measurable. Measured with

    python -m timeit -n 10 -r 7 \\
      -s "import jax; from tokenlab.ops.attention import attention as a" \\
      -s "q = jax.numpy.ones((8, 197, 6, 64)); f = jax.jit(a); f(q, q, q)" "jax.block_until_ready(f(q, q, q))"

and, for both passes, with f = jax.jit(lambda q, k, v: jax.vjp(a, q, k, v)[1](q)).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from tokenlab.core.errors import ShapeError, TokenLabError, suggest
from tokenlab.sharding.constrain import splits
from tokenlab.sharding.target import target_platform

Implementation = Literal["xla", "cudnn"]
IMPLEMENTATIONS = ("xla", "cudnn")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    size: jax.Array | None = None,
    valid: jax.Array | None = None,
    causal_positions: tuple[jax.Array, jax.Array] | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    dropout: tuple[float, jax.Array] | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + bias) v over the keys that each query may see.

    Args:
      q: [B, N, H, Dh] float.
      k, v: [B, M, G, Dh] with H a multiple of G: query head h reads key head h // (H / G) (grouped-query attention).
      size: [B, M], how many inputs each key stands for, >= 0: proportional attention, log(size) is added to the logits
        (ToMe, arXiv 2210.09461, eq. 1), so that a merged key weighs as much as the tokens in it; size 0 is hidden.
      valid: [B, M] bool, False hides a key (padding).
      causal_positions: (positions of the queries [B, N], of the keys [B, M]), int: a query sees keys at its own
        position and before. Positions are those the tokens carry, in any order and with gaps.
      segments: (segment of the queries [B, N], of the keys [B, M]), int: a query sees keys of its own segment.
      window: with `causal_positions`, a query sees no key `window` or more positions before its own (sliding window,
        Beltagy et al. 2020, arXiv 2004.05150); at least 1.
      bias: [B or 1, H or 1, N or 1, M] float, added to the scaled logits; -inf hides.
      scale: of the logits; None is 1 / sqrt(Dh).
      dropout: (rate in [0, 1), key): each weight of the softmax is dropped with that probability, and the others are
        scaled by 1 / (1 - rate), as BERT does (Devlin et al. 2019, arXiv 1810.04805).
      implementation: None or "xla" works everywhere. "cudnn" is jax.nn.dot_product_attention's flash attention: on a
        GPU, bfloat16 or float16, without size, bias and dropout; anything else is an error, not another implementation.

    Returns: [B, N, H, Dh] in q's dtype.

    Raises: ShapeError for wrong shapes or dtypes, TokenLabError for an implementation that is unknown or cannot serve.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    _check_heads(q, k)
    if v.shape != k.shape:
        raise ShapeError(f"k {k.shape} and v {v.shape} must have one shape [B, M, G, Dh].")
    masks = {
        "valid": valid,
        "causal_positions": causal_positions,
        "segments": segments,
        "window": window,
    }
    _check_masks(q, k, size=size, bias=bias, **masks)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise TokenLabError(
            f"implementation is {implementation!r}.{suggest(str(implementation), IMPLEMENTATIONS)}"
        )
    if implementation == "cudnn":
        own = {"size": size, "bias": bias, "dropout": dropout}
        return _cudnn(q, k, v, own, visible=visible_keys(**masks), scale=scale)
    weights, total = _weights(q, k, attention_bias(size=size, bias=bias, **masks), scale)
    if dropout is not None:
        rate, key = dropout
        weights = jnp.where(jax.random.bernoulli(key, 1 - rate, weights.shape), weights / (1 - rate), 0.0)
    batch, n, heads, _ = q.shape
    m, groups = k.shape[1:3]
    # The weights enter the product in v's dtype (bfloat16 on an accelerator) and add up in float32.
    grouped = weights.astype(v.dtype).reshape(batch, groups, *_queries(heads // groups, n), m)
    y = jnp.einsum("bg...m,bgmd->bg...d", grouped, jnp.moveaxis(v, 1, 2), preferred_element_type=jnp.float32)
    y = y.reshape(batch, heads, n, -1) / total
    return jnp.moveaxis(y, 1, 2).astype(q.dtype)


def attention_rows(
    q: jax.Array,
    k: jax.Array,
    *,
    size: jax.Array | None = None,
    valid: jax.Array | None = None,
    causal_positions: tuple[jax.Array, jax.Array] | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """The rows of the attention map for R chosen queries, without the other N - R.

    With q the CLS query ([B, 1, H, Dh]) this is what CLS-attention scores are made of, at 1/N of the cost of the map.

    Args: as `attention`, with q [B, R, H, Dh]; the masks of queries have R entries.

    Returns: [B, H, R, M] float32. Rows sum to 1, or to 0 where no key is visible.

    Raises: ShapeError for wrong shapes or dtypes.
    """
    q, k = jnp.asarray(q), jnp.asarray(k)
    _check_heads(q, k)
    masks = {
        "size": size,
        "valid": valid,
        "causal_positions": causal_positions,
        "segments": segments,
        "window": window,
        "bias": bias,
    }
    _check_masks(q, k, **masks)
    weights, total = _weights(q, k, attention_bias(**masks), scale)
    return weights / total


def visible_keys(
    *,
    valid: jax.Array | None = None,
    causal_positions: tuple[jax.Array, jax.Array] | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
) -> jax.Array | None:
    """Which keys each query sees, as the conjunction of the masks: [B, 1, N or 1, M] bool, None for all.

    The arguments are those of `attention`.
    """
    masks = []
    if valid is not None:
        masks.append(jnp.asarray(valid)[:, None, None, :])
    if causal_positions is not None:
        query, key = (jnp.asarray(positions) for positions in causal_positions)
        ahead = query[:, :, None] - key[:, None, :]
        masks.append((ahead >= 0 if window is None else (ahead >= 0) & (ahead < window))[:, None])
    if segments is not None:
        query, key = (jnp.asarray(segment) for segment in segments)
        masks.append((query[:, :, None] == key[:, None, :])[:, None])
    visible = None
    for mask in masks:
        visible = mask if visible is None else visible & mask
    return visible


def attention_bias(
    *,
    size: jax.Array | None = None,
    valid: jax.Array | None = None,
    causal_positions: tuple[jax.Array, jax.Array] | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
    bias: jax.Array | None = None,
) -> jax.Array | None:
    """Everything that is added to the logits, as one float32 array: bias + log(size), and -inf for hidden keys.

    Shape [B or 1, H or 1, N or 1, M], as small as the masks allow; None when there is nothing to add. The arguments
    are those of `attention`.
    """
    added = None if bias is None else jnp.asarray(bias).astype(jnp.float32)
    visible = visible_keys(valid=valid, causal_positions=causal_positions, segments=segments, window=window)
    if size is not None:
        size = jnp.asarray(size).astype(jnp.float32)[:, None, None, :]
        # The inner where keeps the gradient of log finite at size 0.
        logarithm = jnp.where(size > 0, jnp.log(jnp.where(size > 0, size, 1.0)), -jnp.inf)
        added = logarithm if added is None else added + logarithm
    if visible is None:
        return added
    return jnp.where(visible, 0.0 if added is None else added, -jnp.inf)


def _weights(
    q: jax.Array, k: jax.Array, bias: jax.Array | None, scale: float | None
) -> tuple[jax.Array, jax.Array]:
    """exp(logits - max) [B, H, N, M], and their sums over M [B, H, N, 1], 1 where no key is visible."""
    batch, n, heads, width = q.shape
    m, groups = k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    # In float32 q is scaled, not the logits: XLA contracts scale * logit - max to one rounding, but only in a program
    # without bias, so a bias of zeros would change bits. In bfloat16 scaling q would round it once more.
    if q.dtype == jnp.float32:
        q = q * scale
    q = jnp.moveaxis(q, 1, 2).reshape(batch, groups, *_queries(heads // groups, n), width)
    logits = jnp.einsum("bg...d,bgmd->bg...m", q, jnp.moveaxis(k, 1, 2), preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, n, m)
    if q.dtype != jnp.float32:
        logits = logits * scale
    if bias is not None:
        logits = logits + bias
    # The result does not depend on the maximum, so it needs no gradient. It is kept finite because -inf - (-inf)
    # in a row without a visible key would be NaN; exp(-inf - finite) is 0, as it should be.
    largest = jax.lax.stop_gradient(logits).max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.maximum(largest, jnp.finfo(jnp.float32).min))
    # Where a key is visible the sum is at least exp(0) = 1, and adding 1e-10 to it changes no bit; where none is, it
    # makes 0/0 a 0 with finite gradients. A `where` in its place doubles the time of the forward pass on the CPU.
    return weights, weights.sum(axis=-1, keepdims=True) + 1e-10


def _queries(heads: int, n: int) -> tuple[int, ...]:
    """Sizes of the queries of one key head: side by side, but apart where the mesh splits the n tokens."""
    return (heads, n) if splits("sequence") else (heads * n,)


def _cudnn(q, k, v, more, *, visible, scale) -> jax.Array:
    unsupported = [name for name, given in more.items() if given is not None]
    if unsupported:
        raise TokenLabError(
            f'implementation "cudnn" does not take {" or ".join(unsupported)}; use "xla" or None.'
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float16)):
        raise TokenLabError(
            f'implementation "cudnn" takes bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}; cast, or use None.'
        )
    if target_platform() != "gpu":
        raise TokenLabError(
            f'implementation "cudnn" needs an NVIDIA GPU, not {target_platform()}; use "xla" or None.'
        )
    if visible is not None:
        visible = jnp.broadcast_to(visible, (q.shape[0], 1, q.shape[1], k.shape[1]))
    y = jax.nn.dot_product_attention(q, k, v, mask=visible, scale=scale, implementation="cudnn")
    if visible is None:
        return y
    # cuDNN hides with a large negative number, so a query that sees nothing would average over everything.
    return jnp.where(visible.any(axis=-1)[:, 0, :, None, None], y, 0)


def _check_heads(q: jax.Array, k: jax.Array) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(f"q {q.shape} and k {k.shape} do not fit; expected [B, N, H, Dh] and [B, M, G, Dh].")
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, k)):
        raise ShapeError(f"q is {q.dtype} and k is {k.dtype}; attention takes floats.")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ShapeError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads; the first must be a multiple."
        )


def _check_masks(q, k, *, size, valid, causal_positions, segments, window, bias) -> None:
    batch, n, heads, _ = q.shape
    m = k.shape[1]
    if window is not None and (causal_positions is None or not window >= 1):
        raise ShapeError(
            f"window is {window!r}; expected at least 1, and causal_positions, which it counts in."
        )
    if size is not None and jnp.shape(size) != (batch, m):
        raise ShapeError(f"size has shape {jnp.shape(size)}; expected [B, M] = {(batch, m)}, one a key.")
    if valid is not None and (jnp.shape(valid) != (batch, m) or jnp.result_type(valid) != jnp.bool_):
        raise ShapeError(
            f"valid is {jnp.result_type(valid)}{list(jnp.shape(valid))}; expected bool{[batch, m]}, False for padding."
        )
    for name, pair in (("causal_positions", causal_positions), ("segments", segments)):
        if pair is None:
            continue
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ShapeError(f"{name} must be a tuple (of the queries [B, N], of the keys [B, M]).")
        shapes = tuple(jnp.shape(x) for x in pair)
        if shapes != ((batch, n), (batch, m)):
            raise ShapeError(
                f"{name} have shapes {shapes}; expected [B, N] and [B, M] = {((batch, n), (batch, m))}."
            )
    if bias is not None:
        shape = jnp.shape(bias)
        full = (batch, heads, n, m)
        if len(shape) != 4 or shape[3] != m or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
            raise ShapeError(
                f"bias has shape {shape}; it must broadcast to [B, H, N, M] = {full}, the last one given."
            )
