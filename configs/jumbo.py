"""Jumbo at its published sizes (arXiv 2502.15021), pico to base, and a miniature that trains in minutes.

tokenlab train --config=configs/jumbo.py:nano,128 --workdir=runs/jumbo_nano_128
tokenlab train --config=configs/jumbo.py:nano --workdir=runs/jumbo_nano --config.init_from.path=runs/jumbo_nano_128
tokenlab train --config=configs/jumbo.py:mini --workdir=runs/jumbo_mini
tokenlab cost --config=configs/jumbo.py:mini,registers

Words behind the size, each with a comma before it:
  registers  the baseline: 16 registers (4 in the miniature) and a CLS token that the head reads, plain blocks
  drop       in training only some patches go on behind the embedding, at random: 10 % at the start, 90 % at the end,
             in nine stages of one compiled step each; the pieces always do, and evaluation sees all patches
  128        images of 128 px, on the positions of 224 px

The authors train on ImageNet-1K for 400 epochs at 128 px and 20 at 224 px with DeiT-III teachers, on ImageNet-21K for
50 epochs with `drop`; AdamW at 1e-3 or 3e-3, batches of 1,024, mixup 0.8, cutmix 1. Here there is no teacher, so their
figures are not to be expected, and at these sizes nothing has been trained here. ImageNet is looked for in
TFDS_DATA_DIR, and so is Fashion-MNIST, which the miniature reads.
"""

import math

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.core.errors import ConfigError, suggest
from tokenlab.data.sources import tfds
from tokenlab.train import default_config

SIZES = {
    # name: width D, depth L, heads H, pieces J
    "pico": (96, 12, 3, 6),
    "nano": (128, 12, 4, 6),
    "tiny": (192, 12, 3, 6),
    "small": (384, 12, 6, 6),
    "base": (768, 12, 12, 3),
    "mini": (32, 4, 2, 4),
}
REGISTERS = {"mini": 4}
WORDS = ("registers", "drop", "128")
KEPT = "0%:0.1, 11%:0.2, 22%:0.3, 33%:0.4, 44%:0.5, 56%:0.6, 67%:0.7, 78%:0.8, 89%:0.9"
EPOCHS = {128: 400, 224: 20}


def get_config(run: str = "nano") -> ConfigDict:
    """A run by size and words, "nano" or "tiny,registers,128"."""
    size, *words = run.split(",")
    if size not in SIZES:
        raise ConfigError(f"jumbo has no size {size!r}.{suggest(size, SIZES)}")
    for word in words:
        if word not in WORDS or (size == "mini" and word == "128"):
            raise ConfigError(f"jumbo has no {word!r} for {size}.{suggest(word, WORDS)}")
    config = default_config()
    width, depth, heads, pieces = SIZES[size]
    config.model.update(
        width=width,
        num_heads=heads,
        activation="gelu",
        norm_eps=1e-5,
        kernel_std=0.0227,  # 0.02 once it is cut off at two
        drop_path=0.1,
        drop_path_rates="constant",
    )
    if "registers" in words:
        block = "block"
        config.model.update(registers=REGISTERS.get(size, 16), head="cls")
    else:
        block = "block(special=jumbo)"
        config.model.update(registers=pieces, head="special")
    config.model.stack = f"{block}*{depth}"
    if "drop" in words:
        config.model.stack = f"keep(kept, by=random, train_only=True) + {block}*{depth}"
        config.stack_vars.kept = KEPT
    if size == "mini":
        _fashion_mnist(config)
    else:
        _imagenet(config, 128 if "128" in words else 224)
    return config


def _imagenet(config: ConfigDict, side: int) -> None:
    config.model.update(size="Ti/16", position_grid=(14, 14), head_bias=-math.log(1000), dtype="bfloat16")
    config.batch_size = 1024
    config.steps = EPOCHS[side] * 1_268_356 // config.batch_size
    config.log_every = 1000
    config.eval_every = 10_000
    config.checkpoint_every = 5000
    config.task.update(mixup=0.8, cutmix=1.0)
    config.data = from_dataclass(
        tfds.Config(
            name="tfds",
            dataset="imagenet2012",
            splits={"train": "train[:99%]", "validation": "train[99%:]", "test": "validation"},
            transform=f"decode|random_resized_crop({side})|flip_lr|randaugment(2, 9)|value_range(-1, 1)",
            eval_transform=f"decode|resize_small({round(side * 8 / 7)})|central_crop({side})|value_range(-1, 1)",
            prefetch=2,
        )
    )
    config.optimizer.learning_rate = 1e-3


def _fashion_mnist(config: ConfigDict) -> None:
    config.model.update(size="micro/4", head_bias=-math.log(10))
    config.batch_size = 128
    config.steps = 2000
    config.log_every = 100
    config.eval_every = 500
    config.checkpoint_every = 500
    config.data = from_dataclass(
        tfds.Config(
            name="tfds",
            dataset="fashion_mnist",
            splits={"train": "train[:-5000]", "validation": "train[-5000:]", "test": "test"},
            transform="decode|random_crop(28, pad=2)|flip_lr|value_range(-1, 1)",
            prefetch=2,
        )
    )
    config.optimizer.learning_rate = 2e-3
