"""Multi-head self-attention over tokens that carry their own positions, sizes and validity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ShapeError
from tokenlab.core.tokens import Tokens
from tokenlab.layers import by_modality
from tokenlab.layers.initialize import kernel_initializer
from tokenlab.layers.norm import NormName
from tokenlab.ops import attention as ops
from tokenlab.ops.cache import KVCache, Stacked
from tokenlab.ops.position import rope
from tokenlab.sharding.constrain import constrain, splits


class Projections(NamedTuple):
    """Queries [B, N, H, Dh], keys and values [B, N, G, Dh] (G key heads), after qk-norm and rotary positions."""

    query: Array
    key: Array
    value: Array


class Seen(NamedTuple):
    """M tokens that are seen and do not look: the keys and values of queries that are others.

    Attributes are those of `tokenlab.core.tokens.Tokens`, of which x [B, M, D] is needed always.
    """

    x: Array
    coords: Array | None = None
    size: Array | None = None
    valid: Array | None = None
    position: Array | None = None
    segment: Array | None = None
    modality: Array | None = None


Reading: TypeAlias = Callable[[Projections, Tokens], Array]
"""What an item wants to know of the attention before it, from projections and tokens, without the full map."""


def cls_attention(projections: Projections, tokens: Tokens) -> Array:
    """Attention of the first token (CLS) to every token, averaged over heads: [B, N], float32, rows sum to 1.

    Only the one row is computed: 2*H*Dh*N multiply-adds' FLOPs an example instead of N times that.
    Source: EViT (Liang et al. 2022, arXiv 2202.07800), section 3.1.
    """
    rows = ops.attention_rows(projections.query[:, :1], projections.key, size=tokens.size, valid=tokens.valid)
    return rows[:, :, 0].mean(axis=1)


def special_attention(projections: Projections, tokens: Tokens) -> Array:
    """Attention of the special tokens in front to every token, averaged over heads and over them: [B, N], float32.

    Only their J rows are computed. Source: the maps that Jumbo (arXiv 2502.15021) is shown with, of its pieces.

    Raises:
      ShapeError: there is no special token.
    """
    if tokens.protected < 1:
        raise ShapeError(
            "special_attention: these tokens have no special one in front; give the model registers."
        )
    query = projections.query[:, : tokens.protected]
    rows = ops.attention_rows(query, projections.key, size=tokens.size, valid=tokens.valid)
    return rows.mean(axis=(1, 2))


def mean_key(projections: Projections, tokens: Tokens) -> Array:
    """Keys averaged over heads, [B, N, Dh], float32: the similarity metric of ToMe (arXiv 2210.09461, 3.2)."""
    del tokens
    return projections.key.astype(jnp.float32).mean(axis=2)


class Attention(nn.Module):
    """Self-attention with optional grouped-query heads, qk-norm and rotary positions; also of tokens to others.

    Works on plain arrays: `Attention(num_heads=6)(x)` with x [B, N, D] gives [B, N, D].

    Attributes:
      num_heads: H; D must be a multiple of it unless `head_dim` is given.
      num_kv_heads: G key and value heads; H must be a multiple of it. None: G = H.
      head_dim: Dh. None: D / H.
      qk_norm: norm queries and keys over Dh (ViT-22B, arXiv 2302.05442).
      norm: which norm that is, "layer" or "rms".
      use_bias: biases in the four projections.
      rope_theta: base of rotary positions read from `coords`; None for none.
      causal: a token sees those at its own `position` and before.
      window: of a causal layer: a token sees none `window` or more positions before its own; None for all.
      modalities: M, weights of projections and of qk-norm for each modality; 0 for one set for all.
      kernel_std: standard deviation of the normal, cut off at two, that kernels start from (BERT's is 0.02); None for
        Glorot's uniform one.
      dropout: rate in [0, 1) at which weights of the softmax are dropped where there is a key for it.
      dtype: compute dtype; parameters stay float32, logits and softmax are computed in float32.
      implementation: of the attention itself, see `tokenlab.ops.attention.attention`.

    Raises:
      ShapeError: the head sizes do not divide, rotary positions are wanted without `coords`, a causal layer or a
        memory without `position`, or weights for each modality without `modality`.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    norm: NormName = "layer"
    use_bias: bool = True
    rope_theta: float | None = None
    causal: bool = False
    window: int | None = None
    modalities: int = 0
    kernel_std: float | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32
    implementation: str | None = None

    AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "query/kernel": ("embed", "heads", None),
        "query/bias": ("heads", None),
        "key/kernel": ("embed", "heads", None),
        "key/bias": ("heads", None),
        "value/kernel": ("embed", "heads", None),
        "value/bias": ("heads", None),
        "out/kernel": ("heads", None, "embed"),
        "out/bias": (None,),
    }
    QK_NORM_AXES: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        "query_norm/scale": (None,),
        "query_norm/bias": (None,),
        "key_norm/scale": (None,),
        "key_norm/bias": (None,),
    }

    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Logical axes of the parameters, for `tokenlab.sharding.rules`."""
        found = {**self.AXES, **(self.QK_NORM_AXES if self.qk_norm else {})}
        without = [
            name for name in found if not self.use_bias and name in self.AXES and name.endswith("/bias")
        ]
        if self.norm == "rms":
            without += [name for name in found if name.endswith("_norm/bias")]
        stacked = (None,) if self.modalities else ()
        return {name: (*stacked, *axes) for name, axes in found.items() if name not in without}

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        coords: Array | None = None,
        size: Array | None = None,
        valid: Array | None = None,
        position: Array | None = None,
        segment: Array | None = None,
        modality: Array | None = None,
        memory: KVCache | Stacked | None = None,
        seen: Seen | None = None,
        dropout_key: Array | None = None,
        projections: bool = False,
    ) -> Array | tuple[Array, Projections] | tuple[Array, KVCache | Stacked]:
        """Mix tokens.

        Args:
          x: [B, N, D].
          coords: [B, N] or [B, N, A], positions for RoPE; needed with `rope_theta`.
          size: [B, N], how many inputs each token stands for: log(size) is added to the logits of its key.
          valid: [B, N], False for padding, which no query sees.
          position: [B, N] int, index in the full sequence; needed by a causal layer.
          segment: [B, N] int, documents packed into one sequence: a token sees those of its own.
          modality: [B, N] int, what tokens stand for; needed with `modalities`.
          memory: keys and values of tokens before these (no segments, no sizes). The valid ones of x are put into it,
            and every token sees what it holds at its own position and before.
          seen: the tokens that x looks at, instead of at itself; only queries are made of x then, and only keys and
            values of them. The facts that x would lend its keys (`size`, `valid`) are not read. Not with `memory`.
          dropout_key: key of this layer at this step, in training with `dropout`; None drops nothing.
          projections: also return the `Projections`, for the readings of the item that follows.

        Returns:
          [B, N, D] in the compute dtype; with `projections` a pair, with `memory` a pair of it and the new memory.
        """
        width = x.shape[-1]
        heads, groups = self.num_heads, self.num_kv_heads or self.num_heads
        if self.head_dim is None and width % heads:
            raise ShapeError(
                f"attention: width {width} is not a multiple of num_heads {heads}; give head_dim."
            )
        if heads % groups:
            raise ShapeError(f"attention: num_heads {heads} is not a multiple of num_kv_heads {groups}.")
        size_of_head = self.head_dim or width // heads

        if seen is not None and memory is not None:
            raise ShapeError("attention: tokens that are seen and a memory cannot both be what is looked at.")
        looked = Seen(x, coords, size, valid, position, segment, modality) if seen is None else seen
        how = {"use_bias": self.use_bias, "dtype": self.dtype}
        init = kernel_initializer(self.kernel_std)

        def project(of: Array, name: str, count: int) -> Array:
            return nn.DenseGeneral((count, size_of_head), kernel_init=init, name=name, **how)(of)

        counts = {"query": heads, "key": groups, "value": groups}
        whose = {"query": x, "key": looked.x, "value": looked.x}
        with jax.named_scope("projections"):
            if self.modalities:
                shapes = {name: (count, size_of_head) for name, count in counts.items()}
                of = {"valid": valid, **how}
                if seen is None:
                    made = by_modality.project(self, x, modality, shapes, self.modalities, **of)
                else:
                    first = {"query": shapes.pop("query")}
                    made = by_modality.project(self, x, modality, first, self.modalities, **of)
                    of["valid"] = seen.valid
                    made |= by_modality.project(self, seen.x, seen.modality, shapes, self.modalities, **of)
            else:
                made = {name: project(whose[name], name, count) for name, count in counts.items()}
        query, key, value = made.values()
        if self.qk_norm and self.modalities:
            own = {"norm": self.norm, "dtype": self.dtype}
            query, key = (
                by_modality.NormByModality(self.modalities, name=f"{name}_norm", **own)(made[name], kind)
                for name, kind in (("query", modality), ("key", looked.modality))
            )
        elif self.qk_norm:
            kind = nn.LayerNorm if self.norm == "layer" else nn.RMSNorm
            own = {"epsilon": 1e-6, "dtype": self.dtype, "use_fast_variance": False}
            query, key = kind(name="query_norm", **own)(query), kind(name="key_norm", **own)(key)
        if self.rope_theta is not None:
            if coords is None or looked.coords is None:
                raise ShapeError("attention: rotary positions need coords [B, N, A], got None.")
            query = rope(query, coords, self.rope_theta)
            key = rope(key, looked.coords, self.rope_theta)
        lacking = position is None or looked.position is None
        if lacking and (self.causal or memory is not None):
            raise ShapeError("attention: a causal layer needs the positions of its tokens [B, N], got None.")
        with jax.named_scope("maps"):
            masks: dict[str, Any] = {"size": looked.size, "valid": looked.valid}
            keys, values = key, value
            if memory is not None:
                memory = memory.insert(key, value, position, valid)
                keys, values = (
                    jnp.moveaxis(held, 1, 2).astype(key.dtype) for held in (memory.key, memory.value)
                )
                masks = {"causal_positions": (position, memory.position), "window": self.window}
            elif self.causal:
                masks |= {"causal_positions": (position, looked.position), "window": self.window}
            if segment is not None:
                masks["segments"] = (segment, looked.segment)
            if dropout_key is not None:
                masks["dropout"] = (self.dropout, dropout_key)
            if splits("sequence") and not self.is_initializing():  # parameters are made with a single example
                # Each device asks for its own tokens, and needs the keys and values of all.
                query = constrain(query, "batch", "sequence", ..., ...)
                keys, values = (constrain(each, "batch", None, ..., ...) for each in (keys, values))
            mixed = ops.attention(query, keys, values, implementation=self.implementation, **masks)
        with jax.named_scope("projections"):
            if self.modalities:
                out = by_modality.project(
                    self,
                    mixed,
                    modality,
                    {"out": (width,)},
                    self.modalities,
                    inputs=2,
                    axes=("heads", "embed"),
                    valid=valid,
                    **how,
                )["out"]
            else:
                out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, name="out", **how)(mixed)
        if memory is not None:
            return out, memory
        return (out, Projections(query, key, value)) if projections else out
