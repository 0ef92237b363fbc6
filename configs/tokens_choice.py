"""V-MoE with tokens choice (arXiv 2106.05974) at the sizes of the paper: S/32, B/32, B/16, L/32, L/16, H/14.

tokenlab train --config=configs/tokens_choice.py:B/16 --workdir=runs/vmoe_b16 --config.mesh.expert=8
tokenlab cost --config=configs/tokens_choice.py:B/16

Every second block has 32 experts (of H/14, every second of the last ten), of which a token takes two, with room for
1.05 times an even spread in training and 4 times at evaluation, and 0.005 of the importance and of the load loss.
`:B/16:priority` serves the surest tokens first. The authors train on JFT-300M, which is not public; here the data is
ImageNet, looked for in TFDS_DATA_DIR. At this scale nothing has been trained here.
"""

import math

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.core.errors import ConfigError, suggest
from tokenlab.data.sources import tfds
from tokenlab.train import default_config

SIZES = {
    # name: dense blocks at the beginning, pairs of a dense block and one with experts behind them
    "S/32": (0, 6),
    "B/32": (0, 6),
    "B/16": (0, 6),
    "L/32": (0, 12),
    "L/16": (0, 12),
    "H/14": (22, 5),
}
CLASSES = 1000


def get_config(words: str = "B/16") -> ConfigDict:
    """The run of one size; `:SIZE:priority` with batch-priority routing."""
    size, _, how = words.partition(":")
    if size not in SIZES or how not in ("", "priority"):
        raise ConfigError(f"tokens_choice has no {words!r}.{suggest(size, SIZES)}")
    first, pairs = SIZES[size]
    config = default_config()
    config.steps = 300_000
    config.batch_size = 4096
    config.log_every = 1000
    config.eval_every = 20_000
    config.checkpoint_every = 5_000

    priority = ", batch_priority=True" if how else ""
    layer = f"tokens_choice(experts=32, k=2, capacity=1.05, eval_capacity=4.0{priority})"
    begin = f"block*{first} + " if first else ""
    config.model.update(
        size=size,
        stack=f"{begin}(block + block(ffn={layer}))*{pairs}",
        head_bias=-math.log(CLASSES),
        dtype="bfloat16",
    )
    config.task.loss = "sigmoid"
    config.data = from_dataclass(
        tfds.Config(
            name="tfds",
            dataset="imagenet2012",
            splits={"train": "train[:99%]", "validation": "train[99%:]", "test": "validation"},
            transform="decode|random_resized_crop(224)|flip_lr|value_range(-1, 1)",
            eval_transform="decode|resize_small(256)|central_crop(224)|value_range(-1, 1)",
            prefetch=2,
        )
    )
    config.optimizer.update(learning_rate=8e-4, weight_decay=0.03, clip=10.0)
    config.optimizer.decays = {"head/classifier/kernel": 3.0}
    config.optimizer.schedule.update(name="linear", warmup_steps=10_000)
    return config
