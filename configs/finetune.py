"""Fine-tuning of a masked autoencoder of configs/mae.py: a classifier, and every block at a rate of its own.

tokenlab train --config=configs/mae.py --workdir=runs/mae_digits
tokenlab train --config=configs/finetune.py --workdir=runs/finetune_digits
tokenlab train --config=configs/finetune.py:cifar10 --workdir=runs/scratch --config.init_from.path=None \\
  --config.init_from.fresh="()"

The learning rate falls by 0.75 from each block to the one before it, as published for B; the last line trains the same
from nothing, to compare with. As published too: mixup, cutmix and smoothed labels, which small grey digits do without.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import load

PROBE = Path(__file__).parent / "linear_probe.py"


def get_config(run: str = "digits") -> ConfigDict:
    """The run that goes on from configs/mae.py:RUN, which is looked for in runs/mae_RUN."""
    config = load(f"{PROBE}:{run}")
    config.optimizer.update(learning_rate=1e-3, weight_decay=0.05, only=(), layer_decay=0.75)
    config.optimizer.options = {"b1": 0.9, "b2": 0.999}
    config.model.drop_path = 0.1
    if not run.startswith("digits"):
        config.steps = 2000
        config.task.update(label_smoothing=0.1, mixup=0.8, cutmix=1.0)
    return config
