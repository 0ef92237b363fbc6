"""Tiny decoder language models for tests, and one block of theirs written again in plain numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab import models

VOCABULARY = 37


def build(
    stack: str,
    length: int = 24,
    *,
    train: bool = False,
    outputs: int = VOCABULARY,
    modal: bool = False,
    **settings: Any,
):
    """A decoder of width 16 over the stack, for sequences of `length`; without `train_only` items."""
    settings = {"size": "nano", **settings}
    spec = {"ids": ((length,), "int32")} | ({"modality": ((length,), "int32")} if modal else {})
    return models.build(
        {"name": "decoder_lm", "stack": stack, **settings}, spec=spec, num_outputs=outputs, train=train
    )


def weights(model: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Weights drawn at random, none of them zero: those of norms around one, biases small."""
    draws = np.random.default_rng(seed)

    def drawn(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        around, spread = float(name == "scale"), scale / 5 if "bias" in name else scale
        return jnp.asarray(around + spread * draws.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(drawn, model.abstract_state())


def ids(batch: int, length: int = 24, seed: int = 0) -> jax.Array:
    """[B, N] int32 of the vocabulary."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)), jnp.int32)


def entry(state: Any, kind: str, index: int) -> Any:
    """The weights of block `index` under `kind`, in float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[index], np.float64), state["blocks"][kind])


def rms(x: np.ndarray, scale: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """x / sqrt(mean of squares) * scale."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def turned(x: np.ndarray, position: np.ndarray, theta: float = 10_000.0) -> np.ndarray:
    """x [K, H, Dh] with the pairs (i, i + Dh / 2) turned by position [K] times theta^(-2 i / Dh)."""
    half = x.shape[-1] // 2
    angle = position[:, None, None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
    )


def attend(state: Any, index: int, x: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The attention half of pre-norm block `index` on one sequence, token by token, causal by position.

    x [K, D] of the tokens that are in it, position [K] where each stands in the full sequence; returns [K, D].
    """
    own = entry(state, "attention", index)
    normed = rms(x, entry(state, "attention_norm", index)["scale"])
    query, key, value = (
        np.einsum("kd,dhe->khe", normed, own[name]["kernel"]) for name in ("query", "key", "value")
    )
    query, key = turned(query, position), turned(key, position)
    shared = query.shape[1] // key.shape[1]
    mixed = np.zeros_like(query)
    for i in range(len(x)):
        seen = [j for j in range(len(x)) if position[j] <= position[i]]
        for h in range(query.shape[1]):
            logit = key[seen, h // shared] @ query[i, h] / np.sqrt(query.shape[-1])
            weight = np.exp(logit - logit.max())
            mixed[i, h] = weight / weight.sum() @ value[seen, h // shared]
    return x + np.einsum("khe,hed->kd", mixed, own["out"]["kernel"])


def feed(state: Any, index: int, x: np.ndarray) -> np.ndarray:
    """The feed-forward half of pre-norm block `index`, a SwiGLU: [K, D] -> [K, D]."""
    own = entry(state, "swiglu", index)
    normed = rms(x, entry(state, "ffn_norm", index)["scale"])
    gate, up = normed @ own["gate"]["kernel"], normed @ own["up"]["kernel"]
    return x + (gate / (1 + np.exp(-gate)) * up) @ own["down"]["kernel"]


def block(state: Any, index: int, x: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Both halves."""
    return feed(state, index, attend(state, index, x, position))


def head(state: Any, x: np.ndarray) -> np.ndarray:
    """Logits [K, V] of features [K, D], untied."""
    kernel = np.asarray(state["head"]["kernel"], np.float64)
    return rms(x, np.asarray(state["head"]["norm"]["scale"], np.float64)) @ kernel
