"""Random-LTD (arXiv 2211.11586): as published for GPT-3 1.3B, GPT-2, BERT-large and ViT, and in miniature.

tokenlab train --config=configs/random_ltd.py --workdir=runs/random_ltd
tokenlab train --config=configs/random_ltd.py:vit --workdir=runs/random_ltd_vit
tokenlab benchmark --config=configs/random_ltd.py --config.stack_vars.k=128 --mode=train
tokenlab cost --config=configs/random_ltd.py:gpt3 --chip="TPU v5p"

The miniature is a byte-level decoder on Tiny Shakespeare, six blocks on 256 bytes. The four middle ones see 64 of them,
then 128, 192, and from 70 % of the run on all: four programs, and 0.77 of the dense run's layer tokens. "vit" is the
same on pictures of 64 patches: CIFAR-10 from TFDS_DATA_DIR, or the digits where that is not set. With ",dense" behind
it a run is the baseline.

The published runs have the authors' K_min, K_max, T_req and q (the configurations of DeepSpeed and of its examples), in
eight values instead of up to 120, each a program to compile. Their text and tokenizers are not here: the data are
data/text/*.jsonl.xz, a document a line, as bytes; for BERT with a vocabulary of 30,522 made of it. The blocks of the
decoders are those of this library (rotary positions, SwiGLU). BERT-large is configs/encoder_lm.py:large for two million
steps, in which K reaches N at the end. Nothing has been trained at these sizes here.
"""

import os
from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass, load
from tokenlab.core.errors import ConfigError, suggest
from tokenlab.data.sources import text
from tokenlab.methods.dropping.random_ltd import ltd_layers
from tokenlab.models.decoder_lm import SIZES
from tokenlab.train import default_config

DENSE_STEPS = {"gpt3": 286_102}
"""Where the published run drops nothing for as many tokens, in place of as many steps: 300B."""

CIFAR = Path(__file__).parent / "cifar10.py"
ENCODER = Path(__file__).parent / "encoder_lm.py"

SCHEDULES = {
    "shakespeare": "linear(64, 256, until=70%, values=4)",
    "vit": "linear(17, 65, until=70%, values=4)",
    "gpt3": "linear(128, 2048, until=200000, multiple=16, values=8)",
    "gpt2": "linear(128, 1024, until=400, multiple=8, values=8)",
    "bert-large": "linear(128, 512, until=2000000, multiple=16, values=8)",
    "vit-cifar": "linear(32, 197, until=3910, multiple=8, values=8)",
}


def get_config(run: str = "shakespeare") -> ConfigDict:
    """A run of SCHEDULES; ",dense" behind it is the baseline."""
    name, _, kind = run.partition(",")
    if name not in SCHEDULES or kind not in ("", "dense"):
        raise ConfigError(f"random_ltd has no run {run!r}.{suggest(name, SCHEDULES)}")
    make = {
        "shakespeare": _shakespeare,
        "gpt3": _gpt3,
        "gpt2": _gpt2,
        "bert-large": _bert_large,
        "vit": _vit,
        "vit-cifar": _vit_cifar,
    }
    config, depth = make[name]()
    config.model.stack = f"block*{depth}"
    if kind:
        config.steps = DENSE_STEPS.get(name, config.steps)
    else:
        config.model.stack = f"block + random_ltd(k)(block)*{len(ltd_layers(depth))} + block"
        config.stack_vars.k = SCHEDULES[name]
        config.optimizer.schedule.clock = "layer_tokens"
    return config


def _shakespeare() -> tuple[ConfigDict, int]:
    config = default_config(model="decoder_lm", task="next_token", data="shakespeare")
    config.update(steps=800, batch_size=16, log_every=50, eval_every=200, checkpoint_every=400)
    config.eval.batch_size = 32
    config.model.size = "toy"
    config.data.length = 256
    config.optimizer.learning_rate = 3e-3
    return config, 6


def _vit() -> tuple[ConfigDict, int]:
    if os.environ.get("TFDS_DATA_DIR"):
        config = load(CIFAR)
        config.model.size = "toy/4"
    else:
        config = default_config()
        config.model.size = "toy/1"
        config.optimizer.learning_rate = 2e-3
    config.update(steps=1500, batch_size=64, log_every=50, eval_every=500, checkpoint_every=500)
    return config, 6


def _gpt3() -> tuple[ConfigDict, int]:
    config = _text("1.3B", 2048)
    config.update(
        steps=384_322, batch_size=512
    )  # so many that as much is computed as in 286,102 dense steps: 300B
    config.optimizer.update(learning_rate=2e-4, weight_decay=0.1)
    config.optimizer.schedule.update(final=0.005, warmup_steps=2861)  # 3B tokens; 1e-6
    return config, SIZES["1.3B"][1]


def _gpt2() -> tuple[ConfigDict, int]:
    config = _text("125M", 1024)
    config.update(steps=1344, batch_size=8)
    config.optimizer.learning_rate = 5e-5
    return config, SIZES["125M"][1]


def _bert_large() -> tuple[ConfigDict, int]:
    config = load(f"{ENCODER}:large")
    config.steps = 2_000_000
    config.data.files = ("data/text/*.jsonl.xz",)
    return config, 24


def _text(size: str, length: int) -> ConfigDict:
    config = default_config(model="decoder_lm", task="next_token")
    config.update(log_every=100, eval_every=1000, checkpoint_every=1000)
    config.model.update(size=size, dtype="bfloat16", vocab_multiple=128, execution="scan", remat="full")
    config.data = from_dataclass(
        text.Config(name="text", files=("data/text/*.jsonl.xz",), length=length, prefetch=2)
    )
    return config


def _vit_cifar() -> tuple[ConfigDict, int]:
    config = load(CIFAR)
    config.update(steps=14 * 1406, batch_size=32, log_every=100, eval_every=1406, checkpoint_every=1406)
    config.model.size = "B/16"
    config.data.transform = "decode|resize(224)|flip_lr|value_range(-1, 1)"
    config.data.eval_transform = "decode|resize(224)|value_range(-1, 1)"
    config.optimizer.update(name="adamw", learning_rate=1e-4, weight_decay=3e-7, clip=1.0)
    config.optimizer.options = {"b1": 0.8, "b2": 0.999}
    return config, 12
