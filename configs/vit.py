"""ViT at its published sizes on ImageNet-1K (Dosovitskiy et al. 2021, arXiv 2010.11929, table 3 and appendix B.1).

tokenlab train --config=configs/vit.py:B/16 --workdir=runs/vit_b16
tokenlab compile --config=configs/vit.py:L/16 --topology=v5e:8x8 --mesh=fsdp=64
tokenlab cost --config=configs/vit.py:L/16 --chip="TPU v5e"

As published for training from scratch: 300 epochs of 224 px, batches of 4,096, Adam with a decay of 0.3 and gradients
clipped at 1, a rate of 3e-3 that rises for 10,000 steps and falls along a cosine. Their dropout of 0.1 is not here, nor
is the tanh layer before the classifier. ImageNet is looked for in TFDS_DATA_DIR; nothing has been trained here.
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.core.errors import ConfigError, suggest
from tokenlab.data.sources import tfds
from tokenlab.train import default_config

SIZES = ("Ti/16", "S/16", "B/16", "B/32", "L/16", "L/32", "H/14")
TRAINED_ON = 1_268_356  # images, 99 % of ImageNet's training split


def get_config(size: str = "B/16") -> ConfigDict:
    """The run of one size."""
    if size not in SIZES:
        raise ConfigError(f"vit has no size {size!r}.{suggest(size, SIZES)}")
    config = default_config()
    config.batch_size = 4096
    config.steps = 300 * TRAINED_ON // config.batch_size
    config.log_every = 100
    config.eval_every = 5_000
    config.checkpoint_every = 1_000
    config.model.update(size=size, dtype="bfloat16")
    if size[0] in "LH":
        config.model.remat = "full"
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
    config.optimizer.update(learning_rate=3e-3, weight_decay=0.3, clip=1.0)
    config.optimizer.schedule.warmup_steps = 10_000
    return config
