"""Fashion-MNIST: dense against token-efficient ViTs with equal seconds of training on this machine.

tokenlab compare --config=configs/compare/fashion_mnist.py --workdir=runs/compare_fashion

The prepared set is looked for in TFDS_DATA_DIR.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config, product
from tokenlab.core.config import load

FASHION = Path(__file__).parents[1] / "fashion_mnist.py"

STACKS = {
    "dense": "block*6",
    "keep": "block*2 + keep(0.5, by=cls) + block*4",
    "skip": "block + skip(keep=0.5, by=random, train_only=True)(block)*4 + block",
    "merge": "block*2 + merge(24) + block*4",
}


def get_config() -> ConfigDict:
    """The comparison; with --config.budget.amount=600 every run trains for ten minutes."""
    config = default_config()
    config.title = "Fashion-MNIST at equal training time"
    config.base = load(FASHION)
    config.arms = product({"model.stack": STACKS})
    config.budget.kind = "seconds"
    config.budget.amount = 120.0
    return config
