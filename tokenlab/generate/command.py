"""`tokenlab generate`: what follows a prompt, from the weights of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from tokenlab.core.errors import ConfigError
from tokenlab.data.image_text import ImageTextVocabulary
from tokenlab.data.text.tokenizer import Decoder
from tokenlab.evaluate.trained import Trained, load
from tokenlab.generate.generator import Generator, check_seed, found_no_room
from tokenlab.generate.grammar import Grammar
from tokenlab.models.decoder_lm import DecoderLM
from tokenlab.ops.sample import Sampling
from tokenlab.train import compilation
from tokenlab.train.manifest import Which


def run(
    workdir: str | Path,
    prompts: Sequence[str],
    *,
    tokens: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    checkpoint: Which = "latest",
    prompt_tokens: int | None = None,
    file: TextIO | None = None,
) -> list[str]:
    """Generate text and print it, of one prompt as it comes, of several one after the other at the end.

    Text alone, also of a run on pictures and text: `tokenlab.generate.draw` draws pictures.

    Args:
      workdir: of a training run of a decoder language model.
      prompts: one text or more, none of them empty: nothing teaches a model how documents begin.
      tokens: most tokens that follow each.
      sampling: how they are drawn.
      seed: of the draws.
      overrides: dotted key -> text or value, as `tokenlab evaluate` takes; "eval.stack" is the stack to generate with.
      checkpoint: "latest", "best" or a step.
      prompt_tokens: the longest prompt that the compiled functions take; None for the length the run trained on, or
        that of the longest prompt if it is longer.
      file: where to print; None: standard output.

    Returns:
      The texts with their prompts in front.

    Raises:
      ConfigError: the run is of no language model.
      TokenLabError: as `tokenlab.evaluate.trained.load` and `Generator`.
    """
    trained = load(workdir, overrides, checkpoint, examples=False)
    tokenizer = _tokenizer(trained)
    compilation.use_cache(trained.config.compilation_cache)
    file = file or sys.stdout
    encoded = [tokenizer.encode(text) for text in prompts]
    longest = max((len(ids) for ids in encoded), default=1)
    generator = Generator(
        trained.model,
        jax.device_put(trained.params),
        prompt=max(trained.model.length, longest) if prompt_tokens is None else prompt_tokens,
        new=tokens,
        sampling=sampling,
        end=tokenizer.end,
        grammar=Grammar.of(tokenizer, pictures=False) if isinstance(tokenizer, ImageTextVocabulary) else None,
    )
    generator.padded(encoded)  # what is wrong is said before anything is printed
    check_seed(seed)
    for note in trained.notes:
        print(note, file=sys.stderr)
    decoders = [Decoder(tokenizer) for _ in encoded]
    texts = list(prompts)
    alone = len(texts) == 1
    if alone:
        print(texts[0], end="", flush=True, file=file)
    begun, count = time.perf_counter(), 0
    for chunk in generator.stream(encoded, seed):
        for row, ids in enumerate(chunk):
            said = decoders[row].push(ids[ids != tokenizer.end])
            texts[row] += said
            count += int((ids != tokenizer.end).sum())
            if alone:
                print(said, end="", flush=True, file=file)
    for row, decoder in enumerate(decoders):
        rest = decoder.finish()
        texts[row] += rest
        if alone:
            print(rest, file=file)
    if not alone:
        for row, text in enumerate(texts):
            print(f"--- {row}\n{text}", file=file)
    seconds = time.perf_counter() - begun
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    if generator.lost:
        print(found_no_room(generator.lost), file=sys.stderr)
    return texts


def _tokenizer(trained: Trained) -> Any:
    tokenizer = getattr(trained.source, "tokenizer", None)
    if tokenizer is None or not isinstance(trained.model, DecoderLM):
        name = trained.config.model.get("name", "vit")
        raise ConfigError(
            f"generate needs a run of a language model on text; this one trained {name!r} on data "
            f"{trained.source.name!r}. Train one with configs/lm_quickstart.py."
        )
    return tokenizer
