"""Both directions during training: samples/STEP.png in the workdir, every `config.sample_every` steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from tokenlab import data
from tokenlab.core.errors import ConfigError
from tokenlab.data.image_text import ImageTextVocabulary
from tokenlab.evaluate.pixels import pixels_for
from tokenlab.generate.both_ways import BothWays
from tokenlab.generate.pictures import sheet
from tokenlab.models.decoder_lm import DecoderLM
from tokenlab.train.experiment import Experiment

FOLDER = "samples"


class Samples:
    """A `tokenlab.train.loop.Sampler` of runs on pictures and text.

    Args:
      experiment: the run.
      workdir: its folder.

    Raises:
      ConfigError: the run is of no pictures and text, or several processes train it.
      DataError: the codes of its pictures are those of a file that cannot be read.
      TokenLabError: its stack cannot run token by token.
    """

    def __init__(self, experiment: Experiment, workdir: Path) -> None:
        self._experiment, self._folder = experiment, workdir / FOLDER
        known, every = experiment.source.tokenizer, experiment.config.sample_every
        if not (isinstance(known, ImageTextVocabulary) and isinstance(experiment.model, DecoderLM)):
            raise ConfigError(
                f"config.sample_every is {every}, and data {experiment.source.name!r} has no pictures and text to "
                "sample both ways; expected 0, or config.data.name='image_text'."
            )
        if jax.process_count() > 1:
            raise ConfigError(
                f"config.sample_every is {every}, and {jax.process_count()} processes train; samples are drawn where "
                "one process has all the weights: expected 0. `tokenlab evaluate` draws them of the checkpoints."
            )
        codec = getattr(data.resolve(experiment.config.data), "codec", known.codec)
        self._vocabulary, self._pixels = known, pixels_for(known, codec)
        self._both: BothWays | None = None
        experiment.eval_model(0).generation(1, 1)  # whether it generates is known before training

    def __call__(self, params: Any, step: int) -> str:
        """Draw what the weights `params` give after `step` steps; returns a line that says so."""
        model, split = self._experiment.eval_model(step), self._experiment.config.eval.split
        params = jax.device_get(params)
        if self._both is None or self._both.model is not model:
            self._both = BothWays(model, params, self._vocabulary)
        else:
            self._both.use(params)
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{step}.png"
        sheet(path, self._both, self._pixels, self._experiment.source, split, f"{split}, step {step}")
        return f"wrote {path}"
