"""SkipViT (arXiv 2401.15293): 55 % of the patches go around blocks 4 to 10 of 12, ranked by CLS attention.

tokenlab train --config=configs/skipvit.py --workdir=runs/skipvit
tokenlab train --config=configs/skipvit.py:dense --workdir=runs/skipvit_dense
tokenlab benchmark --config=configs/skipvit.py --config.model.size=toy/2 --mode=train
tokenlab cost --config=configs/skipvit.py:S/16

The miniature has six blocks of width 96 on 64 patches, of which 29 pass through blocks 2 to 4: CIFAR-10 from
TFDS_DATA_DIR, or the digits, enlarged to 32 pixels, where that is not set. toy/2 makes it 256 patches, for timing.

"S/16" is the published model: ViT-small from scratch on ImageNet-1K. Which blocks the tokens skip and the recipe are
assumed (DeiT's): the paper's text was not at hand. Nothing has been trained at that size here.
"""

import os
from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass, load
from tokenlab.data.sources import tfds
from tokenlab.methods.dropping.skipvit import span
from tokenlab.train import default_config

CIFAR = Path(__file__).parent / "cifar10.py"

STACKS = {
    "dense": "block*6",
    "skip": span(layers=6, drop=1, back=5),
    "random": span("skipvit(0.45, by=random)", layers=6, drop=1, back=5),
    "no return": span("skipvit(0.45, rejoin=False)", layers=6, drop=1, back=5),
    "warm-up": span("skipvit(k)", layers=6, drop=1, back=5),
}
WARM_UP = "0:1.0, 10%:0.45"


def get_config(run: str = "skip") -> ConfigDict:
    """The run; a name in STACKS, "S/16" or an expression."""
    if run == "S/16":
        return _published()
    if os.environ.get("TFDS_DATA_DIR"):
        config = load(CIFAR)
    else:
        config = default_config()
        config.data.transform = config.data.eval_transform = "resize(32)"
        config.optimizer.learning_rate = 2e-3
    config.update(steps=1500, batch_size=64, log_every=50, eval_every=500, checkpoint_every=500)
    config.model.update(size="toy/4", width=96, num_heads=3, stack=STACKS.get(run, run))
    if run == "warm-up":
        config.stack_vars.k = WARM_UP
    return config


def _published() -> ConfigDict:
    config = default_config()
    config.update(steps=300 * 1251, batch_size=1024, log_every=100, eval_every=1251, checkpoint_every=1251)
    config.model.update(size="S/16", stack=span(), dtype="bfloat16", drop_path=0.1)
    config.data = from_dataclass(
        tfds.Config(
            name="tfds",
            dataset="imagenet2012",
            splits={"train": "train[:-10000]", "validation": "train[-10000:]", "test": "validation"},
            transform="decode|random_resized_crop(224)|flip_lr|randaugment(2, 9)|value_range(-1, 1)",
            eval_transform="decode|resize_small(256)|central_crop(224)|value_range(-1, 1)",
            prefetch=2,
        )
    )
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.05, clip=1.0)
    config.optimizer.schedule.warmup_steps = 5 * 1251
    return config
