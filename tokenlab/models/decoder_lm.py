"""decoder_lm: a decoder language model in the form that has become usual (LLaMA, arXiv 2302.13971) over any stack.

    tokens = embed(ids)            [B, N, D]
    tokens = stack(tokens)         block*12, (block + mod(keep=0.125)(block))*6, block(ffn=dropless(experts=8))*12
    logits = head(tokens)          final norm, linear to the vocabulary: what follows each token, [B, N, V]

Attention is causal, with rotary positions and grouped-query heads; the feed-forward layer is a SwiGLU; norms are RMS
norms before each half of a block. Nothing has a bias. The weights are {"embed", "blocks", "items", "head"}.

`DecoderLM.generation` gives what generates: prompts first, then token by token, with memories of a fixed size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from tokenlab.core.errors import ConfigError, ShapeError, StackError, TokenLabError, suggest
from tokenlab.core.tokens import Tokens
from tokenlab.layers import generation
from tokenlab.layers.attention import Attention
from tokenlab.layers.block import Block
from tokenlab.layers.build_program import build_program
from tokenlab.layers.context import Context
from tokenlab.layers.ffn import FFNDefaults
from tokenlab.layers.ffn.swiglu import SwiGLU
from tokenlab.layers.norm import NormPlacement
from tokenlab.layers.output import Output
from tokenlab.layers.program import BlockStep, ItemStep, Program, Step
from tokenlab.layers.vocabulary import LMHead, TokenEmbed
from tokenlab.models import Names
from tokenlab.models.trunk import Execution, Remat, Trunk
from tokenlab.sharding.constrain import constrain

SIZES: Mapping[str, tuple[int, int, int, int, int]] = {
    # name: width D, depth L, hidden F of the SwiGLU, heads H, key heads G
    "nano": (16, 2, 32, 2, 2),
    "micro": (32, 4, 88, 2, 2),
    "toy": (96, 6, 256, 4, 4),
    "small": (256, 8, 688, 4, 4),
    "60M": (512, 12, 1376, 8, 8),
    "125M": (768, 12, 2048, 12, 12),
    "220M": (1024, 14, 2736, 16, 16),
    "350M": (1024, 24, 2736, 16, 16),
    "760M": (1536, 24, 4096, 16, 16),
    "1.3B": (2048, 24, 5504, 16, 16),
    "3B": (2560, 34, 6912, 20, 20),
    "7B": (4096, 32, 11008, 32, 32),
}
"""Toys first; then widths and depths as usual for decoders (Brown et al. 2020, arXiv 2005.14165, table 2.1), with
F = 8/3 D in multiples of 16, so that a SwiGLU has as many weights as an MLP of 4 D; 7B is LLaMA's."""


MOST_TOKENS = 2**24
"""Of a prompt and what follows it: so far float32 tells one position from the next."""


