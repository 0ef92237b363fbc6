"""Digits: SparseMixer-v2 against the straight gate, eight experts in every second block, equal steps, three seeds.

tokenlab compare --config=configs/compare/grin.py --workdir=runs/compare_grin

All arms with a router have the same experts, the same number of choices and the same weight of the balance loss; they
differ in how the router gets its gradient.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.compare import default_config, product
from tokenlab.core.config import load

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"

LAYERS = {
    "straight": "dropless(experts=8, k=1, balance=0.001, expert=mlp(hidden=64))",
    "v2": "grin(experts=8, k=1, r=0.1, expert=mlp(hidden=64))",
    "v2, r 0.01": "grin(experts=8, k=1, r=0.01, expert=mlp(hidden=64))",
    "v2 star": "grin(experts=8, k=1, r=0.1, version=v2star, expert=mlp(hidden=64))",
}


def get_config(steps: str = "700") -> ConfigDict:
    """The comparison; every arm trains for `steps` steps."""
    config = default_config()
    config.title = "Routers' gradients on digits at equal steps"
    config.base = load(QUICKSTART)
    config.base.steps = int(steps)
    stacks = {name: f"(block + block(ffn={layer}))*2" for name, layer in LAYERS.items()}
    config.arms = product({"model.stack": {**stacks, "one expert": "(block + block(ffn=mlp(hidden=64)))*2"}})
    config.baseline = "straight"
    config.budget.kind = "steps"
    return config
