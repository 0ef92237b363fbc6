"""What follows prompts, a few tokens at a time; two compiled functions serve every prompt up to the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from tokenlab.core.errors import TokenLabError
from tokenlab.generate.grammar import Grammar
from tokenlab.models.decoder_lm import DecoderLM, Memory
from tokenlab.ops.sample import Sampling, sample


@struct.dataclass
class Going:
    """Sequences under way.

    Attributes:
      token: [B] int32, the last drawn, not yet read.
      ended: [B] bool, the end of the document was drawn.
      drawn: [] int32, tokens drawn so far.
      memory: of what was read.
      left: [B] int32, the state of the grammar behind what was read; None without one.
    """

    token: Array
    ended: Array
    drawn: Array
    memory: Memory
    left: Array | None = None


class Generator:
    """Generates with one model, one batch size after another.

    Args:
      model: a decoder language model.
      params: its weights.
      prompt: P, tokens of the longest prompt.
      new: most tokens that follow.
      sampling: how each is drawn.
      end: the id that ends a document; None goes on to the last token.
      chunk: tokens that are handed out together, >= 1.
      grammar: of pictures among text; a model that is `modal` needs it, since it says what each id stands for.

    Raises:
      TokenLabError: a count below 1, a stack that cannot run token by token, or a grammar that is missing or is of
        other ids than the model's.
    """

    def __init__(
        self,
        model: DecoderLM,
        params: Any,
        *,
        prompt: int,
        new: int,
        sampling: Sampling | None = None,
        end: int | None = None,
        chunk: int = 16,
        grammar: Grammar | None = None,
    ) -> None:
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise TokenLabError(f"chunk is {chunk!r}; expected a number of tokens >= 1.")
        if model.modal and grammar is None:
            raise TokenLabError(
                "generate: the model reads what each token stands for, and no grammar is given; expected "
                "grammar=Grammar.of(VOCABULARY), with the vocabulary of the data it was trained on."
            )
        if grammar is not None and grammar.outputs != model.num_outputs:
            raise TokenLabError(
                f"generate: the grammar is of {grammar.outputs} ids and the model of {model.num_outputs}; expected "
                "that of the vocabulary it was trained on."
            )
        self.functions, self.grammar = model.generation(prompt, new), grammar
        self.sampling, self.end, self.chunk = sampling or Sampling(), end, min(chunk, new)
        self._params = params
        self.lost = 0
        """Tokens that some layer had no room for, the most of any example, since `stream` last began."""
        self.traces = {"prefill": 0, "steps": 0}
        """How often each function was traced; it stays at one a batch size."""

    @cached_property
    def weights(self) -> Any:
        """The weights as the functions read them."""
        return self._prepare(self._params)

    def use(self, params: Any) -> None:
        """Go on with other weights of the same model; nothing is compiled anew."""
        self._params = params
        self.__dict__.pop("weights", None)

    @cached_property
    def _prepare(self) -> Any:
        return jax.jit(self.functions.prepare)

    def stream(self, prompts: Sequence[np.ndarray], seed: int = 0) -> Iterator[np.ndarray]:
        """What follows each prompt, as it comes.

        Args:
          prompts: B of them, ids int32 [T] with 1 <= T <= P.
          seed: of the draws; the same gives the same tokens.

        Yields:
          int32 [B, <= chunk]; behind the end of a document only ends. It stops when all have ended, or after `new`
          tokens.

        Raises:
          TokenLabError: no prompt, an empty one, one longer than P, what is no row of ids, ids outside the vocabulary,
            ids that the grammar does not allow where they stand, or a seed that is no whole number of 32 bits.
        """
        ids, length = self.padded(prompts)
        key, self.lost = jax.random.key(check_seed(seed)), 0
        going = self._start(self.weights, ids, length, self._states(prompts), key)
        left = self.functions.new
        while left > 0:
            tokens, lost, going = self._more(self.weights, going, key)
            tokens = np.asarray(tokens).T[:, :left]
            left -= tokens.shape[1]
            self.lost = int(lost[tokens.shape[1] - 1])  # a chunk goes on where `new` tokens are there
            yield tokens
            if self.end is not None and bool((tokens[:, -1] == self.end).all()):
                return

    def __call__(self, prompts: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
        """All that `stream` yields, in one array int32 [B, <= new]."""
        return np.concatenate(list(self.stream(prompts, seed)), axis=1)

    def padded(self, prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts as ids [B, P] with zeros behind them, and their lengths [B]; raises as `stream`."""
        most, vocabulary = self.functions.prompt, self.functions.model.num_outputs
        if not len(prompts):
            raise TokenLabError("generate: no prompt is given; expected one or more.")
        prompts = [np.asarray(each) for each in prompts]
        for row, each in enumerate(prompts):
            if each.ndim != 1 or (each.size and each.dtype.kind not in "iu"):
                raise TokenLabError(
                    f"generate: prompt {row} is {each.dtype}{list(each.shape)}; expected ids, int [T] (a tokenizer's "
                    "`encode` makes them of text)."
                )
        ids = np.zeros((len(prompts), most), np.int32)
        length = np.array([len(each) for each in prompts], np.int32)
        for row, each in enumerate(prompts):
            if not 1 <= len(each) <= most:
                raise TokenLabError(
                    f"generate: prompt {row} has {len(each)} tokens; expected 1 to {most}, the longest this was built "
                    "for."
                )
            if each.min() < 0 or each.max() >= vocabulary:
                raise TokenLabError(
                    f"generate: prompt {row} has ids from {each.min()} to {each.max()}; expected 0 to {vocabulary - 1}."
                )
            ids[row, : len(each)] = each
        self._states(prompts)
        return ids, length

    def _states(self, prompts: Sequence[np.ndarray]) -> np.ndarray | None:
        """The state of the grammar behind each prompt, int32 [B]."""
        if self.grammar is None:
            return None
        return np.array(
            [self.grammar.after(ids, f"prompt {row}") for row, ids in enumerate(prompts)], np.int32
        )

    def _modality(self, ids: Array) -> Array | None:
        return self.grammar.modality(ids) if self.functions.model.modal else None

    def _draw(self, logits: Array, left: Array | None, key: Array) -> Array:
        """One token of each, [B] int32, among those that may follow."""
        may = logits if self.grammar is None else self.grammar.allow(left, logits)
        return sample(may, key, self.sampling)

    @cached_property
    def _start(self) -> Any:
        def prefill(weights: Any, ids: Array, length: Array, left: Array | None, key: Array) -> Going:
            self.traces["prefill"] += 1
            logits, memory = self.functions.prefill(weights, ids, length, key, modality=self._modality(ids))
            token = self._draw(logits, left, jax.random.fold_in(key, 0))
            return Going(token, jnp.zeros(token.shape, bool), jnp.int32(0), memory, left)

        return jax.jit(prefill)

    @cached_property
    def _more(self) -> Any:
        @partial(jax.jit, donate_argnums=1)
        def steps(weights: Any, going: Going, key: Array) -> tuple[Array, Array, Going]:
            self.traces["steps"] += 1

            def one(going: Going, _: None) -> tuple[Going, tuple[Array, Array]]:
                token = going.token if self.end is None else jnp.where(going.ended, self.end, going.token)
                ended = going.ended if self.end is None else token == self.end
                modality = self._modality(token)
                logits, memory = self.functions.step(weights, token, going.memory, key, modality=modality)
                left = None if self.grammar is None else self.grammar.advance(going.left, token)
                drawn = going.drawn + 1
                after = self._draw(logits, left, jax.random.fold_in(key, drawn))
                return Going(after, ended, drawn, memory, left), (token, memory.lost.max())

            going, (tokens, lost) = lax.scan(one, going, length=self.chunk)
            return tokens, lost, going

        return steps


def found_no_room(lost: int) -> str:
    """What to tell of `Generator.lost` tokens."""
    return (
        f"{lost} tokens wanted into a layer and found no room in it, so this is not what the whole sequence would "
        "give: raise room=, or give keep= as a fraction, in --config.eval.stack"
    )


def check_seed(seed: int) -> int:
    """The seed. Raises TokenLabError unless it is a whole number in [0, 2^32)."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise TokenLabError(f"seed is {seed!r}; expected a whole number from 0 to {2**32 - 1}.")
    return int(seed)