@dataclass(frozen=True)
class DecoderLMConfig:
    """Settings of a decoder language model; None takes what the size says.

    Attributes:
      size: a row of `SIZES`.
      stack: the depth as an expression; None for `block*L`.
      width, num_heads, num_kv_heads, mlp_dim: in place of the size's D, H, G, F.
      head_dim: Dh; None for D / H.
      tied: the head uses the embedding's table.
      vocab_multiple: the table has a multiple of so many rows, so that a mesh can split it.
      norm: "rms" or "layer".
      norm_placement: of each half of a block, "pre" norms what it reads, "res_post" what it adds, "post" the sum.
      norm_eps: eps of all norms, > 0.
      qk_norm: norm queries and keys.
      position: "rope" or "none".
      rope_theta: base of the rotary frequencies, > 0.
      window: a token sees none so many positions or more before its own; None for all.
      leaks: allow stacks in which later tokens change earlier logits, such as mod(decide=topk) at evaluation, to
        measure what that is worth. Their losses are not those of a language model.
      dtype: "float32" or "bfloat16" for computation; parameters, softmax, norms and losses are float32 always.
      execution: "auto", "scan" or "unroll".
      remat: "none", "full" or "dots".
      attention: implementation of attention: None, "xla" or "cudnn".
    """

    size: str = "toy"
    stack: str | None = None
    width: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    tied: bool = False
    vocab_multiple: int = 1
    norm: Literal["rms", "layer"] = "rms"
    norm_placement: NormPlacement = "pre"
    norm_eps: float = 1e-6
    qk_norm: bool = False
    position: Literal["rope", "none"] = "rope"
    rope_theta: float = 10_000.0
    window: int | None = None
    leaks: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    execution: Execution = "auto"
    remat: Remat = "none"
    attention: Literal["xla", "cudnn"] | None = None

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"config.model.size {self.size!r} is unknown.{suggest(self.size, SIZES)}")
        for name in ("width", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_multiple", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"config.model.{name} must be at least 1; got {value}.")
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"config.model.{name} must be above 0; got {getattr(self, name)}.")
        width, _, _, heads, groups, head = self.dims()
        if (self.head_dim is None and width % heads) or heads % groups:
            raise ConfigError(
                f"config.model: width {width}, num_heads {heads}, num_kv_heads {groups}: width must be a multiple of "
                "num_heads unless head_dim is given, and num_heads of num_kv_heads."
            )
        if self.position == "rope" and head % 2:
            raise ConfigError(f"config.model: rotary positions need an even head width; got {head}.")

    def dims(self) -> tuple[int, int, int, int, int, int]:
        """Width D, depth L of the size, hidden F, heads H, key heads G, head width Dh."""
        width, depth, hidden, own, groups = SIZES[self.size]
        chosen = self.width or width
        heads = self.num_heads or own
        # A size with as many key heads as heads stays so with another number of heads.
        groups = self.num_kv_heads or (heads if own == groups else min(groups, heads))
        hidden = self.mlp_dim or round(chosen * hidden / width)
        return chosen, depth, hidden, heads, groups, self.head_dim or chosen // heads


