"""Emoji as 8x8 codes: pictures of 64x64 pixels in colour, one of 512 codes for each 8x8 of them.

tokenlab train --config=configs/vq_emoji.py --workdir=runs/vq_emoji
tokenlab evaluate --workdir=runs/vq_emoji
tokenlab encode --workdir=runs/vq_emoji --out=emoji_codes.npz

Seed 0, 600 steps: test psnr 19.9 dB with 210 of 512 codes used, in 419 seconds of training on two CPU cores that did
other things too.
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.train import default_config


def get_config(quantizer: str = "vq") -> ConfigDict:
    """The run; `quantizer` is "vq", 512 codes, or "fsq", 8 x 8 x 8 levels."""
    config = default_config(model="vq_image", task="reconstruct", data="emoji")
    config.steps = 600
    config.batch_size = 32
    config.log_every = 100
    config.eval_every = 500
    config.checkpoint_every = 500
    config.eval.batch_size = 64

    config.model.size = "small"
    config.model.factor = 8
    config.model.quantizer = quantizer
    if quantizer == "fsq":
        config.model.levels = (8, 8, 8)

    config.optimizer.learning_rate = 2e-3
    return config
