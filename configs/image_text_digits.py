"""Digits and Shakespeare in one stream: a byte-level decoder of four blocks that also writes and reads 8 x 8 pictures.

tokenlab train --config=configs/image_text_digits.py --workdir=runs/image_text
tokenlab data show --config=configs/image_text_digits.py

A row is 64 grey levels of one digit, and 64 tokens of its caption, its delimiters and the plays. On one core of a
shared machine (JAX 0.10.2) its 1,000 steps took 6 minutes, evaluations and compiling included. Nats a target on the
validation and test split: 1.24 and 1.24 of pictures, 1.78 and 1.76 of text, which is 2.67 and 2.65 bits per byte. The
rows of an epoch read an eighth of the plays, so longer training overfits: 1,500 steps end at 1.26 and 1.79.
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.train import default_config


def get_config(stack: str = "block*4") -> ConfigDict:
    """The run; `stack` is an expression."""
    config = default_config(model="decoder_lm", task="mixed_next_token", data="image_text")
    config.steps = 1000
    config.batch_size = 16
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint_every = 500
    config.eval.batch_size = 32

    config.model.size = "toy"  # width 96, 4 heads
    config.model.stack = stack
    config.data.length = 128

    config.optimizer.learning_rate = 3e-3
    return config