@dataclass(frozen=True, eq=False)
class DecoderLM(Trunk):
    """A decoder language model for sequences of N tokens.

    Attributes:
      settings: see `DecoderLMConfig`.
      length: N.
      num_outputs: ids in the vocabulary.
      stack_vars: numbers that names in the stack stand for.
      train: False takes `train_only` items out of the stack.
      modal: what each token stands for is part of the data, see `tokenlab.core.modality`.

    Raises (when built):
      StackError, ConfigError, ShapeError, NameLookupError: settings that do not fit each other, a stack in which tokens
      see what comes after them, or one that asks what tokens stand for where the data does not say it.
    """

    settings: DecoderLMConfig
    length: int
    num_outputs: int
    stack_vars: Mapping[str, int | float]
    train: bool = True
    modal: bool = False

    def __post_init__(self) -> None:
        _ = self.program  # so that a wrong stack is said at once, not at the first call
        self._check_causal(generating=not self.train)
        if self.by_modality and not self.modal:
            raise StackError(
                "stack: it has weights for text and for images, and the data does not say which token is which (it has "
                f"no 'modality'): {self.program.stack.text!r}. Take data of both, such as "
                "config.data.name='image_text', or parts that do not tell them apart."
            )

    def _check_causal(self, *, generating: bool) -> None:
        """Raise StackError where a token sees what comes after it; `generating` lets what prunes prompts pass."""
        for step, sifted in _with_sifting(self.program.steps) if not self.settings.leaks else ():
            if isinstance(step, ItemStep) and step.active and sifted and step.item.scores():
                what, name = (
                    f"ranks the tokens that {sifted} lets in, and later ones are among them",
                    step.kind[1],
                )
            elif isinstance(step, ItemStep) and step.active and not step.item.causal:
                if generating and step.item.generates:
                    continue
                what, name = "chooses tokens by what comes after them", step.kind[1]
            elif isinstance(step, BlockStep) and not getattr(step.block.ffn, "causal", True):
                what, name = "lets a token's result depend on those after it", step.block.ffn_name
            else:
                continue
            raise StackError(
                f"stack: in a language model {name} {what}, so its loss would be that of a model that sees the answer: "
                f"{self.program.stack.text!r}. Take a causal method, make it train_only, or set "
                "config.model.leaks=True to measure it all the same."
            )

    # ------------------------------------------------------------------------------------------ parts

    @property
    def rows(self) -> int:
        """V of the tables: the ids, filled up to a multiple of `vocab_multiple`."""
        multiple = self.settings.vocab_multiple
        return -(-self.num_outputs // multiple) * multiple

    @cached_property
    def embed(self) -> TokenEmbed:
        """The module under state["embed"]."""
        return TokenEmbed(self.rows, self.settings.dims()[0], self.dtype)

    @cached_property
    def head(self) -> LMHead:
        """The module under state["head"]."""
        s = self.settings
        return LMHead(self.num_outputs, self.rows, s.tied, s.norm, s.norm_eps, self.dtype)

    def make_program(self) -> Program:
        """The stack, worked out for sequences of N tokens."""
        return self._program(self.length, None)

    def _program(self, tokens: int, rows: int | None) -> Program:
        s = self.settings
        width, depth, hidden, heads, groups, head = s.dims()
        attention = Attention(
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=head,
            qk_norm=s.qk_norm,
            norm=s.norm,
            use_bias=False,
            rope_theta=s.rope_theta if s.position == "rope" else None,
            causal=True,
            window=s.window,
            dtype=self.dtype,
            implementation=s.attention,
        )
        block = Block(
            attention=attention,
            ffn=SwiGLU(hidden, self.dtype),
            ffn_name="swiglu",
            dtype=self.dtype,
            norm_eps=s.norm_eps,
            norm=s.norm,
            norm_placement=s.norm_placement,
        )
        # An ungated layer of 3/2 F has as many weights as the gated one of F.
        defaults = FFNDefaults(round(hidden * 1.5), "gelu_tanh", self.dtype, gated=hidden)
        return build_program(
            self.parsed(depth),
            Names(),
            block=block,
            ffn_defaults=defaults,
            width=width,
            tokens=tokens,
            protected=0,
            has_cls=False,
            coordinates=1,
            train=self.train and rows is None,
            rows=rows,
        )

    @property
    def tokens_per_example(self) -> int:
        """N."""
        return self.length

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of what `apply` reads of a batch."""
        ids = jax.ShapeDtypeStruct((batch, self.length), jnp.int32)
        return dict.fromkeys(("ids", "segment", "position", *(("modality",) if self.modal else ())), ids)

    def init_embed(self, key: Array) -> dict[str, Any]:
        """Fresh weights of the table."""
        return self.embed.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def init_head(self, key: Array, embed: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh weights of the final norm and, untied, of the linear layer to the vocabulary."""
        return self.head.init(key, jnp.zeros((1, 1, self.settings.dims()[0])), embed["table"])["params"]

    # ------------------------------------------------------------------------------------------ whole sequences

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
    ) -> Output:
        """One forward pass over whole sequences.

        Args:
          state: weights, see `init`.
          batch: "ids" [B, N] int32; "segment" [B, N] int32, the document of each token, 0 for padding, and "position"
            [B, N] int32, its place in the document; without the two every row is one document. "modality" [B, N] int32
            where the model is `modal`.
          train, rng, record, execution, remat: as in `tokenlab.models.vit.ViT.apply`.

        Returns:
          `Output` with logits [B, K, V] of the K tokens that are there at the end, and `tokens` [B, K, D];
          `Output.places` [B, K] says where in the sequence they stand.

        Raises:
          ShapeError: sequences of another length than the model was built for.
          StackError: the stack prunes prompts by what comes after a token, so it can generate and nothing else.
        """
        self._check_causal(generating=False)
        ids = batch["ids"]
        if ids.ndim != 2 or ids.shape[1] != self.length:
            raise ShapeError(f"decoder_lm: built for ids [B, {self.length}], got {list(ids.shape)}.")
        context = Context(jax.random.key(0) if rng is None else rng, train)
        place = jnp.broadcast_to(jnp.arange(self.length, dtype=jnp.int32), ids.shape)
        segment = batch.get("segment")
        valid = None if segment is None else segment > 0
        tokens = self._embedded(state, ids, place, batch.get("position", place), valid)
        tokens = tokens.replace(segment=segment, modality=self._modality(batch.get("modality"), ids))
        ran = self.run(state, tokens, context, record=record, execution=execution, remat=remat)
        logits, normed = self._head(state, ran.tokens.x)
        return Output(logits, normed, normed, ran.aux, ran.trace, ran.loads, ran.tokens.position)

    def _embedded(
        self, state: Mapping[str, Any], ids: Array, place: Array, position: Array, valid: Array | None
    ) -> Tokens:
        with jax.named_scope("embed"):
            x = self.embed.apply({"params": state["embed"]}, ids)
            x = constrain(x, "batch", "sequence", None)
        coords = position[..., None].astype(jnp.float32) if self.settings.position == "rope" else None
        return Tokens(x, place, coords, valid)

    def _modality(self, given: Array | None, ids: Array) -> Array | None:
        """What each token of ids [B, N] stands for; None where the data does not say it."""
        if not self.modal:
            return None
        if given is None or given.shape != ids.shape:
            raise ShapeError(
                f"decoder_lm: modality is {None if given is None else list(given.shape)}; expected {list(ids.shape)}, "
                "as the data has it."
            )
        return given

    def _head(self, state: Mapping[str, Any], x: Array) -> tuple[Array, Array]:
        with jax.named_scope("head"):
            logits, normed = self.head.apply({"params": state["head"]}, x, state["embed"]["table"])
            return constrain(logits, "batch", "sequence", "vocab"), normed

    # ------------------------------------------------------------------------------------------ generation

    @functools.cache  # noqa: B019 models are few and live as long as what they made
    def generation(self, prompt: int, new: int) -> Generation:
        """What generates up to `new` tokens behind prompts of up to `prompt`.

        Raises:
          TokenLabError: not two counts >= 1, or the stack has an item that cannot run token by token.
        """
        for name, value in (("prompt", prompt), ("new", new)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TokenLabError(f"generation: {name} is {value!r}; expected a number of tokens >= 1.")
        if prompt + new > MOST_TOKENS:
            raise TokenLabError(
                f"generation: prompt {prompt} and new {new} are {prompt + new} tokens; expected at most {MOST_TOKENS} "
                "together, as rows of that many are kept for each."
            )
        return Generation(self, prompt, new, self._program(prompt, prompt + new))


def _with_sifting(steps: Iterable[Step], sifted: str | None = None) -> Iterator[tuple[Step, str | None]]:
    """Every block and item, and the name of a wrapper around it whose `item.sifts`; None without one."""
    for step in steps:
        yield step, sifted
        if isinstance(step, BlockStep) and step.between:
            yield step.between, sifted
        if isinstance(step, ItemStep):
            yield from _with_sifting(step.body, step.kind[1] if step.active and step.item.sifts else sifted)


@struct.dataclass
class Memory:
    """What generation remembers of B sequences.

    Attributes:
      length: [B] int32, tokens seen so far.
      layers: keys and values, see `tokenlab.layers.generation`.
    """

    length: Array
    layers: generation.Memories

    @property
    def lost(self) -> Array:
        """Tokens that some layer had no room for, [B] int32."""
        return generation.lost(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values; static."""
        caches = jax.tree.leaves(self.layers, is_leaf=lambda leaf: isinstance(leaf, generation.KVCache))
        return sum(leaf.size * leaf.dtype.itemsize for c in caches for leaf in (c.key, c.value))


@dataclass(frozen=True, eq=False)
class Generation:
    """The functions that generate; all are pure and of static shapes, so that each compiles once.

    Attributes:
      model: whose weights are used.
      prompt: P, tokens of the longest prompt.
      new: tokens that may follow.
      program: the stack, worked out for them.
    """

    model: DecoderLM
    prompt: int
    new: int
    program: Program

    def prepare(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The weights as the other functions read them; once before the first token."""
        layers = generation.prepare(self.program, state, self.model.settings.execution)
        return {"embed": state["embed"], "layers": layers, "head": state["head"]}

    def prefill(
        self,
        weights: Mapping[str, Any],
        ids: Array,
        length: Array,
        rng: Array | None = None,
        *,
        modality: Array | None = None,
    ) -> tuple[Array, Memory]:
        """Read prompts.

        Args:
          weights: from `prepare`.
          ids: [B, P] int32, each prompt from the front; what stands behind is not read.
          length: [B] int32 in 1..P.
          rng: key of random choices in the stack; the same in every step that follows. None: a fixed one.
          modality: [B, P] int32, of a model that is `modal`.

        Returns:
          Logits of what follows each prompt, [B, V] float32 of the V ids there are; the memory.
        """
        if ids.ndim != 2 or ids.shape[1] != self.prompt or length.shape != ids.shape[:1]:
            raise ShapeError(
                f"prefill: ids {list(ids.shape)} and length {list(length.shape)}; expected [B, {self.prompt}] and [B]."
            )
        model, settings = self.model, self.model.settings
        *_, groups, head = settings.dims()
        place = jnp.broadcast_to(jnp.arange(self.prompt, dtype=jnp.int32), ids.shape)
        valid = place < length[:, None]
        tokens = model._embedded(weights, jnp.where(valid, ids, 0), place, place, valid)
        tokens = tokens.replace(modality=model._modality(modality, ids))
        memories = generation.empty(self.program, ids.shape[0], groups, head, model.dtype, weights["layers"])
        tokens, memories = generation.run(
            self.program, weights["layers"], memories, tokens, self._context(rng, "prefill")
        )
        # Tokens may have been dropped on the way; the last of each prompt never is.
        last = jnp.argmax(tokens.valid & (tokens.position == length[:, None] - 1), axis=1)
        x = jnp.take_along_axis(tokens.x, last[:, None, None], axis=1)
        logits, _ = model._head(weights, x)
        return logits[:, 0, : model.num_outputs], Memory(length.astype(jnp.int32), memories)

    def step(
        self,
        weights: Mapping[str, Any],
        ids: Array,
        memory: Memory,
        rng: Array | None = None,
        *,
        modality: Array | None = None,
    ) -> tuple[Array, Memory]:
        """Read one more token of each sequence: ids [B] int32 -> logits of what follows, [B, V]; the new memory.

        `rng` and `modality` [B] are as in `prefill`.
        """
        place = memory.length[:, None]
        tokens = self.model._embedded(weights, ids[:, None], place, place, jnp.ones(place.shape, bool))
        own = None if modality is None else modality[:, None]
        tokens = tokens.replace(modality=self.model._modality(own, place))
        tokens, layers = generation.run(
            self.program, weights["layers"], memory.layers, tokens, self._context(rng, "step")
        )
        logits, _ = self.model._head(weights, tokens.x)
        return logits[:, 0, : self.model.num_outputs], Memory(memory.length + 1, layers)

    def _context(self, rng: Array | None, mode: Literal["prefill", "step"]) -> Context:
        return Context(jax.random.key(0) if rng is None else rng, mode=mode)


Config = DecoderLMConfig


def current(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a run from before `norm_placement`, which said `post_norm`, in today's words; others as they are."""
    if "post_norm" not in settings:
        return settings
    rest = {key: value for key, value in settings.items() if key != "post_norm"}
    return {"norm_placement": "res_post" if settings["post_norm"] else "pre", **rest}


def build(
    config: DecoderLMConfig,
    *,
    spec: Mapping[str, tuple[tuple[int, ...], str]],
    num_outputs: int,
    stack_vars: Mapping[str, int | float],
    train: bool,
) -> DecoderLM:
    """A decoder for the text of a data source; see `tokenlab.models.build`."""
    if "ids" not in spec:
        raise ConfigError(
            f"decoder_lm reads 'ids'; the data has {', '.join(sorted(spec))}. Choose data of text, such as "
            "config.data.name='shakespeare', or another model."
        )
    shape = tuple(spec["ids"][0])
    if len(shape) != 1:
        raise ShapeError(f"decoder_lm reads ids [N]; the data's 'ids' has shape {shape}.")
    return DecoderLM(config, shape[0], num_outputs, stack_vars, train, modal="modality" in spec)
