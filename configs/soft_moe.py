"""Soft MoE at the published sizes (arXiv 2308.00951, and the authors' configurations): S/16, B/16, L/16, S/14, H/14.

tokenlab train --config=configs/soft_moe.py:S/16 --workdir=runs/soft_moe_s16 --config.mesh.expert=8
tokenlab cost --config=configs/soft_moe.py:B/16 --chip="TPU v5e"

The experts lie along the mesh axis `expert`, the batch along all axes. The authors train on JFT-4B, which is not
public; here the data is ImageNet, looked for in TFDS_DATA_DIR, so their figures are not to be expected. At this scale
nothing has been trained here.

As published: one slot an expert, mean of the patches as features, sigmoid loss, head biases of -log(classes), queries
and keys normed, experts that begin alike, tokens rounded to bfloat16 on their way; Adam with decay 0.03 of kernels and
of the routers' scale and 3.0 of the head, norm clipped at 1; a linear warm-up of 10,000 steps to 1e-3, then an inverse
square root with timescale 10,000, and a linear cooldown of 50,000 steps; batches of 4,096.
"""

import math

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.core.errors import ConfigError, suggest
from tokenlab.data.sources import tfds
from tokenlab.train import default_config

SIZES = {
    # name: blocks, of which the last so many have experts, experts, steps
    "S/16": (12, 6, 128, 4_000_000),
    "S/14": (12, 6, 256, 4_000_000),
    "B/16": (12, 6, 128, 4_000_000),
    "L/16": (24, 12, 128, 4_000_000),
    "H/14": (32, 16, 256, 2_000_000),
}
CLASSES = 1000


def get_config(size: str = "S/16") -> ConfigDict:
    """The run of one size."""
    if size not in SIZES:
        raise ConfigError(f"soft_moe has no size {size!r}.{suggest(size, SIZES)}")
    depth, last, experts, steps = SIZES[size]
    config = default_config()
    config.steps = steps
    config.batch_size = 4096
    config.log_every = 1000
    config.eval_every = 20_000
    config.checkpoint_every = 5_000

    layer = f"soft_moe(experts={experts}, slots=1, same_init=True, transport=bfloat16)"
    config.model.update(
        size=size,
        stack=f"block*{depth - last} + block(ffn={layer})*{last}",
        head="mean",
        head_bias=-math.log(CLASSES),
        qk_norm=True,
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
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.03, clip=1.0)
    config.optimizer.decays = {"head/classifier/kernel": 3.0, "blocks/soft_moe/router/scale": 0.03}
    config.optimizer.schedule.update(name="rsqrt", warmup_steps=10_000, timescale=10_000, decay_steps=50_000)
    if size == "B/16":
        compiled = "tokenlab compile --config=configs/soft_moe.py:B/16 --topology=v5e:16x16"
        laid_out = {"mesh.recipe": "expert:128"}
        rule = dict(
            kind="TPU v5e", devices=256, set=laid_out, step_seconds=0.0139, basis="estimated", source=compiled
        )
        config.hardware = (rule,)
    return config
