"""Fashion-MNIST as 7x7 codes: pictures of 28x28 pixels, one of 512 codes for each 4x4 of them.

tokenlab train --config=configs/vq_fashion_mnist.py --workdir=runs/vq_fashion
tokenlab train --config=configs/vq_fashion_mnist.py:fsq --workdir=runs/vq_fashion_fsq
tokenlab evaluate --workdir=runs/vq_fashion
tokenlab encode --workdir=runs/vq_fashion --out=fashion_codes.npz

The prepared set is looked for in TFDS_DATA_DIR. The last 5,000 of the 60,000 training images validate.

Seed 0, 1,000 steps: test psnr 22.13 dB with 335 of 512 codes used, in 303 seconds of training on two CPU cores that did
other things too; with fsq 21.85 dB and 499 codes, in 216 seconds.
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.data.sources import tfds
from tokenlab.train import default_config


def get_config(quantizer: str = "vq") -> ConfigDict:
    """The run; `quantizer` is "vq", 512 codes, or "fsq", 8 x 8 x 8 levels."""
    config = default_config(model="vq_image", task="reconstruct")
    config.steps = 1000
    config.batch_size = 64
    config.log_every = 100
    config.eval_every = 500
    config.checkpoint_every = 500

    config.model.size = "small"
    config.model.factor = 4
    config.model.quantizer = quantizer
    if quantizer == "fsq":
        config.model.levels = (8, 8, 8)

    config.data = from_dataclass(
        tfds.Config(
            name="tfds",
            dataset="fashion_mnist",
            splits={"train": "train[:-5000]", "validation": "train[-5000:]", "test": "test"},
            transform="decode|flip_lr|value_range(-1, 1)",
            eval_transform="decode|value_range(-1, 1)",
            prefetch=2,
        )
    )

    config.optimizer.learning_rate = 2e-3
    return config
