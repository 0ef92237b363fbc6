"""encoder_lm: an encoder language model, BERT (Devlin et al. 2019, arXiv 1810.04805), over any stack.

    tokens = embed(ids)            word + position + type, layer norm -> [B, N, D]
    tokens = stack(tokens)         block*12, block*4 + keep(0.5, by=cls) + block*8, ...
    logits = head(tokens)          of hidden tokens over the vocabulary, or of a text over classes

Every token sees every other one of its document; padding is seen by none. The first token is CLS and is protected: no
item drops or merges it. Items find the ids that the model sees in `tokens.extra["ids"]` [B, N] int32 and padding in
`tokens.valid`. The weights are {"embed", "blocks", "items", "head"}.

With config.model.head="masked_lm" the logits are of the places in the batch's "predict" [B, K], and of no other: the
product with the vocabulary is K / N of what it would be. With "classify" they are of the pooled first token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from tokenlab.core.errors import ConfigError, ShapeError, suggest
from tokenlab.core.tokens import Tokens
from tokenlab.layers.activation import activation
from tokenlab.layers.attention import Attention
from tokenlab.layers.block import Block, dropout
from tokenlab.layers.build_program import build_program
from tokenlab.layers.context import Context
from tokenlab.layers.ffn import FFNDefaults
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.layers.norm import NORMS, NormPlacement
from tokenlab.layers.output import Output
from tokenlab.layers.program import ItemStep, Program
from tokenlab.layers.statistics import Vocabulary
from tokenlab.layers.vocabulary import EncoderEmbed, MaskedLMHead, PooledHead
from tokenlab.models import Names
from tokenlab.models.trunk import Execution, Remat, Trunk
from tokenlab.ops.gather import gather
from tokenlab.sharding.constrain import constrain

SIZES: Mapping[str, tuple[int, int, int, int]] = {
    # name: width D, depth L, hidden F, heads H
    "nano": (16, 2, 32, 2),
    "micro": (32, 4, 128, 2),
    "toy": (128, 6, 512, 4),
    "tiny": (128, 2, 512, 2),
    "mini": (256, 4, 1024, 4),
    "small": (512, 4, 2048, 8),
    "medium": (512, 8, 2048, 8),
    "base": (768, 12, 3072, 12),
    "large": (1024, 24, 4096, 16),
}
"""Toys first; tiny to medium of Turc et al. 2019 (arXiv 1908.08962, table 1), base and large of Devlin et al. 2019."""


@dataclass(frozen=True)
class EncoderLMConfig:
    """Settings of an encoder language model; None takes what the size says.

    Attributes:
      size: a row of `SIZES`.
      stack: the depth as an expression; None for `block*L`.
      width, num_heads, mlp_dim: in place of the size's D, H, F.
      head: "masked_lm" guesses hidden tokens, "classify" says of which class a text is.
      vocab_size: ids that the table of words has; needed by "classify", whose data has classes instead. None takes
        those of the data. It is that of the run whose weights are loaded.
      vocab_multiple: the table has a multiple of so many rows, so that a mesh can split it.
      positions: places that have an embedding, N or more; None for N. Set it to that of the run whose weights are
        loaded where that had longer examples.
      types: kinds of segments ("type" of a batch) that have an embedding; 0 for none.
      norm_placement: of each half of a block, "post" norms the sum, as BERT does, "pre" what the half reads,
        "res_post" what it adds. All but "post" norm once more before the head.
      norm_eps: eps of all norms, > 0.
      activation: "gelu" (exact), "gelu_tanh", "relu" or "silu", in blocks and head.
      dropout: rate in training, in [0, 1): of the embedding, of what each half of a block adds and of what the
        classifier reads.
      attention_dropout: rate in training, in [0, 1), of single weights of attention; not with `attention` "cudnn".
      kernel_std: standard deviation of fresh kernels and tables, > 0.
      always_kept, first_dropped: ids whose tokens an item that ranks by ids (`by=importance`) drops last, and first:
        those of the special tokens. With the byte tokenizer (256, 258, 259) and (257,).
      dtype: "float32" or "bfloat16" for computation; parameters, softmax, norms and losses are float32 always.
      execution: "auto", "scan" or "unroll".
      remat: "none", "full" or "dots".
      attention: implementation of attention: None, "xla" or "cudnn".
    """

    size: str = "toy"
    stack: str | None = None
    width: int | None = None
    num_heads: int | None = None
    mlp_dim: int | None = None
    head: Literal["masked_lm", "classify"] = "masked_lm"
    vocab_size: int | None = None
    vocab_multiple: int = 1
    positions: int | None = None
    types: int = 2
    norm_placement: NormPlacement = "post"
    norm_eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    kernel_std: float = 0.02
    always_kept: tuple[int, ...] = ()
    first_dropped: tuple[int, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    execution: Execution = "auto"
    remat: Remat = "none"
    attention: Literal["xla", "cudnn"] | None = None

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"config.model.size {self.size!r} is unknown.{suggest(self.size, SIZES)}")
        for name in ("width", "num_heads", "mlp_dim", "vocab_size", "vocab_multiple", "positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"config.model.{name} must be at least 1; got {value}.")
        for name in ("norm_eps", "kernel_std"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"config.model.{name} must be above 0; got {getattr(self, name)}.")
        if self.types < 0:
            raise ConfigError(f"config.model.types must be at least 0; got {self.types}.")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"config.model.{name} must be in [0, 1); got {getattr(self, name)}.")
        if self.attention_dropout and self.attention == "cudnn":
            raise ConfigError(
                f"config.model.attention_dropout is {self.attention_dropout}, and config.model.attention 'cudnn' drops "
                "no weights: expected 0, or config.model.attention 'xla'."
            )
        activation(self.activation)
        width, _, _, heads = self.dims()
        if width % heads:
            raise ConfigError(
                f"config.model: width {width}, num_heads {heads}: width must be a multiple of num_heads."
            )

    def dims(self) -> tuple[int, int, int, int]:
        """Width D, depth L of the size, hidden F, heads H."""
        width, depth, hidden, heads = SIZES[self.size]
        chosen = self.width or width
        return chosen, depth, self.mlp_dim or round(chosen * hidden / width), self.num_heads or heads


@dataclass(frozen=True, eq=False)
class EncoderLM(Trunk):
    """An encoder language model for sequences of N tokens, the first of which is CLS.

    Attributes:
      settings: see `EncoderLMConfig`.
      length: N.
      num_outputs: ids in the vocabulary, or classes.
      stack_vars: numbers that names in the stack stand for.
      train: False takes `train_only` items out of the stack.

    Raises (when built):
      StackError, ConfigError, ShapeError, NameLookupError: settings that do not fit each other or the data.
    """

    settings: EncoderLMConfig
    length: int
    num_outputs: int
    stack_vars: Mapping[str, int | float]
    train: bool = True

    def __post_init__(self) -> None:
        s = self.settings
        if s.positions is not None and s.positions < self.length:
            raise ConfigError(
                f"config.model.positions is {s.positions}, and examples have {self.length} tokens: expected at least "
                "so many."
            )
        if s.head == "classify" and s.vocab_size is None:
            raise ConfigError(
                "config.model.vocab_size is None: a model with config.model.head='classify' must be told how many ids "
                "its table has, as its data has classes (tokenlab data show says how many ids a tokenizer has)."
            )
        if s.head == "masked_lm" and s.vocab_size not in (None, self.num_outputs):
            raise ConfigError(
                f"config.model.vocab_size is {s.vocab_size}, and the data's tokenizer has {self.num_outputs} ids; "
                "leave it out, or take the tokenizer that the weights know."
            )
        _ = self.program  # so that a wrong stack is said at once, not at the first call

    # ------------------------------------------------------------------------------------------ parts

    @property
    def vocab_size(self) -> int:
        """Ids that the model reads."""
        return self.settings.vocab_size or self.num_outputs

    @property
    def rows(self) -> int:
        """V of the table: the ids, filled up to a multiple of `vocab_multiple`."""
        multiple = self.settings.vocab_multiple
        return -(-self.vocab_size // multiple) * multiple

    @cached_property
    def embed(self) -> EncoderEmbed:
        """The module under state["embed"]."""
        s = self.settings
        positions = s.positions or self.length
        return EncoderEmbed(self.rows, s.dims()[0], positions, s.types, s.norm_eps, s.kernel_std, self.dtype)

    @cached_property
    def head(self) -> MaskedLMHead | PooledHead:
        """The module under state["head"]."""
        s = self.settings
        common = {
            "norm_eps": s.norm_eps,
            "final_norm": s.norm_placement != "post",
            "std": s.kernel_std,
            "dtype": self.dtype,
        }
        if s.head == "classify":
            return PooledHead(self.num_outputs, dropout=s.dropout, **common)
        return MaskedLMHead(self.num_outputs, self.rows, activation=s.activation, **common)

    @property
    def vocabulary(self) -> Vocabulary:
        """What scores that rank by ids know of them."""
        return Vocabulary(self.vocab_size, self.settings.always_kept, self.settings.first_dropped)

    def make_program(self) -> Program:
        """The stack, worked out for sequences of N tokens."""
        s = self.settings
        width, depth, hidden, heads = s.dims()
        block = Block(
            attention=Attention(
                num_heads=heads,
                kernel_std=s.kernel_std,
                dropout=s.attention_dropout,
                dtype=self.dtype,
                implementation=s.attention,
            ),
            ffn=MLP(hidden, s.activation, self.dtype, s.kernel_std),
            dropout=s.dropout,
            dtype=self.dtype,
            norm_eps=s.norm_eps,
            norm_placement=s.norm_placement,
        )
        return build_program(
            self.parsed(depth),
            Names(),
            block=block,
            ffn_defaults=FFNDefaults(hidden, s.activation, self.dtype, kernel_std=s.kernel_std),
            width=width,
            tokens=self.length,
            protected=1,
            has_cls=True,
            coordinates=1,
            train=self.train,
        )

    @property
    def tokens_per_example(self) -> int:
        """N."""
        return self.length

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what `apply` reads of a batch; without "predict" the logits are of every token that is left."""
        ids = jax.ShapeDtypeStruct((batch, self.length), jnp.int32)
        return {"ids": ids, "length": jax.ShapeDtypeStruct((batch,), jnp.int32)}

    def init_embed(self, key: Array) -> dict[str, Any]:
        """Fresh weights of the tables and the norm."""
        blank = jnp.zeros((1, 1), jnp.int32)
        return self.embed.init(key, blank, blank)["params"]

    def init_head(self, key: Array, embed: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh weights of the head that `settings.head` names."""
        width = self.settings.dims()[0]
        if self.settings.head == "classify":
            return self.head.init(key, jnp.zeros((1, width)))["params"]
        return self.head.init(key, jnp.zeros((1, 1, width)), embed["table"])["params"]

    # ------------------------------------------------------------------------------------------ running

    def apply(
        self,
        state: Mapping[str, Any],
        batch: Mapping[str, Array],
        *,
        train: bool = False,
        rng: Array | None = None,
        record: bool = False,
        execution: Execution | None = None,
        remat: Remat | None = None,
        entering: Collection[int] = (),
    ) -> Output:
        """One forward pass.

        Args:
          state: weights, see `init`.
          batch: "ids" [B, N] int32, the first of each row CLS. Either "length" [B] int32, how many of them are no
            padding, or "segment" [B, N] int32, the document of each token, 0 for padding: tokens then see those of
            their own document only. Without the two every token is real. "position" [B, N] int32 in place of the
            place in the row, "type" [B, N] int32 in place of 0. "predict" [B, K] int32: of which places the logits
            are wanted; without it of all that are left.
          train, rng, record, execution, remat: as in `tokenlab.models.vit.ViT.apply`.
          entering: numbers of blocks outside all wrappers; what comes into them is in `Output.entering`.

        Returns:
          `Output` with `features` [B, D] and `tokens` [B, N', D], of what is there at the end. Of a head "masked_lm"
          logits [B, K, V], `places` [B, K], where in the sequence they are of, -1 for a place whose token is not
          there any more, and as features the first token. Of "classify" logits [B, outputs] and the pooled token.

        Raises:
          ShapeError: sequences of another length than the model was built for.
        """
        ids = batch["ids"]
        if ids.ndim != 2 or ids.shape[1] != self.length:
            raise ShapeError(f"encoder_lm: built for ids [B, {self.length}], got {list(ids.shape)}.")
        context = Context(jax.random.key(0) if rng is None else rng, train)
        tokens = self.embedded(state, batch, context)
        how = {"record": record, "execution": execution, "remat": remat, "entering": entering}
        ran = self.run(state, tokens, context, **how)
        logits, features, places, normed = self.ended(state, ran.tokens, batch, context)
        return Output(logits, features, normed, ran.aux, ran.trace, ran.loads, places, ran.entering)

    def embedded(self, state: Mapping[str, Any], batch: Mapping[str, Array], context: Context) -> Tokens:
        """What the stack begins with; arguments as of `apply`."""
        ids, segment = batch["ids"], batch.get("segment")
        place = jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), ids.shape)
        valid = segment > 0 if segment is not None else None
        if "length" in batch:
            there = place < batch["length"][:, None]
            valid = there if valid is None else valid & there
        with jax.named_scope("embed"):
            x = self.embed.apply(
                {"params": state["embed"]}, ids, batch.get("position", place), batch.get("type")
            )
            if self.settings.dropout and context.train:
                x = dropout(x, self.settings.dropout, context.key("dropout_embed", 0))
            x = constrain(x, "batch", "sequence", None)
        return Tokens(x, place, valid=valid, segment=segment, extra={"ids": ids}, protected=1)

    def ended(
        self, state: Mapping[str, Any], tokens: Tokens, batch: Mapping[str, Array], context: Context
    ) -> tuple[Array, Array, Array | None, Array]:
        """What the head makes of what the stack ends with: logits, features, places and tokens of an `Output`."""
        weights = {"params": state["head"]}
        with jax.named_scope("head"):
            if self.settings.head == "classify":
                key = context.key("dropout_head", 0) if context.train else None
                logits, pooled = self.head.apply(weights, tokens.x[:, 0], key)
                return logits, pooled, None, tokens.x
            x, places = tokens.x, tokens.position
            if "predict" in batch:
                x, places = self._at(tokens, batch["predict"])
            logits = constrain(
                self.head.apply(weights, x, state["embed"]["table"]), "batch", "sequence", "vocab"
            )
            first = tokens.x[:, 0]
            if self.head.final_norm:
                norm = NORMS["layer"](self.dtype, self.settings.norm_eps)
                first = norm.apply({"params": state["head"]["final_norm"]}, first)
        return logits, first.astype(jnp.float32), places, tokens.x

    def _at(self, tokens: Tokens, predict: Array) -> tuple[Array, Array]:
        """Features of the tokens that stand at places `predict` [B, K] of the sequence, and these, -1 where gone."""
        # The count alone does not tell: an item may drop one token and append another. Wrappers put each back.
        moved = any(
            isinstance(step, ItemStep) and step.active and not step.item.wraps for step in self.program.flat()
        )
        if tokens.count == self.length and not moved:
            return gather(tokens.x, predict), predict
        blank = jnp.full(tokens.position.shape[:1] + (self.length,), -1, jnp.int32)
        count = jnp.arange(tokens.count, dtype=jnp.int32)
        now = jax.vmap(lambda row, at: row.at[at].set(count))(blank, tokens.position)
        index = gather(now, predict)
        return gather(tokens.x, jnp.maximum(index, 0)), jnp.where(index < 0, -1, predict)


Config = EncoderLMConfig


def build(
    config: EncoderLMConfig,
    *,
    spec: Mapping[str, tuple[tuple[int, ...], str]],
    num_outputs: int,
    stack_vars: Mapping[str, int | float],
    train: bool,
) -> EncoderLM:
    """An encoder for the text of a data source; see `tokenlab.models.build`."""
    if "ids" not in spec:
        raise ConfigError(
            f"encoder_lm reads 'ids'; the data has {', '.join(sorted(spec))}. Choose data of text, such as "
            "config.data.name='python_text' with config.data.encoder=True, or another model."
        )
    shape = tuple(spec["ids"][0])
    if len(shape) != 1:
        raise ShapeError(f"encoder_lm reads ids [N]; the data's 'ids' has shape {shape}.")
    if "type" in spec and not config.types:
        raise ConfigError("config.model.types is 0, and the data says the 'type' of its tokens; expected 2.")
    return EncoderLM(config, shape[0], num_outputs, stack_vars, train)
