"""A linear classifier on the frozen features of a masked autoencoder that configs/mae.py has trained.

tokenlab train --config=configs/mae.py --workdir=runs/mae_digits
tokenlab train --config=configs/linear_probe.py --workdir=runs/probe_digits
tokenlab train --config=configs/linear_probe.py:cifar10,jumbo --workdir=runs/probe --config.init_from.path=runs/mine

Nothing but head/classifier is trained, so that the encoder runs forward alone. The authors put a batch norm without
weights before the classifier; here it is the encoder's own layer norm, which is frozen with it. `tokenlab evaluate
--workdir=runs/mae_digits --probe=linear` needs no training: a logistic regression on the features of each image once,
without changes to the images.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import load
from tokenlab.train import default_config

MAE = Path(__file__).parent / "mae.py"
OF_MAE = ("name", "keep", "decoder_width", "decoder_depth", "decoder_heads")


def get_config(run: str = "digits") -> ConfigDict:
    """The run that goes on from configs/mae.py:RUN, which is looked for in runs/mae_RUN."""
    trained = load(f"{MAE}:{run}")
    config = default_config()
    config.batch_size = trained.batch_size
    config.steps = 1000
    config.log_every = 100
    config.eval_every = config.checkpoint_every = 500
    config.model.update({key: value for key, value in trained.model.items() if key not in OF_MAE})
    config.data = trained.data
    config.init_from.path = f"runs/mae_{run.replace(',', '_')}"
    config.init_from.fresh = ("head/classifier",)
    config.optimizer.update(learning_rate=1e-2, weight_decay=0.0, only=("head/classifier/*",))
    return config
