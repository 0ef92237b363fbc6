"""CIFAR-10 (as JPEG copies): a ViT of six blocks, width 64, on 8x8 patches of 4x4 pixels, dense or with half dropped.

tokenlab train --config=configs/cifar10.py --workdir=runs/cifar10
tokenlab train --config=configs/cifar10.py:keep --workdir=runs/cifar10_keep

The prepared set, `cifar10_jpeg`, is looked for in TFDS_DATA_DIR; `--config.data.dataset=cifar10` is TFDS's own. The
last 5,000 of the 50,000 training images validate.

Seed 0, --config.steps=1500: test accuracy 0.528 dense, 0.537 with half of the patches dropped at 0.65 of the FLOPs; one
standard error of 10,000 images is 0.005.
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.data.sources import tfds
from tokenlab.train import default_config

STACKS = {"dense": "block*6", "keep": "block*2 + keep(0.5, by=cls) + block*4"}


def get_config(stack: str = "dense") -> ConfigDict:
    """The run; `stack` is a name in STACKS or an expression."""
    config = default_config()
    config.steps = 5000
    config.batch_size = 128
    config.log_every = 100
    config.eval_every = 1000
    config.checkpoint_every = 1000

    config.model.size = "toy/4"
    config.model.stack = STACKS.get(stack, stack)

    config.data = from_dataclass(
        tfds.Config(
            name="tfds",
            dataset="cifar10_jpeg",
            splits={"train": "train[:-5000]", "validation": "train[-5000:]", "test": "test"},
            transform="decode|random_crop(32, pad=4)|flip_lr|value_range(-1, 1)",
            prefetch=2,
        )
    )

    config.optimizer.learning_rate = 2e-3
    return config
