"""Weights for each modality: norms and projections whose parameters depend on what a token stands for.

Every modality has the parameters of one plain layer, stacked along a leading axis [M, ...]; a token meets those of its
own and no product is computed for the others. With them in every part of a block but the attention map itself a model
is a Mixture-of-Transformers (Liang et al. 2024, arXiv 2411.04996).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import get_abstract_mesh

from tokenlab.core.errors import ShapeError
from tokenlab.layers.norm import NORMS, NormName
from tokenlab.ops.dispatch import Sorted
from tokenlab.ops.grouped import grouped_matmul
from tokenlab.ops.modality import check_modality
from tokenlab.ops.spread import Bank


class NormByModality(nn.Module):
    """A norm over D whose scale, and bias, are those of the token's modality.

    Attributes:
      modalities: M.
      norm: "layer" or "rms".
      dtype: of the result; parameters stay float32.
      eps: of the norm, > 0.
    """

    modalities: int
    norm: NormName = "rms"
    dtype: Any = jnp.float32
    eps: float = 1e-6

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        return {name: (None, *axes) for name, axes in NORMS[self.norm].AXES.items()}

    @nn.compact
    def __call__(self, x: Array, modality: Array | None = None) -> Array:
        """x [B, N, ..., D], modality [B, N] -> [B, N, ..., D].

        Raises: ShapeError without modalities [B, N].
        """
        modality = _needed(modality, x, making=self.is_initializing())
        plain = NORMS[self.norm](jnp.float32, self.eps)
        width = (x.shape[-1],)
        still = {name: jnp.full(width, float(name == "scale")) for name in plain.AXES}
        y = plain.apply({"params": still}, x)
        shape = (self.modalities, *width)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        y = y * _own(scale, modality, x.ndim)
        if "bias" in plain.AXES:
            y = y + _own(self.param("bias", nn.initializers.zeros, shape, jnp.float32), modality, x.ndim)
        return y.astype(self.dtype)


def project(
    owner: nn.Module,
    x: Array,
    modality: Array | None,
    outputs: Mapping[str, tuple[int, ...]],
    modalities: int,
    *,
    inputs: int = 1,
    axes: tuple[str | None, str | None] = ("embed", "heads"),
    use_bias: bool = False,
    valid: Array | None = None,
    dtype: Any = jnp.float32,
) -> dict[str, Array]:
    """Linear layers with a matrix for each modality: rows are sorted by it and meet one matrix each.

    Call it inside `nn.compact`. Parameters are `name/kernel` [M, *inputs, *outputs] and `name/bias` [M, *outputs].

    Args:
      owner: the module that holds the weights.
      x: [B, N, *inputs].
      modality: [B, N], a whole number in 0..M - 1. Tokens of any other, which only padding may have where it can be
        seen, get zeros.
      outputs: name -> trailing shape of what it gives.
      modalities: M.
      inputs: how many trailing axes of x are summed over.
      axes: logical axes of what is summed over and of what is given, see `Attention.axes`.
      use_bias: add one.
      valid: [B, N] bool, False for padding, of which the modality does not matter.
      dtype: of computation and result.

    Returns: name -> [B, N, *outputs].
    """
    modality = _needed(modality, x, making=owner.is_initializing())
    check_modality(modality, x.shape[:2], modalities, valid)
    taken = x.shape[-inputs:]
    kernels, biases = {}, {}
    for name, shape in outputs.items():
        held = owner.param(name, _init(taken, shape, modalities, use_bias))
        kernels[name] = held["kernel"].reshape(modalities, math.prod(taken), -1).astype(dtype)
        if use_bias:
            biases[name] = held["bias"].reshape(modalities, -1)

    def groups(params: Mapping[str, Array], rows: Array, sizes: Array) -> Array:
        # By name: what passes a `jax.shard_map` comes back in the order of the alphabet.
        return jnp.concatenate([grouped_matmul(rows, params[name], sizes) for name in outputs], axis=-1)

    known = (modality >= 0) & (modality < modalities)
    own = jnp.where(known, modality, modalities)[..., None].astype(jnp.int32)
    plan = Sorted(own, jnp.ones(own.shape), modalities, everywhere=True)
    rows = x.reshape(*x.shape[:2], -1).astype(dtype)
    if owner.is_initializing() and not get_abstract_mesh().empty:
        # The one example that parameters are made with cannot be split over a mesh.
        y = jnp.zeros((*x.shape[:2], sum(math.prod(shape) for shape in outputs.values())), dtype)
    else:
        y = plan.run(Bank(kernels, groups, groups, axes=dict.fromkeys(kernels, axes)), rows)
    found, start = {}, 0
    for name, shape in outputs.items():
        part = y[..., start : start + math.prod(shape)]
        start += math.prod(shape)
        if use_bias:
            part = part + _own(biases[name], modality, 3).astype(dtype)
        found[name] = part.reshape(*x.shape[:2], *shape)
    return found


def _needed(modality: Array | None, x: Array, *, making: bool = False) -> Array:
    """The modality [B, N] of tokens x [B, N, ...]; zeros while parameters are made. Raises ShapeError without it."""
    if modality is None and making:
        return jnp.zeros(x.shape[:2], jnp.int32)
    if modality is None:
        raise ShapeError(
            "a layer with weights for each modality got none; expected [B, N], 0 for text and 1 for images (a batch's "
            "'modality')."
        )
    if modality.shape != x.shape[:2]:
        raise ShapeError(
            f"modality is {modality.dtype}{list(modality.shape)}; expected [B, N] = {list(x.shape[:2])}."
        )
    return modality


def _init(taken: tuple[int, ...], shape: tuple[int, ...], modalities: int, use_bias: bool) -> Any:
    """Every modality's kernel drawn as that of a plain layer."""

    def init(key: Array) -> dict[str, Array]:
        flat = (math.prod(taken), math.prod(shape))
        drawn = jax.vmap(lambda one: nn.initializers.xavier_uniform()(one, flat, jnp.float32))
        kernel = drawn(jax.random.split(key, modalities)).reshape(modalities, *taken, *shape)
        return {"kernel": kernel} | ({"bias": jnp.zeros((modalities, *shape))} if use_bias else {})

    return init


def _own(leaf: Array, modality: Array, axes: int) -> Array:
    """leaf [M, D] of each token, with `axes` axes in all: [B, N, 1, ..., D]. A small product, whose gradient is one."""
    each = jax.nn.one_hot(modality, leaf.shape[0], dtype=leaf.dtype) @ leaf
    return each.reshape(*modality.shape, *([1] * (axes - 3)), leaf.shape[-1])
