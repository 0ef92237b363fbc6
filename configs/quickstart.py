"""Digits in under a minute on two CPU cores: a ViT of four blocks on 4x4 patches of 2x2 pixels.

tokenlab train --config=configs/quickstart.py --workdir=runs/quickstart
tokenlab evaluate --workdir=runs/quickstart --config.model.stack="block*2 + keep(0.5, by=cls) + block*2"
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.train import default_config


def get_config() -> ConfigDict:
    """The run; every field can be changed with --config.KEY=VALUE."""
    config = default_config()
    config.steps = 700
    config.batch_size = 128
    config.log_every = 50
    config.eval_every = 200
    config.checkpoint_every = 200

    config.model.size = "toy/2"  # width 64, 4 heads; 16 patches and a class token
    config.model.stack = "block*4"

    config.data.transform = "rotate(10)"

    config.optimizer.learning_rate = 2e-3
    return config
