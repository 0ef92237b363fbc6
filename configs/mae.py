"""Masked autoencoders (arXiv 2111.06377): B/16, L/16 and H/14 as published, and miniatures on sets that are at hand.

tokenlab train --config=configs/mae.py --workdir=runs/mae_digits
tokenlab evaluate --workdir=runs/mae_digits --probe=knn,linear
tokenlab train --config=configs/mae.py:cifar10,jumbo --workdir=runs/mae_cifar10_jumbo
tokenlab benchmark --config=configs/mae.py:N256 --mode=train --batch=16
tokenlab cost --config=configs/mae.py:L

Runs are digits, fashion, cifar10, N256 (256 patches of enlarged digits, for benchmarks), B, L and H, each also with
",registers" or ",jumbo" behind it. Prepared sets are looked for in TFDS_DATA_DIR. `configs/linear_probe.py` and
`configs/finetune.py` go on from what was trained.

As published: a quarter of the patches is seen, their pixels are normalised patch by patch, sin-cos positions, a decoder
of eight blocks of width 512, AdamW with (0.9, 0.95) and decay 0.05, a cosine to 0 after 40 epochs of warm-up, batches
of 4,096, 1,600 epochs of ImageNet with crops of at least a fifth and flips. At this scale nothing has been trained
here.
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.core.errors import ConfigError, suggest
from tokenlab.data.sources import tfds
from tokenlab.train import default_config

PAPER = {"B": "B/16", "L": "L/16", "H": "H/14"}
RUNS = ("digits", "fashion", "cifar10", "N256", *PAPER)
REGISTERS, PIECES = 4, 4
VARIANTS = ("plain", "registers", "jumbo")
IMAGES = 1_268_355  # of ImageNet's training split, less a hundredth to validate on
EVERY_BLOCK = {"digits": 4, "fashion": 6, "cifar10": 6, "N256": 12, "B": 12, "L": 24, "H": 32}


def parse(run: str) -> tuple[str, str]:
    """ "cifar10,jumbo" -> ("cifar10", "jumbo"). Raises ConfigError."""
    name, _, variant = run.partition(",")
    variant = variant or VARIANTS[0]
    for given, known in ((name, RUNS), (variant, VARIANTS)):
        if given not in known:
            raise ConfigError(f"mae has no run {run!r}.{suggest(given, known)}")
    return name, variant


def special(name: str, variant: str) -> dict:
    """Settings of the special tokens: CLS alone, CLS and registers, or a Jumbo token of pieces."""
    depth = EVERY_BLOCK[name]
    if variant == "jumbo":
        return {"head": "special", "registers": PIECES, "stack": f"block(special=jumbo)*{depth}"}
    registers = REGISTERS if variant == "registers" else 0
    return {"head": "cls", "registers": registers, "stack": f"block*{depth}"}


def prepared(dataset: str, transform: str, **settings: object) -> ConfigDict:
    """A prepared set whose last 5,000 training images validate."""
    splits = {"train": "train[:-5000]", "validation": "train[-5000:]", "test": "test"}
    settings = {"splits": splits, "prefetch": 2, **settings}
    return from_dataclass(tfds.Config(name="tfds", dataset=dataset, transform=transform, **settings))


def get_config(run: str = "digits") -> ConfigDict:
    """The run; see above."""
    name, variant = parse(run)
    config = default_config(model="mae", task="mae")
    config.log_every = 100
    config.optimizer.update(weight_decay=0.05, options={"b1": 0.9, "b2": 0.95})
    config.steps = 5000
    config.batch_size = 128
    if name == "digits":
        config.steps = 2000
        config.model.size = "toy/2"
        config.data.transform = "shift(1)|rotate(10)"
        config.optimizer.learning_rate = 2e-3
    elif name == "N256":
        config.steps = 100
        config.batch_size = 16
        config.model.size = "Ti/4"
        config.data.transform = config.data.eval_transform = "resize(64)"
    elif name == "fashion":
        config.model.size = "toy/4"
        config.data = prepared("fashion_mnist", "decode|random_crop(28, pad=2)|flip_lr|value_range(-1, 1)")
        config.optimizer.learning_rate = 2e-3
    elif name == "cifar10":
        config.model.size = "toy/4"
        config.data = prepared("cifar10_jpeg", "decode|random_crop(32, pad=4)|flip_lr|value_range(-1, 1)")
        config.optimizer.learning_rate = 2e-3
    else:
        config.model.update(size=PAPER[name], dtype="bfloat16")
        config.batch_size = 4096
        epoch = IMAGES // config.batch_size
        config.steps = 1600 * epoch
        config.optimizer.learning_rate = 1.5e-4 * config.batch_size / 256
        config.optimizer.schedule.warmup_steps = 40 * epoch
        config.data = prepared(
            "imagenet2012",
            "decode|random_resized_crop(224, min_area=0.2)|flip_lr|value_range(-1, 1)",
            eval_transform="decode|resize_small(256)|central_crop(224)|value_range(-1, 1)",
            splits={"train": "train[:99%]", "validation": "train[99%:]", "test": "validation"},
        )
    config.eval_every = config.checkpoint_every = max(config.steps // 5, 1)
    config.model.update(**special(name, variant))
    return config
