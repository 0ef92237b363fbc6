"""Mixture-of-depths on Tiny Shakespeare at equal counted training FLOPs, three seeds: a decoder of six blocks.

tokenlab compare --config=configs/compare/mixture_of_depths.py --workdir=runs/compare_mod

Routed arms are judged by what decides when text is generated, never by the top tokens of a sequence, which are known at
its end only. What came out is in experiments/mixture_of_depths/README.md.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config, product
from tokenlab.core.config import load

QUICKSTART = Path(__file__).parents[1] / "lm_quickstart.py"

STACKS = {
    "dense": "block*6",
    "mod": "(block + mod(keep=0.125)(block))*3",
    "mod, sigmoid": "(block + mod(keep=0.125, gate=sigmoid)(block))*3",
    "mod, random": "(block + mod(keep=0.125, by=random)(block))*3",
    "mod, every block": "block + mod(keep=0.125)(block)*5",
    "shallow": "block*3",
}


def get_config(steps: str = "800") -> ConfigDict:
    """The comparison; every arm spends what the dense one spends in `steps` steps."""
    config = default_config()
    config.title = "Mixture-of-depths on Tiny Shakespeare at equal training FLOPs"
    config.base = load(QUICKSTART)
    config.base.steps = int(steps)
    config.arms = product({"model.stack": STACKS})
    config.budget.kind = "flops"
    return config
