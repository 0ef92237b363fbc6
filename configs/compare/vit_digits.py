"""Digits: a dense ViT and six ways to spend fewer FLOPs a step, three seeds each, with equal counted training FLOPs.

tokenlab compare --config=configs/compare/vit_digits.py --workdir=runs/compare_digits
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config, product
from tokenlab.core.config import load

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"

STACKS = {
    "dense": "block*4",
    "shallow": "block*3",
    "keep by cls": "block + keep(0.5, by=cls) + block*3",
    "keep at random": "block + keep(0.5, by=random) + block*3",
    "keep late": "block*2 + keep(0.5, by=cls) + block*2",
    "skip": "block + skip(keep=0.5, by=random, train_only=True)(block)*2 + block",
    "merge": "block + merge(4) + block + merge(4) + block*2",
}


def get_config() -> ConfigDict:
    """The comparison; --config.budget.kind=seconds makes it one of equal time."""
    config = default_config()
    config.title = "Digits at equal training FLOPs"
    config.base = load(QUICKSTART)
    config.arms = product({"model.stack": STACKS})
    config.budget.kind = "flops"  # as many as the dense model spends in base.steps
    return config
